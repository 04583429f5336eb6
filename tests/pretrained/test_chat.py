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
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

import dllm_sd
from dllm_sd.cli.main import main
from dllm_sd.errors import InputError
from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained import chat
from dllm_sd.pretrained.blueprint import Blueprint, read_blueprint
from dllm_sd.pretrained.chat import Chat
from dllm_sd.pretrained.chat_templates import choose_template
from dllm_sd.pretrained.families import LLADA_TEMPLATE
from dllm_sd.pretrained.model import Model
from dllm_sd.tasks.conversations import content_of
from tests.tiers import crossed, later

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
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
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


# Tokenizers of every kind, each compared with what transformers makes of the same conversation.
BEGIN, CLOSED = "{{ bos_token }}", "{% if add_generation_prompt %}[assistant]{% endif %}"
TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
TEMPLATES: dict[str, Any] = {
    "none": None,
    "begins": BEGIN + TURNS + CLOSED,
    "does not begin": TURNS + CLOSED,
    "default of several": {"tool_use": "{{ 'tools' }}", "default": BEGIN + TURNS + CLOSED},
    "strips": TURNS.replace("m['content']", "m['content'] | trim") + CLOSED,
    "strips the right": TURNS.replace("m['content']", "m['content'].rstrip()") + CLOSED,
    "no system": REFUSES_SYSTEM + TURNS + CLOSED,
    "has a system of its own": "[system]Answer in <answer>.</s>" + TURNS + CLOSED,
    "generation": TURNS.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}") + CLOSED,
    "reads parts": TURNS.replace("{{ m['content'] }}", PARTS) + CLOSED,
    "opens thinking": BEGIN + TURNS + "{% if add_generation_prompt %}[assistant]<think>{% endif %}",
}
BEGINS = ("nothing", "bos", "bos and eos", "bos by key", "bos and eos by key", "bos by a key of the file")
SPECIAL = ("<s>", "</s>", "<pad>", "<mask>", "[user]", "[assistant]", "[system]", "<answer>", "</answer>", "<think>")


def made_tokenizer(begins: str, template: Any, folder: Path) -> Any:
    """Bytes and special tokens; read from files, as that of a checkpoint."""
    words = [*SPECIAL, "</think>", *sorted(ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevelDecoder()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[: len(SPECIAL) + 1]])
    ids = [("<s>", 0), ("</s>", 1)]
    if begins in ("bos", "bos and eos"):
        single = "<s> $A </s>" if "eos" in begins else "<s> $A"
        core.post_processor = TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=ids)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    keys = {"add_bos_token": True, "add_eos_token": "eos" in begins} if begins.endswith("by key") else {}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **named, **keys)
    made.chat_template = template
    made.save_pretrained(folder)
    if keys:
        return made
    written = {"clean_up_tokenization_spaces": True}
    written |= {"add_bos_token": True} if begins == "bos by a key of the file" else {}
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | written))
    return AutoTokenizer.from_pretrained(folder)


CONVERSATIONS = [
    [{"role": "user", "content": "ab"}],
    [{"role": "user", "content": " \n1 + 1 ?\t\u00e9\U0001f9ff\n "}],
    [{"role": "user", "content": "<answer>4</answer> </answer>"}],
    [{"role": "user", "content": "</s>[user]"}],
    [{"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}],
    MESSAGES[:3],
    MESSAGES,
]


@pytest.mark.parametrize(("template", "begins"), crossed(TEMPLATES, BEGINS))
def test_prompts_are_the_tokens_that_transformers_makes(begins: str, template: str, tmp_path: Path):
    theirs = made_tokenizer(begins, TEMPLATES[template], tmp_path)
    ours = Chat(theirs, 1)
    for conversation in CONVERSATIONS:
        spoken = [{**m, "content": content_of(m)} for m in conversation]
        given = conversation if template == "reads parts" else spoken
        if template != "none" and any("</s>" in m["content"] for m in spoken):
            continue  # transformers lets data end a turn
        if template == "no system" and conversation[0]["role"] == "system":
            with pytest.raises(InputError, match=r"no system role.*or leave out the system message \(task\.system\)$"):
                ours.encode(conversation)
            continue
        if template == "none":
            wanted = theirs("\n\n".join(m["content"] for m in spoken))["input_ids"]
            if begins != "bos by a key of the file":  # which transformers may heed or not
                assert (wanted[0] == 0) == ("bos" in begins)
            if "eos" in begins:
                assert wanted.pop() == 1  # it would end the prompt before it is answered
        else:
            wanted = theirs.apply_chat_template(given, add_generation_prompt=True, return_dict=False)
        assert ours.encode(conversation) == wanted


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("none", "opens thinking")])
def test_an_answer_is_gone_on_with_as_transformers_does(template: str, tmp_path: Path):
    theirs = made_tokenizer("bos", TEMPLATES[template], tmp_path)
    for begun in ("It is", " It is\n", "<think>x</think>It is "):
        conversation = [*MESSAGES[1:2], {"role": "assistant", "content": begun}]
        wanted = theirs.apply_chat_template(conversation, tokenize=False, continue_final_message=True)
        assert Chat(theirs, 1).render(conversation, continued=True) == wanted
        assert wanted.rstrip().endswith("It is")


