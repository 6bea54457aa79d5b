"""Two thousand damaged files: each a clean refusal or a correct load, within bounds of memory."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux2_pack.flux2_core import lora
from flux2_pack.flux2_core.checkpoint import read_state_dict
from flux2_pack.flux2_core.configs import TransformerConfig
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.transformer import Flux2Transformer

TINY = TransformerConfig(128, 8, 1, 1, guidance_embed=False)
LINEARS = lora.linears(Flux2Transformer(TINY))
VALUES = (
    -1,
    0,
    1,
    3,
    127,
    2**31,
    2**63,
    2**64,
    1e300,
    None,
    "",
    "F32",
    "X" * 200,
    [],
    {},
    [1, -5],
    True,
)
GROWTH = 50 * 2**20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A plain and a quantised safetensors file, and the plain one as GGUF where that is installed."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    state = {k: v.detach().bfloat16() for k, v in Flux2Transformer(TINY).state_dict().items()}
    save_file(state, folder / "plain.safetensors")
    packed = encode(state.pop("single_blocks.0.linear1.weight"), "nvfp4")
    note = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    state |= {f"single_blocks.0.linear1.{k}": v for k, v in packed.parts.items()}
    state["single_blocks.0.linear1.comfy_quant"] = note
    save_file(state, folder / "packed.safetensors", {"_quantization_metadata": '{"layers": {}}'})
    return [folder / "plain.safetensors", folder / "packed.safetensors"]


def anonymous() -> int:
    """Bytes of this process that no file backs; 0 where the system does not tell."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return 0
    lines = (line.split() for line in rollup.read_text().splitlines())
    return next(int(line[1]) * 1024 for line in lines if line[0] == "Anonymous:")


def outcome(path) -> str:
    """ "loaded", or the refusal; anything else fails the test."""
    try:
        state, _, _ = read_state_dict(path, "transformer")
    except Flux2Error as error:
        assert len(str(error)) < 1200
        return str(error)
    for value in state.values():
        (value.decode() if hasattr(value, "decode") else value.float()).sum()  # every byte is there
    return "loaded"


def bent(value, r: random.Random, depth: int = 0):
    """A JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        key = r.choice(list(value))
        choice = r.random()
        if choice < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if choice < 0.2:
            return {
                (k if k != key else r.choice(("", "a" * 300, "../x", k + "x"))): v
                for k, v in value.items()
            }
        return {**value, key: bent(value[key], r, depth + 1)}
    if isinstance(value, list) and value and r.random() < 0.8:
        i = r.randrange(len(value))
        return [*value[:i], bent(value[i], r, depth + 1), *value[i + 1 :]]
    return r.choice(VALUES)


def mutate_safetensors(raw: bytes, r: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    header, rest = raw[8 : 8 + length], raw[8 + length :]
    kind = r.randrange(5)
    if kind == 0:  # its length
        return (
            struct.pack("<Q", r.choice((0, 1, length - 1, length + 1, 2**40, 2**64 - 1))) + raw[8:]
        )
    if kind == 1:  # its bytes
        spoiled = bytearray(header)
        for _ in range(r.randint(1, 4)):
            spoiled[r.randrange(len(spoiled))] = r.randrange(256)
        return raw[:8] + bytes(spoiled) + rest
    if kind == 2:  # the file's end
        return raw[: r.randrange(len(raw))]
    if kind == 3:  # more behind it
        return raw + bytes(r.randrange(1, 9))
    table = json.dumps(bent(json.loads(header), r)).encode()
    return struct.pack("<Q", len(table)) + table + rest


def lora_outcome(path) -> str:
    try:
        deltas, report = lora.read(path, TINY, LINEARS)
    except Flux2Error as error:
        assert len(str(error)) < 1200
        return str(error)
    for delta in deltas:
        delta.matrix(torch.zeros(LINEARS[delta.place.layer])).sum()
    return "loaded" if not report.skipped else f"skipped {len(report.skipped)}"


def run(paths, folder, name, mutate, count, seed, outcome=outcome):
    r, before, seen = random.Random(seed), anonymous(), {"loaded": 0}
    raws = [path.read_bytes() for path in paths]
    for _ in range(count):
        (folder / name).write_bytes(mutate(r.choice(raws), r))
        said = outcome(folder / name)
        seen[said[:20]] = seen.get(said[:20], 0) + 1
    assert anonymous() - before < GROWTH
    assert len(seen) > 2  # several kinds of damage were told apart


def test_safetensors(files, tmp_path):
    run(files, tmp_path, "a.safetensors", mutate_safetensors, 1200, 1)


def test_loras(tmp_path):
    """A product, a Kronecker product and a rescaled one in a file; whatever is bent, no crash."""
    tensors = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 128),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(384, 2),
        "diffusion_model.double_blocks.0.img_attn.qkv.alpha": torch.ones(()),
        "lycoris_single_blocks_0_linear2.lokr_w1": torch.ones(2, 4),
        "lycoris_single_blocks_0_linear2.lokr_w2_a": torch.ones(64, 2),
        "lycoris_single_blocks_0_linear2.lokr_w2_b": torch.ones(2, 128),
        "transformer.x_embedder.lora_A.weight": torch.ones(2, 128),
        "transformer.x_embedder.lora_B.weight": torch.ones(128, 2),
        "transformer.x_embedder.dora_scale": torch.ones(128, 1),
    }
    save_file(tensors, tmp_path / "whole.safetensors")
    assert lora_outcome(tmp_path / "whole.safetensors") == "loaded"
    paths = [tmp_path / "whole.safetensors"]
    run(paths, tmp_path, "a.safetensors", mutate_safetensors, 600, 4, lora_outcome)


def test_lists_of_shards(files, tmp_path):
    """Names that lead out of the folder are refused, whatever they say."""
    (tmp_path / "model-1.safetensors").write_bytes(files[0].read_bytes())
    with files[0].open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        names = [n for n in json.loads(file.read(length)) if n != "__metadata__"]
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(names, "model-1.safetensors"),
    }
    r, before = random.Random(2), anonymous()
    outside = ("../model-1.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "C:\\x", "")
    path = tmp_path / "model.safetensors.index.json"
    for i in range(400):
        table = bent(index, r)
        if i % 3 == 0:
            table = {
                **index,
                "weight_map": {**index["weight_map"], r.choice(names): r.choice(outside)},
            }
        raw = json.dumps(table).encode()
        path.write_bytes(raw[: r.randrange(len(raw))] if i % 7 == 0 else raw)
        said = outcome(path)
        if i % 3 == 0:
            assert said != "loaded"
    assert anonymous() - before < GROWTH


def test_gguf(files, tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "flux")
    state, _, _ = read_state_dict(files[0], "transformer")
    for name, tensor in state.items():
        form = gguf.GGMLQuantizationType["Q8_0" if "blocks" in name and tensor.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert outcome(tmp_path / "whole.gguf") == "loaded"
    head = 2500  # magic, counts, names, shapes, types, offsets

    def mutate(raw, r):
        if r.random() < 0.2:
            return raw[: r.randrange(len(raw))]
        spoiled = bytearray(raw)
        for _ in range(r.randint(1, 3)):
            at = r.randrange(head)
            spoiled[at : at + 8] = r.choice((bytes(8), b"\xff" * 8, r.randbytes(8), r.randbytes(1)))
        return bytes(spoiled)

    run([tmp_path / "whole.gguf"], tmp_path, "a.gguf", mutate, 400, 3)
