"""The plan: what references will cost, before anything is drawn, and how to make them fit."""

import math
from dataclasses import dataclass

from ..flux2_core import budget, estimate
from ..flux2_core.configs import TransformerConfig, Variant
from ..flux2_core.errors import Flux2Error
from ..flux2_core.kv_cache import ReferenceCache
from ..flux2_core.latents import PIXELS
from ..flux2_core.references import Fit, Reference, plan
from . import host, host_controls, host_plan
from .schema import References, Schema, io, ui

AUTO, NONE = "auto", "off"
GB = 2**30


def _inputs() -> list:
    return [
        References.Input("references", tooltip="The chain made by FLUX.2 Reference."),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="The model that will draw, for memory and time. Connect it after FLUX.2 "
            "Reference Cache and LoRA loaders.",
        ),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip="The canvas: its size and batch count for memory and time. Without it, one "
            "picture of the model's native size.",
        ),
        io.String.Input(
            "order",
            default="",
            tooltip="The references in another order, by number or name, with commas: 2, 1, 3 or "
            "hero, 1. The first becomes image 1. Empty leaves them as they are.",
        ),
        io.Int.Input(
            "tokens",
            default=0,
            min=0,
            max=200_000,
            tooltip="The most tokens that references may take at once (1024 x 1024 pixels are "
            "4096): where they are more, they are shrunk by importance. 0 is no limit.",
        ),
        io.Float.Input(
            "memory",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.1,
            round=0.01,
            tooltip="The most memory in GB that drawing may take beside the weights: references "
            "are shrunk by importance until it is enough. Needs the model. 0 is no limit.",
        ),
        io.Combo.Input(
            "cache",
            options=[AUTO, NONE, "exact", "approximate"],
            default=AUTO,
            tooltip="Which reference cache to reckon with. auto: the one that FLUX.2 Reference "
            "Cache gave the model, if any.",
        ),
        io.Boolean.Input(
            "measure",
            default=True,
            tooltip="Time the model, for about a second and once in a session, to say how long a "
            "step will take. It is loaded for that.",
        ),
    ]