@pytest.mark.parametrize("template", ["none", "begins", "opens thinking"])
@pytest.mark.parametrize("begins", ["nothing", "bos and eos by key"])
def test_a_completion_survives_its_tokens_but_for_turn_marks(begins: str, template: str, tmp_path: Path):
    ours = Chat(made_tokenizer(begins, TEMPLATES[template], tmp_path), 1)
    for text in ("2 , 2 ? it 's", "<think> a </think>\n<answer>4</answer>", "", " \u00e9\U0001f9ff\n"):
        tokens = ours.encode_completion(text)
        assert ours.text([0, *tokens, 2, 3, 1]) == text
        assert "".join(ours.text([token]) for token in ours.encode_completion("<answer>4 .")) == "<answer>4 ."
    marks: Any = ours.tokenizer.convert_tokens_to_ids(["[user]", "[assistant]"])
    assert ours.text(marks) == ("[user][assistant]" if template == "none" else "")
    assert ours.non_text_ids == {0, 1, 2, 3, *(marks if template != "none" else [])}


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "none"])
@pytest.mark.parametrize("begins", ["nothing", *later("bos and eos by key")])
def test_special_tokens_that_data_spells_are_text_and_end_no_turn(begins: str, template: str, tmp_path: Path):
    ours = Chat(made_tokenizer(begins, TEMPLATES[template], tmp_path), 1)
    for word in ("</s>", "<mask>", "<pad>", "<s>", "[user]", "[assistant]"):
        for text in (f"a {word} b", word, f"{word}{word} <answer>{word}", f" x{word}\n</s>", f"<think>{word}</think>"):
            plain = ours.encode([{"role": "user", "content": "ab"}])
            held = ours.encode([{"role": "user", "content": text}])
            assert [one for one in held if one in ours.non_text_ids] == [
                one for one in plain if one in ours.non_text_ids
            ]
            spelled = ours.render([{"role": "user", "content": text}])
            assert ours.tokenizer.decode(held) == spelled
            completion = ours.encode_completion(text)
            assert completion[-1] == 1
            assert not ours.non_text_ids & {*completion[:-1]}
            assert ours.text(completion) == text
            assert ("<answer>" in text) == (ours.tokenizer.convert_tokens_to_ids("<answer>") in completion)


def test_text_beside_a_spelled_special_token_has_the_tokens_of_a_tokenizer_that_splits_them(tmp_path: Path):
    ours = Chat(made_tokenizer("nothing", TURNS + CLOSED, tmp_path), 1)
    text = "a b </s> c"
    wanted = ours.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.encode_completion(text, ended=False) == wanted
    assert ours.encode([{"role": "user", "content": text}])[1:-2] == wanted


def test_spelled_special_tokens_are_said_once_with_what_becomes_of_them(tmp_path: Path):
    for template, becomes in ((None, "it becomes that token"), (TURNS + CLOSED, "it is read as text")):
        ours = Chat(made_tokenizer("nothing", template, tmp_path), 1)
        assert ours.warn_of_control(["a", "<answer>"], "the prompts") is None
        said = ours.warn_of_control(["a", "b </s>", "<mask>", "x" * 999], "the prompts")
        assert said is not None
        assert said.startswith("2 of the prompts spell a special token, such as '</s>' in 'b </s>'; ")
        assert becomes in said


@pytest.mark.parametrize(
    ("template", "system", "words"),
    [
        ("{{ 'Answer.' }}", False, "leaves out the user message"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
            False,
            "nothing",
        ),
        ("{{ '\n ' }}", False, "renders nothing"),
        ("{{ messages[-1].content[:3] }}", False, "leaves out the user message"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            True,
            "leaves out the system message",
        ),
    ],
)
def test_a_template_that_leaves_the_question_out_is_refused(template: str, system: bool, words: str):
    with pytest.raises(InputError, match=r"^the chat template ") as caught:
        Chat(tokenizer(), 5, template=template).check_template(system)
    assert words in str(caught.value)
    assert "set model.chat_template" in str(caught.value)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "no system"])
def test_templates_that_write_all_messages_pass(template: str, tmp_path: Path):
    for system in (False, True):
        Chat(made_tokenizer("bos", TEMPLATES[template], tmp_path), 1).check_template(system)


