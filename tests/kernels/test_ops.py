"""The operations as PyTorch and a user see them: schemas, fake tensors, torch.compile, and the table
that chooses who serves a call."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flux2_pack.flux2_core import kernels
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.kernels import ops, reference, table

ROOT = Path(__file__).resolve().parents[2]
E4M3, BF16 = reference.E4M3, torch.bfloat16
# hidden size, heads, tokens at one megapixel with 512 of text
MODELS = {"dev": (6144, 48, 4608), "klein 9B": (4096, 32, 4608), "klein 4B": (3072, 24, 4608)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def own_op():
    """An operation of the test's own: log of calls, and a way to call it."""
    op = table.operation("test_op", (torch.float32,), (8,), 16)
    op.candidates, op.broken = [], {}
    op.chosen.clear()
    yield op
    del table.OPS["test_op"]


def call(op, x):
    return op(x.device, (x.dtype,), (x.shape[1],), x.shape[0], x)


def codes(rows, columns):
    return torch.randn(rows, columns).to(E4M3)


def samples():
    """An operation's arguments, at sizes that are quick."""
    x, y = torch.randn(2, 2, 5, 64).bfloat16()
    shift, scale, gate = torch.randn(2, 1, 3 * 64).bfloat16().chunk(3, -1)
    qkv, text = (torch.randn(2, n, 3 * 2 * 32).bfloat16() for n in (4, 3))
    weights, rope = torch.rand(4, 32).bfloat16(), torch.rand(2, 7, 16)
    heads = (qkv, *weights[:2], *rope, text, *weights[2:])
    cut = [t[3:] for t in rope]
    w = (codes(24, 64), torch.rand(24, 1))
    return [
        ("quantize_rows", (x[0],)),
        ("quantize_rows", (x[0], 32.0)),
        ("modulate_quantize", (x, shift, scale)),
        ("modulate_quantize", (x, shift, scale, 32.0)),
        ("gated_modulate_quantize", (x, y, gate, shift, scale)),
        ("gated_modulate_quantize", (x, y, gate, shift, scale, 16.0)),
        ("swiglu_quantize", (torch.randn(5, 200).bfloat16()[:, 72:],)),
        ("swiglu_quantize", (torch.randn(5, 128).bfloat16(), x[0])),
        ("swiglu_quantize", (torch.randn(5, 128).bfloat16(), x[0], 16.0)),
        ("qk_norm_rope", (qkv, *weights[:2], *cut)),
        ("qk_norm_rope", heads),
        ("requantize", (torch.randn(6, 20), torch.rand(6, 1), 7)),
        ("fp8_linear", (codes(5, 64), torch.rand(5, 1), *w)),
        ("fp8_linear", (codes(5, 64), torch.rand(5, 1), w[0], torch.ones(()), torch.float32)),
        ("fp8_weight_linear", (x[0], *w)),
        ("fp8_weight_linear", (x[0], w[0], torch.ones(()))),
        ("modulate", (x, shift, scale)),
        ("gated_modulate", (x, y, gate, shift, scale)),
        ("gated_add", (x, y, gate)),
        ("swiglu", (torch.randn(5, 200).bfloat16()[:, 72:],)),
        ("swiglu", (torch.randn(5, 128).bfloat16(), x[0])),
    ]


SAMPLES = [pytest.param(i, id=f"{name} {i}") for i, (name, _) in enumerate(samples())]


@pytest.fixture
def sample(request):
    torch.manual_seed(0)
    name, arguments = samples()[request.param]
    return getattr(kernels, name), arguments


def equal(a, b):
    return (
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        if a.dtype == E4M3
        else (torch.equal(a, b))
    )


# ------------------------------------------------------------------------------------ as PyTorch sees


