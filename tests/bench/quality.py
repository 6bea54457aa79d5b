"""Your own pictures, through two autoencoders or out of two runs: how far they are apart.

    python3 dev.py bench quality --pictures DIR [--vae nano FILE ...] [--json FILE] [--perceptual]
    python3 dev.py bench quality --runs DIR DIR [--json FILE] [--perceptual]

--vae: each picture is encoded and decoded by each autoencoder (a FLUX.2 VAE, small decoder or TAEF2;
nano is the built-in one) and held to the picture itself. --runs: pictures of the same name in two
folders are held to each other. PSNR (given up to 100 dB) and SSIM: higher is closer; colour
difference (CIEDE2000) and LPIPS: lower is. LPIPS needs the package lpips.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

import report

from flux2_pack.flux2_core import quality, sizes
from flux2_pack.flux2_core.checkpoint import load_autoencoder
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.references import read
from flux2_pack.flux2_core.vae_memory import Memory

KINDS = {".png", ".jpg", ".jpeg", ".webp"}
UNITS = {"psnr": "dB", "ssim": "", "delta_e": "CIEDE2000", "delta_e_95": "CIEDE2000", "lpips": ""}


def pictures(folder: Path) -> dict[str, Path]:
    """Name without ending -> file. Raises Flux2Error where there is no picture."""
    found = {f.stem: f for f in sorted(folder.glob("*")) if f.suffix.lower() in KINDS}
    if not found:
        raise Flux2Error(
            "There are no pictures in this folder", str(folder), "Put PNG, JPEG or WebP files there"
        )
    return found


@torch.inference_mode()
def round_trip(vae, picture: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) in [0, 1] -> encoded, decoded, and cut back to its size."""
    padded, memory = sizes.pad(picture[None]), Memory()
    dtype = next(vae.parameters()).dtype
    latent = memory.encode(vae, padded.movedim(-1, 1).to(dtype) * 2 - 1)
    out = (memory.decode(vae, latent).float().movedim(1, -1) + 1) / 2
    return sizes.cut(out.clamp(0, 1), (picture.shape[1], picture.shape[0]))[0]


def through(
    folder: Path, names: list[str]
) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """(autoencoder, picture's name, picture, what came back) of each autoencoder and picture."""
    for name in names:
        vae = load_autoencoder(name)
        for title, file in pictures(folder).items():
            picture = read(file).image
            yield Path(name).stem, title, picture, round_trip(vae, picture)


def between(first: Path, second: Path) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """The pictures that both folders have."""
    a, b = pictures(first), pictures(second)
    if not (both := sorted(a.keys() & b.keys())):
        raise Flux2Error(
            "The two folders have no picture of the same name",
            f"{', '.join(list(a)[:3])} ... and {', '.join(list(b)[:3])} ...",
            "Name the pictures that belong together alike",
        )
    for title in both:
        yield f"{first.name} and {second.name}", title, read(a[title]).image, read(b[title]).image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.options(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pictures", type=Path, metavar="DIR")
    what.add_argument("--runs", type=Path, nargs=2, metavar="DIR")
    parser.add_argument("--vae", nargs="+", default=["nano"], metavar="FILE")
    parser.add_argument("--perceptual", action="store_true", help="LPIPS too")
    options = parser.parse_args()
    out = report.Report("quality", options)
    found: dict[str, list[dict]] = {}
    try:
        pairs = between(*options.runs) if options.runs else through(options.pictures, options.vae)
        for case, title, a, b in pairs:
            values = asdict(quality.distance(a, b, perceptual=options.perceptual))
            values = {k: v for k, v in values.items() if v is not None}
            values["psnr"] = min(values["psnr"], 100.0)  # infinity is no JSON
            for key, value in values.items():
                out.add(f"{case}, {title}", key, value, UNITS[key])
            found.setdefault(case, []).append(values)
    except Flux2Error as error:
        parser.error(str(error))
    for case, rows in found.items():
        for key in rows[0]:
            middle = median(row[key] for row in rows)
            out.add(f"{case}, {len(rows)} pictures", f"median {key}", middle, UNITS[key])
    if options.perceptual and "lpips" not in next(iter(found.values()))[0]:
        print("LPIPS was left out: the Python package lpips is not installed")
    out.finish()


if __name__ == "__main__":
    main()
