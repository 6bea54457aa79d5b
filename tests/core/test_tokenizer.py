"""Templates, padding and tokenizer files, against diffusers' pipelines and transformers."""

import base64
import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from flux2_pack.flux2_core.configs import MISTRAL3_24B, NANO_TEXT, QWEN3_4B
from flux2_pack.flux2_core.errors import Flux2Error
from flux2_pack.flux2_core.nano import scenes
from flux2_pack.flux2_core.nano.vocabulary import SPECIAL, WORDS, tokenizer_json
from flux2_pack.flux2_core.text_encoder import TextEncoder
from flux2_pack.flux2_core.tokenizer import (
    SYSTEM,
    PromptTokenizer,
    find_tokenizer,
    nano_tokenizer,
)
from flux2_pack.flux2_core.tokenizer_files import from_file, from_json, from_tekken

tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
transformers = pytest.importorskip("transformers", reason="pip install transformers")
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402

TEXTS = (
    "a cat in the hat",
    "The cat's THE, 123 naïve  cafés\n\n  at\tnight — 猫が🐈",
    "",
    "[IMG]the [INST]hat[/INST] <|im_end|>cat</think> [IM[IMG]G]",
    "xyzw nai\u0308ve",  # a word that no joins lead to; dots of their own
    "the cat " * 40,
)

# Mistral's cut into words, the "pattern" of its tekken files.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[A]", "[B]", "[C]", "[D]", "[E]"]
MISTRAL_SPECIAL += ["[IMG]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
JOINED = [
    b"th",
    b"at",
    b"in",
    b" t",
    b"the",
    b" the",
    b" c",
    b"cat",
    b" cat",
    b"he",
    b"hat",
    b"xyzw",
]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def tekken() -> dict:
    """A tekken file in miniature, with one word too many for the vocabulary."""
    words = [bytes([i]) for i in range(256)] + JOINED + [b" hat"]
    listed = [{"rank": i, "token_bytes": base64.b64encode(w).decode()} for i, w in enumerate(words)]
    special = [
        {"rank": i, "token_str": s, "is_control": True} for i, s in enumerate(MISTRAL_SPECIAL)
    ]
    config = {
        "pattern": PATTERN,
        "default_vocab_size": len(special) + len(words) - 1,
        "default_num_special_tokens": len(special),
    }
    return {"config": config, "vocab": listed, "special_tokens": special}


def as_tensor(data: dict) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)


def converted(data: dict):
    """transformers' own conversion of the same words, with the file's pattern."""
    from transformers.integrations.mistral import MistralConverter

    vocabulary: dict = {token["token_str"]: token["rank"] for token in data["special_tokens"]}
    for word in data["vocab"][: data["config"]["default_vocab_size"] - len(vocabulary)]:
        vocabulary[base64.b64decode(word["token_bytes"])] = len(vocabulary)
    return MistralConverter(
        vocabulary, PATTERN, additional_special_tokens=MISTRAL_SPECIAL
    ).converted()


