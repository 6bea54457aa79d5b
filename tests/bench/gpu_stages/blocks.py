"""Blocks and whole models with random weights: bf16, fp8 with and without fused passes, and peers."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import nn

from gpu_stages.bench import Bench, Model, decibels

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.configs import TransformerConfig
from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.kernels.reference import E4M3, E4M3_MAX, SMALLEST_AMAX
from flux2_pack.flux2_core.layers import Modulation
from flux2_pack.flux2_core.positions import rope_table
from flux2_pack.flux2_core.quantised import BLOCK_LINEARS, FP8_FORM, QuantLinear
from flux2_pack.flux2_core.transformer import Flux2Transformer

BF16, BF16_FUSED, UNFUSED, FUSED = "bf16", "bf16, fused", "fp8, not fused", "fp8, fused"
OVER_UNFUSED = 1.15
NOT_SLOWER = 1.0
RUNS = 6


# --------------------------------------------------------------------------------------- the models


def config(model: Model, double: int, single: int) -> TransformerConfig:
    return TransformerConfig(model.hidden, model.context, double, single, guidance_embed=False)


def built(b: Bench, model: Model, double: int = 1, single: int = 1, fp8: bool = False):
    """A transformer with random weights that keep activations near 1; block linears in fp8 as they
    are made, so that the whole never stands in bf16 beside it."""
    with torch.device("meta"):
        network = Flux2Transformer(config(model, double, single), dtype=torch.bfloat16)
    for seed, (name, layer) in enumerate(list(network.named_modules())):
        own = dict(layer.named_parameters(recurse=False))
        for part, empty in own.items():
            shape = tuple(empty.shape)
            scale, mean = (shape[1] ** -0.5, 0.0) if len(shape) > 1 else (0.1, 1.0)
            weight = b.randn(*shape, scale=scale, seed=seed).add_(mean)
            if fp8 and isinstance(layer, nn.Linear) and BLOCK_LINEARS.fullmatch(name):
                network.set_submodule(name, QuantLinear(encode(weight, FP8_FORM)))
            else:
                setattr(layer, part, nn.Parameter(weight, requires_grad=False))
    return network.eval()


def quantised(network: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy with other block linears, all else shared."""
    shared = {id(p): p for p in network.parameters()}
    out = copy.deepcopy(network, shared)
    for name, layer in list(out.named_modules()):
        if isinstance(layer, nn.Linear) and BLOCK_LINEARS.fullmatch(name):
            out.set_submodule(name, make(layer))
    return out


def ours(layer: nn.Linear) -> QuantLinear:
    return QuantLinear(encode(layer.weight, FP8_FORM))


class Unfused(QuantLinear):
    """Takes numbers only: norms, activations and quantising are passes of their own."""

    def takes_codes(self, x):
        return False


def unfused(layer: nn.Linear) -> Unfused:
    return Unfused(encode(layer.weight, FP8_FORM))


def plain_quantize(x):
    """Row quantising as one writes it in PyTorch without care for the last bit: fewer passes than
    the definition, so that the comparison is with good code."""
    amax = x.abs().amax(-1, keepdim=True).float().clamp_min(SMALLEST_AMAX)
    codes = (x * (E4M3_MAX / amax)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes, amax / E4M3_MAX


kernels.register("quantize_rows", "plain", -1, plain_quantize)  # only where it is named


@contextmanager
def served(b: Bench, form: str) -> Iterator[None]:
    """Who serves while a form runs. A CPU has nothing but PyTorch, which is asked for by name:
    otherwise fp8 weights would be multiplied in bf16 there."""
    here = {UNFUSED: "plain,torch", FUSED: "auto", BF16_FUSED: "auto"}
    there = {UNFUSED: "plain,eager", FUSED: "eager", BF16_FUSED: "reference"}
    with kernels.use((here if b.cuda else there).get(form, "off")):
        yield


# ------------------------------------------------------------------------------------------- peers


def kitchen(layer: nn.Linear) -> nn.Module:
    """As ComfyUI computes fp8 with comfy-kitchen: a scale for the whole tensor on both sides."""
    tensor = import_module("comfy_kitchen.tensor")

    class Kitchen(nn.Module):
        def __init__(self):
            super().__init__()
            form = tensor.QuantizedTensor.from_float
            self.make = partial(form, layout_cls="TensorCoreFP8Layout")
            self.codes = form(layer.weight, "TensorCoreFP8Layout")

        def forward(self, x):
            rows = x.reshape(-1, x.shape[-1])
            out = F.linear(self.make(rows), self.codes)
            return out.reshape(*x.shape[:-1], -1)

    return Kitchen()


def torchao(network: nn.Module) -> nn.Module:
    """torchao's dynamic fp8 with a scale for each row."""
    ao = import_module("torchao.quantization")
    how = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    out = quantised(network, lambda layer: copy.deepcopy(layer))
    ao.quantize_(out, how, filter_fn=lambda m, name: bool(BLOCK_LINEARS.fullmatch(name)))
    return out


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "comfy-kitchen fp8": lambda network: quantised(network, kitchen),
    "torchao fp8": torchao,
}


