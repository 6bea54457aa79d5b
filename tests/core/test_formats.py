"""Codecs against the packages that define them: gguf and comfy-kitchen."""

import numpy as np
import pytest
import torch

from flux2_pack.flux2_core import formats_gguf
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import (
    FORMATS,
    Packed,
    e2m1_decode,
    e2m1_encode,
    encode,
    stack,
    swizzle,
    unswizzle,
)
from flux2_pack.tests.core.toys import decibels

WRITTEN = [name for name, form in FORMATS.items() if form.encode]
# least signal to quantisation noise in dB, on normal numbers; seen beside it
SQNR = {
    "float8_e4m3fn": 31,  # seen 31.6
    "float8_e5m2": 25,  # seen 25.6
    "int8_tensorwise": 38,  # seen 42.5
    "nvfp4": 20,  # seen 20.4
    "mxfp8": 31,  # seen 31.5
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", formats_gguf.TYPES)
def test_gguf_bit_for_bit(name):
    """Any bytes: what the gguf package makes of them."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    kind = formats_gguf.TYPES[name]
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (24, kind.bytes), generator=generator).to(torch.uint8)
    for start in {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "BF16": ()}.get(name, (0,)):
        half = torch.rand(24, generator=generator).sub(0.5).half().view(torch.uint8).reshape(24, 2)
        blocks[:, start : start + 2] = half
    if name == "BF16":
        blocks = normal(24, 1).bfloat16().view(torch.uint8)
    rows = blocks.reshape(4, -1)
    wanted = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name])
    got = Packed(f"gguf {name}", (4, 6 * kind.weights), {"weight": rows}).decode()
    assert np.array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0"])
def test_gguf_as_an_outside_writer_writes_it(name):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    weight = normal(8, 256)
    rows = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    got = Packed(f"gguf {name}", (8, 256), {"weight": torch.from_numpy(rows)}).decode()
    assert decibels(got, weight) > {"Q8_0": 40, "Q5_0": 25, "Q4_0": 18}[name]  # seen 45, 27, 21


def test_nvfp4_of_an_outside_writer():
    kitchen = pytest.importorskip("comfy_kitchen", reason="pip install comfy-kitchen")
    weight = normal(192, 160)  # neither 128 rows nor 4 columns of blocks: the container is padded
    whole = weight.abs().max() / (448 * 6)
    codes, scales = kitchen.quantize_nvfp4(weight.bfloat16(), whole, pad_16x=False)
    parts = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}
    wanted = kitchen.dequantize_nvfp4(codes, whole, scales, torch.float32)
    assert torch.equal(Packed("nvfp4", (192, 160), parts).decode(), wanted[:192, :160])


def test_mxfp8_of_an_outside_writer():
    kitchen = pytest.importorskip("comfy_kitchen", reason="pip install comfy-kitchen")
    weight = normal(160, 192)
    codes, scales = kitchen.quantize_mxfp8(weight.bfloat16(), pad_32x=False)
    wanted = kitchen.dequantize_mxfp8(codes, scales, torch.float32)
    got = Packed("mxfp8", (160, 192), {"weight": codes, "weight_scale": scales}).decode()
    assert torch.equal(got, wanted[:160, :192])


def test_our_nvfp4_is_what_an_outside_reader_reads():
    kitchen = pytest.importorskip("comfy_kitchen", reason="pip install comfy-kitchen")
    ours = encode(normal(256, 128), "nvfp4")
    p = ours.parts
    theirs = kitchen.dequantize_nvfp4(
        p["weight"], p["weight_scale_2"], p["weight_scale"], torch.float32
    )
    assert torch.equal(ours.decode(), theirs)


def test_the_swizzle_is_the_fact_sheets_formula():
    rows, columns = 200, 10
    scales = torch.arange(rows * columns).remainder(251).to(torch.uint8).reshape(rows, columns)
    flat, wide = swizzle(scales).flatten(), -(-columns // 4)
    for r, c in ((0, 0), (1, 0), (31, 3), (32, 0), (127, 9), (128, 4), (199, 9)):
        at = ((r // 128) * wide + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
        assert flat[at] == scales[r, c]
    assert torch.equal(unswizzle(swizzle(scales), rows, columns), scales)


def test_every_four_bit_code_comes_back():
    codes = torch.arange(256).to(torch.uint8).reshape(16, 16)
    again = e2m1_encode(e2m1_decode(codes))
    minus_zero = (codes >> 4 == 8) | (codes & 15 == 8)  # -0 is written as 0
    assert torch.equal(again[~minus_zero], codes[~minus_zero])


def test_halfway_goes_to_the_even_code():
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0]])
    assert e2m1_decode(e2m1_encode(x)).tolist() == [[0, 1, 1, 2, 2, 4, 4, 6]]
    assert e2m1_decode(e2m1_encode(-x)).tolist() == [[0, -1, -1, -2, -2, -4, -4, -6]]


@pytest.mark.parametrize("name", WRITTEN)
def test_written_and_read(name):
    weight = normal(256, 512)
    packed = encode(weight, name)
    assert decibels(packed.decode(), weight) > SQNR[name]
    again = encode(packed.decode(), name)
    assert torch.equal(again.decode(), packed.decode())


@pytest.mark.parametrize("name", WRITTEN)
def test_zeros_stay_zeros(name):
    weight = normal(128, 128)
    weight[3] = 0
    decoded = encode(weight, name).decode()
    assert torch.isfinite(decoded).all() and (decoded[3] == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_split_layers_become_one_exactly(name):
    if name in WRITTEN:
        pieces = [encode(normal(128, 256, seed=i) * (i + 1), name) for i in range(3)]
        if name in ("float8_e4m3fn", "int8_tensorwise"):  # one scale for all, as most files have
            pieces[0] = Packed(
                name, (128, 256), pieces[0].parts | {"weight_scale": torch.tensor(0.5)}
            )
            pieces[1] = Packed(name, (128, 256), {"weight": pieces[1].parts["weight"]})
    else:
        kind = formats_gguf.TYPES[name.removeprefix("gguf ")]
        rows = torch.arange(128 * 256 // kind.weights * kind.bytes).remainder(64).to(torch.uint8)
        pieces = [Packed(name, (128, 256), {"weight": rows.reshape(128, -1) + i}) for i in range(3)]
    whole = stack(pieces)
    assert whole.shape == (384, 256)
    assert torch.equal(
        whole.decode().nan_to_num(), torch.cat([p.decode() for p in pieces]).nan_to_num()
    )


def test_refusals():
    with pytest.raises(Flux2Error, match="several formats"):
        stack([encode(normal(128, 128), "nvfp4"), encode(normal(128, 128), "mxfp8")])
    with pytest.raises(Flux2Error, match="not written here"):
        encode(normal(128, 256), "gguf Q8_0")
