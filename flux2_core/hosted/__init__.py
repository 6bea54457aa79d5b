"""FLUX.2's hosted models: Pro, Max, Flex and Klein through the API of Black Forest Labs.

    request = make_request("flux-2-pro", "a red fox", references=(Reference(image),), seed=7)
    before = estimate(request)                            # Price: .cents, .text
    client = Client(read_settings(region="eu"))
    result = await client.run(request, run_id="queue 12", keep=lambda r: r.save("fox.png"))
    result.cost, result.image()                           # what the service reported; (H, W, 3)

Nothing here imports ComfyUI. aiohttp, which every ComfyUI has, is imported when a request is sent.
Every mistake is a Flux2Error; what the service or the network caused is its subclass HostedError,
whose `code` is one word of CODES.

What there is
-------------
ENDPOINTS: {name: Endpoint}
    Every hosted model as data: `path`, `title`, `references` (most), `total_megapixels` (input and
    output together, or None), `steps` and `guidance` (Range or None where it takes none),
    `upsampling` (field name or None), `first_cents` and `further_cents` per megapixel.
    `endpoint.takes(name) -> bool` for "steps", "guidance", "prompt_upsampling".
TABLE_DATE: str
    When the table of endpoints and prices was read.
REGIONS: ("global", "eu", "us")

make_request(model, prompt, *, references=(), width=None, height=None, seed=0, steps=None,
             guidance=None, safety_tolerance=None, output_format="png", prompt_upsampling=None)
             -> Request
    None is "not given": the service decides. What a model does not take, or out of its range, is
    refused, and so are more references than it takes and references with strength, steps, mask or
    region. Width and height None or 0 follow the first reference, else 1024 x 1024; they are always
    sent, so that the price is known. References are fitted by the local path's rule and sent as
    PNG; @name in the prompt becomes "image N".
    Request: `endpoint`, `fields` (what is sent, without pictures), `pictures` (Upload: `data`,
    `size`, `name`, `sha256`), `size`.

estimate(request) -> Price
    Without network, key or settings. Price: `cents` (Decimal), `output_megapixels`,
    `input_megapixels`, `text` (one line for people).

read_settings(region="global", environ=os.environ) -> Settings
    Key, address and gateway, together from the environment or from one settings file, never mixed:
        BFL_API_KEY, FLUX2KIT_HOSTED_ADDRESS, FLUX2KIT_HOSTED_GATEWAY,
        FLUX2KIT_HOSTED_PER_RUN, FLUX2KIT_HOSTED_PER_DAY (cents; 100 and 1000 if not set)
        or the same in FLUX2KIT_HOSTED_SETTINGS, by default ~/.config/flux2-kit/hosted.json:
        {"key": "...", "address": "https://...", "gateway": "http://127.0.0.1:8080",
         "per_run": 100, "per_day": 1000}, readable by its owner alone.
    FLUX2KIT_HOSTED_STATE moves the folder of journal and ledger. `region` is all that a workflow
    may choose. Settings: `origin` (scheme://host[:port]), `region`, `per_run`, `per_day`,
    `folder`; the key never shows in its repr, in errors or in any file.

Client(settings, *, timing=Timing(), sleep=asyncio.sleep, clock=time.monotonic, now=time.time,
       turns=the queue of this process)
    client.spent() -> Spending: `today`, `left_today` in cents (Decimal), for a line on a node.
    client.waiting(request) -> bool: a paid task of these very inputs waits to be fetched: running
        it again costs nothing.
    await client.run(request, *, run_id="", per_run=None, per_day=None, progress=None, check=None,
                     keep=None) -> Result
        Submits, waits and downloads, or goes on with a task that was paid for already.
        run_id: requests with the same id share one per-run ceiling (a queue run's id); "" stands
            alone. per_run, per_day: cents; they can only lower the settings' ceilings.
        progress(share, state): share in [0, 1] or None, state a word for people.
        check(): called four times a second at least, may raise to interrupt; the task stays in the
            journal, so the same inputs go on with it later. A submission on its way is finished
            first: it may be paid.
        keep(result): called before the journal forgets the task: save the file there, then no
            crash can lose it.
        At most 24 tasks of this process are with the service at a time; the others wait their turn.

Result: `data` (the bytes as they came), `format` ("png", "jpeg", "webp"), `width`, `height`,
    `endpoint`, `region`, `task_id`, `seed`, `prompt` (the one used), `price` (Price, before), `cost`
    (Decimal cents reported, or None), `resumed`, `cost_text` (one line for people);
    image() -> (H, W, 3) float tensor in [0, 1]; manifest() -> dict for JSON;
    save(path) -> Path: writes `data` untouched, with the format's suffix, and the manifest beside
    it as .json.
"""

from .client import Client
from .endpoints import ENDPOINTS, TABLE_DATE, Endpoint, Range
from .money import Price, Spending, estimate, in_cents
from .outcomes import CODES, HostedError
from .pace import Timing
from .request import Request, Upload, make_request
from .result import Result
from .settings import REGIONS, Settings, read_settings
from .turns import Turns

__all__ = [
    "CODES",
    "ENDPOINTS",
    "REGIONS",
    "TABLE_DATE",
    "Client",
    "Endpoint",
    "HostedError",
    "Price",
    "Range",
    "Request",
    "Result",
    "Settings",
    "Spending",
    "Timing",
    "Turns",
    "Upload",
    "estimate",
    "in_cents",
    "make_request",
    "read_settings",
]