# ------------------------------------------------------------------------------------------- blocks


class Inputs:
    """What blocks take, for some references."""

    def __init__(self, b: Bench, model: Model, references: int):
        h, side = model.hidden, b.side
        self.text, self.rows = b.text, b.rows(references)
        self.xs = [b.randn(1, self.rows, h, seed=i) for i in range(3)]
        parts = [b.randn(1, 1, h, scale=0.3, seed=20 + i) for i in range(6)]
        self.first, self.second = Modulation(*parts[:3]), Modulation(*parts[3:])
        sizes = ((side, side),) * references
        axes = TransformerConfig().axes_dim
        self.rope = rope_table(b.text, (side, side), sizes, axes, 2000, b.device)

    def single(self, network) -> list[Callable]:
        block = network.single_blocks[0]
        return [partial(block, x, self.first, self.rope) for x in self.xs]

    def double(self, network) -> list[Callable]:
        block, mods = network.double_blocks[0], (self.first, self.second)
        pairs = [(x[:, self.text :], x[:, : self.text]) for x in self.xs]
        return [partial(block, *pair, mods, mods, self.rope) for pair in pairs]


def within(b: Bench, form: str, calls: list[Callable]) -> list[Callable]:
    def run(call):
        with served(b, form):
            return call()

    return [partial(run, call) for call in calls]


def forms(b: Bench, bf16: nn.Module) -> dict[str, nn.Module]:
    made = {BF16: bf16, BF16_FUSED: bf16}
    made |= {UNFUSED: quantised(bf16, unfused), FUSED: quantised(bf16, ours)}
    return made | {name: peer for name in PEERS if (peer := _peer(b, name, bf16)) is not None}


def _peer(b: Bench, name: str, bf16: nn.Module) -> nn.Module | None:
    try:
        made = PEERS[name](bf16)
        b.out.add("peers", f"{name}, version {version(name.split()[0])}", 1, "")
        return made
    except Exception as error:
        b.out.add("peers", f"{name} is absent: {type(error).__name__}: {error}"[:200], 0, "")
        return None


def blocks(b: Bench) -> None:
    """One block of each kind in every form, and what a step of the whole model comes to."""
    for name, model in b.models.items():
        networks = forms(b, built(b, model))
        for at, references in enumerate(b.references):
            if b.left < (90 if references < 10 else 120) and not b.small:
                return
            inputs = Inputs(b, model, references)
            times = {}
            for kind in ("single", "double"):
                times[kind] = one(
                    b, f"{name}, {kind}, {references} references", kind, networks, inputs
                )
                if kind == "single":
                    required(b, f"{name}, {references} references", model, at, times[kind])
            for form in times["single"].keys() & times["double"].keys():
                step = model.single * times["single"][form] + model.double * times["double"][form]
                case = f"step, {name}, {references} references"
                beside = {} if form == BF16 else {"peer": BF16}
                b.out.add(case, f"derived, {form}", step, "s", **beside)
        del networks


