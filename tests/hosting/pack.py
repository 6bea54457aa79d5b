"""The archive that the registry makes of this checkout, without the registry's own tool."""

import subprocess
import zipfile
from pathlib import Path

from .server import PROJECT


def packed_files(root: Path) -> list[str]:
    """What git tracks, less what .comfyignore names (its patterns are git's), by posix path."""
    tracked = _git(root, "ls-files")
    ignored = set(_git(root, "ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore"))
    return [name for name in tracked if name not in ignored]


def pack(root: Path, archive: Path) -> Path:
    """Write the archive; its files stand at its top, as in the registry's."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for name in packed_files(root):
            out.write(root / name, name)
    return archive


def install(archive: Path, custom_nodes: Path) -> Path:
    """Unpack as the manager does: into a folder with the project's name."""
    folder = custom_nodes / PROJECT
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def _git(root: Path, *command: str) -> list[str]:
    made = subprocess.run(["git", *command, "-z"], cwd=root, check=True, capture_output=True)
    return [name for name in made.stdout.decode("utf-8").split("\0") if name]
