"""A hosted service in miniature: it speaks the protocol, counts what it is paid, and misbehaves on
request. Written from the API's documentation, not from our client: prices, field names and limits
are its own. Run as a program it serves until it is stopped: python server.py [port]

    with Server() as server:
        server.faults["submit"].append(answer(503))
        ...
        assert server.paid == 1
"""

import asyncio
import base64
import io
import sys
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal

from aiohttp import web
from PIL import Image, PngImagePlugin

KEY = "sk-test-0123456789abcdef-NEVER-SHOWN"
MEGA = 1 << 20
COMMON = {"prompt", "width", "height", "seed", "safety_tolerance", "output_format"}
# model: tenths of a cent for the first megapixel and for others, pictures taken, further fields
MODELS = {
    "flux-2-pro": (30, 15, 8, {"disable_pup"}),
    "flux-2-pro-preview": (30, 15, 8, {"disable_pup"}),
    "flux-2-max": (70, 30, 8, {"disable_pup"}),
    "flux-2-flex": (50, 50, 8, {"prompt_upsampling", "steps", "guidance"}),
    "flux-2-klein-4b": (14, 1, 4, set()),
    "flux-2-klein-9b": (15, 2, 4, set()),
    "flux-2-klein-9b-preview": (15, 2, 4, set()),
}
SIGNATURE = "c2pa: signed by the service"
Normal = Callable[[], Awaitable[web.StreamResponse]]
Fault = Callable[[web.Request, Normal], Awaitable[web.StreamResponse]]


@dataclass
class Task:
    fields: dict
    cost: float
    states: deque
    data: bytes
    links: int = 0
    polls: int = 0
    done: bool = False


@dataclass
class Seen:
    what: str  # submit, poll or result
    key: str | None
    at: float
    task: str = ""


@dataclass
class Server:
    """`faults` are used up one for each request; `states` is what each task goes through."""

    key: str = KEY
    states: tuple = ("Pending", "Ready")
    most_active: int = 24
    clock: Callable[[], float] = time.monotonic
    paint: Callable[[dict], bytes] | None = None
    link: str = ""  # where results are said to be, {task}; here by default
    host: str = "127.0.0.1"
    port: int = 0
    faults: dict[str, deque] = field(default_factory=lambda: defaultdict(deque))
    tasks: dict[str, Task] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    peak: int = 0

    def reset(self) -> None:
        """Forget everything but the port."""
        fresh = Server(host=self.host, port=self.port)
        vars(self).update(vars(fresh))

    @property
    def paid(self) -> int:
        return len(self.tasks)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def active(self) -> int:
        return sum(not task.done for task in self.tasks.values())

    def of(self, what: str) -> list[Seen]:
        return [s for s in self.seen if s.what == what]

    def __enter__(self) -> "Server":
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=256 << 20)
        app.router.add_post("/v1/{model}", self._around("submit", self._submit))
        app.router.add_get("/v1/get_result", self._around("poll", self._poll))
        app.router.add_get("/results/{task}", self._around("result", self._result))
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, self.host, self.port, backlog=512)
        self._loop.run_until_complete(site.start())
        self.port = site._server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):  # what hangs on purpose
            task.cancel()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    def _around(self, what: str, normal) -> Callable:
        async def handle(request: web.Request) -> web.StreamResponse:
            task = request.query.get("id") or request.match_info.get("task", "")
            self.seen.append(Seen(what, request.headers.get("x-key"), self.clock(), task))
            if self.faults[what]:
                fault: Fault = self.faults[what].popleft()
                return await fault(request, lambda: normal(request))
            return await normal(request)

        return handle

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("x-key") != self.key:
            return problem(401, "Invalid key")
        model = MODELS.get(request.match_info["model"])
        if model is None:
            return problem(404, "Not found")
        if self.active >= self.most_active:
            return problem(429, "Too many active tasks", {"Retry-After": "1"})
        fields = await request.json()
        first, further, most, more = model
        pictures = {n: fields.pop(n) for n in list(fields) if n.startswith("input_image")}
        names = ["input_image", *(f"input_image_{i}" for i in range(2, most + 1))]
        if strange := sorted((set(fields) - COMMON - more) | (set(pictures) - set(names))):
            return web.json_response(
                {"detail": [{"loc": ["body", n], "msg": "Extra inputs"} for n in strange]},
                status=422,
            )
        sizes = [_size(base64.b64decode(p, validate=True)) for p in pictures.values()]
        out, took = _mega(fields["width"], fields["height"]), sum(_mega(*s) for s in sizes)
        task = uuid.uuid4().hex
        cost = (first + further * (out - 1) + further * took) / 10
        data = (self.paint or paint)({**fields, "references": len(sizes)})
        self.tasks[task] = Task(fields, cost, deque(self.states), data)
        self.peak = max(self.peak, self.active)
        return web.json_response(
            {
                "id": task,
                "polling_url": f"{self.url}/v1/get_result?id={task}",
                "cost": cost,
                "input_mp": took,
                "output_mp": out,
            }
        )

    async def _poll(self, request: web.Request) -> web.StreamResponse:
        name = request.query["id"]
        task = self.tasks.get(name)
        if request.headers.get("x-key") != self.key:
            return problem(401, "Invalid key")
        if task is None:
            return web.json_response({"id": name, "status": "Task not found"}, status=404)
        task.polls += 1
        state = task.states.popleft() if len(task.states) > 1 else task.states[0]
        said = {"id": name, "status": state} if isinstance(state, str) else {"id": name, **state}
        if said["status"] not in ("Pending", "Task not found"):
            task.done = True
        if said["status"] == "Pending":
            said["progress"] = min(0.9, 0.2 * task.polls)
        if said["status"] == "Ready" and "result" not in said:
            task.links += 1
            here = f"{self.url}/results/{{task}}?sig=a%2Fb%3D{task.links}"
            said["result"] = {
                "sample": (self.link or here).format(task=name),
                "seed": task.fields["seed"],
                "prompt": task.fields["prompt"] + ", in soft light",
            }
        return web.json_response(said)

    async def _result(self, request: web.Request) -> web.StreamResponse:
        if not request.rel_url.raw_query_string.startswith(
            "sig=a%2Fb%3D"
        ):  # altered, the signature fails
            return problem(403, "Signature does not match")
        return web.Response(body=self.tasks[request.match_info["task"]].data)


