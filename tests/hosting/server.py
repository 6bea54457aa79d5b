"""A real ComfyUI server as a child process, spoken to over HTTP. Standard library only."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

PROJECT = "flux2-kit"  # the folder name under custom_nodes: the project name, normalised
FOLDERS = ("custom_nodes", "input", "output", "temp", "user", "models")
START_SECONDS = 180  # 4 to 7 s on a quiet machine; a busy one takes many times that


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def link_folder(source: Path, link: Path) -> None:
    """Make `link` show `source`: a symbolic link, on Windows a junction (needs no privilege)."""
    if link.is_symlink() or link.exists():
        link.unlink()  # an earlier link; refuses a real folder
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(source), str(link))
    else:
        link.symlink_to(source, target_is_directory=True)


class Server:
    """with Server(comfyui, base, python, pack=ROOT) as s: s.run(prompt) ...

    comfyui: the folder with main.py. base: a scratch folder for inputs, outputs, models and user
    data, so that nothing is written into the host. pack: a folder to show under custom_nodes, or
    None where base already holds what is wanted there. cpu: never touch a GPU. flags: more of
    ComfyUI's own. env: variables of its environment.
    """

    def __init__(
        self, comfyui, base, python=sys.executable, pack=None, port=None, cpu=True, flags=(), env=()
    ):
        self.comfyui, self.base, self.python = Path(comfyui).resolve(), Path(base).resolve(), python
        self.pack, self.port, self.env = pack, port or free_port(), dict(env)
        self.flags = [*flags, "--cpu"] if cpu else [*flags]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.base / "comfyui.log"
        self.process = None

    def command(self) -> list[str]:
        database = (self.base / "user" / "comfyui.db").as_posix().lstrip("/")
        root = "" if sys.platform == "win32" else "/"
        return [
            *(str(self.python), str(self.comfyui / "main.py"), *self.flags),
            *("--listen", "127.0.0.1", "--port", str(self.port)),
            *("--base-directory", str(self.base)),
            *("--database-url", f"sqlite:///{root}{database}"),
            *("--disable-auto-launch", "--disable-api-nodes"),
        ]

    def __enter__(self):
        for name in FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.pack:
            link_folder(Path(self.pack).resolve(), self.base / "custom_nodes" / PROJECT)
        env = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8")
        env.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1")
        env.update(self.env)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command(), cwd=self.comfyui, env=env, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_it_answers(self):
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                return self.get("/system_stats")
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended ({self.process.returncode}):\n{self.tail()}")
            if time.monotonic() > end:
                raise TimeoutError(f"ComfyUI does not answer:\n{self.tail()}")
            time.sleep(0.1)

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def tail(self, characters: int = 3000) -> str:
        return self.log.read_text("utf-8", "replace")[-characters:]

    def raw(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def get(self, path: str):
        return json.loads(self.raw(path))

    def post(self, path: str, body) -> tuple[int, dict | None]:
        """-> (status, answer); a refusal is an answer too."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as refusal:
            return refusal.code, json.loads(refusal.read() or b"null")

    def run(self, prompt: dict, workflow: dict | None = None, seconds: float = 600) -> dict:
        """Queue an API-format prompt and wait; returns its outputs, node id -> what it showed.

        workflow: the UI form that saved pictures carry. Raises RuntimeError with the host's words
        if the prompt is refused or a node fails.
        """
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        body = {"prompt": prompt, "client_id": uuid.uuid4().hex, "extra_data": extra}
        status, answer = self.post("/prompt", body)
        if status != 200:
            raise RuntimeError(f"ComfyUI refused the prompt ({status}): {json.dumps(answer)}")
        entry = self._history(answer["prompt_id"], seconds)
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(f"The run failed: {_failure(entry)}")
        return entry["outputs"]

    def _history(self, prompt_id: str, seconds: float) -> dict:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                return entry
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended during the run:\n{self.tail()}")
            time.sleep(0.1)
        raise TimeoutError(f"No result after {seconds:.0f} s:\n{self.tail()}")

    def saved(self, outputs: dict, name: str = "") -> list[Path]:
        """The files that nodes saved (previews left out) whose names begin so, by node id."""
        images = (i for id in sorted(outputs, key=str) for i in outputs[id].get("images", ()))
        folder = self.base / "output"
        return [
            folder / i["subfolder"] / i["filename"]
            for i in images
            if i["type"] == "output" and i["filename"].startswith(name)
        ]


def _failure(entry: dict) -> str:
    for event, data in entry["status"]["messages"]:
        if event == "execution_error":
            return f"{data['node_type']} ({data['node_id']}): {data['exception_message']}"
    return str(entry["status"])
