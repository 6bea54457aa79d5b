"""The autoencoder, whole and strip by strip: memory, time, peers, and TAEF2's quality.

    python3 dev.py bench vae [--json FILE] [--force] [--only memory time taef2] [--full]
                             [--size 1024] [--rounds 3] [--dtype float32] [--device cpu]
                             [--taef2 DIR]

The released shape with random weights. Memory is the bytes of live tensors beyond the weights,
counted on tensors without numbers. Time is ours whole and strip by strip in turns, then each peer
in a process of its own, with its largest resident memory: diffusers whole and tiled, and the
ComfyUI named by COMFYUI_PATH. --full adds 2048 x 2048, once. --taef2 is the folder that holds
TAEF2's two files; their round trip needs scikit-image's photographs.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

import report

from flux2_pack.flux2_core import sizes, taef2, vae_stream
from flux2_pack.flux2_core.autoencoder import AutoEncoder
from flux2_pack.flux2_core.configs import AutoEncoderConfig
from flux2_pack.flux2_core.vae_memory import WAYS

GIB = 2**30
STREAMED, LEAN = WAYS[1], WAYS[2]
MOST, SHARE, SLOWER = 3.0, 0.5, 1.2  # GiB; of whole's memory; times whole's time
PHOTOGRAPHS = {  # dB, as published with the weights this was measured with first
    "astronaut": 31.2, "coffee": 29.6, "chelsea": 32.7, "rocket": 30.5, "hubble_deep_field": 30.2,
}  # fmt: skip
OURS = ("ours, whole", "ours, strip by strip", "ours, strip by strip, lean")
PEERS = ("diffusers, whole", "diffusers, tiled", "ComfyUI, whole", "ComfyUI, tiled")


def memory(out: report.Report) -> None:
    counter = importlib.import_module("flux2_pack.tests.core.live_bytes").LiveBytes

    def peak(call):
        with counter() as counted:
            call()
        return counted.peak / GIB

    for width, height in ((2048, 2048), (2048, 2064)):
        with FakeTensorMode(), torch.inference_mode():
            vae = AutoEncoder(AutoEncoderConfig(), dtype=torch.bfloat16)
            pixels = torch.empty(1, 3, height, width, dtype=torch.bfloat16)
            latents = torch.empty(1, 128, height // 16, width // 16, dtype=torch.bfloat16)
            calls = {  # encoding below `encode` itself, which looks at every number
                "encode": (partial(vae.encoder, pixels), partial(vae_stream._encode, vae, pixels)),
                "decode": (partial(vae.decode, latents), partial(vae_stream.decode, vae, latents)),
            }
            for job, (whole, streamed) in calls.items():
                case, most = f"{job} {width} x {height}, bf16", peak(whole)
                out.add(case, "live tensors, whole", most, "GiB")
                for name, how in (("strip by strip", STREAMED), ("strip by strip, lean", LEAN)):
                    taken = peak(partial(streamed, how))
                    out.add(case, f"live tensors, {name}", taken, "GiB", at_most=MOST)
                    out.add(case, f"share of whole, {name}", taken / most, "", at_most=SHARE)


def random_state(dtype) -> dict:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = AutoEncoder(AutoEncoderConfig()).state_dict()

    def tensor(name, like):
        if name.startswith("bn."):
            return torch.full(like.shape, float("mean" not in name)).to(like.dtype)
        scale, mean = (
            (0.1, float("norm" in name)) if like.ndim == 1 else (like[0].numel() ** -0.5, 0)
        )
        return torch.empty(like.shape, dtype=dtype).normal_(mean, scale, generator=generator)

    return {name: tensor(name, like) for name, like in shapes.items()}


def ours(state: dict, device: str) -> AutoEncoder:
    with torch.device("meta"):
        vae = AutoEncoder(AutoEncoderConfig())
    vae.load_state_dict(state, assign=True)
    return vae.to(device).eval().requires_grad_(False)


def decoders(options) -> dict:
    """name -> a call that decodes latents of the size, for those of ours."""
    vae = ours(random_state(options.kind), options.device)
    x = latents(options)
    how = dict(zip(OURS, (None, STREAMED, LEAN), strict=True))
    return {
        name: partial(vae.decode, x) if h is None else partial(vae_stream.decode, vae, x, h)
        for name, h in how.items()
    }


def latents(options) -> torch.Tensor:
    side = options.size // 16
    x = torch.randn(1, 128, side, side, generator=torch.Generator().manual_seed(1))
    return x.to(options.device, options.kind)


def peer(name: str, options):
    """The call of one peer."""
    if name in OURS:
        return decoders(options)[name]
    x = latents(options)
    if name.startswith("diffusers"):
        diffusers = importlib.import_module("diffusers")
        theirs = diffusers.AutoencoderKLFlux2().to(options.device, options.kind).eval()
        if "tiled" in name:
            theirs.enable_tiling()
        unpacked = torch.nn.functional.pixel_shuffle(x, 2)
        return lambda: theirs.decode(unpacked).sample
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    importlib.import_module("comfy.cli_args").args.cpu = options.device == "cpu"
    vae = importlib.import_module("comfy.sd").VAE(sd=random_state(options.kind))
    if "tiled" in name:
        return lambda: vae.decode_tiled(x, tile_x=64, tile_y=64, overlap=16)
    return lambda: vae.decode(x)


@torch.inference_mode()
def child(name: str, options) -> None:
    """Runs in a process of its own: a JSON line of seconds and GiB."""
    call = peer(name, options)
    rounds = []
    for _ in range(options.rounds + 1):
        begun = time.perf_counter()
        call()
        if options.device != "cpu":
            torch.cuda.synchronize()
        rounds.append(time.perf_counter() - begun)
    most = resident() if options.device == "cpu" else torch.cuda.max_memory_allocated()
    found = {"seconds": median(rounds[1:] or rounds)}
    print(json.dumps(found if most is None else found | {"GiB": most / GIB}))


def resident() -> int | None:
    """The most bytes of this process that were in memory; None where the system does not say. Not
    getrusage: its figure begins with the parent's."""
    if not (table := Path("/proc/self/status")).exists():
        return None
    lines = (line.partition(":") for line in table.read_text().splitlines())
    return next(int(value.split()[0]) * 1024 for name, _, value in lines if name == "VmHWM")


