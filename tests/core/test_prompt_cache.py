"""Prompts kept on disk: the same bits back, never another encoder's, within bounds, whatever happens
to the files."""

import logging
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from flux2_pack.flux2_core import prompt_cache
from flux2_pack.flux2_core.checkpoint import load_text_encoder
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.formats import Packed
from flux2_pack.flux2_core.pipeline import Pipeline
from flux2_pack.flux2_core.prompt_cache import PromptCache, fingerprint, key
from flux2_pack.flux2_core.tokenizer import Template
from flux2_pack.tests.conftest import ROOT

PROMPTS = ["a red ring left on tan background", "", "a word " * 40]
A, B = "a" * 64, "b" * 64


@pytest.fixture
def encoder():
    return load_text_encoder("nano", dtype=torch.float32)


@pytest.fixture
def cache(tmp_path):
    return PromptCache(tmp_path / "prompts")


def entries(cache):
    return sorted(cache.folder.glob("*.safetensors"))


def refuse(*_):
    raise AssertionError("the encoder was used")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hit_has_the_same_bits_and_needs_no_encoder(cache, dtype, monkeypatch):
    encoder = load_text_encoder("nano", dtype=dtype)
    plain = torch.cat([encoder.encode(prompt) for prompt in PROMPTS])
    first = cache.encode(encoder, PROMPTS)
    assert (cache.hits, cache.misses) == (0, 3)
    monkeypatch.setattr(encoder, "forward", refuse)
    again = PromptCache(cache.folder).encode(encoder, PROMPTS)
    assert first.dtype == again.dtype == dtype
    assert torch.equal(first, plain) and torch.equal(again, plain)


def test_a_pipeline_with_a_cache(cache, monkeypatch):
    """The same picture's latent, the second time without the text encoder."""
    pipe = Pipeline.load("nano")
    asked = {"steps": 1, "width": 64, "height": 64}
    prompt = "A ring in color #dc2828 on the left."
    wanted = pipe.sample("A ring in red on the left.", **asked)
    pipe.prompts = cache
    assert torch.equal(pipe.sample(prompt, **asked), wanted)
    monkeypatch.setattr(pipe.text, "forward", refuse)
    assert torch.equal(pipe.sample(prompt, **asked), wanted)


def test_float32_that_came_from_bf16_takes_half_the_room(cache):
    rows = torch.randn(1, 8, 64).bfloat16().float()
    rows[0, 0, :3] = torch.tensor([-0.0, 1e-40, 3e38]).bfloat16().float()
    cache.write(A, rows)
    cache.write(B, rows + 1e-6)
    small, whole = (path.stat().st_size for path in entries(cache))
    assert small < 0.65 * whole  # 1.4 and 2.4 KB
    for name, wanted in ((A, rows), (B, rows + 1e-6)):
        assert cache.read(name).view(torch.int32).equal(wanted.view(torch.int32))
    rows[0, 0, 0] = torch.nan
    cache.write(A, rows)
    assert cache.read(A).view(torch.int32).equal(rows.view(torch.int32))


