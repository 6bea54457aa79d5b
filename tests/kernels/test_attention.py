"""Who computes attention: right ones that are faster, and nobody else. Providers and clock are made up."""

import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from flux2_pack.flux2_core.attention import attend, attend_lse
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.kernels import attention as chooser
from flux2_pack.flux2_core.kernels.attention import explicit, sdpa, use
from flux2_pack.flux2_core.kernels.attention_providers import PROVIDERS, Provider, flash, flash_lse

CPU = torch.device("cpu")


def qkv(rows=20, keys=30, dtype=torch.float32, dim=32):
    made = torch.Generator().manual_seed(1)
    return [torch.randn(1, 2, n, dim, generator=made).to(dtype) for n in (rows, keys, keys)]


class Fake:
    """A provider whose results are exact but for relative noise, and that counts its calls."""

    def __init__(self, name="fake", noise=0.0, exact=True, fails=None, lse=True):
        self.name, self.noise, self.fails, self.calls, self.found = name, noise, fails, 0, 0
        self.provider = Provider(
            name, name, self.find, lambda device, dtype: None, self.find_lse if lse else None, exact
        )

    def find(self):
        self.found += 1
        return lambda q, k, v: self.run(q, k, v)[0]

    def find_lse(self):
        return self.run

    def run(self, q, k, v):
        self.calls += 1
        if self.fails:
            raise self.fails
        out, lse = explicit(q, k, v)
        made = torch.Generator().manual_seed(2)
        noise = torch.randn(out.shape, generator=made) * out.float().std() * self.noise
        return (out.float() + noise).to(out.dtype), lse


@pytest.fixture
def install(monkeypatch):
    """install(*fakes, times): these are the providers, and this is what a clock says of each."""
    for question in (chooser.attention, chooser.attention_lse):
        monkeypatch.setattr(question, "chosen", {})
        monkeypatch.setattr(question, "tested", {})
    monkeypatch.setattr(chooser, "_wish", "auto")
    asked = []

    def install(*fakes, **times):
        monkeypatch.setattr(chooser, "PROVIDERS", tuple(f.provider for f in fakes))

        def seconds(calls, device):
            asked.append(sorted(calls))
            return {name: times[name] for name in calls}

        monkeypatch.setattr(chooser, "seconds", seconds)
        return asked

    return install


def why(name, question="attention"):
    return next(dict(r.refused).get(name) for r in chooser.status(CPU) if r.op == question)


def test_on_a_cpu_it_is_the_stock_call_bit_for_bit():
    q, k, v = qkv()
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.equal(attend(q, k, v), wanted)
    row = chooser.status(CPU)[0]
    assert row.chosen == "sdpa"
    assert dict(row.refused) == {p.name: "it needs a GPU" for p in PROVIDERS}


def test_a_right_and_faster_one_wins_and_is_remembered(install):
    fake = Fake()
    asked = install(fake, sdpa=1.0, fake=0.9)
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v), attend(q, k, v))
    assert asked == [["fake", "sdpa"]] and fake.found == 1
    assert chooser.status(CPU)[0].chosen == "fake"
    assert why("sdpa") == "fake is 1.11 x as fast"
    attend(*qkv(32, 32))  # the same powers of two
    assert len(asked) == 1
    attend(*qkv(33, 33))
    assert len(asked) == 2 and fake.found == 1  # timed anew, tested once


def test_one_that_is_hardly_faster_does_not_win(install):
    fake = Fake()
    install(fake, sdpa=1.04, fake=1.0)
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v), sdpa(q, k, v).transpose(1, 2).flatten(2))
    assert why("fake") == "1.04 x the speed of PyTorch's, taken from 1.05 x on"


def test_the_fastest_of_several(install):
    a, b = Fake("a"), Fake("b")
    install(a, b, sdpa=3.0, a=2.0, b=1.5)
    attend(*qkv())
    assert chooser.status(CPU)[0].chosen == "b"
    assert why("a") == "1.50 x the speed of PyTorch's"


