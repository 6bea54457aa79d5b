"""The prompt: text and names of references -> CONDITIONING."""

import logging
import re

from ..flux2_core.errors import Flux2Error
from ..flux2_core.prompt_lint import advice, unconnected
from ..flux2_core.prompt_nano import in_words
from ..flux2_core.references import lint, resolve
from . import host_prompts, host_text
from .schema import References, Schema, io, ui

SPLITS = ["lines of ---", "every line"]
SPLIT = (
    "What stands between two prompts: a line of three or more -, so that a prompt may have many "
    "lines, or the end of every line."
)
log = logging.getLogger(__name__)

REFERENCES = References.Input(
    "references",
    optional=True,
    tooltip="A chain made by FLUX.2 Reference: only its names are used here. The pictures "
    "themselves go in at FLUX.2 Apply References.",
)


class Flux2KitPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitPrompt",
            display_name="FLUX.2 Prompt",
            category="FLUX.2/prompt",
            description="Turns a prompt into what the model reads. Call references image 1, image 2 "
            "... or, with a chain connected, by @name.",
            search_aliases=["clip text encode", "flux2 prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from FLUX.2 Loader."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a red circle left on white background",
                    tooltip="What to draw. Klein and dev read 512 tokens (about 350 words), nano 32; "
                    "what comes after is cut off, with a warning in the log.",
                ),
                REFERENCES,
            ],
            outputs=[io.Conditioning.Output(tooltip="For positive or negative.")],
        )

    @classmethod
    def execute(cls, clip, text, references=()):
        text, shown = written(clip, text, references)
        (made,), kept = host_prompts.encode(clip, [text])
        return io.NodeOutput(made, ui=ui.PreviewText("\n".join(filter(None, (shown, kept)))))


class Flux2KitPromptBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitPromptBatch",
            display_name="FLUX.2 Prompt Batch",
            category="FLUX.2/prompt",
            description="Several prompts at once: what follows runs once for each, in their order, "
            "with the same seed and settings.",
            search_aliases=["prompts from lines", "prompt list", "batch prompts", "queue prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from FLUX.2 Loader."),
                io.String.Input(
                    "texts",
                    multiline=True,
                    default="a red circle left on white background\n---\na blue ring right on pink "
                    "background",
                    tooltip="The prompts. They are taken as they are: no wildcards, no chance.",
                ),
                io.Combo.Input("split", options=SPLITS, default=SPLITS[0], tooltip=SPLIT),
                REFERENCES,
            ],
            outputs=_lists(),
        )

    @classmethod
    def execute(cls, clip, texts, split=SPLITS[0], references=()):
        both = [written(clip, text, references) for text in parts(texts, split)]
        made, kept = host_prompts.encode(clip, [text for text, _ in both])
        shown = [f"{i}: {said}" for i, (_, said) in enumerate(both, 1)] + [kept] * bool(kept)
        read = [text for text, _ in both]
        return io.NodeOutput(made, read, ui=ui.PreviewText("\n".join(shown)))


class Flux2KitPromptCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitPromptCache",
            display_name="FLUX.2 Prompt Cache",
            category="FLUX.2/prompt",
            description="Keeps what the text encoder makes of prompts on disk, so that a prompt used "
            "before needs no encoder, and takes the encoder out of memory when it is done.",
            search_aliases=["cache text embeddings", "unload clip", "free vram", "offload"],
            inputs=_cache_inputs(),
            outputs=[io.Clip.Output(tooltip="For FLUX.2 Prompt and FLUX.2 Prompt Batch.")],
        )

    @classmethod
    def execute(cls, clip, keep=True, gigabytes=2.0, release=False):
        return io.NodeOutput(host_prompts.with_prompts(clip, keep, gigabytes, release))


def _lists() -> list:
    return [
        io.Conditioning.Output(is_output_list=True, tooltip="One for each prompt."),
        io.String.Output(
            display_name="text", is_output_list=True, tooltip="What was read of each."
        ),
    ]


def _cache_inputs() -> list:
    return [
        io.Clip.Input(
            "clip", tooltip="The text encoder from FLUX.2 Loader, before or after a LoRA."
        ),
        io.Boolean.Input(
            "keep",
            default=True,
            tooltip="Keep encoded prompts in ComfyUI's user folder. The files hold numbers, not the "
            "words. They come back bit for bit, and never for another text encoder.",
        ),
        io.Float.Input(
            "gigabytes",
            default=2.0,
            min=0.1,
            max=100.0,
            step=0.1,
            tooltip="How much room they may take together: a prompt is 16 MB for dev, 8 MB for klein "
            "4B, 13 MB for klein 9B. Those used longest ago go first.",
        ),
        io.Boolean.Input(
            "release",
            default=False,
            tooltip="After its prompts the text encoder leaves memory, so that the model has all of "
            "it. The next new prompt loads it again.",
        ),
    ]


def written(clip, text: str, references) -> tuple[str, str]:
    """-> the prompt as it is encoded, and what the node says of it. Advice goes to the log too."""
    text, variant = resolve(text, references), host_text.variant(clip)
    said = [*lint(text, references), *advice(text, variant)]
    notes = [] if references else unconnected(text)
    if variant and variant.text_encoder == "nano":
        plain, put = in_words(text)
        notes += [*put, f"Read as: {plain}"] if put else []
        text = plain
    said += host_text.length(clip, text)
    for sentence in said:
        log.warning(sentence)
    for sentence in notes:
        log.info(sentence)
    return text, "\n".join([*said, *notes, host_text.counted(clip, text)]).strip()


def parts(texts: str, split: str) -> list[str]:
    """The prompts of a text. Raises Flux2Error where there is none."""
    between = r"\n" if split == SPLITS[1] else r"(?m)^[ \t]*-{3,}[ \t]*$"
    found = [part.strip() for part in re.split(between, texts)]
    found = [part for part in found if part]
    if not found:
        raise Flux2Error("There is no prompt here", repr(texts[:40]), "Write at least one")
    return found
