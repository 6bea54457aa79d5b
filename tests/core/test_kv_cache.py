"""The reference cache's storage and keys: what is kept, what it is found by, when it is due."""

import copy
import weakref

import pytest
import torch

from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.kv_cache import ReferenceCache, bytes_for, fingerprint

LAYERS, BATCH, HEADS, TOKENS, DIM = 3, 2, 4, 6, 128


def kv(seed=0, batch=BATCH, tokens=TOKENS, dtype=torch.bfloat16):
    """K and V of every block, as a forward makes them."""
    made = torch.Generator().manual_seed(seed)
    shape = (LAYERS, 2, batch, HEADS, tokens, DIM)
    return [(k, v) for k, v in torch.randn(shape, generator=made).to(dtype)]


def latent(seed=0, size=(4, 6)):
    return torch.randn(1, 128, *size, generator=torch.Generator().manual_seed(seed))


def fill(cache, key, blocks):
    recorder = cache.record(key, len(blocks))
    for i, (k, v) in enumerate(blocks):
        recorder.put(i, k, v)
    return recorder.finish()


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ------------------------------------------------------------------------------------ fingerprints

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_sees_one_value_and_not_the_strides(dtype):
    x = (latent() > 0).to(dtype)
    seen = fingerprint(x)
    assert fingerprint(x.clone()) == seen
    assert fingerprint(x.mT.contiguous().mT) == seen
    assert fingerprint(torch.stack((x, x), -1)[..., 1]) == seen
    assert fingerprint(x[:, :, :, :5]) == fingerprint(x[:, :, :, :5].clone()) != seen
    y = x.clone()
    y[0, 17, 2, 3] = 1 - y[0, 17, 2, 3].float()
    assert fingerprint(y) != seen


@pytest.mark.parametrize(
    "dtype, bits", [(torch.float64, torch.int64), (torch.bfloat16, torch.int16)]
)
def test_a_fingerprint_sees_any_single_bit_and_any_two_signs(dtype, bits):
    x = latent(size=(1, 1)).to(dtype)
    prints = {fingerprint(x)}
    for bit in range(8 * x.element_size()):
        y = x.clone()
        y.view(bits)[0, 5] ^= (1 << bit) - (1 << 8 * x.element_size() if bit == 63 else 0)
        prints.add(fingerprint(y))
    for i in range(1, 100):
        y = x.clone()
        y[0, [0, i]] *= -1
        prints.add(fingerprint(y))
    assert len(prints) == 1 + 8 * x.element_size() + 99


def test_a_fingerprint_sees_order_shape_dtype_and_the_sign_of_zero():
    x = latent()
    others = [
        x.flip(1),
        x.mT,
        x.flatten(2),
        x[None],
        x.view(torch.int32),
        x.double(),
        torch.cat((x, torch.zeros_like(x))),
        torch.zeros(4),
        -torch.zeros(4),
        torch.zeros(5),
        torch.zeros(0),
        torch.zeros(()),
    ]
    assert len({fingerprint(y) for y in (x, *others)}) == len(others) + 1


def test_a_fingerprint_is_the_same_in_another_process():
    """Not salted as Python's own hashes are."""
    seen = fingerprint(torch.arange(6, dtype=torch.float32).reshape(2, 3))
    assert seen == (11803607474143049096, 17708025918386398000)


# ------------------------------------------------------------------------------------------- store


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_s_dtype_is_kept_bit_for_bit(dtype, place):
    cache, blocks = ReferenceCache(place=place), kv(dtype=dtype)
    fill(cache, key := cache.key([latent()], "about"), blocks)
    kept = cache.find(key)
    for i, pair in enumerate(blocks):
        for got, wanted in zip(kept.get(i, pair[0]), pair, strict=True):
            assert got.dtype == dtype and torch.equal(got, wanted)


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_keeps_two_digits_of_every_row(dtype, place):
    cache, blocks = ReferenceCache(store="fp8", place=place), kv(dtype=dtype)
    blocks[0][0][0, 1] *= 1e-3  # a quiet head beside loud ones
    blocks[0][1][1, 2, 3] = 0
    fill(cache, key := cache.key([latent()], "about"), blocks)
    kept = cache.find(key)
    for i, pair in enumerate(blocks):
        for got, wanted in zip(kept.get(i, pair[0]), pair, strict=True):
            assert got.dtype == dtype and error(got, wanted) < 0.027  # 0.0261
    quiet = kept.get(0, blocks[0][0])[0][0, 1]
    assert error(quiet, blocks[0][0][0, 1]) < 0.027  # 0.0258
    assert not kept.get(0, blocks[0][0])[1][1, 2, 3].any()


