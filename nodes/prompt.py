"""The prompt: text and names of references -> CONDITIONING."""

import logging

from ..flux2_core.prompt_lint import advice
from ..flux2_core.references import lint, resolve
from . import host_text
from .schema import References, Schema, io, ui

log = logging.getLogger(__name__)


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
                    dynamic_prompts=True,
                    default="a red circle left on white background",
                    tooltip="What to draw. Klein and dev read 512 tokens (about 350 words), nano 32; "
                    "what comes after is cut off, with a warning in the log.",
                ),
                References.Input(
                    "references",
                    optional=True,
                    tooltip="A chain made by FLUX.2 Reference: only its names are used here. The "
                    "pictures themselves go in at FLUX.2 Apply References.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For positive or negative.")],
        )

    @classmethod
    def execute(cls, clip, text, references=()):
        text = resolve(text, references)
        said = [*lint(text, references), *host_text.length(clip, text), *advice(text)]
        for sentence in said:
            log.warning(sentence)
        shown = "\n".join([*said, host_text.counted(clip, text)]).strip()
        return io.NodeOutput(host_text.conditioning(clip, text), ui=ui.PreviewText(shown))
