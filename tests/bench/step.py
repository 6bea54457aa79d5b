"""One forward pass of the transformer, beside its peers and the bare work.

    python3 dev.py bench step [--json FILE] [--force] [--rounds 5] [--references 0 1 4]
                              [--beside DIR ...] [--threads N]

klein 4B's width, one double and two single blocks, bfloat16, a 512 x 512 picture, 512 text rows,
references of 512 x 512. Peers: diffusers, and the ComfyUIs named by COMFYUI_PATH and --beside,
with PyTorch attention; ours is also run as these would. All share one set of random weights, and
are first compared in float32. The bare work is the matrix products and attentions of our own
forward, alone.
"""

import argparse
import importlib
import os
import sys
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F

import report

from flux2_pack.flux2_core.configs import TransformerConfig
from flux2_pack.flux2_core.keymaps import TRANSFORMER, to_diffusers
from flux2_pack.flux2_core.latents import grid, tokens
from flux2_pack.flux2_core.positions import REFERENCE_T, picture_ids, text_ids
from flux2_pack.flux2_core.transformer import Flux2Transformer

CONFIG = TransformerConfig(3072, 7680, 1, 2, guidance_embed=False)
OURS, WHOLE, BARE = "ours", "ours, every row computed", "bare products and attention"
AT_MOST = 1.10  # ours over the fastest peer
AT_MOST_ERROR = 1e-5  # 9.7e-7


class Whole(Flux2Transformer):
    """Ours, with the last block's rows that nobody reads."""

    def single(self, i, s):
        return self.single_blocks[i](s.img, s.single_mod, s.rope, s.attention())