@pytest.mark.parametrize("store", ["model", "fp8"])
def test_what_is_kept_is_a_copy(store):
    """K and V are slices of the whole sequence, in memory that is written again."""
    cache = ReferenceCache(store=store)
    whole = torch.randn(BATCH, TOKENS + 9, HEADS, DIM).transpose(1, 2)  # head by head it is not
    part = whole[:, :, -TOKENS:]
    wanted = part.clone()
    fill(cache, key := cache.key([], 0), [(part, part)])
    assert cache.bytes == bytes_for(1, HEADS * DIM, TOKENS, BATCH, store, itemsize=4)
    whole.zero_()
    k, _ = cache.find(key).get(0, whole)
    assert k.is_contiguous() and error(k, wanted) < 0.027  # fp8: 0.0257


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("store, itemsize", [("model", 4), ("model", 2), ("fp8", 2)])
def test_the_predicted_size_is_the_counted_size(store, itemsize, place, batch):
    cache = ReferenceCache(store=store, place=place)
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    blocks = kv(batch=batch, dtype=dtype)
    for n in (1, 2):
        fill(cache, cache.key([], n), blocks)
        one = bytes_for(LAYERS, HEADS * DIM, TOKENS, batch, store, itemsize=itemsize)
        assert cache.bytes == n * one
    assert cache.find(cache.key([], 1)).get(0, blocks[0][0])[0].shape[0] == batch
    cache.clear()
    assert cache.bytes == 0


def test_a_megapixel_of_klein_9b_takes_what_the_fact_sheet_says():
    assert bytes_for(32, 4096, 4096) == 2 * 2**30  # bf16
    assert bytes_for(32, 4096, 4096, store="fp8") == 33 / 64 * 2 * 2**30


@pytest.mark.parametrize("store", ["model", "fp8"])
def test_entries_recorded_in_inference_mode_serve_outside_it(store):
    cache = ReferenceCache(store=store)
    with torch.inference_mode():
        x = latent()
        blocks = kv()
        fill(cache, key := cache.key([x], (x,)), blocks)
        cache.find(key).get(0, blocks[0][0])
    weight = torch.ones(1, requires_grad=True)
    k, _ = cache.find(cache.key([x], (x,))).get(0, blocks[0][0].clone())
    (k * weight).sum().backward()
    assert weight.grad is not None


# -------------------------------------------------------------------------------------------- keys


def test_the_key_knows_every_part():
    a, b = latent(1), latent(2)
    mask = torch.ones(4, 6, dtype=torch.bool)
    other = mask.clone()
    other[0, 0] = False
    cache = ReferenceCache("approximate")

    def key(references=(a, b), about=("positions", 1.0, mask), weights="w", run="r"):
        cache.weights, cache.run = weights, run
        return cache.key(references, about)

    keys = [
        key(),
        key([b, a]),
        key([a]),
        key([a, b, b]),
        key([a.to(torch.bfloat16), b]),
        key([a.mT, b]),
        key([a, b + 1e-6]),
        key(about=("positions", 1.5, mask)),
        key(about=("positions", 1.0, other)),
        key(about=("positions", 1.0, None)),
        key(about=("positions", 1.0)),
        key([a], about=("positions", 1.0, b)),
        key(weights=("w", "a LoRA")),
        key(run="another"),
    ]
    assert len(set(keys)) == len(keys)
    assert key([a.clone(), b.clone()], ["positions", 1.0, mask.clone()]) == keys[0]


def test_the_exact_key_does_not_know_the_run():
    cache = ReferenceCache()
    cache.begin("one", "w")
    key = cache.key([latent()], 0)
    cache.begin("two", "w")
    assert cache.key([latent()], 0) == key


def test_a_reference_written_in_place_is_another_one():
    cache, x = ReferenceCache(), latent()
    fill(cache, cache.key([x], 0), kv())
    assert cache.find(cache.key([x], 0))
    x[0, 0, 0, 0] += 1
    assert cache.find(cache.key([x], 0)) is None


# --------------------------------------------------------------------------------------------- due


def full_steps(cache, key, steps=12):
    full = []
    for cache.step in range(steps):
        if cache.due(key):
            assert cache.find(key) is None
            fill(cache, key, kv())
            full.append(cache.step)
        else:
            assert cache.find(key)
    return full


