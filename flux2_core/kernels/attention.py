"""Attention by whoever is fastest here and right: PyTorch, unless an installed library wins.

A provider is first held to `explicit` on this device, in float32: TOLERANCE for kernels that
multiply in the activations' dtype, DECIBELS for those with 8 bits. Those that pass run the first
attention of each kind (device, dtype, width of a head, lengths in powers of two) beside PyTorch's,
which stays unless one is WORTH times as fast; the choice holds as long as the program runs.
FLUX2_ATTENTION, or use(), names one instead. What fails later is switched off, with a line in the
log. On a CPU, under torch.compile (but for the log-sum-exp) and where gradients are wanted it is
always PyTorch's own call.
"""

import logging
import os
import time
from collections.abc import Callable
from functools import lru_cache, partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Flux2Error
from .attention_providers import PROVIDERS, LseKernel, Provider
from .ops import define, fp8_linear
from .table import Row, Wish, differentiated

log = logging.getLogger(__name__)

AUTO, SDPA = "auto", "sdpa"
WORTH = 1.05  # times PyTorch's speed, below which it stays
TOLERANCE = 3e-3  # of |error| / |exact|; rounding the result to bfloat16 alone makes 1.7e-3
DECIBELS = 30.0
LSE_TOLERANCE = 2e-2
ROUNDS = 5
PASSES = (torch.cuda.OutOfMemoryError, Flux2Error)