class Flux2KitReferencePlan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitReferencePlan",
            display_name="FLUX.2 Reference Plan",
            category="FLUX.2/references",
            description="Says before the run what references cost in tokens, memory and time; puts "
            "them in order, and shrinks them to a budget.",
            search_aliases=["reference budget", "token count", "vram estimate", "reorder"],
            inputs=_inputs(),
            outputs=[
                References.Output(
                    display_name="references", tooltip="In order, and as large as they fit."
                ),
                io.String.Output(
                    display_name="report", tooltip="What the node shows, as a Markdown table."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, references=(), model=None, latent=None, order="", tokens=0, memory=0.0, cache=AUTO,
        measure=True,
    ):  # fmt: skip
        chain = budget.order(references, order)
        run = None if model is None else run_of(model, latent, cache)
        fitted, said = within(chain, run, tokens, memory)
        lines = rows(chain, fitted)
        clock = host_plan.clock_of(model) if run and measure else None
        device = host_plan.device_of(model) if run else None
        sums = [*said, *totals(fitted, run, device, clock)]
        host_plan.show(cls.hidden, "\n".join([*map(line, lines), *sums]))
        report = "\n".join([*table(lines), "", *(f"{sentence}  " for sentence in sums)])
        return io.NodeOutput(fitted, report, ui=ui.PreviewText(report))


# ----------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Run:
    """What the plan knows of the run: sizes in tokens, and how the model computes."""

    config: TransformerConfig
    variant: Variant
    picture: int
    batch: int
    passes: int  # a step
    itemsize: int
    cache: ReferenceCache | None
    kv: bool
    ours: bool

    @property
    def sizes(self) -> dict:
        """For the estimates. Both passes of a step are one batch where memory allows."""
        text, batch = self.config.text_length, self.batch * self.passes
        return {"text": text, "picture": self.picture, "batch": batch}

    def memory(self, references, held=None) -> estimate.Memory:
        more = {"itemsize": self.itemsize, "cache": self.cache}
        return estimate.run_bytes(
            self.config, references=references, held=held, **self.sizes, **more
        )


def run_of(model, latent, cache: str) -> Run:
    variant, config = host.variant_of(model), host.config_of(model)
    batch, picture = 1, (variant.size // PIXELS) ** 2
    if latent is not None:
        batch, _, height, width = latent["samples"].shape
        ratio = latent.get("downscale_ratio_spacial", PIXELS) / PIXELS
        picture = int(height * ratio) * int(width * ratio)
    kept = {AUTO: host_plan.cache_of(model), NONE: None}
    return Run(
        config,
        variant,
        picture,
        batch,
        2 if variant.guidance_kind == "cfg" and variant.guidance > 1 else 1,
        host_plan.dtype_of(model).itemsize,
        kept[cache] if cache in kept else ReferenceCache(cache),
        host_plan.in_kv_form(model) or cache == "exact",
        host_controls.is_ours(model),
    )


def within(chain, run: Run | None, tokens: int, memory: float) -> tuple[tuple, list[str]]:
    """The references within a budget of tokens, of GB, or both, and what was shrunk for it."""
    limits = [(tokens, f"{tokens:,} tokens")] if tokens else []
    if memory:
        if run is None:
            raise Flux2Error(
                "A memory budget needs the model",
                f"{memory:g} GB, and no model connected",
                "Connect the model, or set a number of tokens in place of memory",
            )
        more = {"itemsize": run.itemsize, "cache": run.cache}
        room = estimate.tokens_within(int(memory * GB), run.config, **run.sizes, **more)
        if room < 0:
            alone = sum(run.memory([]))
            raise Flux2Error(
                f"{memory:g} GB are not enough for the picture",
                f"without any reference it takes {_bytes(alone)}",
                "Raise the budget, or draw a smaller picture",
            )
        limits.append((room, f"{memory:g} GB"))
    if not limits or not chain:
        return tuple(chain), []
    most, why = min(limits)
    together = run is not None and run.cache is not None
    return budget.fit(chain, most, why=why, together=together)


# -------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Row:
    """One reference, in words."""

    number: int
    name: str
    seen: str
    used: str
    tokens: int
    marks: str


def rows(chain, fitted) -> list[Row]:
    """`chain` before, `fitted` after the budget."""
    fits = plan(fitted)
    return [
        Row(
            i + 1,
            f"@{r.name}" if r.name else "",
            f"{fit.seen[0]} x {fit.seen[1]}",
            f"{fit.size[0]} x {fit.size[1]}",
            budget.tokens_of(r, fit),
            ", ".join(marks(before, r, fit)),
        )
        for i, (before, r, fit) in enumerate(zip(chain, fitted, fits, strict=True))
    ]


def marks(before: Reference, reference: Reference, fit: Fit) -> list[str]:
    """What is special about a reference: why it is smaller than its picture, and its controls."""
    r, out = reference, []
    if fit.scaled != fit.seen:
        own = r.megapixels and math.prod(fit.scaled) > 0.9e6 * r.megapixels
        budgeted = r.megapixels != before.megapixels
        why = "the budget" if budgeted else "its megapixels" if own else "the model's rule"
        out.append(f"shrunk by {why}")
    if r.strength != 1:
        out.append(f"strength {r.strength:g}" if r.strength else "strength 0: off")
    if (r.start, r.end) != (0, 1):
        out.append(f"steps {r.start:.0%} to {r.end:.0%}")
    if r.mask is not None and r.strength:
        out.append(f"mask keeps {budget.tokens_of(r, fit) / fit.tokens:.0%}")
    if r.region is not None:
        out.append("region")
    if r.importance != 1:
        out.append(f"importance {r.importance:g}")
    return out


def table(lines: list[Row]) -> list[str]:
    """Markdown."""
    if not lines:
        return ["No references are connected."]
    head = [
        "| image | name | picture | used | tokens | |",
        "| --- | --- | --- | --- | ---: | --- |",
    ]
    return head + [
        f"| {r.number} | {r.name} | {r.seen} | {r.used} | {r.tokens:,} | {r.marks} |" for r in lines
    ]


def line(r: Row) -> str:
    name, marks = (f" {r.name}" if r.name else ""), (f" ({r.marks})" if r.marks else "")
    size = r.used if r.used == r.seen else f"{r.seen} → {r.used}"
    return f"Image {r.number}{name}: {size}, {r.tokens:,} tokens{marks}"


def totals(fitted, run: Run | None, device, clock) -> list[str]:
    """Sentences about tokens, memory and time."""
    counts = [budget.tokens_of(r, f) for r, f in zip(fitted, plan(fitted), strict=True)]
    most = budget.fullest(fitted, counts)
    at_once = "" if sum(most) == sum(counts) else f", at most {sum(most):,} at once"
    if run is None:
        return [
            f"Tokens: {sum(counts):,} of references{at_once}.",
            "Connect the model to see memory and time.",
        ]
    text, picture = run.config.text_length, run.picture
    every = text + picture + sum(most)
    out = [
        f"Tokens: {sum(counts):,} of references{at_once}, {picture:,} of the picture, {text:,} of "
        f"text: {every:,}."
    ]
    return out + memory_words(run, run.memory(most, counts), device) + time_words(run, most, clock)


def memory_words(run: Run, need: estimate.Memory, device) -> list[str]:
    kept = f" and {_bytes(need.cache)} for the reference cache" if run.cache else ""
    weights = f", {_bytes(device.weights)} of weights to load" if device.weights else ""
    out = [
        f"Memory: {_bytes(need.activations)} to draw{kept}{weights}; free on {device.name}: "
        f"{_bytes(device.free)} of {_bytes(device.total)}."
    ]
    short = sum(need) + device.weights - device.free
    if short > 0:
        out.append(
            f"That is {_bytes(short)} more than is free: ComfyUI will make room by unloading other "
            "models or keeping weights in main memory, which is slower."
        )
    return out


def time_words(run: Run, references, clock) -> list[str]:
    if clock is None:
        return [] if run.ours else ["Time: only models from FLUX.2 Load Model can be measured."]
    sizes = {**run.sizes, "references": references}
    full = clock.seconds(run.config, **sizes, kv=run.kv)
    passes = ", two passes" if run.passes > 1 else ""
    if run.cache is None or not sum(references):
        steps = run.variant.steps
        return [
            f"Time: about {seconds_as_words(full)} a step{passes}; {seconds_as_words(full * steps)} for the {steps} steps "
            f"that {run.variant.label} wants."
        ]
    cached = clock.seconds(run.config, **sizes, cached=True)
    if run.cache.mode == "approximate":
        return [
            f"Time: about {seconds_as_words(cached)} a step{passes} with cached references, {seconds_as_words(full)} "
            "where they are computed anew."
        ]
    alone = clock.seconds(run.config, text=0, picture=0, references=references, kv=True)
    return [
        f"Time: about {seconds_as_words(cached)} a step{passes}, and {seconds_as_words(alone)} once for references."
    ]


def _bytes(count: float) -> str:
    return f"{count / GB:.1f} GB" if count >= 0.95 * GB else f"{count / 2**20:.0f} MB"


def seconds_as_words(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.95 else f"{1000 * seconds:.0f} ms"
