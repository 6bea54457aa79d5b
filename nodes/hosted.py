"""FLUX.2's hosted models as nodes: one for every endpoint, and one that says what it costs."""

import asyncio

from ..flux2_core.hosted import (
    ENDPOINTS,
    REGIONS,
    Client,
    HostedError,
    Result,
    Settings,
    Spending,
    estimate,
    in_cents,
    make_request,
    read_settings,
)
from . import host_hosted
from .schema import References, Schema, io, ui

AUTO, ON, OFF = "auto", "on", "off"
FORMATS = ("png", "jpeg", "webp")
PREFIX = "flux2_kit/hosted"
FIXED = getattr(io, "ControlAfterGenerate", None)  # a new seed is a new picture to pay for


def _model():
    return io.Combo.Input(
        "model",
        options=list(ENDPOINTS),
        default="flux-2-pro",
        tooltip="The hosted model. It runs at Black Forest Labs and costs money for each picture: "
        "FLUX.2 Hosted Cost says how much.",
    )


def _references():
    return References.Input(
        "references",
        optional=True,
        tooltip="A chain of FLUX.2 Reference, at most 8, klein 4. Strength, steps, mask and region "
        "work with local models only: here they are refused.",
    )


def _size() -> list:
    def side(name):
        return io.Int.Input(
            name,
            default=0,
            min=0,
            max=4096,
            step=16,
            tooltip=f"The picture's {name} in pixels, a multiple of 16; 4 megapixels (2048 x 2048) at "
            "most. 0 for both: as the first reference, or 1024 x 1024.",
        )

    return [side("width"), side("height")]


def _choice(name: str, options: list[str], tooltip: str):
    return io.Combo.Input(name, options=options, default=options[0], tooltip=tooltip)


def _ceiling(name: str, per: str):
    return io.Float.Input(
        name,
        default=0.0,
        min=0.0,
        max=100_000.0,
        step=1.0,
        round=0.1,
        tooltip=f"The most to spend per {per}, in US cents: it is refused before it is sent. It can "
        "only lower the ceiling of your settings; 0 leaves that as it is.",
    )


def _inputs() -> list:
    return [
        _model(),
        io.String.Input(
            "prompt",
            multiline=True,
            default="",
            tooltip="What to draw. References are image 1, image 2 ..., or @name.",
        ),
        _references(),
        *_size(),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=FIXED.fixed if FIXED else True,
            tooltip="Another seed is another picture, and is paid again. The same inputs are not: "
            "ComfyUI keeps their result.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=50,
            tooltip="Flex only: 1 to 50 steps. 0 leaves it to the service (50).",
        ),
        io.Float.Input(
            "guidance",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.1,
            tooltip="Flex only: how closely the prompt is followed, 1.5 to 10. 0 leaves it to the "
            "service (4.5).",
        ),
        _choice(
            "safety_tolerance",
            [AUTO, *map(str, range(6))],
            "How much the service's moderation lets pass: 0 is the strictest, 5 the least strict. "
            "auto leaves it to the service (2).",
        ),
        _choice("output_format", [*FORMATS], "The format of the file. png loses nothing."),
        _choice(
            "prompt_upsampling",
            [AUTO, ON, OFF],
            "Whether the service rewrites the prompt. auto leaves it to the service; klein has none.",
        ),
        _choice(
            "region",
            list(REGIONS),
            "Where it may be computed: anywhere, in the EU only, in the US only. Key and address are "
            "never part of a workflow.",
        ),
        _ceiling("per_run", "run of the queue"),
        _ceiling("per_day", "day (UTC)"),
        io.String.Input(
            "filename_prefix",
            default=PREFIX,
            tooltip="Where the file is saved below ComfyUI's output folder: the very bytes that came, "
            "with their signature, and beside them a .json about how they were made.",
        ),
    ]


class Flux2KitHosted(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitHosted",
            display_name="FLUX.2 Hosted",
            category="FLUX.2/hosted",
            description="Draws with FLUX.2 Pro, Max, Flex or Klein at Black Forest Labs, with your own "
            "key. It costs money; the node shows how much before and after.",
            search_aliases=["flux 2 pro", "flux 2 max", "flux 2 flex", "bfl api", "api"],
            inputs=_inputs(),
            outputs=[
                io.Image.Output(tooltip="The picture."),
                io.String.Output(
                    display_name="report", tooltip="What it cost, and the prompt that was used."
                ),
                io.String.Output(
                    display_name="file", tooltip="The saved file: the bytes as they came."
                ),
            ],
        )

    @classmethod
    async def execute(
        cls, model, prompt, references=(), region="global", per_run=0.0, per_day=0.0,
        filename_prefix=PREFIX, **asked,
    ):  # fmt: skip
        host_hosted.check_prefix(filename_prefix)
        request = await asyncio.to_thread(request_of, model, prompt, references, **asked)
        ceilings = {"per_run": per_run or None, "per_day": per_day or None}
        result, image, saved = await draw(request, region, ceilings, filename_prefix)
        path, shown = saved
        said = report(result, Client(read_settings(region)).spent())
        return io.NodeOutput(image[None], said, str(path), ui={"images": [shown], "text": (said,)})


