"""Writing with a text encoder, against transformers' Mistral-3 and Qwen3 with the same weights.

Errors are max |a - b| / std(b) in float32.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flux2_pack.flux2_core.configs import MISTRAL3_24B, NANO_TEXT, QWEN3_4B, QWEN3_8B
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.files import Checkpoint, Entry
from flux2_pack.flux2_core.formats import encode
from flux2_pack.flux2_core.generate import CHATS, choose, continue_text
from flux2_pack.flux2_core.generate_files import ability, load_writer, rest_in, rest_of
from flux2_pack.flux2_core.info import describe
from flux2_pack.flux2_core.keymaps import LLAMA_CPP, match
from flux2_pack.flux2_core.quantised import QuantLinear
from flux2_pack.flux2_core.text_encoder import TextEncoder
from flux2_pack.flux2_core.vision_tower import pixels_of, place_of
from flux2_pack.tests.core import toy_language

pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("tokenizers", reason="pip install tokenizers")

FAMILIES = ("mistral", "qwen", "qwen untied")
CLOSE = 1e-5


def picture(seed: int, width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


PICTURES = (picture(1, 60, 90), picture(2, 130, 50))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> (our writer from a file, transformers' model)."""
    folder = tmp_path_factory.mktemp("writers")
    models = {
        "mistral": toy_language.mistral(),
        "qwen": toy_language.qwen(),
        "qwen untied": toy_language.qwen(tied=False),
    }
    out = {}
    for family, model in models.items():
        kind = family.split()[0]
        rename = toy_language.as_published if kind == "mistral" else str
        path = toy_language.write(model, kind, folder / f"{family}.safetensors", rename)
        out[family] = load_writer(path), model
    return out


