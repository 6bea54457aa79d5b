"""FLUX.2 Kernel Status in the host."""

import pytest

from flux2_pack.tests.nodes import toy

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def graph(host):
    toy.write_models(host.models)
    with toy.heads_from_width():
        yield host


def status(graph, **inputs) -> list[str]:
    return graph.call("Flux2KitKernelStatus", **inputs)[0].splitlines()


def test_without_a_model_it_tells_about_the_device(graph):
    lines = status(graph)
    assert lines[0].startswith(("Device: cpu", "Card: "))
    assert any(line.startswith("  products in fp8: ") for line in lines)
    (attention,) = [line for line in lines if line.startswith("  attention: ")]
    assert attention.endswith("as ComfyUI was started")  # the host's choice stays the user's
    assert "The model's blocks:" not in lines


@pytest.mark.parametrize(
    ("precision", "said"),
    [("bf16", None), ("fp8", "fp8, multiplied in "), ("fp8 weights only", "fp8 weights only, ")],
)
def test_a_models_layers_are_counted(graph, precision, said):
    how = {"precision": precision, "layers": "single_blocks.1.*: bf16"}
    (model,) = graph.call("Flux2KitModelLoader", model="toy-klein.safetensors", **how)
    lines = status(graph, model=model)
    blocks = lines[lines.index("The model's blocks:") + 1 :]
    counts = {line.split(": ", 1)[1]: int(line.split()[0]) for line in blocks}
    assert sum(counts.values()) == 8 * 2 + 2 * 3
    packed = sum(many for what, many in counts.items() if said and what.startswith(said))
    assert packed == (8 * 2 + 2 * 2 if said else 0)


def test_a_models_own_attention_is_told(graph):
    (model,) = graph.call("Flux2KitModelLoader", model="toy-klein.safetensors")
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda *a, **k: 0
    told = " ".join(status(graph, model=model))
    assert "another node puts its own in its place" in told


def test_it_runs_anew_each_time(graph):
    from flux2_pack.nodes.kernels import Flux2KitKernelStatus as node

    assert node.fingerprint_inputs() != node.fingerprint_inputs()
