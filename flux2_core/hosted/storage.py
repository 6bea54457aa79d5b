"""Files that only their owner reads: written whole or not at all, and locks between processes.

On Windows the permission bits mean nothing; there the files are as private as the user's folder.
"""

import asyncio
import contextlib
import json
import os
import secrets
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from .outcomes import HostedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_folder(path: Path) -> Path:
    """Make a folder for its owner alone. Raises if it is another's or others may write in it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from None
    if os.name != "nt":
        status = path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise HostedError(
                "state",
                "Others may write in the folder that keeps tasks and spending",
                str(path),
                f"Run chmod 700 {path}",
            )
    return path


def write_json(path: Path, value: Any) -> None:
    """Replace a file in one step, readable by its owner alone, and safe against a power cut."""
    try:
        write_bytes(path, json.dumps(value).encode(), 0o600)
    except OSError as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> HostedError:
    return HostedError(
        "state",
        "What is paid for cannot be written down or looked up",
        f"{path}: {error.strerror}",
        "Make room on the disk, or set FLUX2KIT_HOSTED_STATE to a folder of yours",
    )


def write_bytes(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace a file in one step; `mode` is lessened by the umask."""
    spare = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    handle = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(spare, path)
    except BaseException:
        spare.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # the name itself must survive as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_json(path: Path) -> Any:
    """What write_json wrote; None if there is no such file. Raises ValueError if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from None
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _try_lock(path: Path) -> int | None:
    """-> an open handle that holds the lock, or None while somebody else does."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the holder before us may have removed the name: then this lock guards nothing
            if os.fstat(handle).st_ino != path.stat().st_ino:
                raise BlockingIOError
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(handle: int, path: Path, remove: bool) -> None:
    if remove and fcntl is not None:
        path.unlink(missing_ok=True)
    if fcntl is None:
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
    os.close(handle)  # gives the lock back; so does the end of the process, however it ends


@contextlib.contextmanager
def locked(path: Path, patience: float = 20.0) -> Iterator[None]:
    """Hold a lock for a moment, against threads and processes alike."""
    until = time.monotonic() + patience
    while (handle := _try_lock(path)) is None:
        if time.monotonic() > until:
            raise HostedError(
                "state",
                "Another program holds the file about spending",
                str(path),
                "Close other ComfyUI windows that hang, then queue it again: nothing was charged",
            )
        time.sleep(0.005)
    try:
        yield
    finally:
        _unlock(handle, path, remove=False)


@contextlib.asynccontextmanager
async def held(path: Path, check: Callable[[], None]) -> AsyncIterator[None]:
    """Hold a lock for as long as a submission takes; the file goes when it is given back."""
    wait = 0.005
    while (handle := _try_lock(path)) is None:
        check()
        await asyncio.sleep(wait)
        wait = min(2 * wait, 0.2)
    try:
        yield
    finally:
        _unlock(handle, path, remove=True)