def qwen_folder(folder):
    """Qwen's three files in miniature: 256 bytes, a few merges, the special tokens after them."""
    letters = bytes_to_unicode()
    pairs = [
        (" ", "c"),
        ("a", "t"),
        (" c", "at"),
        ("t", "h"),
        ("th", "e"),
        (" ", "the"),
        ("\n", "\n"),
        ("1", "2"),
    ]
    words = [bytes([i]) for i in range(256)] + [(a + b).encode() for a, b in pairs]

    def spell(word):
        return "".join(letters[b] for b in (word.encode() if isinstance(word, str) else word))

    vocabulary = {spell(word): i for i, word in enumerate(words)}
    added = {
        str(len(words) + i): {"content": s, "special": i < 3} for i, s in enumerate(QWEN_SPECIAL)
    }
    config = {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"}
    merges = "\n".join(f"{spell(a)} {spell(b)}" for a, b in pairs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


TOY = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, heads=2, kv_heads=1, head_dim=16,
    layers_out=(1, 2, 3), text_length=96,
)  # fmt: skip
MISTRAL, QWEN = replace(MISTRAL3_24B, **TOY), replace(QWEN3_4B, **TOY, pad_id=264)


def test_the_system_text_is_the_published_one():
    digest = "d43d93082f24034d9c7f4e5b65cdeceb1e082c64c9cf95dfae5be89c31e1320d"
    assert hashlib.sha256(SYSTEM.encode()).hexdigest() == digest
    diffusers = pytest.importorskip("diffusers.pipelines.flux2.system_messages")
    assert diffusers.SYSTEM_MESSAGE == SYSTEM


def test_tekken_is_cut_and_joined_as_transformers_does():
    data = tekken()
    ids, expected = from_tekken(as_tensor(data)), converted(data)
    for text in TEXTS:
        assert ids(text) == expected.encode(text, add_special_tokens=False).ids
    assert ids("[INST]") == [3] and ids("cat") != ids(" cat") and len(ids("the")) == 1
    assert len(ids(" hat")) == 2  # beyond the vocabulary's end


def test_tekken_joins_the_lowest_rank_first():
    """The definition, written out: join the neighbours whose result has the lowest rank."""
    data = tekken()
    words = [base64.b64decode(word["token_bytes"]) for word in data["vocab"][:-1]]
    rank = {word: i for i, word in enumerate(words)}
    ids = from_tekken(json.dumps(data))
    for text in ("that", " the", "hathat", " cathe", "inthecat"):
        parts = [bytes([b]) for b in text.encode()]
        while any(a + b in rank for a, b in pairwise(parts)):
            joins = [rank.get(a + b, 9999) for a, b in pairwise(parts)]
            i = joins.index(min(joins))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        assert ids(text) == [rank[part] + len(MISTRAL_SPECIAL) for part in parts]


@pytest.mark.parametrize("broken", ["{", "[]", json.dumps({"config": {}, "vocab": []})])
def test_a_broken_tokenizer_is_an_error_in_words(broken, tmp_path):
    for name in ("tekken.json", "tokenizer.json", "vocab.json"):
        (tmp_path / name).write_text(broken)
        with pytest.raises(Flux2Error, match=r"cannot be read.*Get it again"):
            from_file(tmp_path / name)


def test_qwen_files_read_as_transformers_reads_them(tmp_path):
    folder = qwen_folder(tmp_path / "q")
    ids = from_file(folder / "vocab.json")
    expected = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    for text in TEXTS:
        assert ids(text) == expected(text).input_ids
    assert ids("<think>") == [267] and ids(" cat") == [258]


@pytest.mark.host
def test_the_hosts_qwen_files_get_qwen3s_own_tokens(host):
    """Older hosts ship Qwen2.5's list of added tokens, in which <think> is no token."""
    import comfy.text_encoders

    folder = next(iter(comfy.text_encoders.__path__)) + "/qwen25_tokenizer"
    ids = find_tokenizer(QWEN3_4B, folders=[folder]).tokens("a cat")
    head, tail = [151644, 872, 198], [151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271]
    assert ids == [*head, 64, 8251, *tail]


# The parts of the published chat templates that a single user turn reaches.
QWEN_CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>' + '\\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
MISTRAL_CHAT = (
    "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + message['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}{%- else %}"
    "{{- '[INST]' }}{%- for block in message['content'] %}{{- block['text'] }}{%- endfor %}"
    "{{- '[/INST]' }}{%- endif %}{%- endfor %}"
)


class Recorder:
    """A text encoder that keeps what diffusers gives it, and answers with our hidden states."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder

    def __call__(self, input_ids, attention_mask, **_):
        self.ids, self.mask = input_ids, attention_mask.bool()
        states = self.encoder(self.ids, self.mask).chunk(3, -1)
        return SimpleNamespace(hidden_states=dict(enumerate(states)))


def check_encode(config, prompts: PromptTokenizer, embed, tokenizer):
    encoder = TextEncoder(config).requires_grad_(False)
    encoder.tokenizer = prompts
    texts = [*TEXTS, "hat"]
    recorder = Recorder(encoder)
    expected = embed(
        recorder, tokenizer, texts, max_sequence_length=96, hidden_states_layers=(0, 1, 2)
    )
    ids, mask = prompts.encode(texts)
    assert torch.equal(mask, recorder.mask)
    assert torch.equal(ids.where(mask, config.pad_id), recorder.ids)
    assert torch.equal(encoder.encode(texts), expected)


def test_qwen_rows_are_diffusers_rows(tmp_path):
    klein = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein")
    folder = qwen_folder(tmp_path)
    theirs = transformers.Qwen2TokenizerFast.from_pretrained(folder, chat_template=QWEN_CHAT)
    embed = klein.Flux2KleinPipeline._get_qwen3_prompt_embeds
    check_encode(QWEN, find_tokenizer(QWEN, folder), embed, theirs)


def test_mistral_rows_are_diffusers_rows():
    dev = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=converted(tekken()), bos_token="<s>", pad_token="<pad>",
        padding_side="left", chat_template=MISTRAL_CHAT,
    )  # fmt: skip
    config = replace(MISTRAL, text_length=288)  # the toy's system text alone has 140 tokens
    embed = dev.Flux2Pipeline._get_mistral_3_small_prompt_embeds

    def longer(*args, **options):
        return embed(*args, **options | {"max_sequence_length": 288})

    check_encode(config, find_tokenizer(config, tekken=as_tensor(tekken())), longer, theirs)


def test_too_long_a_prompt_loses_its_end_and_short_ones_are_padded():
    left = PromptTokenizer(replace(NANO_TEXT, padding="left"), from_json(tokenizer_json()))
    for prompts in (nano_tokenizer(), left):
        ids, mask = prompts.encode(["red " * 40, "red"])
        assert ids.shape == mask.shape == (2, 32)
        assert ids.dtype == torch.int64 and mask.dtype == torch.bool
        assert mask[0].all() and ids[0, 0] == 2 and (ids[0, 1:] == WORDS.index("red")).all()
        assert ids[1][mask[1]].tolist() == [2, WORDS.index("red")] and (ids[1][~mask[1]] == 0).all()
        assert len(prompts.tokens("red " * 40)) == 41
    assert mask[1].tolist() == [False] * 30 + [True] * 2


def test_tokenizers_are_taken_from_wherever_they_are(tmp_path):
    expected = nano_tokenizer().encode(TEXTS[0])[0]
    text = tokenizer_json()
    model = tokenizers.Tokenizer.from_str(text)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(text)
    (tmp_path / "text_encoder").mkdir()
    found = [
        find_tokenizer(NANO_TEXT, metadata={"tokenizer_json": text}),
        find_tokenizer(NANO_TEXT, folders=[tmp_path / "none", tmp_path]),
        find_tokenizer(
            NANO_TEXT, folders=[tmp_path / "text_encoder"]
        ),  # a folder in diffusers form
    ]
    given = [
        nano_tokenizer(),
        model,
        transformers.PreTrainedTokenizerFast(tokenizer_object=model),
        from_json(text),
        str(tmp_path),
        tmp_path / "tokenizer" / "tokenizer.json",
    ]
    found += [find_tokenizer(NANO_TEXT, tokenizer) for tokenizer in given]
    for prompts in found:
        assert torch.equal(prompts.encode(TEXTS[0])[0], expected)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(Flux2Error, match=r"another text encoder.*<\|im_start\|>"):
        find_tokenizer(QWEN, from_tekken(as_tensor(tekken())))
    with pytest.raises(Flux2Error, match=r"more words than the text encoder.*of 200"):
        find_tokenizer(replace(QWEN, vocab_size=200), qwen_folder(tmp_path)).encode("a")
    with pytest.raises(Flux2Error, match=f"No tokenizer was found.*in {tmp_path}.*not the one in"):
        find_tokenizer(MISTRAL, folders=[tmp_path])
    with pytest.raises(Flux2Error, match=f"There is no tokenizer here.*{tmp_path / 'no'}"):
        find_tokenizer(MISTRAL, tmp_path / "no")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(Flux2Error, match="pip install tokenizers"):
        nano_tokenizer()


def words_of(prompt: str) -> list[str]:
    return [WORDS[i] for i in nano_tokenizer().tokens(prompt)[1:]]


def test_nanos_words_fit_its_encoder_and_are_distinct():
    assert WORDS[:3] == SPECIAL == ("[pad]", "[unk]", "[bos]")
    assert len(WORDS) == len(set(WORDS)) <= NANO_TEXT.vocab_size
    assert {*map(str, range(1, 21)), *"abcdefghijklmnopqrstuvwxyz"} <= set(WORDS)


def test_nano_knows_every_word_of_its_world():
    prompts = [f"a {c} {s} {p} on {b} background" for c in scenes.COLORS for s in scenes.SHAPES
               for p in scenes.PLACES for b in scenes.BACKGROUNDS]  # fmt: skip
    prompts += [scenes.recolor_prompt(10, c) for c in scenes.COLORS]
    prompts += [scenes.background_prompt(3, "tan"), scenes.mix_prompt(2, 9, "center", "gray")]
    prompts += [
        scenes.pick_prompt([(7, "left"), (3, "right")], "white"),
        "an orange shape and a ring",
    ]
    assert not [p for p in prompts if "[unk]" in words_of(p)]
    assert max(len(nano_tokenizer().tokens(p)) for p in prompts) <= NANO_TEXT.text_length


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A RED circle,left.", "a red circle left"),
        ("image 10 with a blue shape!", "image 10 with a blue shape"),
        ("Image10", "image 10"),
        ("the word 'b a d'", "the word b a d"),
        ("a zebra and @hero on 99", "a [unk] and [unk] on [unk]"),
        ("@red's circle, naïve 猫", "[unk] circle [unk] [unk]"),
        ("  \n ", ""),
    ],
)
def test_nano_splits_freely_written_prompts(prompt, words):
    assert words_of(prompt) == words.split()


def test_where_a_long_prompt_is_cut():
    """What is read and what is not: the first part fits, a word more does not."""
    tokenizer = nano_tokenizer()
    assert tokenizer.cut("a red circle") is None
    text = "red " * 40
    at = tokenizer.cut(text)
    before = tokenizer.template.before
    assert len(tokenizer.tokenize(before + text[:at])) == tokenizer.config.text_length
    assert len(tokenizer.tokenize(before + text[: at + 4])) > tokenizer.config.text_length
