"""Triton's interpreter, made to compute what a GPU computes.

TRITON_INTERPRET=1 runs kernels on the CPU, but casts to bfloat16 and fp8 round wrongly, arithmetic
on those types works on bit patterns, `tl.dot` of bfloat16 too, `tl.dot_scaled` is missing, NaN
survives maxima that lose it on a GPU, assertions are off, and wrong addresses read or write what
happens to be there. After `install()`:

- casts round to nearest, ties to even, and saturate for fp8, as cvt.rn.satfinite does
- dot and dot_scaled multiply numbers, accumulate in float64 and round once: an ideal tensor core
- arithmetic on bfloat16 and fp8 values is refused: convert to float32 first, on a GPU as well
- max and min drop NaN, comparisons with NaN are ordered or not as Triton says
- device_assert raises; autotune takes its first configuration
- every load and store must stay within the tensors of the launch, and nothing is stored twice

Not modelled: the limited precision of real accumulators, flushing of subnormals, fused
multiply-adds, races within a program, alignment of descriptors. Written for Triton 3.6; it patches
private functions, so test_shim.py comes before anything that relies on it.
"""

import contextlib
import inspect
import itertools
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import autotuner, interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder

TORCH = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
AS_BITS = (tl.bfloat16, tl.float8e4nv, tl.float8e5)  # what numpy has no type for
SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NAN = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7F}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

installed = False


def install() -> None:
    """Repair the interpreter of this process, once. Needs TRITON_INTERPRET=1."""
    global installed
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before Triton is imported")
    if installed:
        return
    installed = True
    np.seterr(all="ignore")
    interpreter._convert_float = _convert
    Builder.cast_impl = _cast
    Builder.create_dot = _dot
    Builder.create_dot_scaled = _dot_scaled
    for name, op in {"maxnumf": np.fmax, "minnumf": np.fmin, "fcmpONE": _ordered_unequal}.items():
        setattr(Builder, f"create_{name}", lambda self, a, b, op=op: self.binary_op(a, b, op))
    for name in ("ULT", "UGT", "ULE", "UGE", "UEQ"):
        op = getattr(np, COMPARISONS[name[1:]])
        setattr(Builder, f"create_fcmp{name}", _unordered(op))
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(Builder, name, _refusing(getattr(Builder, name), name == "ternary_op"))
    Builder.create_assert = _assert
    object.__setattr__(interpreter.interpreter_builder.options, "debug", True)
    Builder.create_masked_load = _guarded_load
    Builder.create_masked_store = _guarded_store
    interpreter._implicit_cvt = _known_argument
    interpreter.GridExecutor.__call__ = _launch
    interpreter.InterpretedFunction.__call__ = _device_function
    interpreter._patch_lang_tensor = _patch_tensor
    autotuner.Autotuner.do_bench = property(lambda self: lambda *_, **__: [0.0, 0.0, 0.0])
    _accept_plain_formats()


# --------------------------------------------------------------------------------------- casts


def numbers(data: np.ndarray, dtype) -> torch.Tensor:
    """The interpreter's storage of a Triton dtype -> the same numbers as a tensor."""
    kind = TORCH[dtype]
    raw = np.ascontiguousarray(data).view(SIGNED[kind.itemsize])
    return torch.from_numpy(raw.copy()).view(kind).reshape(np.shape(data))


