"""Conversations as text: templates, the thinking switch, and the published tokenizers where a folder holds them."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

import dllm_sd
from dllm_sd.cli import main
from dllm_sd.errors import InputError
from dllm_sd.policies import chat
from dllm_sd.policies.blueprint import Blueprint, read_blueprint
from dllm_sd.policies.chat import Chat
from dllm_sd.policies.families import LLADA_TEMPLATE
from dllm_sd.policies.loading import build_policy
from dllm_sd.policies.model import Model

ASSETS = Path(dllm_sd.__file__).parent / "assets"
MESSAGES = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "\n1 + 1?\n\n"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And\n2 + 2?"},
]
PUBLISHED_LLADA = (  # `chat_template` in tokenizer_config.json of LLaDA-8B-Instruct
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
SWITCH = (  # as in Qwen3's template
    "{%- for message in messages %}{{- '<' + message.role + '>' + message.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<assistant>' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}{%- endif %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Single characters and LLaDA's special tokens."""
    special = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    words = ["<unk>", *special, *map(chr, range(10, 127))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Split("", "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    made.add_special_tokens({"additional_special_tokens": special[2:]})
    made.chat_template = template
    return made


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:2], MESSAGES[:3]], ids=len)
def test_lladas_turn_is_opened_exactly_as_published_and_only_where_asked_for(messages: list[dict[str, str]]):
    published = Chat(tokenizer(PUBLISHED_LLADA), 5)
    ours = Chat(tokenizer(PUBLISHED_LLADA), 5, template=LLADA_TEMPLATE)
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert ours.render(messages) == published.render(messages)
    assert ours.render(messages).startswith("<|startoftext|><|start_header_id|>")
    assert published.render(messages, open_turn=False) == published.render(messages)  # why there is one of our own
    assert ours.render(messages, open_turn=False) + header == ours.render(messages)


def test_special_tokens_of_a_prompt_are_single_tokens_and_none_is_added():
    chat = Chat(tokenizer(), 5, template=LLADA_TEMPLATE)
    ids = chat.encode([{"role": "user", "content": "1"}])
    letters = {name: [chat.tokenizer.convert_tokens_to_ids(c) for c in name] for name in ("user", "assistant", "\n\n")}
    opened = [3, *letters["assistant"], 4, *letters["\n\n"]]
    one = chat.tokenizer.convert_tokens_to_ids("1")
    assert ids == [1, 3, *letters["user"], 4, *letters["\n\n"], one, 5, *opened]


def test_a_completion_ends_its_turn_and_its_text_has_no_special_tokens():
    chat = Chat(tokenizer(), 5, template=LLADA_TEMPLATE)
    tokens = chat.encode_completion("4 <ok>\n")
    assert tokens[-1] == 5
    assert chat.text([1, *tokens, 2]) == chat.tokenizer.decode(tokens[:-1])
    assert "".join(chat.text([token]) for token in tokens) == "4 <ok>\n"


@pytest.mark.parametrize(
    ("thinking", "opened"),
    [(None, "<user>1<assistant>"), (True, "<user>1<assistant>"), (False, "<user>1<assistant><think></think>")],
)
def test_the_thinking_switch_is_only_touched_where_it_is_set(thinking: bool | None, opened: str):
    chat = Chat(tokenizer(SWITCH), 5, thinking=thinking)
    assert chat.render([{"role": "user", "content": "1"}]) == opened
    assert chat.render([{"role": "user", "content": "1"}], open_turn=False) == "<user>1"


def test_a_switch_that_is_left_alone_is_not_defined():
    template = "{{ 'defined' if enable_thinking is defined else 'undefined' }}"
    assert Chat(tokenizer(template), 5).render(MESSAGES) == "undefined"
    assert Chat(tokenizer(template), 5, thinking=True).render(MESSAGES) == "defined"


@pytest.mark.parametrize("template", [PUBLISHED_LLADA, None])
@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_without_a_switch_is_refused(template: str | None, thinking: bool):
    with pytest.raises(InputError, match=r"^model\.thinking is set, but the chat template has no thinking switch"):
        Chat(tokenizer(template), 5, thinking=thinking)