def test_a_changed_encoder_never_hits(cache, encoder):
    """One value of any weight, anywhere, is enough."""
    cache.encode(encoder, PROMPTS[0])
    for name, weight in encoder.named_parameters():
        for place in (0, weight.numel() // 2, -1):
            value = weight.data.view(-1)[place].clone()
            weight.data.view(-1)[place] += 1e-3
            wanted = encoder.encode(PROMPTS[0])
            assert torch.equal(cache.encode(encoder, PROMPTS[0]), wanted), (name, place)
            weight.data.view(-1)[place] = value
    assert cache.hits == 0 and cache.misses == 1 + 3 * len(list(encoder.parameters()))
    cache.encode(encoder, PROMPTS[0])
    assert cache.hits == 1


def test_what_else_tells_entries_apart(encoder):
    tokenizer, seen = encoder.tokenizer, set()

    def told(*how, prompt="a red ring", which="x"):
        seen.add(key(which, tokenizer, prompt, *how))

    told()
    told(torch.bfloat16)
    told(torch.bfloat16, "cuda")
    told(prompt="a blue ring")
    told(which="y")
    config, template = tokenizer.config, tokenizer.template
    tokenizer.template = Template("[bos]a", "", ("[bos]",))
    told()
    tokenizer.template = template
    for change in ({"layers_out": (1, 2, 2)}, {"text_length": 16}, {"rope_theta": 1e6}):
        tokenizer.config = replace(config, **change)
        told()
    assert len(seen) == 9


def test_what_is_cut_off_makes_no_difference(encoder):
    long = "red " * 40
    assert key("x", encoder.tokenizer, long) == key("x", encoder.tokenizer, long + "blue")


def test_large_weights_are_sampled_from_end_to_end():
    """2 MiB: dtype, shape, format, first and last value count, and so does an edit in place."""
    weight = torch.zeros(1024, 1024, dtype=torch.float16)
    seen = [fingerprint(weight), fingerprint(weight.view(torch.bfloat16)), fingerprint(weight.T)]
    seen += [fingerprint(weight.reshape(512, 2048)), fingerprint({"a": weight})]
    seen += [fingerprint(Packed(f, (1024, 1024), {"weight": weight})) for f in ("a", "b")]
    for place in (0, -1):
        changed = weight.clone()
        changed.view(-1)[place] = 1
        seen.append(fingerprint(changed))
    assert len(set(seen)) == len(seen) - 1  # zeros, turned, are of the same shape
    assert fingerprint(weight) == fingerprint(weight.clone())


def test_an_edit_between_samples_counts(encoder, cache):
    """In place, as optimisers and merges do it."""
    encoder.model.embed_tokens = torch.nn.Embedding(192 * 50, 128).requires_grad_(False)
    cache.encode(encoder, "a red ring")
    encoder.model.embed_tokens.weight[3000, 5] += 1
    cache.encode(encoder, "a red ring")
    assert (cache.hits, cache.misses) == (0, 2)


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(TypeError):
        fingerprint({"patch": lambda w: w})


def damage(path, how):
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    if how == "empty":
        data = b""
    elif how == "cut":
        data = data[:-1]
    elif how == "one bit of a row":
        data = data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]
    elif how == "length":
        data = (1 << 60).to_bytes(8, "little") + data[8:]
    elif how == "version":
        data = data.replace(b'\\"version\\": 1', b'\\"version\\": 2')
    elif how == "dtype":
        data = data.replace(b"torch.float32", b"torch.float64")
    elif how == "no description":
        data = data.replace(b"flux2_kit_prompt", b"flux2_kit_prompX")
    elif how == "page":
        data = b"<html>" + data[:length]
    elif how == "pickle":
        data = b"\x80\x02" + data
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    ["empty", "cut", "one bit of a row", "length", "version", "dtype", "no description", "page", "pickle"],
)  # fmt: skip
def test_a_damaged_file_is_made_anew(cache, encoder, caplog, how):
    wanted = cache.encode(encoder, PROMPTS[0])
    (path,) = entries(cache)
    before = path.read_bytes()
    damage(path, how)
    assert path.read_bytes() != before
    caplog.set_level(logging.INFO)
    assert torch.equal(cache.encode(encoder, PROMPTS[0]), wanted)
    assert len(caplog.records) == 1 and "damaged" in caplog.text
    assert (cache.hits, cache.misses) == (0, 2)
    assert path.read_bytes() == before


def test_another_entrys_file_is_not_believed(cache, caplog):
    cache.write(A, torch.zeros(1, 2, 3))
    cache.write(B, torch.ones(1, 2, 3))
    first, second = entries(cache)
    first.write_bytes(second.read_bytes())
    assert cache.read(A) is None and "damaged" in caplog.text
    assert entries(cache) == [second]


def test_the_least_recently_used_go(cache):
    names = [f"{i:064x}" for i in range(6)]
    for name in names[:4]:
        cache.write(name, torch.randn(1, 4, 64))
    size = entries(cache)[0].stat().st_size
    for i, name in enumerate(names[:4]):
        os.utime(cache.folder / f"{name}.safetensors", ns=(i, i))
    cache.read(names[0])  # the oldest, used again
    mine = cache.folder / "notes.txt"
    mine.write_text("not an entry" * 1000)
    cache.most_bytes = 3 * size + 100
    cache.write(names[4], torch.randn(1, 4, 64))
    left = {path.stem for path in entries(cache)}
    assert left == {names[0], names[3], names[4]}
    assert mine.exists()


def test_what_a_dead_writer_left_goes(cache):
    cache.write(A, torch.zeros(1, 2, 3))
    old, new = (cache.folder / f"{A}.{n}.part" for n in ("x1", "x2"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.write(B, torch.zeros(1, 2, 3))
    assert not old.exists() and new.exists()


def test_no_room_is_no_error(tmp_path, encoder, caplog):
    wanted = encoder.encode(PROMPTS[0])
    tight = PromptCache(tmp_path / "tight", most_bytes=1000)
    assert torch.equal(tight.encode(encoder, PROMPTS[0]), wanted)
    assert "is not cached" in caplog.text and not tight.folder.exists()
    caplog.clear()
    (tmp_path / "file").write_text("in the way")
    blocked = PromptCache(tmp_path / "file" / "prompts")
    assert torch.equal(blocked.encode(encoder, PROMPTS[0]), wanted)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * len(caplog.records)


def test_a_key_is_no_path(cache):
    with pytest.raises(Flux2Error, match="no key"):
        cache.read("../../somewhere")


WORKER = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from flux2_core.checkpoint import load_text_encoder
from flux2_core.prompt_cache import PromptCache
torch.set_num_threads(1)
encoder, cache = load_text_encoder("nano"), PromptCache(sys.argv[1], 200_000)
for i in range(60):
    prompt = "a " + "red ring " * (i % 12)
    assert torch.equal(cache.encode(encoder, prompt), encoder.encode(prompt))
"""


def test_two_processes_at_once(cache, tmp_path):
    """On one folder that holds fewer entries than they use: both read and remove all the time."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, str(script), str(cache.folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "damaged" not in said, said
    assert sum(path.stat().st_size for path in entries(cache)) <= 200_000
    assert not list(cache.folder.glob("*.part"))


def test_the_default_holds_many_prompts_of_dev():
    assert prompt_cache.MOST_BYTES > 100 * 512 * 15360 * 2