def storage(x: torch.Tensor) -> np.ndarray:
    """A tensor -> its bits, unsigned, as the interpreter keeps bfloat16 and fp8."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(bits).numpy().view(UNSIGNED[x.element_size()])


def _convert(data, source, target, rounding_mode=None):
    """Float to float, to nearest even; to fp8 saturating. NaN becomes the one NaN of fp8."""
    if source not in TORCH or target not in TORCH:
        raise NotImplementedError(f"{source} to {target} is not modelled")
    x, kind = numbers(data, source), TORCH[target]
    if kind.itemsize > 1:
        wide = x.float() if x.element_size() == 1 else x
        return storage(wide.to(kind)).reshape(np.shape(data))
    wide, top = x.float(), torch.finfo(kind).max
    codes = wide.clamp(-top, top).nan_to_num(0.0).to(kind).view(torch.uint8)
    return torch.where(wide.isnan(), NAN[kind], codes).numpy().astype(np.uint8)


def _cast(self, src, dst_type):
    """All casts but bitcasts. Through float32 where numpy has no type; integers saturate."""
    source, target = src.dtype.scalar, dst_type.scalar
    data, known = src.data, source
    if source in TORCH and target in TORCH:
        bits = _convert(data, source, target)
        return Handle(bits.view(interpreter._get_np_dtype(target)), target)
    if source in AS_BITS:
        data, known = _convert(data, source, tl.float32).view(np.float32), tl.float32
    if target in AS_BITS:
        return Handle(_convert(data.astype(np.float32), tl.float32, target), target)
    kind = interpreter._get_np_dtype(target)
    if known in TORCH and np.issubdtype(kind, np.integer):
        limits = np.iinfo(kind)
        whole = np.trunc(np.nan_to_num(data.astype(np.float64), nan=0.0))
        over, under = whole >= float(limits.max), whole <= float(limits.min)
        data = np.where(over | under, 0, whole).astype(kind)
        data = np.where(over, limits.max, np.where(under, limits.min, data))
    return Handle(data.astype(kind), target)


# ------------------------------------------------------------------------------------- products


def _values(handle) -> np.ndarray:
    """The numbers of a handle, float64."""
    kind = handle.dtype.scalar
    return numbers(handle.data, kind).double().numpy() if kind in TORCH else handle.data


def _dot(self, a, b, d, *_):
    if a.dtype.scalar not in TORCH:  # integers: exact as they are
        return Handle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)
    product = torch.from_numpy(_values(a) @ _values(b) + _values(d))
    return Handle(_rounded(product, d.dtype.scalar), d.dtype.scalar)


def _rounded(x: torch.Tensor, dtype) -> np.ndarray:
    y = x.to(TORCH[dtype])
    return storage(y) if dtype in AS_BITS else y.numpy()


def _dot_scaled(self, a, a_scale, a_format, b, b_scale, b_format, fast, a_k_pack, b_k_pack, acc):
    """Scales (rows, K / block): e8m0 as uint8 (a power of two), or e4m3 numbers (NVFP4)."""
    left = _scaled(_elements(a, a_format, a_k_pack), a_scale)
    right = _scaled(_elements(b, b_format, b_k_pack, columns=True).T, b_scale)
    return Handle((left @ right.T + acc.data).astype(np.float32), tl.float32)


def _elements(handle, form, k_pack: bool, columns: bool = False) -> np.ndarray:
    """(M, K) or, for columns, (K, N) float64. Two e2m1 to a byte: the lower bits come first."""
    name = str(form).upper()
    if "E2M1" not in name:
        kind = {"E4M3": tl.float8e4nv, "E5M2": tl.float8e5, "BF16": tl.bfloat16}
        found = [k for tag, k in kind.items() if tag in name]
        return numbers(handle.data, found[0] if found else handle.dtype.scalar).double().numpy()
    axis = 0 if columns == k_pack else 1
    codes = handle.data.view(np.uint8)
    pairs = np.stack((E2M1[codes & 15], E2M1[codes >> 4]), axis + 1)
    return pairs.reshape([n * (2 if i == axis else 1) for i, n in enumerate(codes.shape)])


def _scaled(x: np.ndarray, scale) -> np.ndarray:
    """x (rows, K) with a scale for each block of K."""
    if scale is None:
        return x
    if scale.dtype.scalar == tl.float8e4nv:
        factors = numbers(scale.data, tl.float8e4nv).double().numpy()
    else:
        codes = scale.data.astype(np.int64)
        factors = np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))
    return x * np.repeat(factors, x.shape[1] // factors.shape[1], 1)


def _accept_plain_formats() -> None:
    """The front end reads `.value` of a format, which interpreted kernels pass as a plain string."""
    semantic = interpreter.TritonSemantic
    original = semantic.dot_scaled

    class Text(str):
        @property
        def value(self):
            return str(self)

    def text(form):
        return Text(getattr(form, "value", form))

    def dot_scaled(self, a, a_scale, a_format, b, b_scale, b_format, *rest):
        return original(self, a, a_scale, text(a_format), b, b_scale, text(b_format), *rest)

    semantic.dot_scaled = dot_scaled


# ------------------------------------------------------------------------------------ elementwise

COMPARISONS = {
    "LT": "less",
    "GT": "greater",
    "LE": "less_equal",
    "GE": "greater_equal",
    "EQ": "equal",
}


def _ordered_unequal(a, b):
    return (a < b) | (a > b)


def _unordered(op):
    def compare(a, b):
        return op(a, b) | np.isnan(a) | np.isnan(b)

    return lambda self, a, b: self.binary_op(a, b, compare)


def _refusing(original, last_only: bool):
    """`select` moves values and may; everything else must not calculate with bit patterns."""

    def operate(self, *args):
        op = args[-1]
        for handle in args[:-1]:
            bits = isinstance(handle, Handle) and handle.dtype.scalar in AS_BITS
            if bits and not (last_only and op is np.where):
                raise TypeError(
                    f"arithmetic on {handle.dtype.scalar}: convert to float32 first, on a GPU too"
                )
        result = original(self, *args)
        if result.data.dtype == bool:  # the original gives it the type of what was compared
            result.dtype = tl.int1
        return result

    return operate


def _assert(self, condition, message):
    if not np.all(condition.data):
        raise AssertionError(f"device_assert in program {self.grid_idx}: {message}")


# ----------------------------------------------------------------------------------------- memory

_ranges: dict[int, int] = {}  # first byte -> one past the last, of each tensor of this launch
_stored: list[np.ndarray] = []
_patched: set[int] = set()
_chosen: list[int] | None = None
_original_argument = interpreter._implicit_cvt
_original_load, _original_store = Builder.create_masked_load, Builder.create_masked_store
_original_patch = interpreter._patch_lang_tensor


def _known_argument(arg: Any):
    if hasattr(arg, "data_ptr") and arg.numel():
        span = 1 + sum((n - 1) * s for n, s in zip(arg.shape, arg.stride(), strict=True))
        first = arg.data_ptr()
        _ranges[first] = max(_ranges.get(first, 0), first + span * arg.element_size())
    return _original_argument(arg)


@contextlib.contextmanager
def only(programs: Iterable[int]):
    """Within this, launches run these programs of the first axis alone (those that there are). A
    program takes some milliseconds: long inputs are sampled."""
    global _chosen
    _chosen = sorted(set(programs))
    try:
        yield
    finally:
        _chosen = None


def _launch(self, *args, **kwargs):
    """A launch on CPU tensors: nothing is copied, and errors of a kernel stay what they are."""
    for record in (_ranges, _stored, _patched):
        record.clear()
    known = inspect.getfullargspec(self.fn).args
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    for hook in self.pre_run_hooks:
        hook(*args, **kwargs)
    scope = interpreter._patch_lang(self.fn)
    try:
        bound = inspect.getcallargs(self.fn, *args, **kwargs)
        bound = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in bound.items()
        }
        grid = (*(self.grid(bound) if callable(self.grid) else self.grid), 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        first = range(grid[0]) if _chosen is None else [x for x in _chosen if x < grid[0]]
        for program in itertools.product(first, range(grid[1]), range(grid[2])):
            interpreter.interpreter_builder.set_grid_idx(*program)
            self.fn(**bound)
    finally:
        scope.restore()
    if _stored:
        addresses = np.sort(np.concatenate(_stored))
        twice = int((addresses[1:] == addresses[:-1]).sum())
        if twice:
            raise AssertionError(f"{twice} elements were stored more than once")


def _device_function(self, *args, **kwargs):
    """As the original, which patches Triton's modules anew at each call: 50 times slower."""
    if id(self.fn.__globals__) not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(id(self.fn.__globals__))
    return self.rewrite()(*args, **kwargs)


def _addresses(self, pointers, mask, what: str) -> np.ndarray:
    taken = np.broadcast_to(mask.data, pointers.data.shape)
    at = pointers.data[taken]
    size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    inside = np.zeros(at.shape, bool)
    for first, end in _ranges.items():
        inside |= (at >= np.uint64(first)) & (at + size <= np.uint64(end))
    if not inside.all():
        wrong = int((~inside).sum())
        raise IndexError(f"{wrong} elements to {what} in program {self.grid_idx} lie in no tensor")
    return at


def _guarded_load(self, pointers, mask, *rest):
    _addresses(self, pointers, mask, "load")
    return _original_load(self, pointers, mask, *rest)


def _guarded_store(self, pointers, value, mask, *rest):
    _stored.append(_addresses(self, pointers, mask, "store"))
    return _original_store(self, pointers, value, mask, *rest)


def _patch_tensor(tensor, scope):
    """numpy 2.4 makes no int of an array of one element."""
    _original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))
