"""Where paused runs are: below the output folder, and, to read, below the input folder."""

from pathlib import Path

import folder_paths

from ..flux2_core.errors import Flux2Error
from ..flux2_core.paused import PausedState
from .host_save import target


def save(state: PausedState, name: str) -> str:
    """-> the file's name below the output folder."""
    path = target(name.removesuffix(".safetensors"))
    state.save(path)
    return path.relative_to(Path(folder_paths.get_output_directory()).resolve()).as_posix()


def load(name: str) -> PausedState:
    return PausedState.load(find(name))


def find(name: str) -> Path:
    """The file of that name. Raises Flux2Error for names that lead out of the two folders."""
    for folder in (folder_paths.get_output_directory(), folder_paths.get_input_directory()):
        root = Path(folder).resolve()
        path = (root / name).resolve()  # follows links: one that leads out is out
        if not name.strip() or Path(name).is_absolute() or not path.is_relative_to(root):
            raise Flux2Error(
                "A paused run is read from ComfyUI's output and input folders only",
                f"'{name[:60]}'",
                "Use the name that FLUX.2 Save State shows",
            )
        if path.is_file():
            return path
    raise Flux2Error(
        "There is no such paused run", f"'{name[:60]}'", "Use the name that FLUX.2 Save State shows"
    )


def stamp(name: str) -> tuple:
    """Changes when the file does."""
    try:
        status = find(name).stat()
    except (Flux2Error, OSError, ValueError):
        return (name,)
    return name, status.st_mtime_ns, status.st_size