@pytest.mark.parametrize(
    ("noise", "exact", "reason"),
    [
        (0.002, True, None),
        (0.004, True, "its error is 4.0e-03, at most 3e-03 is allowed"),
        (0.02, False, None),
        (0.05, False, "it comes to 26.0 dB, at least 30 dB are asked for"),
        (float("nan"), True, "its error is nan, at most 3e-03 is allowed"),
        (float("nan"), False, "it comes to nan dB, at least 30 dB are asked for"),
    ],
)
def test_accuracy_comes_first(install, noise, exact, reason):
    install(Fake(noise=noise, exact=exact), sdpa=1.0, fake=0.1)
    attend(*qkv())
    assert chooser.status(CPU)[0].chosen == ("fake" if reason is None else "sdpa")
    assert why("fake") == reason


def test_one_that_misreads_the_layout_is_refused(install):
    """A token's heads lie beside each other in queries and keys too, not in values alone."""
    fake = Fake()
    run = fake.run

    def misread(q, k, v):
        stride = torch.empty(q.shape).stride()
        return run(q.as_strided(q.shape, stride), k, v)

    fake.run = misread
    install(fake, sdpa=2.0, fake=1.0)
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v), sdpa(q, k, v).transpose(1, 2).flatten(2))
    assert "its error is" in why("fake")


def test_one_that_does_not_import_or_fails_is_refused(install):
    broken = Fake("broken", fails=RuntimeError("no kernel image is available\nmore"))
    absent = Fake("absent")

    def find():
        raise ImportError("it is not installed")

    absent.provider = absent.provider._replace(find=find)
    install(broken, absent, sdpa=1.0)
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v), sdpa(q, k, v).transpose(1, 2).flatten(2))
    calls = broken.calls
    assert why("broken") == "it failed: RuntimeError: no kernel image is available"
    assert why("absent") == "it is not installed"
    attend(*qkv(100))
    assert calls == 1 and broken.found == 1


def test_one_that_fails_later_is_switched_off(install, caplog):
    fake = Fake()
    install(fake, sdpa=1.0, fake=0.5)
    q, k, v = qkv()
    attend(q, k, v)
    fake.fails = RuntimeError("misaligned address")
    with caplog.at_level(logging.WARNING):
        out = attend(q, k, v)
        attend(q, k, v)
    assert torch.equal(out, sdpa(q, k, v).transpose(1, 2).flatten(2))
    assert [r.getMessage() for r in caplog.records] == [
        "Attention by fake is switched off on cpu: it failed: RuntimeError: misaligned address"
    ]
    assert chooser.status(CPU)[0].chosen == "sdpa" and "misaligned" in why("fake")


def test_a_wrong_call_is_not_the_providers_fault(install):
    fake = Fake()
    install(fake, sdpa=1.0, fake=0.5)
    q, k, v = qkv()
    attend(q, k, v)
    with pytest.raises(RuntimeError):
        attend(q, k[..., :16], v)
    assert chooser.status(CPU)[0].chosen == "fake"


def test_out_of_memory_passes_through(install):
    fake = Fake()
    install(fake, sdpa=1.0, fake=0.5)
    q, k, v = qkv()
    attend(q, k, v)
    fake.fails = torch.cuda.OutOfMemoryError("no room")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        attend(q, k, v)
    assert chooser.status(CPU)[0].chosen == "fake"


def test_the_user_names_one(install, caplog):
    a, b = Fake("a"), Fake("b", noise=0.5)
    asked = install(a, b, sdpa=1.0, a=5.0, b=0.1)
    q, k, v = qkv()
    with use("a"):
        attend(q, k, v)
        assert chooser.status(CPU)[0].chosen == "a" and not asked  # slow, but wished for
        assert why("b") == "FLUX2_ATTENTION names a"
    with use("sdpa"):
        attend(q, k, v)
        assert chooser.status(CPU)[0].chosen == "sdpa"
    with use("b"), caplog.at_level(logging.WARNING):
        attend(q, k, v)
        assert chooser.status(CPU)[0].chosen == "sdpa"
    assert "FLUX2_ATTENTION=b is not used: its error is" in caplog.text
    with pytest.raises(Flux2Error, match="names what is not there"):
        use("shell")
    attend(q, k, v)
    assert chooser.status(CPU)[0].chosen == "sdpa"  # auto again: a is slower, b is wrong


def test_where_gradients_are_wanted_it_is_pytorch(install):
    fake = Fake()
    install(fake, sdpa=1.0, fake=0.1)
    q, k, v = qkv()
    attend(q.requires_grad_(), k, v).sum().backward()
    assert not fake.calls and q.grad is not None


