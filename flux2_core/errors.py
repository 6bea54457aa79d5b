"""The one error that a user can cause and mend."""


class Flux2Error(ValueError):
    """A mistake a user can mend: what was wrong, what was seen, what to do.

    The message is one sentence per part, in plain words: it is shown as it is, in the node's error
    box or on the command line.
    """

    def __init__(self, wrong: str, seen: str = "", do: str = ""):
        self.wrong, self.seen, self.do = wrong, seen, do
        seen = f"Seen: {seen}" if seen else ""
        super().__init__(" ".join(_sentence(part) for part in (wrong, seen, do) if part))


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."
