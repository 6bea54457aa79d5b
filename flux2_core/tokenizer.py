"""Prompts -> token ids: chat templates, padding, and where a tokenizer comes from.

A prompt is put into its model's template as text and then tokenized as one, the reference's way
(diffusers' FLUX.2 pipelines). So a special token that somebody types, such as <|im_end|>, is that
token and no plain text; only [IMG] is taken out, for Mistral-3.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configs import NANO_TEXT, TextEncoderConfig
from .errors import Flux2Error
from .nano.vocabulary import tokenizer_json
from .tokenizer_files import Coder, Tokenize, from_file, from_json, from_tekken


@dataclass(frozen=True)
class Template:
    """What stands around a prompt. `special`: tokens that a fitting tokenizer knows."""

    before: str
    after: str
    special: tuple[str, ...]
    removed: str = ""  # taken out of the prompt

    def __call__(self, prompt: str) -> str:
        prompt = prompt.replace(self.removed, "") if self.removed else prompt
        return self.before + prompt + self.after


# A constant of FLUX.2 dev, line break included (source: black-forest-labs/flux2, Apache-2.0).
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation."
)
TEMPLATES = {
    "mistral3": Template(
        f"<s>[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT][INST]",
        "[/INST]",
        ("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
        removed="[IMG]",
    ),
    "qwen3": Template(
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    ),
    "nano": Template("[bos]", "", ("[bos]",)),
}


class PromptTokenizer:
    """Prompts -> rows of `text_length` ids and the mask that tells text from padding.

    `tokenize` turns text, special tokens spelt out in it, into ids and adds none of its own.
    Raises Flux2Error if it does not know the template's special tokens.
    """

    def __init__(self, config: TextEncoderConfig, tokenize: Tokenize):
        self.config = config
        self.template = TEMPLATES[config.template]
        self.tokenize = tokenize
        unknown = [token for token in self.template.special if len(tokenize(token)) != 1]
        if unknown:
            raise Flux2Error(
                "This tokenizer belongs to another text encoder",
                f"it does not know {', '.join(unknown)}",
                "Choose the tokenizer published with this text encoder",
            )

    def encode(self, prompts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """-> ids (B, T) int64, mask (B, T) bool. What is too long loses its end, template too."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        config, length = self.config, self.config.text_length
        ids = torch.full((len(prompts), length), config.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens = torch.tensor(self.tokens(prompt)[:length], dtype=torch.int64)
            n = len(tokens)
            place = slice(length - n, length) if config.padding == "left" else slice(n)
            ids[row, place], mask[row, place] = tokens, True
        return ids, mask

    def tokens(self, prompt: str) -> list[int]:
        """All ids of one prompt in its template, however many."""
        ids = list(self.tokenize(self.template(prompt)))
        if ids and max(ids) >= self.config.vocab_size:
            raise Flux2Error(
                "This tokenizer has more words than the text encoder",
                f"word {max(ids)} of {self.config.vocab_size}",
                "Choose the tokenizer published with this text encoder",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text that the model wrote. Raises Flux2Error for a tokenizer that only reads."""
        decode = getattr(self.tokenize, "decode", None)
        if decode is None:
            raise Flux2Error(
                "This tokenizer reads text, but cannot write it",
                f"a {type(self.tokenize).__name__}",
                "Use the tokenizer published with this text encoder",
            )
        return decode(ids)

    def cut(self, prompt: str) -> int | None:
        """How many characters of a prompt the model reads, None: all, its template included."""
        length = self.config.text_length
        if len(self.tokens(prompt)) <= length:
            return None
        low, high = 0, len(prompt)
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(self.tokenize(self.template.before + prompt[:middle])) <= length
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def nano_tokenizer() -> PromptTokenizer:
    """The tokenizer that nano's file carries."""
    return PromptTokenizer(NANO_TEXT, from_json(tokenizer_json()))


def find_tokenizer(
    config: TextEncoderConfig,
    given: Any = None,
    *,
    metadata: Mapping[str, str] | None = None,
    tekken: Tensor | bytes | None = None,
    folders: Sequence[str | Path] = (),
) -> PromptTokenizer:
    """The tokenizer of a text encoder, from the first of these places that has it:

    `given`: a PromptTokenizer, a tokenizer object (tokenizers or transformers), a function text ->
    ids, a folder or a tokenizer file. If it is given, nothing else is tried.
    `metadata`: the weight file's, whose "tokenizer_json" holds a tokenizer.json.
    `tekken`: the weight file's tensor `tekken_model`.
    `folders`: where else to look, such as the weight file's folder and the host's own copy.
    Raises Flux2Error that says where it looked.
    """
    if given is not None:
        return _given(config, given)
    if text := (metadata or {}).get("tokenizer_json"):
        return PromptTokenizer(config, from_json(text))
    if tekken is not None:
        return PromptTokenizer(config, from_tekken(tekken))
    refused = []
    for path in _tokenizer_files(folders):
        found = _try(config, path)
        if isinstance(found, PromptTokenizer):
            return found
        refused.append(f"not the one in {path} ({found.wrong})")
    looked = ["in the weight file", *(f"in {folder}" for folder in folders), *refused]
    raise Flux2Error(
        "No tokenizer was found for this text encoder",
        f"looked {', '.join(looked)}",
        "Put the publisher's tokenizer folder (tokenizer.json) beside the weights and name it",
    )


def _try(config: TextEncoderConfig, path: Path) -> "PromptTokenizer | Flux2Error":
    try:
        return PromptTokenizer(config, from_file(path))
    except Flux2Error as error:
        return error


def _given(config: TextEncoderConfig, given: Any) -> PromptTokenizer:
    if isinstance(given, PromptTokenizer):
        return given
    if isinstance(given, (str, Path)):
        path = Path(given)
        files = [path] if path.is_file() else list(_tokenizer_files([path]))
        if not files:
            raise Flux2Error(
                "There is no tokenizer here",
                str(path),
                "Name a folder that holds tokenizer.json, tekken.json, or vocab.json and merges.txt",
            )
        return PromptTokenizer(config, from_file(files[0]))
    return PromptTokenizer(config, _from_object(given))


def _from_object(tokenizer: Any) -> Tokenize:
    """A tokenizer of the tokenizers or transformers package, or already a function."""
    return Coder(tokenizer) if hasattr(tokenizer, "encode") else tokenizer


def _tokenizer_files(folders: Sequence[str | Path]) -> Iterator[Path]:
    """Tokenizer files in the folders, in a subfolder `tokenizer`, or (diffusers) in one beside."""
    for folder in map(Path, folders):
        for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
            for name in ("tokenizer.json", "tekken.json", "vocab.json"):
                if (place / name).is_file():
                    yield place / name