@pytest.mark.parametrize("sample", SAMPLES, indirect=True)
def test_opcheck(sample):
    """Schema (nothing changed, nothing aliased), fake tensors, registration, symbolic shapes."""
    op, arguments = sample
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    if not any(a.dtype == E4M3 for a in arguments if isinstance(a, torch.Tensor)):
        checks.append("test_schema")  # it calculates with its inputs, which fp8 does not allow
    torch.library.opcheck(op, arguments, test_utils=checks)
    op(*arguments)
    assert all(
        equal(a, b) for a, b in zip(before, arguments, strict=True) if isinstance(a, torch.Tensor)
    )


@pytest.mark.parametrize("sample", SAMPLES, indirect=True)
def test_what_serves_agrees_with_the_definition(sample):
    op, arguments = sample
    made = op(*arguments)
    with kernels.use("reference"):
        right = op(*arguments)
    many = (made, right) if isinstance(made, tuple) else ((made,), (right,))
    for a, b in zip(*many, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.dtype == E4M3:
            assert equal(a, b)
        else:  # observed: 2.3e-3, a product rounded before and after its scale
            assert (a.double() - b.double()).norm() <= 3e-3 * b.double().norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    """The parts of a block in one graph: the numbers that they have without torch.compile."""
    x, y = torch.randn(2, 1, 6, 64).bfloat16()
    shift, scale, gate = torch.randn(1, 1, 3 * 64).bfloat16().chunk(3, -1)
    w = [(codes(n, k), torch.rand(n, 1) * 0.02) for n, k in ((6 * 64, 64), (64, 4 * 64))]
    rope = torch.rand(2, 6, 16)

    def block(x, y):
        x, c, s = kernels.gated_modulate_quantize(x, y, gate, shift, scale)
        mlp = kernels.fp8_linear(c, s, *w[0])
        q, k, v = kernels.qk_norm_rope(mlp[None, :, :192], torch.ones(32), torch.ones(32), *rope)
        c, s = kernels.swiglu_quantize(mlp, x[0])
        return kernels.fp8_linear(c, s, *w[1]), kernels.fp8_weight_linear(x[0], *w[0]), q, k, v

    made = torch.compile(block, fullgraph=True, backend=backend)(x, y)
    assert all(torch.equal(a, b) for a, b in zip(made, block(x, y), strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("model", MODELS)
def test_fake_cuda_tensors_at_true_sizes(model):
    """A single block of the real model, with no GPU: shapes, dtypes and device all the way."""
    h, heads, rows = MODELS[model]
    rope_size = (rows, 64)

    def new(*size, dtype=BF16):
        return torch.empty(size, dtype=dtype, device="cuda")

    def is_(x, dtype, *size):
        assert x.shape == size and x.dtype == dtype and x.device.type == "cuda"

    with FakeTensorMode():
        x, part = new(1, rows, h), new(1, 1, h)
        new_x, c, s = kernels.gated_modulate_quantize(x, x, part, part, part)
        is_(new_x, BF16, 1, rows, h), is_(c, E4M3, rows, h), is_(s, torch.float32, rows, 1)
        w = new(9 * h, h, dtype=E4M3), new(9 * h, 1, dtype=torch.float32)
        packed = kernels.fp8_linear(c, s, *w)
        is_(packed, BF16, rows, 9 * h)
        qkv, mlp = packed.split((3 * h, 6 * h), -1)
        norm, rope = new(128), new(*rope_size, dtype=torch.float32)
        text, picture = qkv.unsqueeze(0).split((512, rows - 512), 1)
        for q in kernels.qk_norm_rope(picture, norm, norm, rope, rope, text, norm, norm):
            is_(q, BF16, 1, heads, rows, 128)
        c, s = kernels.swiglu_quantize(mlp, new(rows, h))
        is_(c, E4M3, rows, 4 * h), is_(s, torch.float32, rows, 1)
        w = new(h, 4 * h, dtype=E4M3), new(dtype=torch.float32)
        is_(kernels.fp8_linear(c, s, *w, torch.float16), torch.float16, rows, h)
        is_(kernels.fp8_weight_linear(new(rows, 4 * h), *w), BF16, rows, h)
        is_(kernels.requantize(new(h, h), w[1], 3), E4M3, h, h)
        is_(kernels.quantize_rows(new(rows, h))[0], E4M3, rows, h)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("quantize_rows", (torch.ones(2, 3, 4),)),
        ("modulate_quantize", (torch.ones(2, 3, 4), torch.ones(2, 1, 4), torch.ones(1, 1, 4))),
        ("swiglu_quantize", (torch.ones(3, 4), torch.ones(2, 4))),
        ("fp8_weight_linear", (torch.ones(3, 4), torch.ones(5, 4), torch.ones(()))),
        ("fp8_weight_linear", (torch.ones(3, 4), torch.ones(5, 4).to(E4M3), torch.ones(4, 1))),
        ("qk_norm_rope", (torch.ones(1, 4, 24), *torch.ones(2, 4), *torch.ones(2, 3, 2))),
    ],
)
def test_what_does_not_fit_is_refused(name, arguments):
    """Also for fake tensors: a kernel would read what is not there."""
    with pytest.raises(Flux2Error, match=f"{name} was given tensors that do not fit"):
        getattr(kernels, name)(*arguments)
    with FakeTensorMode() as mode, pytest.raises(Flux2Error, match="do not fit"):
        getattr(kernels, name)(*map(mode.from_tensor, arguments))


def test_a_second_copy_of_the_pack_has_operations_of_its_own():
    assert ops._namespace(tuple(ops.SCHEMAS)) != "flux2_kit"
    assert "flux2_kit" in str(kernels.quantize_rows)


def test_importing_needs_no_triton():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["triton"] = None  # importing it fails
import flux2_core.kernels as kernels, torch
kernels.quantize_rows(torch.ones(2, 3))
print([row.chosen for row in kernels.status("cpu")])
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0 and "eager" in made.stdout, made.stderr


# ----------------------------------------------------------------------------------------- the table


def test_the_best_that_does_not_refuse(own_op):
    table.register("test_op", "reference", 0, lambda x: "reference")
    table.register("test_op", "fast", 50, lambda x: "fast")
    asked = []

    def refuses(case):
        asked.append(case)
        return "too narrow" if case.widths[0] < 16 else None

    table.register("test_op", "fastest", 90, lambda x: "fastest", refuses)
    assert call(own_op, torch.ones(5, 16)) == "fastest"
    assert [call(own_op, torch.ones(n, 8)) for n in (5, 6, 8)] == ["fast"] * 3
    assert len(asked) == 2  # 5, 6 and 8 rows are one case
    case = asked[1]
    assert (case.arch, case.rows, case.widths, case.dtypes) == ("cpu", 8, (8,), (torch.float32,))
    row = next(r for r in kernels.status("cpu") if r.op == "test_op" and r.chosen == "fast")
    assert row.refused == (("fastest", "too narrow"),)
    assert row.case == "up to 8 rows, 8, float32" and row.device == "cpu"


@pytest.mark.parametrize("name", ["fp8_linear", "fp8_weight_linear", "fp8_linear_fused"])
def test_no_rows_are_asked_of_nobody(name, fussy):
    fussy(name)
    weight, scale = codes(24, 64), torch.rand(24, 1)
    made = torch.empty(0, 64)
    rows = (made.bfloat16(),) if name == "fp8_weight_linear" else (made.to(E4M3), made[:, :1])
    y = getattr(kernels, name)(*rows, weight, scale)
    assert y.shape == (0, 24) and y.dtype == BF16


def test_a_failing_implementation_is_switched_off(own_op, caplog):
    calls = []

    def fails(x):
        calls.append(x)
        raise RuntimeError("no kernel image\nfor this device")

    table.register("test_op", "reference", 0, lambda x: x + 1)
    table.register("test_op", "fast", 50, fails)
    x = torch.zeros(4, 8)
    with caplog.at_level(logging.WARNING):
        for rows in (4, 4, 400):
            assert (call(own_op, torch.zeros(rows, 8)) == 1).all()
    assert len(calls) == 1 and len(caplog.records) == 1
    assert "test_op: fast is switched off on cpu, reference serves" in caplog.text
    row = next(r for r in kernels.status("cpu") if r.op == "test_op")
    assert row.chosen == "reference"
    assert row.refused == (("fast", "it failed: RuntimeError: no kernel image"),)
    assert (x == 0).all()


def test_a_call_at_fault_switches_nothing_off(own_op, caplog):
    def fails(x):
        raise ValueError("too cold")

    table.register("test_op", "reference", 0, fails)
    table.register("test_op", "fast", 50, fails)
    with pytest.raises(ValueError, match="too cold"):
        call(own_op, torch.ones(4, 8))
    assert not own_op.broken and not caplog.records


def test_lack_of_memory_and_mistakes_pass_through(own_op):
    """The host frees memory and tries again; nothing is slower afterwards."""
    errors = [torch.cuda.OutOfMemoryError("full"), Flux2Error("wrong")]

    def fails(x):
        if errors:
            raise errors.pop()
        return "fast"

    table.register("test_op", "reference", 0, lambda x: "reference")
    table.register("test_op", "fast", 50, fails)
    for kind in (Flux2Error, torch.cuda.OutOfMemoryError):
        with pytest.raises(kind):
            call(own_op, torch.ones(4, 8))
    assert call(own_op, torch.ones(4, 8)) == "fast"


def test_the_user_chooses(own_op):
    for name, priority in (("reference", 0), ("eager", 10), ("torch", 40), ("triton", 100)):
        table.register("test_op", name, priority, lambda x, name=name: name)
    x = torch.ones(4, 8)
    assert call(own_op, x) == "triton"
    for name in ("reference", "eager", "torch", "triton", "auto"):
        with kernels.use(name):
            assert call(own_op, x) == {"auto": "triton"}.get(name, name)
    assert call(own_op, x) == "triton"
    with kernels.use("torch, eager"), kernels.use("eager"):
        assert call(own_op, x) == "eager"
    chosen = kernels.use("reference")
    assert call(own_op, x) == "reference"
    chosen.__exit__()
    own_op.candidates = [c for c in own_op.candidates if c.name != "torch"]
    with kernels.use("torch"):
        assert call(own_op, x) == "eager"
    with pytest.raises(Flux2Error, match="fastest"):
        kernels.use("fastest")
    assert call(own_op, x) == "triton"


@pytest.mark.parametrize("wish", ["reference", "nonsense"])
def test_the_environment_chooses(wish):
    code = f"""
import os, sys
os.environ["FLUX2_KERNELS"] = {wish!r}
sys.path.insert(0, {str(ROOT)!r})
import flux2_core.kernels as kernels, torch
try:
    kernels.quantize_rows(torch.ones(2, 3))
    print([row.chosen for row in kernels.status("cpu") if row.op == "quantize_rows"])
except kernels.table.Flux2Error as error:
    print(error)
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    wanted = {"reference": "['reference']", "nonsense": "FLUX2_KERNELS names what is not there"}
    assert wanted[wish] in made.stdout


def test_every_operation_has_a_definition_and_a_row_of_status():
    rows = {row.op for row in kernels.status("cpu")}
    for name, op in table.OPS.items():
        assert op.typical and name in rows
        assert {"reference"} <= {c.name for c in op.candidates}


def test_the_table_costs_little(own_op):
    """A look in a dictionary. Observed: 0.5 to 0.7 us on a quiet machine."""
    table.register("test_op", "reference", 0, lambda x: x)
    x = torch.ones(4, 8)
    best = min(_seconds(lambda: call(own_op, x), 500) for _ in range(20))
    assert best < 10e-6


def _seconds(do, count):
    start = time.perf_counter()
    for _ in range(count):
        do()
    return (time.perf_counter() - start) / count