@pytest.mark.parametrize(
    "interval, guard, full",
    [
        (4, 1, [0, 4, 8]),
        (4, 0, [0, 4, 8]),
        (4, 3, [0, 1, 2, 6, 10]),
        (5, 2, [0, 1, 6, 11]),
        (1, 1, list(range(12))),
        (99, 1, [0]),
        (4, 99, list(range(12))),
    ],
)
def test_full_steps_of_a_run(interval, guard, full):
    cache = ReferenceCache("approximate", interval=interval, guard=guard)
    cache.begin("run")
    assert full_steps(cache, cache.key([latent()], 0)) == full
    seen = cache.statistics
    assert (seen.misses, seen.recorded, seen.hits) == (len(full), len(full), 12 - len(full))


def test_exact_entries_are_computed_once():
    cache = ReferenceCache()
    assert full_steps(cache, cache.key([latent()], 0)) == [0]
    cache.begin("another run")
    assert full_steps(cache, cache.key([latent()], 0)) == []


def test_keys_within_a_step_have_steps_of_their_own():
    """Two conditionings, and a solver that calls the model twice a step."""
    cache = ReferenceCache("approximate", interval=2)
    cache.begin("run")
    calls = []
    for cache.step in range(4):
        for about in ("positive", "negative", "positive", "negative"):
            key = cache.key([latent()], about)
            if cache.due(key):
                fill(cache, key, kv())
                calls.append((cache.step, about))
    twice = [(0, "positive"), (0, "negative")] * 2  # the guard's step is never served
    assert calls == [*twice, (2, "positive"), (2, "negative")]


def test_a_new_run_never_sees_an_old_approximate_entry():
    cache = ReferenceCache("approximate", guard=0, interval=99)
    cache.begin("one", "w")
    cache.step = 3
    fill(cache, old := cache.key([latent()], 0), kv())
    cache.begin("two", "w")
    assert cache.step == 0 and cache.bytes == 0
    assert cache.due(cache.key([latent()], 0)) and cache.due(old)
    fill(cache, cache.key([latent()], 0), kv())
    cache.begin("two", "w")  # the same run goes on
    assert cache.find(cache.key([latent()], 0))
    cache.run = "three"
    assert cache.due(cache.key([latent()], 0))


def test_an_entry_from_a_later_step_is_of_an_earlier_run():
    cache = ReferenceCache("approximate", guard=0, interval=99)
    cache.step = 3
    fill(cache, key := cache.key([latent()], 0), kv())
    cache.step = 2
    assert cache.due(key) and cache.find(key) is None


@pytest.mark.parametrize("mode", ["exact", "approximate"])
def test_other_weights_drop_the_entries(mode):
    cache = ReferenceCache(mode, guard=0)
    cache.begin("run", "w")
    fill(cache, key := cache.key([latent()], 0), kv())
    cache.begin("run", "w")
    assert cache.find(key)
    cache.begin("run")  # not said again: as they were
    assert cache.weights == "w" and cache.find(key)
    cache.begin("run", ("w", "a LoRA"))
    assert cache.bytes == 0 and cache.find(cache.key([latent()], 0)) is None
    cache.begin("run", "w")
    assert cache.find(key) is None


# ----------------------------------------------------------------------------------- record, limit


def test_a_forward_that_fails_leaves_nothing_behind():
    cache, blocks = ReferenceCache(), kv()
    key = cache.key([latent()], 0)
    recorder = cache.record(key, LAYERS)
    for i, pair in enumerate(blocks[:-1]):
        recorder.put(i, *pair)
        assert cache.find(key) is None and cache.bytes == 0
    with pytest.raises(ValueError, match="2 of 3 blocks"):
        recorder.finish()
    assert cache.find(key) is None and cache.bytes == 0 and cache.statistics.recorded == 0
    recorder.put(LAYERS - 1, *blocks[-1])
    kept = recorder.finish()
    assert torch.equal(kept.get(2, blocks[2][0])[1], cache.find(key).get(2, blocks[2][0])[1])


def test_blocks_of_one_entry_are_alike():
    cache = ReferenceCache()
    recorder = cache.record(cache.key([], 0), 2)
    recorder.put(0, *kv()[0])
    with pytest.raises(ValueError, match="block 1"):
        recorder.put(1, *kv(batch=1)[0])


def test_an_entry_in_use_outlives_its_refresh():
    cache = ReferenceCache("approximate", guard=0)
    old, new = kv(0), kv(1)
    fill(cache, key := cache.key([latent()], 0), old)
    kept = cache.find(key)
    fill(cache, key, new)
    cache.clear()
    assert torch.equal(kept.get(1, old[1][0])[0], old[1][0])