def request_of(
    model, prompt, references=(), *, width=0, height=0, seed=0, steps=0, guidance=0.0,
    safety_tolerance=AUTO, output_format="png", prompt_upsampling=AUTO,
):  # fmt: skip
    """The widgets as a request: what stands at auto or 0 is not given. Raises Flux2Error."""
    return make_request(
        model,
        prompt,
        references=references,
        width=width or None,
        height=height or None,
        seed=seed,
        steps=steps or None,
        guidance=guidance or None,
        safety_tolerance=None if safety_tolerance == AUTO else int(safety_tolerance),
        output_format=output_format,
        prompt_upsampling=None if prompt_upsampling == AUTO else prompt_upsampling == ON,
    )


async def draw(request, region: str, ceilings: dict, prefix: str):
    """-> (Result, image (H, W, 3), what `host_hosted.save` returns)."""
    settings, run, saved = read_settings(region), host_hosted.Run(), []
    client, price = Client(settings), estimate(request)
    paid = ", paid already" if client.waiting(request) else ""
    head = f"{request.endpoint.title}, {price.text}{paid}"

    async def work():
        result = await client.run(
            request,
            run_id=run.id,
            progress=lambda share, state: run.say(share, f"{head}\n{state}"),
            check=run.check,
            keep=lambda made: saved.append(host_hosted.save(made, prefix)),
            **ceilings,
        )
        run.say(1.0, f"{result.request.endpoint.title}: {result.cost_text}")
        return result, await asyncio.to_thread(result.image), saved[0]

    return await run.aside(request.fingerprint(settings.base), work)


def report(result: Result, spending: Spending) -> str:
    """For people; no address, no key."""
    return "\n".join(
        [
            f"{result.request.endpoint.title}: {result.cost_text}",
            today(spending),
            f"Seed {result.seed}, {result.width} x {result.height}, {result.format}",
            f"Prompt used: {result.prompt}",
        ]
    )


def today(spending: Spending) -> str:
    return f"Today (UTC): {in_cents(spending.today)} spent, {in_cents(spending.left_today)} left"


# ---------------------------------------------------------------------------------------- the cost


class Flux2KitHostedCost(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return Schema(
            node_id="Flux2KitHostedCost",
            display_name="FLUX.2 Hosted Cost",
            category="FLUX.2/hosted",
            description="Says what a hosted picture will cost, what your ceilings are and what was "
            "spent today. Sends nothing and costs nothing.",
            search_aliases=["price", "credits", "budget"],
            inputs=[
                _model(),
                _references(),
                *_size(),
                io.Int.Input(
                    "pictures",
                    default=1,
                    min=1,
                    max=10_000,
                    tooltip="How many pictures to reckon with.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="What the node shows.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        """What was spent is part of the answer; asking again costs nothing."""
        settings, spending, problem = money()
        return f"{settings and (settings.per_run, settings.per_day)} {spending} {problem}"

    @classmethod
    async def execute(cls, model, references=(), width=0, height=0, pictures=1):
        size = {"width": width, "height": height}
        request = await asyncio.to_thread(request_of, model, "any", references, **size)
        said = cost(request, pictures, *money())
        host_hosted.Run().say(None, said)
        return io.NodeOutput(said, ui=ui.PreviewText(said))


def money() -> tuple[Settings | None, Spending | None, str]:
    """Ceilings and spending, or why they cannot be told: a price is known without a key."""
    try:
        settings = read_settings()
        return settings, Client(settings).spent(), ""
    except HostedError as error:
        return None, None, str(error)


def cost(request, pictures: int, settings, spending, problem: str) -> str:
    """The report, as lines."""
    price = estimate(request)
    total = price.cents * pictures
    lines = [f"{request.endpoint.title}, {price.text}"]
    if pictures > 1:
        lines.append(f"{pictures} pictures: {in_cents(total)}")
    if settings is None:
        return "\n".join([*lines, f"Ceilings and spending are not known. {problem}"])
    per_run, per_day = settings.per_run, settings.per_day
    lines += [f"Ceilings: {in_cents(per_run)} per run, {in_cents(per_day)} per day"]
    lines += [today(spending)]
    if price.cents > per_run:
        lines.append("It will be refused: a picture costs more than a run may")
    elif total > spending.left_today:
        lines.append("It will be refused: not so much is left for today")
    return "\n".join(lines)
