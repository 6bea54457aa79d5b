"""What a hosted run asks of the host: its queue run, its interrupt, its bar, its output folder.

The network has a thread and an event loop of its own. The host runs local models inside the loop
that its async nodes share: a minute of sampling would be a minute without polls, and links of
results expire. When a queue run ends early the host also cancels what is pending; a submission
must come to its end nevertheless, or nobody knows what was paid.
"""

import asyncio
import os
import re
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import comfy.utils
import folder_paths
from comfy_execution.utils import get_executing_context

from ..flux2_core.errors import Flux2Error
from . import host_plan

GLANCE = 0.05  # seconds between two looks at the other thread
MOST_LEFT = 24
_starting, _saving = threading.Lock(), threading.Lock()
_network: list[asyncio.AbstractEventLoop] = []
_left: dict[str, Future] = {}  # runs whose queue run ended before them, by their inputs


class Run:
    """One node's run as its user sees it. Made in the node, used in the network's thread."""

    def __init__(self):
        context = get_executing_context()
        self.id = context.prompt_id if context else ""
        self.unique_id = context.node_id if context else None
        self._bar = comfy.utils.ProgressBar(100, node_id=self.unique_id)
        self._stopped = threading.Event()

    def check(self) -> None:
        """Raise the host's interrupt if the user asked for it, or the queue run is over. It leaves
        the host's flag: other nodes in flight look at it too."""
        if self._stopped.is_set() or memory.processing_interrupted():
            self._stopped.set()
            raise memory.InterruptProcessingException

    def say(self, share: float | None, text: str) -> None:
        """Move the bar, and write on the node. Never raises: what is paid goes on."""
        if self._stopped.is_set() or memory.processing_interrupted():
            return
        host_plan.show(self, text)
        try:
            if share is not None:
                self._bar.update_absolute(round(100 * share), 100)
        except memory.InterruptProcessingException:  # the host has taken its flag back with it
            self._stopped.set()

    async def aside(self, inputs: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """Await `work` in the network's thread. If the queue run ends before it, the next run with
        the same `inputs` has its result."""
        earlier = _left.pop(inputs, None)
        if earlier is not None and await self._ended_well(earlier):
            return earlier.result()
        future = asyncio.run_coroutine_threadsafe(work(), _loop())
        try:
            while not future.done():
                await asyncio.sleep(GLANCE)
        except asyncio.CancelledError:
            self._stopped.set()
            _left[inputs] = future
            while len(_left) > MOST_LEFT:
                del _left[next(iter(_left))]
            raise
        return future.result()

    async def _ended_well(self, earlier: Future) -> bool:
        """An earlier run was told to stop, so that it ends soon."""
        while not earlier.done():
            self.check()
            await asyncio.sleep(GLANCE)
        return not earlier.cancelled() and earlier.exception() is None


def _loop() -> asyncio.AbstractEventLoop:
    with _starting:
        if not _network:
            _network.append(asyncio.new_event_loop())
            run = _network[0].run_forever
            threading.Thread(target=run, name="FLUX.2 hosted", daemon=True).start()
    return _network[0]


def check_prefix(prefix: str) -> None:
    """Raise Flux2Error for a place outside the output folder: before anything is paid."""
    folder = Path(folder_paths.get_output_directory()).resolve()
    plain = os.path.normpath(prefix) if prefix.strip() and prefix.isprintable() else ""
    named = os.path.basename(plain).strip(". ")
    if not named or not (folder / plain).resolve().is_relative_to(folder):
        raise Flux2Error(
            "Files are saved below ComfyUI's output folder only",
            f"filename_prefix '{prefix}'",
            "Write it like flux2_kit/hosted",
        )


def save(result, prefix: str) -> tuple[Path, dict[str, str]]:
    """Save a result as the host names files -> (its path, how the host's UI finds it)."""
    try:
        with _saving:
            size = result.width, result.height
            root = folder_paths.get_output_directory()
            folder, name, count, below, _ = folder_paths.get_save_image_path(prefix, root, *size)
            task = re.sub(r"[^A-Za-z0-9]", "", result.task_id)[:8]  # no other process has this one
            path = result.save(Path(folder) / f"{name}_{count:05}_{task}")
    except OSError as error:
        raise Flux2Error(
            "The picture is made and paid for, but cannot be saved",
            error.strerror or "",
            "Make room in ComfyUI's output folder and queue it again soon: the same inputs fetch it "
            "anew and cost nothing",
        ) from None
    return path, {"filename": path.name, "subfolder": below, "type": "output"}
