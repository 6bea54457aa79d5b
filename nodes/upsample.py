"""A short prompt into a full one, by the loaded text encoder or a chat endpoint."""

import logging

from ..flux2_core.protected import lost
from ..flux2_core.references import resolve
from ..flux2_core.upsample import CREATE, EDIT, TEMPERATURE
from . import host_plan, host_upsample
from .schema import References, Schema, io, ui

AUTO = "auto"
STOP, KEEP = "stop", "keep my prompt"
FIXED = getattr(io, "ControlAfterGenerate", None)  # a new seed is a new prompt
AFTER_LOCKED = 1  # widgets that follow `locked`
log = logging.getLogger(__name__)


def _choice(name: str, options: list[str], tooltip: str):
    return io.Combo.Input(name, options=options, default=options[0], tooltip=tooltip)


def _inputs() -> list:
    return [
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="The text encoder from FLUX.2 Loader: it writes, and the new prompt is kept short "
            "enough for it. A chat endpoint works without one.",
        ),
        References.Input(
            "references",
            optional=True,
            tooltip="A chain of FLUX.2 Reference. Mistral-3 with its vision tower, and an endpoint that "
            "sees, look at the pictures; others know their numbers and names only.",
        ),
        io.String.Input(
            "text",
            multiline=True,
            default="a red circle",
            tooltip="Your prompt, a few words or more. Quoted words, colours such as #dc2828, image 1 "
            "and @names come through to the letter.",
        ),
        _choice(
            "writer",
            [host_upsample.ENCODER, host_upsample.ENDPOINT],
            "What writes: the connected text encoder, or a chat endpoint. Its address and key are set "
            "outside the workflow: see the help. References are sent to it only if it sees.",
        ),
        _choice(
            "task",
            [AUTO, CREATE, EDIT],
            "create writes a description of a new picture, edit an instruction of 50 to 80 words that "
            "says what changes and what stays. auto edits where references are connected.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=FIXED.fixed if FIXED else True,
            tooltip="The same seed writes the same prompt. An answer that lost something is asked for "
            "again with the next three seeds.",
        ),
        io.Float.Input(
            "temperature",
            default=TEMPERATURE,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How freely it writes: 0 always takes the likeliest word, 0.15 stays close to your "
            "prompt, 1 invents.",
        ),
        _choice(
            "if_refused",
            [STOP, KEEP],
            "What happens when four answers in a row lost a quoted word, a colour or a reference: stop "
            "with an error, or go on with your prompt and say so.",
        ),
        io.String.Input(
            "locked",
            multiline=True,
            default="",
            tooltip="If there is text here it is the result, letter for letter, and nothing is written. "
            "Copy a prompt that you like into it: the graph then gives it on every computer.",
        ),
        io.Boolean.Input(
            "lock_saved",
            default=True,
            tooltip="Pictures of the run that writes carry the new prompt in locked: dragged back into "
            "ComfyUI, such a picture repeats exactly. The graph before you stays as it is.",
        ),
    ]


class Flux2KitPromptUpsample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitPromptUpsample",
            display_name="FLUX.2 Prompt Upsample",
            category="FLUX.2/prompt",
            description="Writes a full prompt from a short one with the text encoder that is loaded "
            "anyway, which may look at the references. What you quoted stays as it is, or nothing comes out.",
            search_aliases=[
                "enhance prompt",
                "prompt expansion",
                "rewrite prompt",
                "llm",
                "caption",
            ],
            inputs=_inputs(),
            outputs=[
                io.String.Output(display_name="text", tooltip="For FLUX.2 Prompt."),
                io.String.Output(display_name="report", tooltip="What there is to know about it."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    async def execute(
        cls, text, writer=host_upsample.ENCODER, task=AUTO, seed=0, temperature=TEMPERATURE,
        if_refused=STOP, locked="", lock_saved=True, clip=None, references=(),
    ):  # fmt: skip
        wanted = resolve(text, references)
        if locked.strip():
            return _shown(cls, locked, about_lock(wanted, locked, len(references)))
        source = host_upsample.source_of(writer, clip)
        options = {"task": "" if task == AUTO else task, "keep": if_refused == KEEP}
        options |= {"seed": seed, "temperature": temperature}
        made = await host_upsample.aside(source, clip, wanted, references, **options)
        if lock_saved and not made.kept:
            lock(cls.hidden, made.text)
        blind = BLIND if references and not source.sees else ""
        return _shown(cls, made.text, [source.says, blind, *made.said])


BLIND = "What writes does not see the references: it knows their numbers and names."


def _shown(cls, text: str, said) -> io.NodeOutput:
    """Outputs, and on the node the prompt with what there is to say about it below."""
    report = "\n".join(sentence for sentence in said if sentence)
    for sentence in report.splitlines():
        log.info(sentence)
    shown = f"{text}\n\n{report}".strip()
    host_plan.show(cls.hidden, shown)
    return io.NodeOutput(text, report, ui=ui.PreviewText(shown))


def about_lock(text: str, locked: str, references: int) -> list[str]:
    """A locked prompt stands, whatever the prompt above it says now."""
    gone = ", ".join(lost(text, locked, references))
    more = (
        f"Your prompt now also holds {gone}: empty locked to have it written anew." if gone else ""
    )
    return ["Locked: this text is used as it is.", more]


def lock(hidden, text: str) -> None:
    """Write a prompt into `locked` of this node, in the workflow that pictures of this run carry."""
    info = getattr(hidden, "extra_pnginfo", None)
    try:
        nodes = info["workflow"]["nodes"]
        values = [n["widgets_values"] for n in nodes if str(n["id"]) == str(hidden.unique_id)]
        place = -1 - AFTER_LOCKED
        if values and str(values[0][place]).strip() == "":
            values[0][place] = text
    except (KeyError, TypeError, IndexError):  # queued without a workflow, or one of another form
        return