def test_without_a_template_contents_are_joined():
    assert Chat(tokenizer(), 5).render(MESSAGES[1:3]) == "\n1 + 1?\n\n\n\n2"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_a_template_that_fails_is_named_in_one_line(template: str, message: str):
    chat = Chat(tokenizer(), 5, template=template)
    with pytest.raises(InputError, match=r"^the chat template cannot render the prompt: ") as caught:
        chat.render(MESSAGES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ 'a' * 10**10 }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'a' * 10**8 }}",
        "{{ 10 ** (10**8) }}",
        "{{ 10**9999 }}",
        "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{{ [[0] * 10**5] * 10**5 }}",
        "{{ messages[7].content.x.y }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ " + "(" * 10_000 + ")" * 10_000 + " }}",
        "{{ messages | sort }}",
    ],
    ids=lambda text: text[:40],
)
def test_a_hostile_template_is_a_sentence_within_seconds(template: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    start = time.process_time()
    with pytest.raises(InputError, match=r"chat.template") as caught:
        Chat(tokenizer(), 5, template=template).render(MESSAGES)
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_template_is_tried_before_a_weight_is_read(tmp_path: Path):
    shutil.copytree(ASSETS / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "chat_template.jinja").write_text("{{ 1 // 0 }}")
    (tmp_path / "tiny" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^the chat template cannot render .* or set model\.chat_template$"):
        read_blueprint(Model(path=str(tmp_path / "tiny")))


def test_a_template_works_away_from_the_main_thread():
    made = Chat(tokenizer(PUBLISHED_LLADA), 5)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(made.render, MESSAGES).result() == made.render(MESSAGES)


# What follows reads the published tokenizers, which are too big to keep here.
PUBLISHED = Path(os.environ.get("DLLM_SD_TOKENIZERS") or "DLLM_SD_TOKENIZERS names no folder of published tokenizers")
published = pytest.mark.skipif(not (PUBLISHED / "dream").is_dir(), reason=f"not a folder of tokenizers: {PUBLISHED}")
QWEN: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "max_window_layers": 2},
    **{"use_sliding_window": False, "rope_scaling": None, "hidden_act": "silu", "tie_word_embeddings": False},
    **{"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": 151643},
}
SIZES = {key: value for key, value in QWEN.items() if not key.endswith("token_id") and key != "rope_scaling"}
FAMILIES: dict[str, dict[str, Any]] = {
    "dream": {
        "tokenizer": "dream",
        "native": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=152064, **SIZES)),
        "config": {"model_type": "Dream", "vocab_size": 152064, "mask_token_id": 151666, "rope_theta": 1e6, **QWEN},
        "generation": {"eos_token_id": 151643, "pad_token_id": 151643},
        "mask": 151666,
        "ends": (151645, 151643),
        "unknown": range(151667, 152064),
        "decode": {},
        "suffix": {},
    },
    "sdar": {
        "tokenizer": "qwen3_sdar",
        "native": lambda: Qwen3ForCausalLM(Qwen3Config(vocab_size=151936, head_dim=16, **SIZES)),
        "config": {
            **{"model_type": "sdar", "vocab_size": 151936, "mask_token_id": 151669, "rope_theta": 1e6, **QWEN},
            **{"head_dim": 16, "block_size": 4, "attn_implementation": "flex_attention"},
        },
        "generation": {"eos_token_id": [151645, 151643], "pad_token_id": 151643},
        "mask": 151669,
        "ends": (151645, 151643),
        "unknown": range(151670, 151936),
        "decode": {"block_length": 4},
        "suffix": {"scope": "active_block", "ratio": 0.5},
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A random checkpoint of a family: the original config, the real vocabulary, few and small layers."""
    disable_progress_bar()
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    family["native"]().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(family["config"]))
    (folder / "generation_config.json").write_text(json.dumps(family["generation"]))
    return folder, family


def blueprint(tiny: tuple[Path, dict[str, Any]], **options: Any) -> Blueprint:
    folder, family = tiny
    return read_blueprint(Model(path=str(folder), tokenizer=str(PUBLISHED / family["tokenizer"]), **options))


@published
def test_ids_of_the_published_tokenizers(tiny: tuple[Path, dict[str, Any]]):
    read, family = blueprint(tiny), tiny[1]
    assert read.mask_id == family["mask"]
    assert read.end_ids == family["ends"]
    assert read.pad_id == 151643
    assert read.block_length == family["config"].get("block_size")
    assert build_policy(read).suppress == tuple(family["unknown"])


@published
def test_turns_of_the_published_tokenizers(tiny: tuple[Path, dict[str, Any]]):
    chat = blueprint(tiny).chat
    assert chat
    turn = "<|im_start|>user\n1 + 1?<|im_end|>\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" * (tiny[1]["tokenizer"] == "dream")
    messages = [{"role": "user", "content": "1 + 1?"}]
    assert chat.render(messages) == f"{system}{turn}<|im_start|>assistant\n"
    assert chat.render(messages, open_turn=False) == f"{system}{turn}"
    assert chat.encode(messages).count(151644) == 2 + bool(system)
    if tiny[1]["tokenizer"] == "dream":
        with pytest.raises(InputError, match="no thinking switch"):
            blueprint(tiny, thinking=False)
    else:
        silent = blueprint(tiny, thinking=False).chat
        assert silent
        assert silent.render(messages) == f"{turn}<|im_start|>assistant\n<think>\n\n</think>\n\n"


@published
def test_text_survives_the_published_tokenizers(tiny: tuple[Path, dict[str, Any]]):
    chat = blueprint(tiny).chat
    assert chat
    text = "  12+3 = 15\n\n```python\n\tx = 'é你好'\n``` #### 1,234 \n"
    tokens = chat.encode_completion(text)
    assert tokens[-1] == 151645
    assert chat.text([*tokens, 151643, 151643]) == text


@pytest.fixture
def gsm8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Trains on a few questions; returns the metrics of the updates."""
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)

    def train(model: dict[str, Any], decode: dict[str, Any], suffix: dict[str, Any]) -> list[dict[str, Any]]:
        tree = {
            "run": "run",
            "updates": 3,
            "model": {**model, "lora": {"rank": 4, "alpha": 8}},
            "task": {"name": "gsm8k", "data": "train.jsonl", "size_dev": 0},
            "decode": {"length": 16, "block_length": 8, "tokens_per_step": 2, **decode},
            "method": {
                **{"name": "d_opsd", "gate": "all", "rollout": {"problems": 2, "attempts": 1}},
                "contexts": [{"name": "suffix", **suffix}],
            },
            "optim": {"lr": 1e-2},
            "eval": {"every": 0},
            "log": {"progress": False, "tensorboard": False},
        }
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
        assert main(["train", "small.yaml"]) == 0
        lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]

    return train


@published
def test_a_published_vocabulary_trains_from_end_to_end(
    tiny: tuple[Path, dict[str, Any]], gsm8k: Callable[..., list[dict[str, Any]]]
):
    folder, family = tiny
    model = {"path": str(folder), "tokenizer": str(PUBLISHED / family["tokenizer"])}
    lines = gsm8k(model, family["decode"], family["suffix"])
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert all(line["sites"] > 0 and 0 < line["loss"] < 1 for line in lines)