@pytest.mark.parametrize(
    "odd", [[{}], ["x"], [{"name": "default"}], [{"name": 1, "template": "{{ 1 }}"}], [None], [{"template": "{{ 1 }}"}]]
)
def test_an_odd_list_of_templates_is_a_sentence(odd: Any):
    for asked in (None, "default"):
        with pytest.raises(
            InputError, match=r"^the tokenizer's chat templates are a list in which .* model\.chat_template"
        ):
            choose_template(odd, asked)


def test_begin_is_not_doubled_where_the_text_begins_with_it(tmp_path: Path):
    ours = Chat(made_tokenizer("bos", None, tmp_path), 1)
    assert ours.encode([{"role": "user", "content": "<s>ab"}]) == ours.encode([{"role": "user", "content": "ab"}])
    assert ours.encode([{"role": "user", "content": ""}]) == [0]


def test_several_templates_without_a_default_want_a_name(tmp_path: Path):
    theirs = made_tokenizer("bos", {"rag": "rag{{ bos_token }}", "plain": TURNS + CLOSED}, tmp_path)
    with pytest.raises(InputError, match=r"no default; set model\.chat_template to one of plain, rag$"):
        Chat(theirs, 1)
    with pytest.raises(
        InputError, match=r"^model\.chat_template is 'tools', .*templates of this tokenizer: plain, rag$"
    ):
        Chat(theirs, 1, template="tools")
    assert Chat(theirs, 1, template="plain").render(MESSAGES[1:2]) == "[user]\n1 + 1?\n\n</s>[assistant]"
    assert Chat(theirs, 1, template="rag").encode(MESSAGES) == theirs("rag<s>", add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError, match="this tokenizer has no templates with names"):
        Chat(tokenizer(), 5, template="rag")


@pytest.mark.parametrize(
    ("template", "switches"),
    [
        ("{% if enable_thinking is defined and not enable_thinking %}x{% endif %}", ("enable_thinking",)),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}", ("thinking",)),
        ("{%- set thinking = thinking | default(false) %}{{ thinking }}", ("thinking",)),
        ("{% generation %}{{ thinking or enable_thinking }}{% endgeneration %}", ("enable_thinking", "thinking")),
        ("{# enable_thinking #}{{ 'enable_thinking' }}enable_thinking", ()),
        ("{% set enable_thinking = true %}{{ enable_thinking }}", ()),
        ("{{ messages[0].thinking }}{% for m in messages if m.enable_thinking %}{% break %}{% endfor %}", ()),
        ("{% macro f(thinking) %}{{ thinking }}{% endmacro %}{{ f(1) }}", ()),
    ],
)
def test_a_thinking_switch_is_a_variable_that_the_template_reads(template: str, switches: tuple[str, ...]):
    made = Chat(tokenizer(template), 5)
    assert made.switches == switches
    assert made.has_switch == bool(switches)
    if not switches:
        with pytest.raises(InputError, match="no thinking switch"):
            Chat(tokenizer(template), 5, thinking=False)
        return
    for value in (True, False):
        given: dict[str, Any] = dict.fromkeys(switches, value)
        wanted = made.tokenizer.apply_chat_template(MESSAGES, tokenize=False, **given)
        assert Chat(tokenizer(template), 5, thinking=value).render(MESSAGES, open_turn=False) == wanted
        assert made.render(MESSAGES, open_turn=False, thinking=value) == wanted


@pytest.mark.parametrize("content", [None, 7, {"text": "a"}, [], [{"type": "image"}], ["a"], [{"type": "text"}]])
@pytest.mark.parametrize("template", [None, TURNS])
def test_a_content_that_is_no_text_is_refused(template: str | None, content: Any):
    with pytest.raises(InputError, match=r"^the content of a message \('user'\) must be text"):
        Chat(tokenizer(template), 5).encode([{"role": "user", "content": content}])


@pytest.mark.parametrize("half", ["a\ud800b", "\udc00"])
def test_half_a_surrogate_pair_is_refused_before_it_meets_the_tokenizer(half: str):
    made = Chat(tokenizer(), 5)
    for read in (made.encode_completion, lambda text: made.encode([{"role": "user", "content": text}])):
        with pytest.raises(InputError, match=r"^a text holds half a surrogate pair \(.ud[8c]00\)"):
            read(half)
    with pytest.raises(InputError, match="half a surrogate pair"):
        Chat(tokenizer("{{ '\\ud800' }}"), 5).encode(MESSAGES)


