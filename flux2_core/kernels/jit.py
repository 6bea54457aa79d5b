"""Triton kernels that are plain functions until the first of a module is launched.

The pack imports without Triton. A module of kernels begins like this, and names `triton` and `tl`
only inside functions marked with `@kernel`:

    from __future__ import annotations
    from typing import TYPE_CHECKING
    from .jit import kernel
    if TYPE_CHECKING:
        import triton.language as tl
"""

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_lock = threading.RLock()


@lru_cache(maxsize=1)
def triton_missing() -> str | None:
    """Why Triton cannot be used here, or None. On Windows it is a package of its own, which may be
    broken."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return "Triton is not installed" if error.name == "triton" else f"Triton: {error}"
    except Exception as error:
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


class Kernel:
    """A function in Triton's language. `kernel[grid](...)` launches it; `.jitted` is Triton's own
    object for it. Either imports Triton, and raises what that import raises."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        self.function, self.options = function, options
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __getitem__(self, grid) -> Callable:
        return self.jitted[grid]

    @property
    def jitted(self) -> Any:
        _jit_module(self.function.__globals__)
        return self.function.__globals__[self.__name__]


def kernel(function: Callable | None = None, **options: Any) -> Any:
    """Marks a kernel, or a function that kernels of the same module call. Options are those of
    `triton.jit`."""
    if function is None:
        return lambda function: Kernel(function, options)
    return Kernel(function, options)


def jitted(kernel: Any) -> Any:
    """Triton's own object for a kernel, whether or not its module has been launched before."""
    return kernel.jitted if isinstance(kernel, Kernel) else kernel


def _jit_module(module: dict[str, Any]) -> None:
    """All kernels of a module at once, in place: they find each other by the module's names."""
    with _lock:
        waiting = {name: value for name, value in module.items() if isinstance(value, Kernel)}
        if not waiting:
            return
        import triton
        import triton.language

        module |= {"triton": triton, "tl": triton.language}
        made = {name: triton.jit(k.function, **k.options) for name, k in waiting.items()}
        module |= made
