"""nano's words: a word's place in the list is its token id.

Its own world first, then words for a wider one (letters, sizes, counts, free wording). The order
is part of the weights: only append, at most NANO_TEXT.vocab_size entries.
"""

import json

SPECIAL = ("[pad]", "[unk]", "[bos]")

WORLD = (
    "red green blue yellow purple cyan orange black white gray pink tan "
    "circle square triangle cross ring shape left right top bottom center on background and "
    "an image with the of in color"
)

NUMBERS = [str(n) for n in range(1, 21)]
LETTERS = list("abcdefghijklmnopqrstuvwxyz")  # "a" is the article too

WIDER = (
    "zero one two three four five six seven eight nine ten "
    "small large big tiny medium huge size word letter text says written number "
    "colour colored coloured grey circles squares triangles crosses rings shapes objects object "
    "thing things picture images reference centre no without only empty nothing "
    "change make put to at side move turn into replace remove add keep swap place it its this "
    "that is are has same other another first second third last from as but not "
    "middle upper lower above below under over next beside between near corner here there "
    "draw show paint plain flat solid dark light bright please"
)

WORDS: tuple[str, ...] = (*SPECIAL, *WORLD.split(), *NUMBERS, *LETTERS, *WIDER.split())


def tokenizer_json() -> str:
    """The words as a `tokenizers` WordLevel model, the text that nano's file carries.

    Lower-cased; runs of letters and runs of digits are words, punctuation falls away, a name like
    @hero stays one (unknown) word, and a word before a closing quote is spelled: "cat" is c a t.
    """
    added = [
        dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        | {"id": WORDS.index(word), "content": word, "special": True}
        for word in SPECIAL
    ]
    splitter = {
        "type": "Split",
        "pattern": {"Regex": r'@\S+|\p{L}(?=\p{L}*")|\p{L}+|\p{N}+'},
        "behavior": "Removed",
    }
    model = {
        "type": "WordLevel",
        "vocab": {w: i for i, w in enumerate(WORDS)},
        "unk_token": "[unk]",
    }
    parts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": splitter | {"invert": True},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return json.dumps(parts, separators=(",", ":"))