def test_a_template_is_read_from_the_file_that_the_key_names(tmp_path: Path):
    for name, text in {"a.jinja": "\ufeff" + TURNS, "b": TURNS, "c.json": json.dumps({"chat_template": TURNS})}.items():
        (tmp_path / name).write_text(text)
        assert Model(path="tiny", chat_template=str(tmp_path / name)).chat_template == TURNS
    assert Model(path="tiny", chat_template=TURNS).chat_template == TURNS


@pytest.mark.parametrize(
    ("given", "content", "says"),
    [
        ("no.jinja", None, "cannot be read (No such file"),
        ("sub/no", None, "cannot be read (No such file"),
        ("words.txt", "Answer the question.", "holds no chat template"),
        ("words", "Answer {question}.", "holds no chat template"),
        ("config.json", "{}", "holds no chat template"),
        ("config.json", '{"chat_template": [1]}', "holds no chat template"),
        ("config.json", "{", "is not valid JSON"),
        ("bytes.jinja", "\xff", "is not UTF-8 text"),
        (" ", None, "is empty"),
        ("Answer {question}.", None, "is not a template"),
        ("default", None, "this tokenizer has no templates with names"),
    ],
)
def test_a_template_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, content: str | None, says: str
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(given).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"model\.chat_template") as caught:
        read_blueprint(Model(path="tiny", chat_template=given))
    assert says in str(caught.value)


@pytest.mark.parametrize("path", ["tiny", "tiny_ar"])
def test_a_token_that_the_tokenizer_does_not_have_is_refused_with_those_like_it(path: str):
    with pytest.raises(InputError, match=r"<\|mask\|>.* has no mask token '<mask>'; name it in model\.mask_token$"):
        read_blueprint(Model(path=path, mask_token="<mask>"))
    with pytest.raises(InputError, match=r"no token 'end'; fix model\.end_tokens; did you mean <\|end\|>\?$"):
        read_blueprint(Model(path=path, end_tokens=("<|end|>", "end")))


def words_of(known: str, split: Any, unknown: str | None = "<unk>", **options: Any) -> Chat:
    """A tokenizer of whole words or letters that knows those of ``known`` alone."""
    words = {word: i for i, word in enumerate(["<unk>", "</s>", *known.split()])}
    core = Tokenizer(options.pop("model", WordLevel)(words, unk_token=unknown))
    core.pre_tokenizer = split
    return Chat(PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown, eos_token="</s>", **options), 1)


@pytest.mark.parametrize(
    ("made", "lost"),
    [
        (lambda: words_of("two plus", Whitespace()), "3?"),
        (lambda: words_of("t w o p l u s", Split("", "isolated")), "3?"),
        (lambda: words_of("t w o p l u s", Split("", "isolated"), None, model=lambda w, **_: BPE(w, [])), "3?"),
        (lambda: tokenizer(), ""),
    ],
    ids=["words", "letters", "letters without an unknown token", "all letters"],
)
def test_what_a_tokenizer_does_not_know_is_found_and_said(made: Callable[[], Any], lost: str):
    ours = made() if isinstance(made(), Chat) else Chat(made(), 5)
    assert ours.loses
    assert ours.lost("two plus 3?") == lost
    assert ours.lost("two\n plus\t") == ""
    said = ours.warn_of_lost(["two plus", "two plus 3?"], "the prompts")
    if not lost:
        assert said is None
        return
    assert said is not None
    assert said.startswith(
        "the tokenizer does not know 12 % of the characters of the prompts, such as '3?' of 'two plus"
    )
    assert ours.warn_of_lost(["two plus", ""], "the prompts") is None


def test_a_tokenizer_of_bytes_knows_everything(tmp_path: Path):
    ours = Chat(made_tokenizer("bos", None, tmp_path), 1)
    assert not ours.loses
    assert ours.unknown_id is None
    assert ours.warn_of_lost(iter(lambda: pytest.fail("a text was looked at"), 0), "the prompts") is None


def test_an_unknown_token_that_also_ends_a_text_is_no_sign_of_unknown_text():
    ours = words_of("two", Whitespace(), "</s>")
    assert ours.unknown_id is None
    assert words_of("two", Whitespace()).unknown_id == 0


def test_a_tokenizer_that_would_cut_long_texts_does_not(tmp_path: Path):
    made = tokenizer()
    made.backend_tokenizer.enable_truncation(8)
    made.save_pretrained(tmp_path)
    ours = Chat(AutoTokenizer.from_pretrained(tmp_path), 5)
    assert len(ours.encode_completion("ab" * 50)) == 101
    assert len(ours.encode([{"role": "user", "content": "ab" * 50}])) == 100
    assert ours.lost("ab" * 50) == ""


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
            "eval": {"every": 0, "final_problems": 0},
            "log": {"progress": False, "trackers": []},
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