class Case(NamedTuple):
    """A kind of call; lengths are the least powers of two that queries and keys do not exceed."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"up to {self.queries} x {self.keys} rows, heads of {self.head_dim}, {kind}"


class Choice(NamedTuple):
    name: str
    kernel: Callable[..., Any]
    refused: tuple[tuple[str, str], ...]  # providers, and why not they


# ----------------------------------------------------------------------------------- the definition


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, rows: int = 1024):
    """The definition, in float32 (float64 where given): out and log-sum-exp of
    softmax(q k' / sqrt(D) + bias), `rows` queries at a time; bias (Q, K) or None."""
    kind = torch.promote_types(q.dtype, torch.float32)
    outs, sums = [], []
    for i in range(0, max(1, q.shape[2]), rows):
        part = q[:, :, i : i + rows].to(kind) * q.shape[-1] ** -0.5
        logits = part @ k.to(kind).mT
        if bias is not None:
            logits = logits + bias[i : i + rows]
        sums.append(logits.logsumexp(-1))
        outs.append((logits - sums[-1][..., None]).exp() @ v.to(kind))
    return torch.cat(outs, 2).to(q.dtype), torch.cat(sums, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _cpu(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def _flash(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _efficient(q, k, v):
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse[..., : q.shape[2]]  # some versions pad it


@lru_cache
def sdpa_lse(device: str, dtype: torch.dtype, head_dim: int) -> LseKernel:
    """PyTorch's first kernel with log-sum-exp that is right here, else `explicit`."""
    q, k, v = _sample(torch.device(device), dtype, head_dim, 5, 7)
    wanted = explicit(q, k, v)
    for kernel in {"cpu": (_cpu,), "cuda": (_flash, _efficient)}.get(torch.device(device).type, ()):
        try:
            got = kernel(q, k, v)
        except (RuntimeError, NotImplementedError, AttributeError):
            continue
        if all((a - b).abs().max() < LSE_TOLERANCE for a, b in zip(got, wanted, strict=True)):
            return kernel
    return explicit


# ------------------------------------------------------------------------------------- the question


class Question:
    """Attention, or attention with its log-sum-exp: who answers each kind of call."""

    def __init__(self, lse: bool):
        self.lse = lse
        self.chosen: dict[Case, Choice] = {}
        self.tested: dict[tuple, tuple[Callable[..., Any] | None, str]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """q (B, H, Q, D), k, v (B, H, K, D) -> out (B, H, Q, D) [and log-sum-exp (B, H, Q)];
        softmax scale 1 / sqrt(D), no mask."""
        if torch.compiler.is_compiling() and self.lse and not differentiated(q, k, v):
            return _opaque_lse(q, k, v)
        if torch.compiler.is_compiling() or type(q) is not Tensor or differentiated(q, k, v):
            return self._stock(q.device, q.dtype, q.shape[3])(q, k, v)
        case = Case(q.device, q.dtype, q.shape[3], _bucket(q.shape[2]), _bucket(k.shape[2]))
        choice = self.chosen.get(case) or self._choose(case, q, k, v)
        if choice.name == SDPA:
            return choice.kernel(q, k, v)
        try:
            return choice.kernel(q, k, v)
        except PASSES:
            raise
        except Exception as error:
            out = self._stock(*case[:3])(q, k, v)  # if this raises as well, the call is at fault
            self._switch_off(choice.name, case, error)
            return out

    def _stock(self, device: torch.device, dtype: torch.dtype, head_dim: int):
        return sdpa_lse(str(device), dtype, head_dim) if self.lse else sdpa

    def _choose(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Choice:
        stock = self._stock(*case[:3])
        able, refused = self.able(case)
        if able and _capturing(q.device):
            return Choice(SDPA, stock, refused)  # nothing can be measured now: not remembered
        wish = _wished()
        if wish not in (AUTO, SDPA) and wish in able:
            choice = Choice(wish, able[wish], refused)
        else:
            choice = fastest({SDPA: stock, **able}, (q, k, v), refused)
            if wish not in (AUTO, SDPA):
                log.warning("FLUX2_ATTENTION=%s is not used: %s", wish, dict(refused).get(wish))
        self.chosen[case] = choice
        return choice

    def able(self, case: Case) -> tuple[dict[str, Callable[..., Any]], tuple[tuple[str, str], ...]]:
        """-> the providers that may be used, and the others with why they may not."""
        able, refused, wish = {}, [], _wished()
        for provider in PROVIDERS:
            if wish not in (AUTO, provider.name):
                refused.append((provider.name, f"FLUX2_ATTENTION names {wish}"))
                continue
            kernel, reason = self._tested(provider, *case[:3])
            if kernel is None:
                refused.append((provider.name, reason))
            else:
                able[provider.name] = kernel
        return able, tuple(refused)

    def _tested(self, provider: Provider, device: torch.device, dtype: torch.dtype, head_dim: int):
        """-> a kernel and "", or None and why not; found out once."""
        key = (provider.name, device, dtype, head_dim)
        if key not in self.tested:
            reason = provider.refuses(device, dtype)
            find = provider.find_lse if self.lse else provider.find
            if not reason and find is None:
                reason = "it gives no log-sum-exp"
            kernel = None
            if not reason and find is not None:
                try:
                    kernel = find()
                    reason = _wrong(kernel, provider.exact, self.lse, device, dtype, head_dim)
                except torch.cuda.OutOfMemoryError:
                    return None, "there was no memory left to test it"
                except ImportError as error:
                    reason = str(error)
                except Exception as error:
                    reason = _failed(error)
            self.tested[key] = (None, reason) if reason else (kernel, "")
        return self.tested[key]

    def _switch_off(self, name: str, case: Case, error: Exception) -> None:
        reason = _failed(error)
        self.tested[(name, *case[:3])] = None, reason
        self.chosen = {c: choice for c, choice in self.chosen.items() if choice.name != name}
        log.warning("Attention by %s is switched off on %s: %s", name, case.device, reason)


attention, attention_lse = Question(lse=False), Question(lse=True)


# For torch.compile: who gives the log-sum-exp is found by trying, which is nothing to be traced.


def _attention_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, sums = attention_lse(q, k, v)
    return out.contiguous(), sums.float().contiguous()


def _fake_attention_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


_SCHEMAS = {"attention_lse": "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)"}
_opaque_lse = define(_SCHEMAS, globals(), fp8_linear.namespace)["attention_lse"]


# ------------------------------------------------------------------------------------ right and fast


def _sample(device: torch.device, dtype: torch.dtype, head_dim: int, queries: int, keys: int):
    """q, k, v (1, 2, L, D) laid out as the passes of `qk_norm_rope` leave them, a token's heads beside
    each other. As in trained models, keys share a mean that is larger than what tells them apart."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, head_dim, generator=made) for n in (queries, keys, keys))
    k = k + 2 * torch.randn(1, 1, 2, head_dim, generator=made)
    q, k, v = (x.to(device, dtype).transpose(1, 2) for x in (q, k, v))
    return q, k, v


def _wrong(kernel, exact: bool, lse: bool, device, dtype, head_dim: int) -> str:
    """Why a kernel is not accurate enough, or nothing. The lengths fit no block size."""
    q, k, v = _sample(device, dtype, head_dim, 333, 777)
    wanted, sums = explicit(q.float(), k.float(), v.float())
    got = kernel(q, k, v)
    out = got[0] if lse else got
    if out.shape != wanted.shape or out.dtype != dtype:
        return f"it gives {tuple(out.shape)} {out.dtype} for {tuple(wanted.shape)} {dtype}"
    error = ((out.float() - wanted).norm() / wanted.norm()).item()
    if exact and not error <= TOLERANCE:
        return f"its error is {error:.1e}, at most {TOLERANCE:.0e} is allowed"
    decibels = -20 * torch.tensor(error).log10().item()
    if not exact and not decibels >= DECIBELS:
        return f"it comes to {decibels:.1f} dB, at least {DECIBELS:g} dB are asked for"
    if lse and not (got[1].float() - sums).abs().max().item() <= LSE_TOLERANCE:
        return "its log-sum-exp is wrong"
    return ""


def fastest(kernels: dict[str, Callable[..., Any]], qkv, refused) -> Choice:
    """The fastest of these on q, k, v; PyTorch's, the first one, unless another is WORTH more."""
    calls, reasons = {}, list(refused)
    for name, kernel in kernels.items():
        call = partial(kernel, *qkv)
        try:
            if len(kernels) > 1:
                call()
            calls[name] = call
        except Exception as error:
            if name == SDPA:
                raise
            reasons.append((name, _failed(error)))
    times = seconds(calls, qkv[0].device) if len(calls) > 1 else dict.fromkeys(calls, 0.0)
    best = min(times, key=lambda name: times[name])
    if times[SDPA] < WORTH * times[best]:
        best = SDPA
    for name, taken in times.items():
        if name not in (SDPA, best):
            told = f"{times[SDPA] / taken:.2f} x the speed of PyTorch's"
            reasons.append((name, f"{told}, taken from {WORTH} x on" if best == SDPA else told))
        elif name == SDPA != best:
            reasons.append((name, f"{best} is {taken / times[best]:.2f} x as fast"))
    return Choice(best, kernels[best], tuple(reasons))


def seconds(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """The median time of each, all called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(_once(call, device))
    return {name: median(taken) for name, taken in times.items()}


def _once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000


def _failed(error: Exception) -> str:
    line = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return f"it failed: {type(error).__name__}: {line}"


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _bucket(rows: int) -> int:
    return 1 << max(rows - 1, 0).bit_length()


# ------------------------------------------------------------------------------- the user's wish

_wish = os.environ.get("FLUX2_ATTENTION", "").strip().lower() or AUTO


def use(name: str) -> Wish:
    """use("sdpa"): from now on, or for a `with` block, this provider, where it is right: auto, sdpa,
    flash, cudnn, sage, sage3, kitchen. The environment's FLUX2_ATTENTION says the same at the
    start. Raises Flux2Error for an unknown name."""
    return Wish(_set, name, _wish)


def _set(name: str) -> None:
    global _wish
    before, _wish = _wish, name
    try:
        _wished()
    except Flux2Error:
        _wish = before
        raise
    for question in (attention, attention_lse):
        question.chosen.clear()


def _wished() -> str:
    known = (AUTO, SDPA, *(provider.name for provider in PROVIDERS))
    if _wish not in known:
        raise Flux2Error(
            "FLUX2_ATTENTION names what is not there", _wish, f"Use one of {', '.join(known)}"
        )
    return _wish


def status(device: torch.device | str | None = None) -> list[Row]:
    """Who computes attention on `device` (default: the first GPU, else the CPU), for the kinds of
    calls seen so far, or for a typical one before any; and why not the others."""
    place = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    rows = []
    for name, question in (("attention", attention), ("attention in segments", attention_lse)):
        seen = [case for case in question.chosen if case.device == place]
        for case in seen or [Case(place, torch.bfloat16, 128, 8192, 8192)]:
            if choice := question.chosen.get(case):
                rows.append(Row(name, str(place), str(case), choice.name, choice.refused))
                continue
            able, refused = question.able(case)
            waiting = [(n, "it is measured when the first picture is drawn") for n in able]
            rows.append(Row(name, str(place), str(case), SDPA, (*waiting, *refused)))
    return rows