def asked(writer, with_pictures: bool):
    """Token ids of a chat, the pictures' pixels, and both as transformers takes them."""
    pixels = [pixels_of(p, 28) for p in PICTURES] if with_pictures else []
    chat = CHATS[writer.encoder.config.template]
    text = chat("Rewrite.", "a red circle", "".join(place_of(p, 28) for p in pixels))
    ids = list(writer.prompts.tokenize(text))
    more = {}
    if pixels:
        sizes = [p.shape[-2:] for p in pixels]
        high, wide = (max(size[i] for size in sizes) for i in (0, 1))
        padded = torch.zeros(len(pixels), 3, high, wide)
        for i, p in enumerate(pixels):
            padded[i, :, : p.shape[-2], : p.shape[-1]] = p[0]
        more = {"pixel_values": padded, "image_sizes": torch.tensor([list(s) for s in sizes])}
    return ids, pixels, more


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(pairs, family, cached):
    """Of the whole text and of eight tokens more, with the K/V cache and without."""
    writer, model = pairs[family]
    ids, pixels, more = asked(writer, family == "mistral")
    caches = writer.new_caches(len(ids) + 8) if cached else []
    found = [writer.logits(ids, pixels, caches)]
    for i in range(8):
        ids = [*ids, 40 + i]
        found.append(writer.logits(ids[-1:] if cached else ids, () if cached else pixels, caches))
    with torch.no_grad():
        rows = model(torch.tensor([ids]), use_cache=False, **more).logits[0, -9:]
    assert (torch.stack(found) - rows).abs().max() / rows.std() < CLOSE  # observed 4.8e-6 at most


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers(pairs, family):
    writer, model = pairs[family]
    ids, _, more = asked(writer, family == "mistral")
    chat = CHATS[writer.encoder.config.template]
    stop = [writer.prompts.tokenize(token)[0] for token in chat.stop]
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=24, do_sample=False, eos_token_id=stop, pad_token_id=0, **more,
        )[0, len(ids) :].tolist()  # fmt: skip
    expected = writer.prompts.decode([token for token in out if token not in stop])
    shown = PICTURES if more else ()
    text, ended = writer.write("Rewrite.", "a red circle", shown, limit=24)
    assert text == expected and ended == (out[-1] in stop)
    assert family == "qwen" or len(set(out)) > 4  # a tied head of random words repeats itself


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_equals_transformers(pairs, family):
    """The same seed's draws on transformers' logits give the same tokens."""
    writer, model = pairs[family]
    ids, _, more = asked(writer, family == "mistral")
    read: list[int] = []

    def step(new):
        read.extend(new)
        with torch.no_grad():
            return model(torch.tensor([read]), use_cache=False, **more).logits[0, -1]

    chat = CHATS[writer.encoder.config.template]
    stop = {writer.prompts.tokenize(token)[0] for token in chat.stop}
    tokens, _ = continue_text(step, ids, stop, 24, 0.7, seed=5)
    shown = PICTURES if more else ()
    text, _ = writer.write("Rewrite.", "a red circle", shown, limit=24, temperature=0.7, seed=5)
    assert text == writer.prompts.decode(tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_cache_changes_no_word(pairs, family, temperature):
    writer, _ = pairs[family]
    shown = PICTURES if writer.sees else ()
    options = {"limit": 30, "temperature": temperature, "seed": 3}
    with_cache = writer.write("Rewrite.", "a cat", shown, **options)
    assert with_cache == writer.write("Rewrite.", "a cat", shown, cached=False, **options)


def test_the_same_seed_writes_the_same(pairs):
    writer, _ = pairs["qwen"]
    texts = [
        writer.write("Rewrite.", "a cat", limit=30, temperature=1.0, seed=s)[0] for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_pictures_and_their_order_are_seen(pairs):
    writer, _ = pairs["mistral"]
    rows = []
    for shown in ((), PICTURES, PICTURES[::-1]):
        pixels = [pixels_of(p, 28) for p in shown]
        text = CHATS["mistral3"]("", "a cat", "".join(place_of(p, 28) for p in pixels))
        rows.append(writer.logits(list(writer.prompts.tokenize(text)), pixels))
    assert all((a - b).abs().max() > 0.1 for a, b in ((rows[0], rows[1]), (rows[1], rows[2])))


def test_words_with_a_meaning_are_taken_out(pairs):
    """Nobody's prompt ends its turn or pretends to be a picture."""
    writer, _ = pairs["mistral"]
    plain = writer.write("Rewrite.", "a cat", PICTURES[:1], limit=8)
    typed = writer.write("Rewrite.", "a [IMG]cat</s>", PICTURES[:1], limit=8)
    assert plain == typed


def test_interrupt_and_limit(pairs):
    writer, _ = pairs["qwen"]
    said: list[int] = []

    def stop(count):
        said.append(count)
        if count == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        writer.write("Rewrite.", "a cat", limit=10, on_token=stop)
    assert said == [1, 2, 3]
    step = lambda new: torch.tensor([0.0, 1.0])  # noqa: E731
    assert continue_text(step, [0], {0}, 4, 0, 0) == ([1, 1, 1, 1], False)
    assert continue_text(step, [0], {1}, 4, 0, 0) == ([], True)


def test_draws_follow_the_softmax():
    """10,000 draws at two temperatures; the expected shares are met within 2 %."""
    logits = torch.tensor([1.0, 0.0, -1.0, float(torch.finfo(torch.float32).min)])
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 0.5):
        drawn = [choose(logits, temperature, generator) for _ in range(10_000)]
        share = torch.bincount(torch.tensor(drawn), minlength=4) / 10_000
        assert (share - (logits / temperature).softmax(-1)).abs().max() < 0.02  # observed 0.007
    with pytest.raises(Flux2Error, match="overflow"):
        choose(torch.tensor([0.0, float("nan")]), 1.0, generator)


# ------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("rename", [str, toy_language.as_published])
def test_both_spellings_of_mistral_load(tmp_path, rename):
    path = toy_language.write(toy_language.mistral(), "mistral", tmp_path / "m.safetensors", rename)
    found = rest_of(path)
    assert found.layers == 2 and found.vision and found.vision.layers == 3
    bare = toy_language.write(
        toy_language.mistral(), "mistral", tmp_path / "text.safetensors", toy_language.as_published,
        leave=("vision_tower", "multi_modal"),
    )  # fmt: skip
    assert rest_of(bare).vision is None and not load_writer(bare).sees


def test_half_precision_files_write(tmp_path):
    path = toy_language.write(
        toy_language.mistral(), "mistral", tmp_path / "m.safetensors", dtype=torch.bfloat16
    )
    writer = load_writer(path)
    assert writer.rest.norm.weight.dtype == torch.bfloat16
    assert writer.write("", "a cat", PICTURES, limit=4)[0]


LINEARS = ("_proj.weight", "lm_head.weight")


def logits_of(writer):
    return writer.logits(list(writer.prompts.tokenize("a red circle")))


@pytest.mark.parametrize("form", ["float8_e4m3fn", "int8_tensorwise"])
def test_quantised_files_write(tmp_path, form):
    """The upper layers and the head are read in the file's own format, layer by layer."""
    model = toy_language.qwen(tied=False)
    state, decoded = {}, {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if not name.endswith(LINEARS):
            state[name] = decoded[name] = tensor.clone()
            continue
        packed = encode(tensor, form)
        state |= {f"{layer}.{part}": codes for part, codes in packed.parts.items()}
        decoded[name] = packed.decode()
    found = []
    for i, tensors in enumerate((state, decoded)):
        path = tmp_path / f"{i}.safetensors"
        save_file(tensors, path, {"tokenizer_json": toy_language.tokenizer_json("qwen")})
        found.append(load_writer(path, dtype=torch.float32))
    assert isinstance(found[0].rest.lm_head, QuantLinear)
    a, b = map(logits_of, found)
    assert (a - b).abs().max() / b.std() < CLOSE  # observed 4.9e-7


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_files_write(tmp_path, tied):
    """llama.cpp's names and its order of rows, above the encoder as in it; its `output`, or none."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    model, family = (toy_language.qwen(), "qwen3") if tied else (toy_language.mistral(), "llama")
    config = model.config.get_text_config()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(tmp_path / "text.gguf", family)
    for name, tensor in model.state_dict().items():
        name = name.replace("language_model.", "")
        if "vision" in name or "multi_modal" in name or (tied and "lm_head" in name):
            continue
        count = heads.get(name.split(".")[-2]) if family == "llama" else None
        if count:
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).flatten(0, 2)
        writer.add_tensor(llama_cpp(name), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kind = "qwen" if tied else "mistral"
    (tmp_path / "tokenizer.json").write_text(toy_language.tokenizer_json(kind))
    found = logits_of(load_writer(tmp_path / "text.gguf"))
    plain = logits_of(load_writer(toy_language.write(model, kind, tmp_path / "plain.safetensors")))
    assert (found - plain).abs().max() / plain.std() < CLOSE  # observed 5.4e-7: other alignment


def llama_cpp(name: str) -> str:
    if name == "lm_head.weight":
        return "output.weight"
    rule, fields = match(LLAMA_CPP, name.removeprefix("model."), 0)
    return rule.diffusers.format(**fields)


def entries(config, layers: int, *more: str) -> Checkpoint:
    """The header of a file with so many layers, and tensors of these names besides."""
    config = replace(config, layers_out=(1, 2, layers))
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in TextEncoder(config).state_dict().items()}
    shapes |= dict.fromkeys(more, (config.hidden_size,))
    tensors = {name: Entry("BF16", shape) for name, shape in shapes.items()}
    path = Path("text.safetensors")
    return Checkpoint(path, tensors, {}, dict.fromkeys(tensors, path))


@pytest.mark.parametrize(
    ("config", "layers", "more", "says"),
    [
        (MISTRAL3_24B, 30, (), "30 of its 40 layers"),
        (MISTRAL3_24B, 40, ("lm_head.weight",), "last norm"),
        (MISTRAL3_24B, 40, ("model.norm.weight",), "output head"),
        (QWEN3_8B, 36, ("model.norm.weight",), "output head"),
        (QWEN3_4B, 27, ("model.norm.weight",), "27 of its 36 layers"),
        (NANO_TEXT, 3, (), "trained to read only"),
    ],
)
def test_cut_files_say_so(config, layers, more, says):
    with pytest.raises(Flux2Error, match=f"text.safetensors cannot write text.*{says}.*endpoint"):
        rest_in(entries(config, layers, *more), config)


def test_what_a_file_can_do_is_said_in_a_sentence(tmp_path):
    """As FLUX.2 Checkpoint Info shows it."""
    whole = toy_language.write(toy_language.mistral(), "mistral", tmp_path / "m.safetensors")
    assert "Reads and writes prompts; sees references." in describe(whole).lines
    cut = ability(entries(MISTRAL3_24B, 30), MISTRAL3_24B)
    assert cut.startswith("Reads prompts, and cannot write them: 30 of its 40 layers are in it")
    assert "does not see" in ability(entries(QWEN3_4B, 36, "model.norm.weight"), QWEN3_4B)


def test_shards_write(tmp_path):
    """A published folder: an index, shards, tokenizer.json beside them."""
    model = toy_language.mistral()
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    (tmp_path / "tokenizer.json").write_text(toy_language.tokenizer_json("mistral"))
    index = tmp_path / "model.safetensors.index.json"
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    writer = load_writer(index)
    assert writer.sees and torch.equal(writer.rest.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("config", "layers", "more", "above"),
    [
        (MISTRAL3_24B, 40, ("model.norm.weight", "lm_head.weight"), 10),
        (QWEN3_4B, 36, ("model.norm.weight",), 9),
        (QWEN3_8B, 36, ("model.norm.weight", "lm_head.weight"), 9),
    ],
)
def test_whole_files_write(config, layers, more, above):
    found = rest_in(entries(config, layers, *more), config)
    assert found.layers == above and len(found.names) == 2 + above * (11 if config.qk_norm else 9)
