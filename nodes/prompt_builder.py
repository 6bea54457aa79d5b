"""A prompt from its parts, as prose or JSON."""

from ..flux2_core.prompting import Lettering, Prompt, from_json, prose, read_palette, to_json
from .schema import Schema, io, ui

PLACES = ["anywhere", "left", "right", "top", "bottom", "center"]
FORMS = ["prose", "JSON"]


def _text(name: str, tooltip: str, lines: bool = False):
    return io.String.Input(name, default="", multiline=lines, tooltip=tooltip)


def _inputs() -> list:
    return [
        _text("subject", "Who or what: a vintage car, a woman in a raincoat.", True),
        _text("action", "What it does or how it stands: parked at the kerb."),
        io.Combo.Input(
            "place", options=PLACES, default="anywhere", tooltip="Where the subject stands."
        ),
        _text("style", "The kind of picture: film photograph, watercolour, isometric render."),
        _text("setting", "What is around it, and the time of day.", True),
        _text("light", "No words change a picture more: low evening sun, soft window light."),
        _text("camera", "Lens, angle, depth of field: 85 mm, low angle, shallow focus."),
        _text(
            "palette",
            "One colour a line: #dc2828 red: the car. Name and object may be left out; up to five.",
            True,
        ),
        _text(
            "lettering", "Exact words to write in the picture, a line each. Up to four words.", True
        ),
        _text("font", "How the letters look: bold stencil, thin neon script."),
        io.Combo.Input(
            "lettering_place", options=PLACES, default="anywhere", tooltip="Where they stand."
        ),
        _text("change", "For an edit of a reference: what is to change. One thing at a time."),
        _text("keep", "For an edit: what has to stay as it is."),
        _text(
            "avoid",
            "What should not be there. It is turned into what should: FLUX.2 knows no 'no'.",
        ),
        io.Combo.Input(
            "form",
            options=FORMS,
            default="prose",
            tooltip="How the first output is written. Every variant reads both; klein was trained on prose.",
        ),
        _text(
            "json",
            "A prompt in JSON, as the second output writes it: replaces all fields above.",
            True,
        ),
    ]


class Flux2KitPromptBuilder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitPromptBuilder",
            display_name="FLUX.2 Prompt Builder",
            category="FLUX.2/prompt",
            description="Writes a prompt from its parts, in the order that FLUX.2 reads best: colours "
            "bound to objects, exact words, what changes and what stays.",
            search_aliases=["json prompt", "hex color", "typography", "structured prompt"],
            inputs=_inputs(),
            outputs=[
                io.String.Output(display_name="text", tooltip="For FLUX.2 Prompt."),
                io.String.Output(display_name="json", tooltip="The parts; can be read in again."),
            ],
        )

    @classmethod
    def execute(cls, json="", form="prose", **parts):
        prompt = from_json(json) if json.strip() else build(**parts)
        text, whole = prose(prompt), to_json(prompt)
        text = whole if form == "JSON" else text
        return io.NodeOutput(text, whole, ui=ui.PreviewText(text))


def build(
    palette="", lettering="", font="", place="anywhere", lettering_place="anywhere", **plain
) -> Prompt:
    """The widgets' values -> Prompt."""
    lines = [line.strip() for line in lettering.splitlines() if line.strip()]
    where = "" if lettering_place == "anywhere" else lettering_place
    return Prompt(
        place="" if place == "anywhere" else place,
        palette=read_palette(palette),
        lettering=tuple(Lettering(line, font.strip(), where) for line in lines),
        **{name: value.strip() for name, value in plain.items()},
    )
