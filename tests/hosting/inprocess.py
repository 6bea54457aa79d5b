"""ComfyUI inside the test process: its real loader, validation and executor, without a server."""

import asyncio
import os
import shutil
import sys
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = "flux2-kit"  # the folder name under custom_nodes: the project name, normalised


def prepare(comfyui: Path, cpu: bool) -> Path:
    """Make `import comfy`, `nodes`, `folder_paths` ... mean that ComfyUI; returns its scratch folder.

    Called before anything imports the host. Its top-level modules have common names, so its root
    goes first on sys.path; `utils` is bound before `nodes` puts ComfyUI's comfy/ (with a utils.py
    of its own) in front.
    """
    base = Path(tempfile.mkdtemp(prefix="flux2-kit-tests-"))
    for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
        (base / name).mkdir()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1")
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu, args.base_directory, args.disable_api_nodes = cpu, str(base), True
    import utils.extra_config  # noqa: F401

    return base


def remove(base: Path):
    """Delete the scratch folder; the pack in it is a link, whose target stays."""
    shutil.rmtree(base, ignore_errors=True)


@dataclass
class Result:
    """What one prompt left behind."""

    outputs: dict  # node id -> what the node showed, such as {"images": [{"filename": ...}]}
    kept: dict  # name -> the value that `keep` asked for
    executed: list  # ids of the nodes that ran (the others came from the cache)
    progress: list  # (value, total, preview) as sent by samplers


class HostError(Exception):
    """The host refused a prompt (`refused`: error and node errors) or a node in it failed."""

    def __init__(self, message: str, refused: dict | None = None, node: str | None = None):
        self.refused, self.node = refused, node
        super().__init__(message)


@dataclass
class _Server:
    """What the executor and some nodes expect of ComfyUI's PromptServer."""

    client_id: str | None = None
    last_node_id: str | None = None
    last_prompt_id: str | None = None
    sockets_metadata: dict = field(default_factory=dict)
    events: list = field(default_factory=list)

    def send_sync(self, event, data, sid=None):
        self.events.append((event, data))

    def send_progress_text(self, *args, **kwargs):
        pass


class Host:
    """ComfyUI with its own nodes and this pack, loaded the way ComfyUI loads them."""

    def __init__(self, base: Path, root: Path, alias: str):
        import nodes

        self.base, self.mappings = base, nodes.NODE_CLASS_MAPPINGS
        self.input, self.output = base / "input", base / "output"
        link = base / "custom_nodes" / PROJECT
        link.symlink_to(root, target_is_directory=True)
        share_modules(str(link).replace(".", "_x_"), alias)
        asyncio.run(self._load(nodes, link))
        self.mappings["TestKeep"] = Keep

    async def _load(self, nodes, link):
        await nodes.init_builtin_extra_nodes()
        before = set(self.mappings)
        loaded = await nodes.load_custom_node(str(link), before, module_parent="custom_nodes")
        assert loaded, "ComfyUI could not load the pack: see the captured log"
        self.ours = sorted(set(self.mappings) - before)

    def models(self, kind: str) -> Path:
        """A scratch folder that the host lists first for this kind of file ("vae", "loras" ...)."""
        import folder_paths

        folder = self.base / "models" / kind
        folder.mkdir(parents=True, exist_ok=True)
        folder_paths.add_model_folder_path(kind, str(folder), is_default=True)
        return folder

    def call(self, node: str, **inputs) -> tuple:
        """Run one node by id, outside any graph; returns its outputs."""
        import torch

        cls = self.mappings[node]
        with torch.inference_mode():
            made = getattr(cls, "execute", None) or getattr(cls(), cls.FUNCTION)
            result = made(**inputs)
        return result.args if hasattr(result, "args") else result

    def run(self, prompt: dict, keep: dict | None = None, workflow: dict | None = None) -> Result:
        """Validate and execute an API-format prompt with the host's executor.

        keep: name -> [node id, output index]; the values come back in `Result.kept`. A prompt needs
        an output node or something to keep. `workflow`: the graph that saved pictures carry. Raises
        HostError.
        """
        prompt = {**prompt}
        for name, source in (keep or {}).items():
            inputs = {"value": list(source), "name": name}
            prompt[f"keep_{name}"] = {"class_type": "TestKeep", "inputs": inputs}
        outputs = self._validate(prompt)
        extra = {"client_id": "test"}
        extra |= {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        server, Keep.values, progress = _Server(), {}, []
        executor = self._executor(server)
        with _progress_sent_to(progress):
            executor.execute(prompt, uuid.uuid4().hex, extra, outputs)
        for event, data in executor.status_messages:
            if event in ("execution_error", "execution_interrupted"):
                what = f"{data.get('exception_type', event)}: {data.get('exception_message', '')}"
                raise HostError(what.strip(), node=data["node_id"])
        ran = [data["node"] for event, data in server.events if event == "executing"]
        return Result(executor.history_result["outputs"], Keep.values, ran, progress)

    def _validate(self, prompt: dict) -> list:
        import execution

        check = execution.validate_prompt
        ok, error, outputs, node_errors = asyncio.run(check(uuid.uuid4().hex, prompt, None))
        if not ok:
            refused = {"error": error, "node_errors": node_errors}
            raise HostError(str(refused), refused=refused)
        return outputs

    def _executor(self, server):
        """A fresh executor, with an empty cache. Hosts differ in the sizes that they ask for."""
        import execution

        sizes = {"lru": 0, "ram": 0, "ram_inactive": 0}
        return execution.PromptExecutor(
            server, cache_type=execution.CacheType.CLASSIC, cache_args=sizes
        )

    def png(self, result: Result, node: str) -> Path:
        """The file that a SaveImage node of this result wrote first."""
        image = result.outputs[node]["images"][0]
        return self.output / image["subfolder"] / image["filename"]


class Keep:
    """A test-only output node that holds on to any value."""

    values: dict = {}  # noqa: RUF012 (replaced for every run)
    RETURN_TYPES = ()
    FUNCTION = "keep"
    OUTPUT_NODE = True
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*", {}), "name": ("STRING", {"default": ""})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def keep(self, value, name):
        Keep.values[name] = value
        return ()


class _progress_sent_to:
    """Within it, the host's global progress hook writes (value, total, preview) to a list."""

    def __init__(self, events: list):
        self.events = events

    def __enter__(self):
        import comfy.utils

        comfy.utils.set_progress_bar_global_hook(self.note)

    def note(self, value, total, preview=None, **_):
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        self.events.append((value, total, preview))

    def __exit__(self, *_):
        import comfy.utils

        comfy.utils.set_progress_bar_global_hook(None)


def share_modules(name: str, alias: str):
    """Let the host find the alias's modules under the name that it gives the pack.

    Each file is then one module, whichever way it is reached: a Flux2Error that a node raises is
    the class that the test imports.
    """
    import importlib

    for part in ("flux2_core", "nodes"):
        sys.modules[f"{name}.{part}"] = importlib.import_module(f"{alias}.{part}")