def built(make, weights: dict):
    """make() filled with these very tensors, not copies of them."""
    with torch.device("meta"):
        model = make()
    # newer ComfyUIs call the norms' weights `weight`, all others `scale`
    known, renamed = model.state_dict(), (".scale", ".weight")
    names = {k: k if k in known else k.replace(*renamed) for k in weights}
    model.load_state_dict({names[k]: v for k, v in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


def random_weights(seed: int = 0) -> dict:
    """Weights in bfloat16 that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in Flux2Transformer(CONFIG).state_dict().items()}

    def tensor(shape):
        scale, mean = (shape[1] ** -0.5, 0) if len(shape) > 1 else (0.1, 1)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(mean, scale, generator=generator)

    return {name: tensor(shape) for name, shape in shapes.items()}


def inputs(references: int, side: int, text: int, dtype=torch.bfloat16, seed: int = 1) -> dict:
    """What our forward takes; `side` in latent pixels."""
    generator = torch.Generator().manual_seed(seed)
    x, *refs = (
        torch.randn(1, CONFIG.in_channels, side, side, generator=generator).to(dtype)
        for _ in range(1 + references)
    )
    context = torch.randn(1, text, CONFIG.context_dim, generator=generator).to(dtype)
    return {"x": x, "timestep": torch.tensor([0.5]), "context": context, "references": refs}


def diffusers_peer(weights: dict) -> dict:
    """diffusers' transformer, called as ours is."""
    import diffusers

    make = partial(
        diffusers.Flux2Transformer2DModel,
        num_layers=CONFIG.double_blocks,
        num_single_layers=CONFIG.single_blocks,
        num_attention_heads=CONFIG.heads,
        joint_attention_dim=CONFIG.context_dim,
        guidance_embeds=False,
    )
    model = built(make, to_diffusers(weights, TRANSFORMER))

    def forward(x, timestep, context, references):
        pictures = [x, *references]
        ids = [picture_ids(*p.shape[2:], REFERENCE_T * i) for i, p in enumerate(pictures)]
        out = model(
            torch.cat([tokens(p) for p in pictures], 1),
            encoder_hidden_states=context,
            timestep=timestep,
            img_ids=torch.cat(ids),
            txt_ids=text_ids(context.shape[1]),
            return_dict=False,
        )[0]
        h, w = x.shape[2:]
        return grid(out[:, : h * w], h, w)

    return {f"diffusers {diffusers.__version__}": forward}


@contextmanager
def importing(folder: str):
    """Inside, `comfy` is that ComfyUI's; afterwards no ComfyUI is imported, so another can be."""
    sys.path.insert(0, folder)
    try:
        args = importlib.import_module("comfy.cli_args").args
        args.cpu, args.use_pytorch_cross_attention = True, True
        yield
    finally:
        sys.path.remove(folder)
        ours = ("comfy", "comfyui_version", "flux2_pack.nodes")
        for name in [n for n in sys.modules if n in ours or n.startswith(("comfy.", ours[-1]))]:
            del sys.modules[name]


def comfyui_peers(folder: str, weights: dict) -> dict:
    """ComfyUI's own FLUX.2, and ours as it runs there."""
    with importing(folder):
        version = importlib.import_module("comfyui_version").__version__
        theirs = importlib.import_module("comfy.ldm.flux.model")
        ours = importlib.import_module("flux2_pack.nodes.host_model")
        ops = importlib.import_module("comfy.ops").disable_weight_init
        dtype = weights["img_in.weight"].dtype
        params = ours.unet_config(CONFIG)
        known = {f.name for f in fields(theirs.FluxParams)}
        kw = {"dtype": dtype, "operations": ops}
        flux = partial(theirs.Flux, **{k: v for k, v in params.items() if k in known}, **kw)
        method = {k: params[k] for k in ("default_ref_method", "ref_index_scale")}
        networks = {
            f"ComfyUI {version}": built(flux, weights),
            f"ours in ComfyUI {version}": built(
                partial(ours.HostTransformer, CONFIG, **method, **kw), weights
            ),
        }

    def forward(model, x, timestep, context, references):
        return model(x, timestep, context, ref_latents=references or None)

    return {name: partial(forward, model) for name, model in networks.items()}


def bare(model: Flux2Transformer, arguments: dict):
    """The linear layers and attentions that model(**arguments) runs, on inputs of the same shapes."""
    jobs, made = [], {}

    def like(x):
        if x.shape not in made:
            made[x.shape] = torch.randn(x.shape, dtype=x.dtype, device=x.device)
        return made[x.shape]

    def linear(layer, args, _):
        jobs.append(partial(F.linear, like(args[0]), layer.weight))

    def attention(*qkv):
        jobs.append(partial(stock, *(like(x) for x in qkv)))
        return stock(*qkv)

    stock = F.scaled_dot_product_attention
    hooks = [
        m.register_forward_hook(linear) for m in model.modules() if isinstance(m, torch.nn.Linear)
    ]
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        model(**arguments)
    for hook in hooks:
        hook.remove()

    def run():
        for job in jobs:
            job()

    return run


def everyone(weights: dict, hosts: list[str]) -> dict:
    """name -> forward, all with the same weights."""
    out = {OURS: built(partial(Flux2Transformer, CONFIG), weights)}
    out[WHOLE] = built(partial(Whole, CONFIG), weights)
    out |= diffusers_peer(weights)
    for folder in hosts:
        out |= comfyui_peers(folder, weights)
    return out


def compare(weights: dict, hosts: list[str], out: report.Report) -> None:
    """In float32, on a small picture: do all compute the same thing?"""
    models = everyone({k: v.float() for k, v in weights.items()}, hosts)
    i = inputs(2, 6, 20, torch.float32)
    wanted = models[OURS](**i)
    for name, model in models.items():
        if name != OURS:
            error = ((model(**i) - wanted).abs().max() / wanted.std()).item()
            out.add("float32", "largest error / std", error, "", peer=name, at_most=AT_MOST_ERROR)


def judge(case: str, times: dict, out: report.Report) -> None:
    middle = {name: median(t) for name, t in times.items()}
    ratios = {name: report.ratio(times[OURS], t) for name, t in times.items()}
    for name, seconds in middle.items():
        beside = {} if name == OURS else {"peer": name, "ratio": ratios[name]}
        out.add(case, f"forward, {name}", seconds, "s", **beside)
    fastest = min((n for n in times if n.startswith(("diffusers", "ComfyUI"))), key=middle.get)
    beside = {"peer": fastest, "ratio": ratios[fastest]}
    out.add(case, "over the fastest peer", ratios[fastest], "x", **beside, at_most=AT_MOST)
    spared = middle[WHOLE] - middle[OURS]
    out.add(case, "spared by the last block's unread rows", spared, "s")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parser.add_argument("--beside", nargs="*", default=[], metavar="DIR", help="more ComfyUIs")
    parser.add_argument("--references", nargs="*", type=int, default=[0, 1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # ComfyUI reads the command line too
    if options.threads:
        torch.set_num_threads(options.threads)

    out = report.Report("step", options)
    out.quiet()
    weights = random_weights()
    hosts = [folder for folder in (os.environ.get("COMFYUI_PATH"), *options.beside) if folder]
    compare(weights, hosts, out)
    models = everyone(weights, hosts)
    for references in options.references:
        i = inputs(references, 32, CONFIG.text_length)
        calls = {name: partial(model, **i) for name, model in models.items()}
        calls[BARE] = bare(models[OURS], i)
        judge(f"{references} references", out.interleaved(calls, options.rounds), out)
    out.finish()


if __name__ == "__main__":
    main()