def problem(status: int, detail: str, headers: dict | None = None) -> web.Response:
    return web.json_response({"detail": detail}, status=status, headers=headers)


def answer(status: int, body: dict | bytes | None = None, **headers: str) -> Fault:
    """Answer at once and do nothing. Header names are written with _ for -."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}

    async def fault(request, _normal):
        await request.read()
        if isinstance(body, bytes):
            return web.Response(status=status, body=body, headers=headers)
        return web.json_response(
            body or {"detail": f"trouble {status}"}, status=status, headers=headers
        )

    return fault


async def cut(request: web.Request, _normal: Normal) -> web.StreamResponse:
    """Break the connection; nothing has been done."""
    await request.read()
    request.transport.abort()
    return web.Response()


async def cut_after(request: web.Request, normal: Normal) -> web.StreamResponse:
    """Do the work, break the connection before the answer."""
    await normal()
    request.transport.abort()
    return web.Response()


async def cut_within(request: web.Request, normal: Normal) -> web.StreamResponse:
    """Break the connection in the middle of the answer."""
    whole = await normal()
    part = web.StreamResponse(headers={"Content-Length": str(len(whole.body))})
    await part.prepare(request)
    await part.write(whole.body[: len(whole.body) // 2])
    request.transport.abort()
    return part


def paint(fields: dict) -> bytes:
    """A picture whose colour is the seed's, in the format and size asked for, signed."""
    seed = fields["seed"]
    colour = (60 + seed % 190, 60 + seed * 7 % 190, 60 + seed * 31 % 190)
    picture = Image.new("RGB", (fields["width"], fields["height"]), colour)
    out, kind = io.BytesIO(), fields.get("output_format", "jpeg")
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("signature", SIGNATURE)
        picture.save(out, "PNG", pnginfo=info, compress_level=1)
    elif kind == "jpeg":
        picture.save(out, "JPEG", comment=SIGNATURE)
    else:
        picture.save(out, "WEBP", exif=b"Exif\0\0" + SIGNATURE.encode(), method=0)
    return out.getvalue()


def _size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size


def _mega(width: int, height: int) -> int:
    return -(-width * height // MEGA)


def cents(cost: float) -> Decimal:
    return Decimal(str(cost))


if __name__ == "__main__":
    with Server(port=int(sys.argv[1]) if len(sys.argv) > 1 else 0) as running:
        sys.stdout.write(f"{running.url}\n")
        sys.stdout.flush()
        threading.Event().wait()