def test_under_compile_it_is_pytorch(install):
    fake = Fake()
    install(fake, sdpa=1.0, fake=0.1)
    q, k, v = qkv()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), sdpa(q, k, v).transpose(1, 2).flatten(2))
    assert not fake.calls


def test_under_compile_the_log_sum_exp_is_one_operation(install):
    """Found by trying, which is nothing to trace: opaque, with what it makes of fake tensors."""
    fake = Fake()
    install(fake, sdpa=1.0, fake=0.1)
    q, k, v = qkv()
    compiled = torch.compile(attend_lse, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(q, k, v), explicit(q, k, v), strict=True):
        assert torch.equal(got, wanted)
    assert fake.calls
    torch.library.opcheck(chooser._opaque_lse, (q, k, v))


def test_log_sum_exp_by_providers_that_give_it(install):
    with_it, without = Fake("a"), Fake("b", lse=False)
    asked = install(with_it, without, sdpa=1.0, a=0.5, b=0.1)
    q, k, v = qkv()
    out, lse = attend_lse(q, k, v)
    wanted, sums = explicit(q, k, v)
    assert torch.equal(out, wanted) and torch.equal(lse, sums) and asked == [["a", "sdpa"]]
    assert why("b", "attention in segments") == "it gives no log-sum-exp"


def test_a_wrong_log_sum_exp_is_refused(install):
    fake = Fake()

    def find():
        def kernel(q, k, v):
            out, lse = explicit(q, k, v)
            return out, lse / torch.log(torch.tensor(2.0))

        return kernel

    fake.provider = fake.provider._replace(find_lse=find)
    install(fake, sdpa=1.0, fake=0.5)
    q, k, v = qkv()
    assert torch.allclose(attend_lse(q, k, v)[1], explicit(q, k, v)[1], atol=1e-5)
    assert why("fake", "attention in segments") == "its log-sum-exp is wrong"


def test_a_stock_kernel_with_log_sum_exp_that_is_wrong_is_not_used(monkeypatch):
    def wrong(q, k, v):
        out, lse = explicit(q, k, v)
        return out, lse * torch.log2(torch.tensor(torch.e))

    monkeypatch.setattr(chooser, "_cpu", wrong)
    chooser.sdpa_lse.cache_clear()
    assert chooser.sdpa_lse("cpu", torch.float32, 16) is explicit
    chooser.sdpa_lse.cache_clear()


@pytest.mark.parametrize("version", ["2", "3", "3, older"])
def test_flash_attn_of_every_version_is_called_rightly(monkeypatch, version):
    """Axes (B, L, H, D); the second gives three results when asked, an older third always two."""

    def run(q, k, v, **asked):
        out, lse = explicit(*(x.transpose(1, 2) for x in (q, k, v)))
        out = out.transpose(1, 2)
        if version == "3, older":
            if asked:
                raise TypeError("got an unexpected keyword argument 'return_attn_probs'")
            return out, lse
        if not asked.get("return_attn_probs"):
            return out
        return (out, lse, None) if version == "2" else (out, lse)

    name = "flash_attn" if version == "2" else "flash_attn_interface"
    for other in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, other, None)
    module = types.ModuleType(name)
    module.flash_attn_func = run
    monkeypatch.setitem(sys.modules, name, module)
    q, k, v = qkv()
    wanted, sums = explicit(q, k, v)
    out, lse = flash_lse()(q, k, v)
    assert torch.equal(flash()(q, k, v), wanted)
    assert torch.equal(out, wanted) and torch.equal(lse, sums)


def test_reasons_tell_missing_from_broken(monkeypatch):
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"^it is not installed$"):
        flash()

    class Broken:
        def find_spec(self, name, *_):
            if name == "flash_attn":
                raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match="does not import: OSError: libcudart"):
        flash()


def test_measuring_is_fair(monkeypatch):
    """All in turn, the median of each."""
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(chooser.time, "perf_counter", lambda: next(clock))
    calls = {n: (lambda n=n: order.append(n)) for n in "ab"}
    times = chooser.seconds(calls, CPU)
    assert "".join(order) == "ab" * chooser.ROUNDS and times == {"a": 1, "b": 1}