def one(b: Bench, case: str, kind: str, networks: dict, inputs: Inputs) -> dict[str, float]:
    """-> form -> seconds of one block."""
    calls, wanted = {}, None
    for form, network in networks.items():
        some = within(b, form, getattr(inputs, kind)(network))
        try:
            out = some[0]()
        except Exception as error:
            b.out.add(case, f"{form} failed: {type(error).__name__}: {error}"[:200], 0, "")
            continue
        out = out[0] if isinstance(out, tuple) else out
        if wanted is None:
            wanted = out
        else:
            b.out.add(case, f"beside bf16, {form}", decibels(out, wanted), "dB")
        calls[form] = some
    del out, wanted
    taken = b.each(calls, RUNS if inputs.rows < 20_000 else 4, 1)
    for form, seconds in taken.items():
        beside = {} if form == BF16 else {"peer": BF16, "ratio": seconds / taken[BF16]}
        b.out.add(case, form, seconds, "s", **beside)
    return taken


def required(b: Bench, case: str, model: Model, at: int, times: dict[str, float]) -> None:
    """What the single block, most of every model, must reach."""
    if not {BF16, BF16_FUSED, FUSED, UNFUSED} <= times.keys():
        return b.out.add(case, "fp8 ran", 0, "", at_least=1)
    over = times[BF16] / times[FUSED]
    wanted = b.bound(max(NOT_SLOWER, model.fused_over_bf16[at]))
    b.out.add(case, "fp8 fused over bf16", over, "x", peer=BF16, at_least=wanted)
    over = times[BF16] / times[BF16_FUSED]
    bound = b.bound(NOT_SLOWER)
    b.out.add(case, "bf16 fused over bf16", over, "x", peer=BF16, at_least=bound)
    over = times[UNFUSED] / times[FUSED]
    b.out.add(
        case, "fp8 fused over not fused", over, "x", peer=UNFUSED, at_least=b.bound(OVER_UNFUSED)
    )


# ---------------------------------------------------------------------------------- compiled, whole


def compiled(b: Bench) -> None:
    """torch.compile's own fusion: bf16, fp8 with every pass apart, and ours under it."""
    for name in list(b.models)[:1] + list(b.models)[2:]:
        if b.left < 100 and not b.small:
            return
        model = b.models[name]
        networks = forms(b, built(b, model))
        for form in ("comfy-kitchen fp8", BF16_FUSED):  # the compiler fuses bf16's passes itself
            networks.pop(form, None)
        inputs = Inputs(b, model, 0)
        for form, network in networks.items():
            network.single_blocks[0].compile(backend="inductor" if b.cuda else "aot_eager")
            try:
                with served(b, form):  # around all: who serves is part of what is compiled
                    seconds = b.seconds(inputs.single(network), RUNS)
            except Exception as error:
                what = f"{form} failed: {type(error).__name__}: {error}"
                b.out.add(f"{name}, single, compiled", what[:200], 0, "")
                continue
            b.out.add(f"{name}, single, compiled", form, seconds, "s")


def step(b: Bench) -> None:
    """Whole models, measured: every block with weights of its own, one megapixel, no reference."""
    for name, model in b.models.items():
        whole = 2 * model.hidden**2 * (26 * model.double + 13 * model.single)  # bytes in bf16
        if b.cuda and whole > 0.85 * torch.cuda.mem_get_info(b.device)[0]:
            b.out.add(f"step, {name}", "left out: bf16 does not fit", whole / 2**30, "GiB")
            continue
        side, taken = b.side, {}
        x = b.randn(1, 128, side, side)
        context = b.randn(1, b.text, model.context, seed=1)
        t = torch.tensor([0.5], device=b.device)
        for form in (BF16, BF16_FUSED, FUSED):
            network = built(b, model, model.double, model.single, fp8=form == FUSED)
            taken[form] = b.seconds(within(b, form, [partial(network, x, t, context)]), 5, 2)
            if b.cuda:
                memory = torch.cuda.memory_allocated(b.device) / 2**30
                b.out.add(f"step, {name}", f"memory, {form}", memory, "GiB")
            del network
        for form, seconds in taken.items():
            beside = {} if form == BF16 else {"peer": BF16, "ratio": seconds / taken[BF16]}
            b.out.add(f"step, {name}", f"measured, {form}", seconds, "s", **beside)