def beside(case: str, options, out: report.Report) -> None:
    for name in (*OURS, *PEERS):
        if name.startswith("ComfyUI") and not os.environ.get("COMFYUI_PATH"):
            print(f"skipped: {name}: COMFYUI_PATH names no ComfyUI", file=sys.stderr)
            continue
        given = [
            f"--{key}={getattr(options, key)}" for key in ("size", "rounds", "dtype", "device")
        ]
        run = subprocess.run(
            [sys.executable, __file__, f"--child={name}", *given], capture_output=True, text=True
        )
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["ended"])[-1]
            print(f"skipped: {name}: {reason}", file=sys.stderr)
            continue
        found = json.loads(run.stdout.splitlines()[-1])
        out.add(case, f"decode, {name}", found["seconds"], "s", peer=name)
        if "GiB" in found:
            out.add(case, f"largest memory of the process, {name}", found["GiB"], "GiB", peer=name)


@torch.inference_mode()
def timed(options, out: report.Report) -> None:
    case = f"decode {options.size} x {options.size}, {options.dtype}"
    calls = decoders(options)
    times = out.interleaved(calls, options.rounds)
    for name, seconds in times.items():
        out.add(case, f"in turns, {name}", median(seconds), "s")
    for name in OURS[1:]:
        # the lean way computes more, and is only taken where the other does not fit
        bound = {"at_most": SLOWER} if name == OURS[1] else {}
        out.add(
            case, f"{name}, over whole", report.ratio(times[name], times[OURS[0]]), "x", **bound
        )
    whole = calls[OURS[0]]()
    for name in OURS[1:]:
        error = ((calls[name]() - whole).float().abs().max() / whole.float().std()).item()
        out.add(case, f"{name}, largest error / std", error, "")
    del calls, whole
    beside(case, options, out)


@torch.inference_mode()
def tiny(folder: Path | None, out: report.Report) -> None:
    """TAEF2's round trip on scikit-image's photographs."""
    try:
        data = importlib.import_module("skimage.data")
    except ImportError:
        print("skipped: TAEF2: scikit-image is not installed", file=sys.stderr)
        return
    if folder is None:
        print("skipped: TAEF2: --taef2 names no folder with its files", file=sys.stderr)
        return
    net = taef2.TinyAutoEncoder().eval()
    net.encoder.load_state_dict(load_file(folder / "taef2_encoder.safetensors"))
    net.decoder.load_state_dict(load_file(folder / "taef2_decoder.safetensors"))
    for name, wanted in PHOTOGRAPHS.items():
        picture = torch.from_numpy(getattr(data, name)()[..., :3].copy()).float()[None] / 255
        height, width = (side // sizes.PIXELS * sizes.PIXELS for side in picture.shape[1:3])
        pixels = picture[:, :height, :width].movedim(-1, 1) * 2 - 1
        drawn = net.decode(net.encode(pixels))
        psnr = 10 * torch.log10(4 / (drawn - pixels).square().mean()).item()
        out.add("TAEF2", f"PSNR, {name}", psnr, "dB")
        out.add("TAEF2", f"off its table, {name}", abs(psnr - wanted), "dB", at_most=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    parts = ("memory", "time", "taef2")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--full", action="store_true", help="2048 x 2048 too, once")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--taef2", type=Path, metavar="DIR")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # ComfyUI reads the command line too
    options.kind = getattr(torch, options.dtype)
    if options.child:
        return child(options.child, options)
    out = report.Report("vae", options, options.device)
    if "memory" in options.only:
        memory(out)
    if "time" in options.only:
        timed(options, out)
        if options.full:
            options.size, options.rounds = 2048, 0
            beside(f"decode 2048 x 2048, {options.dtype}, once", options, out)
    if "taef2" in options.only:
        tiny(options.taef2, out)
    out.finish()


if __name__ == "__main__":
    main()
