"""Tokenizer files -> functions text -> ids: tokenizer.json, Mistral's tekken, Qwen's two files.

All become tokenizers of the `tokenizers` package, which every ComfyUI has. Tekken and Qwen's files
hold byte-level BPE; what they leave unsaid is written down here.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import Flux2Error

Tokenize = Callable[[str], Sequence[int]]

AGAIN = "Get it again from the publisher's page"

# How Qwen cuts text into words (source: Qwen2 tokenizer in transformers, Apache-2.0).
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3's own tokens; some hosts ship the files of Qwen2.5, which are else the same.
QWEN3_ADDED = {
    151665: "<tool_response>",
    151666: "</tool_response>",
    151667: "<think>",
    151668: "</think>",
}
QWEN_ENDOFTEXT = 151643  # the first added token, after 151,643 words


def from_file(path: str | Path) -> Tokenize:
    """tokenizer.json, tekken.json, or vocab.json with merges.txt beside it (Qwen)."""
    path = Path(path)
    try:
        if path.name == "vocab.json":
            return _from_qwen(path.parent)
        text = path.read_text("utf-8")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path.name, error) from error
    return from_tekken(text) if path.name == "tekken.json" else from_json(text)


def from_json(text: str) -> Tokenize:
    """The text of a tokenizer.json."""
    try:
        tokenizer = _package().Tokenizer.from_str(text)
    except Flux2Error:
        raise
    except Exception as error:  # the package raises bare Exception
        raise _damaged("The tokenizer", error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Coder(tokenizer)


def from_tekken(data: Tensor | bytes | str) -> Tokenize:
    """Mistral's tekken JSON: as text, or as the uint8 tensor in which weight files carry it."""
    if not isinstance(data, (bytes, str)):
        data = data.cpu().numpy().tobytes()
    try:
        tekken = json.loads(data)
        config = tekken["config"]
        offset = config["default_num_special_tokens"]  # ids of words start after the special ones
        words = {
            base64.b64decode(word["token_bytes"]): word["rank"] + offset
            for word in tekken["vocab"]
            if word["rank"] + offset < config["default_vocab_size"]
        }
        special = {token["rank"]: token["token_str"] for token in tekken["special_tokens"]}
        pattern = config["pattern"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged("The tokenizer (tekken)", error) from error
    alphabet = _alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocabulary = {spell(word): number for word, number in words.items()}
    merges = [(spell(left), spell(right)) for left, right in _merges(words)]
    # As tiktoken, which tekken is: a word that is in the list is taken whole.
    return _byte_level(vocabulary, merges, special, pattern, ignore_merges=True)


def _merges(words: Mapping[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """The pairs that BPE joins, in order: tekken lists only the results, lowest rank first."""
    for word in sorted(words, key=lambda word: words[word]):
        pairs = [(word[:i], word[i:]) for i in range(1, len(word))]
        known = [(left, right) for left, right in pairs if left in words and right in words]
        yield from sorted(known, key=lambda pair: (words[pair[0]], words[pair[1]]))


def _from_qwen(folder: Path) -> Tokenize:
    """vocab.json, merges.txt and the added tokens of tokenizer_config.json."""
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if len(line.split()) == 2]
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    added = {int(n): token["content"] for n, token in config["added_tokens_decoder"].items()}
    if len(vocabulary) == QWEN_ENDOFTEXT:
        added |= QWEN3_ADDED
    return _byte_level(vocabulary, merges, added, QWEN_WORDS, normalize=True)


def _byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple],
    special: Mapping[int, str],
    pattern: str,
    ignore_merges: bool = False,
    normalize: bool = False,
) -> Tokenize:
    """Byte-level BPE after a cut by `pattern`; `special` tokens are found in the text first."""
    parts = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, "special": True} | dict.fromkeys(FLAGS, False)
            for number, token in sorted(special.items())
        ],
        "normalizer": {"type": "NFC"} if normalize else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel"} | dict.fromkeys(
            ("add_prefix_space", "trim_offsets", "use_regex"), True
        ),
        "model": {
            "type": "BPE",
            "vocab": dict(vocabulary) | {token: number for number, token in special.items()},
            "merges": [" ".join(pair) for pair in merges],
            "ignore_merges": ignore_merges,
        },
    }  # fmt: skip
    return from_json(json.dumps(parts))


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def _alphabet() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte (source: GPT-2)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    other = iter(range(256, 512))
    return [chr(byte if byte in plain else next(other)) for byte in range(256)]


class Coder:
    """A tokenizer of the tokenizers or transformers package: a function text -> ids, and back."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> Sequence[int]:
        out = self._tokenizer.encode(text, add_special_tokens=False)
        return getattr(out, "ids", out)

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise Flux2Error(
            "The Python package tokenizers is missing",
            do="Install it with: pip install tokenizers",
        ) from error
    return tokenizers


def _damaged(name: str, error: Exception) -> Flux2Error:
    return Flux2Error(f"{name} cannot be read", str(error)[:200], AGAIN)