@pytest.mark.parametrize("store", ["model", "fp8"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_drift_is_the_largest_change_at_a_refresh(store, place):
    cache = ReferenceCache("approximate", guard=99, store=store, place=place)
    cache.begin("run")
    key, blocks = cache.key([latent()], 0), kv(dtype=torch.float32)
    fill(cache, key, blocks)
    assert cache.statistics.drift is None
    fill(cache, key, blocks)
    assert cache.statistics.drift == 0
    moved = [(k, v + 0.5 * k * (i == 1)) for i, (k, v) in enumerate(blocks)]
    fill(cache, key, moved)
    wanted = error(blocks[1][1], moved[1][1])
    wanted = pytest.approx(wanted, rel=1e-5 if store == "model" else 0.01)  # 2e-7, 0.0021
    assert cache.statistics.drift == wanted
    fill(cache, key, moved)
    assert cache.statistics.drift == wanted


def test_the_oldest_entries_go_first():
    one = bytes_for(LAYERS, HEADS * DIM, TOKENS, BATCH)
    cache = ReferenceCache("approximate", guard=0, limit_bytes=2 * one + 1)
    keys = [cache.key([latent(i)], 0) for i in range(3)]
    for key in keys[:2]:
        fill(cache, key, kv())
    fill(cache, keys[0], kv())  # now the younger one
    fill(cache, keys[2], kv())
    assert [cache.find(key) is not None for key in keys] == [True, False, True]
    assert cache.bytes == 2 * one and cache.statistics.dropped == 1


def test_room_is_made_before_an_entry_is_recorded():
    one = bytes_for(LAYERS, HEADS * DIM, TOKENS, BATCH)
    cache = ReferenceCache(limit_bytes=one)
    fill(cache, cache.key([latent(0)], 0), kv())
    cache.record(cache.key([latent(1)], 0), LAYERS).put(0, *kv()[0])
    assert cache.bytes == 0


def test_two_entries_recorded_at_once_keep_the_limit():
    one = bytes_for(LAYERS, HEADS * DIM, TOKENS, BATCH)
    cache = ReferenceCache(limit_bytes=2 * one)
    other = cache.key([latent(1)], 0)
    fill(cache, other, kv())
    key = cache.key([latent(0)], 0)
    recorders = [cache.record(k, LAYERS) for k in (key, key, cache.key([latent(2)], 0))]
    for recorder in recorders:
        for i, pair in enumerate(kv()):
            recorder.put(i, *pair)
    recorders[0].finish()
    recorders[1].finish()  # in the place of the first, not beside it
    assert cache.bytes == 2 * one and cache.find(other)
    recorders[2].finish()
    assert cache.bytes == 2 * one and cache.find(other) is None


def test_a_refresh_needs_the_room_of_one_entry():
    cache = ReferenceCache("approximate", guard=99)
    fill(cache, key := cache.key([latent()], 0), kv())
    old = [weakref.ref(x) for block in cache._entries[key].blocks for x in block]
    recorder = cache.record(key, LAYERS)
    for i, pair in enumerate(kv()):
        recorder.put(i, *pair)
        assert sum(x() is not None for x in old) == 2 * (LAYERS - 1 - i)


def test_an_entry_above_the_limit_is_refused_at_its_first_block():
    one = bytes_for(LAYERS, HEADS * DIM, TOKENS, BATCH)
    cache = ReferenceCache(limit_bytes=one - 1)
    recorder = cache.record(cache.key([latent()], 0), LAYERS)
    with pytest.raises(Flux2Error, match=rf"take {one / 2**20:.1f} MiB.*Raise the limit"):
        recorder.put(0, *kv()[0])
    fill(ReferenceCache(limit_bytes=one), cache.key([latent()], 0), kv())


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "fast"},
        {"store": "int4"},
        {"place": "disk"},
        {"interval": 0},
        {"guard": -1},
        {"limit_bytes": 0},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(Flux2Error, match=r"Seen: .* Use "):
        ReferenceCache(**wrong)


def test_a_copied_handle_is_the_handle():
    """A host copies the options of a model with every clone."""
    options = {"cache": ReferenceCache()}
    assert copy.deepcopy(options)["cache"] is options["cache"]


# ------------------------------------------------------------------------------------- pinned host


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["model", "fp8"])
def test_pinned_blocks_come_back_in_any_order(store):
    blocks = [(k.cuda(), v.cuda()) for k, v in kv(tokens=4096)]
    near, far = (ReferenceCache(store=store, place=place) for place in ("device", "host"))
    key = near.key([latent()], 0)
    wanted, kept = fill(near, key, blocks), fill(far, key, blocks)
    assert near.bytes == far.bytes
    like = blocks[0][0]
    order = [*range(LAYERS), 0, 2, 2, 1, 0]
    for i, pair in [(i, kept.get(i, like)) for i in order]:  # all held while others come
        for a, b in zip(pair, wanted.get(i, like), strict=True):
            assert a.is_cuda and torch.equal(a, b)
