"""Whether a method and a model belong together: refused in one sentence with key and remedy, before any weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from dllm_sd.config import apply_overrides, build_config, load_config
from dllm_sd.errors import InputError
from dllm_sd.methods import METHODS
from dllm_sd.pairing import (
    REFERENCES_CHECKED,
    _literal_texts,  # pyright: ignore[reportPrivateUsage]
    check_data,
    check_model,
    check_references,
    check_tokenizer,
)
from dllm_sd.policies import loading
from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.blueprint import Blueprint
from dllm_sd.pretrained.model import Model, Shape
from dllm_sd.tasks.task import NoChanceLevel, Problem
from dllm_sd.teachers import Reference

SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
RANDOM: dict[str, Any] = {"random_init": True, "tokenizer": "tiny", "shape": SHAPE}
MODELS: dict[str, dict[str, Any]] = {
    "denoiser": RANDOM,
    "blocks": {**RANDOM, "block_length": 4},
    "causal": {**RANDOM, "as": "autoregressive"},
}
SWITCH = "{{ messages[-1].content }}{{ enable_thinking }}"
SLOTS = "{question}{hint}"
DECODE = {"length": 16, "block_length": 4}
REASONS = {"name": "reference", "reasoning": {"length": 10}}
REASONED = {"name": "reference", "reasoning": {"length": 8}}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What is decided here is decided without a network."""
    if "tmp_path" not in request.fixturenames:

        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("weights were read")

        monkeypatch.setattr(loading, "load_network", never)


def check(model: str, *overrides: str, method: Any = "grpo", **options: Any) -> Blueprint:
    tree: dict[str, Any] = {
        "task": {"name": "sudoku"},
        "model": {**MODELS[model], **options},
        "decode": {"length": 16, "block_length": 4},
        "method": method,
    }
    return check_model(build_config(apply_overrides(tree, overrides)))


def refusal(model: str, *overrides: str, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        check(model, *overrides, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


PEERS = ["op_co_distill"]
"""Methods that need two students, which a config names."""
TEACHERS = ("opd", "opd_sampled", "topd", "popd")
REVEALING = [name for name, row in METHODS.items() if any(part.reveals for part in row.method.contexts)]
HINTING = [name for name, row in METHODS.items() if any(part.hint is not None for part in row.method.contexts)]


def test_the_table_of_methods_has_all_kinds():
    assert set(REVEALING) >= {"d_opsd", "later_step", "d_demo_psd"}
    assert set(HINTING) >= {"opsd", "sdpo", "d_opsd_pmi"}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in {*TEACHERS, *PEERS}])
def test_every_method_belongs_to_a_denoiser(name):
    assert not check("denoiser", method=name).causal


@pytest.mark.parametrize("name", [name for name in METHODS if name not in {*TEACHERS, *PEERS, *REVEALING}])
def test_every_method_whose_teacher_reveals_nothing_belongs_to_an_autoregressive_model(name):
    blueprint = check("causal", method=name)
    assert blueprint.causal
    assert blueprint.mask_id is None


@pytest.mark.parametrize("name", REVEALING)
def test_a_teacher_that_sees_what_stands_behind_is_refused_for_an_autoregressive_model(name):
    found = refusal("causal", method=name)
    part = "later_step" if name == "later_step" else "suffix"
    assert found.startswith(f"method.contexts {part} reveals tokens after the graded position")
    assert "put a hint into the prompt instead (reference, sibling)" in found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decode.threshold=0.9"], "decode.threshold commits several tokens a step"),
        (["decode.guidance=1.5"], "decode.guidance masks the prompt"),
        (["eval.schedules.fast.threshold=0.9"], "eval.schedules.fast.threshold commits several tokens a step"),
        (["eval.schedules.wide.guidance=1"], "eval.schedules.wide.guidance masks the prompt"),
    ],
)
def test_what_an_autoregressive_decoder_cannot_do_is_refused(overrides, message):
    found = refusal("causal", *overrides)
    assert found == f"{message}, which an autoregressive model cannot; leave it out"
    check("denoiser", *overrides)


@pytest.mark.parametrize(
    ("override", "key"),
    [("decode.continuous=true", "decode"), ("eval.schedules.turns.continuous=true", "eval.schedules.turns")],
)
def test_continuous_batching_is_for_autoregressive_models_whose_weights_have_the_type_that_computes(override, key):
    for model in ("denoiser", "blocks"):
        found = refusal(model, override)
        assert found == f"{key}.continuous is for autoregressive models and this one denoises; leave it out"
    check("causal", override)
    for lora, other in ((None, ""), ({"rank": 2}, "model.dtype to bfloat16, or ")):
        assert refusal("causal", override, "optim.autocast=bfloat16", lora=lora) == (
            f"{key}.continuous under optim.autocast needs weights of that type; set {other}{key}.continuous to false"
        )
    check("causal", override, "optim.autocast=bfloat16", dtype="bfloat16", lora={"rank": 2})


def test_blocks_and_steps_have_no_meaning_for_an_autoregressive_model_and_are_not_read():
    check("causal", "decode.block_length=5", "decode.steps=1", "eval.schedules.odd.block_length=7")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decode.block_length=5"], "decode.block_length 5 does not divide decode.length 16; choose a divisor"),
        (["decode.steps=3"], "decode.steps must be at least the number of blocks, 4"),
        (
            ["eval.schedules.odd.block_length=5"],
            "eval.schedules.odd.block_length 5 does not divide eval.schedules.odd.length 16; choose a divisor",
        ),
        (["eval.schedules.odd.steps=1"], "eval.schedules.odd.steps must be at least the number of blocks, 4"),
        (
            ["eval.schedules.odd.length=6"],
            "eval.schedules.odd.block_length 4 does not divide eval.schedules.odd.length",
        ),
    ],
)
def test_blocks_that_do_not_fill_the_canvas_are_refused(overrides, message):
    assert refusal("denoiser", *overrides).startswith(message)


def test_the_blocks_of_a_block_causal_model_are_its_own():
    found = refusal("blocks", "decode.block_length=8")
    assert found.startswith("decode.block_length is 8, but this model is block-causal with blocks of 4")
    assert found.endswith("set decode.block_length to 4")


@pytest.mark.parametrize("context", ["reference", "sibling", "no_question"])
def test_a_hint_in_the_prompt_would_move_the_blocks_of_a_block_causal_model(context):
    rollout = {"keep": "all", "until_solved": False}
    method = {"name": "d_opsd", "contexts": [context], "rollout": rollout, "gate": "all"}
    found = refusal("blocks", method=method)
    assert found.startswith("method.contexts gives a teacher a prompt of another length, which would move the blocks")
    assert "use suffix in the active block" in found
    check("denoiser", method=method)


def test_a_suffix_with_a_prompt_is_refused_for_a_block_causal_model_too():
    context = {"name": "suffix", "scope": "active_block", "prompt": "no_question"}
    method = {"name": "d_opsd", "contexts": [context]}
    assert refusal("blocks", method=method).startswith("method.contexts gives a teacher a prompt of another length")
    check("denoiser", method=method)
    check("blocks", method={"name": "d_opsd", "contexts": [{"name": "suffix", "scope": "active_block"}]})


def test_what_a_block_causal_model_never_sees_cannot_be_revealed_or_hidden():
    found = refusal("blocks", method="d_opsd")
    assert found.endswith("set the suffix context's scope to active_block")
    assert "use random_masks" in refusal("blocks", method="diffu_grpo")


def test_an_analysis_must_fit_into_the_blocks_of_a_denoiser():
    found = refusal("denoiser", method={"name": "d_opsd", "contexts": [REASONS]})
    assert "block_length 4 does not divide" in found
    assert "10" in found
    check("causal", method={"name": "opsd", "contexts": [REASONS]})
    check("denoiser", "method.contexts.0.reasoning.length=12", method={"name": "d_opsd", "contexts": [REASONS]})


@pytest.mark.parametrize("model", ["denoiser", "causal"])
@pytest.mark.parametrize("thinking", [True, False])
def test_a_thinking_teacher_needs_a_template_with_a_switch(model, thinking):
    method = {"name": "opsd", "contexts": [{"name": "reference", "thinking": thinking}]}
    found = refusal(model, method=method)
    assert found == "a context sets thinking, but the chat template has no thinking switch; leave it out"
    check(model, method=method, chat_template=SWITCH)


@pytest.mark.parametrize("model", ["denoiser", "causal"])
def test_thinking_in_evaluations_needs_a_template_with_a_switch(model):
    found = refusal(model, "eval.thinking=true")
    assert found == "eval.thinking is set, but the chat template has no thinking switch; leave it out"
    check(model, "eval.thinking=true", chat_template=SWITCH)


def test_the_thinking_of_the_prompt_of_a_suffix_needs_a_switch_too():
    context = {"name": "suffix", "prompt": {"name": "no_question", "thinking": True}}
    assert "has no thinking switch" in refusal("denoiser", method={"name": "d_opsd", "contexts": [context]})


# Teachers that are other checkpoints


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_of_another_checkpoint_must_be_named(model, name):
    assert refusal(model, method=name) == "method.teacher.0.path is missing; name the checkpoint that teaches"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints of random models with the tokenizer of `tiny`, and one with another tokenizer."""
    folders: dict[str, str] = {}
    for name, options in {**MODELS, "other words": MODELS["causal"]}.items():
        folder = tmp_path_factory.mktemp("models") / name.replace(" ", "_")
        options = {key: value for key, value in options.items() if key not in ("as", "shape")}
        made = build_policy(
            Model(**options, shape=Shape(**SHAPE), as_="autoregressive" if name in ("causal", "other words") else None)
        )
        made.module.network.save_pretrained(folder)
        assert made.chat
        tokenizer: Any = made.chat.tokenizer if name != "other words" else words(sorted("abcdefgh"))
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def words(some: Sequence[str]) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(["<unk>", "</s>", *some])}, unk_token="<unk>"))
    model.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")


def taught_by(path: str) -> dict[str, Any]:
    return {"name": "opd", "teacher": [{"name": "checkpoint", "path": path}]}


@pytest.mark.parametrize("model", MODELS)
def test_a_teacher_of_the_same_kind_and_tokenizer_is_taken(tmp_path, saved, model):
    method = taught_by(saved[model])
    if model == "blocks":  # whose hints would move the blocks; the plain prompt does not
        method["contexts"] = ["nothing"]
    check(model, method=method)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("teacher", MODELS)
def test_a_teacher_that_reads_in_another_way_is_refused(tmp_path, saved, model, teacher):
    if model != teacher:
        found = refusal(model, method=taught_by(saved[teacher]))
        assert found.startswith(f"the teacher at {saved[teacher]!r} is not of the student's kind")
        assert found.endswith("choose one of the student's kind")


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, saved):
    found = refusal("causal", method=taught_by(saved["other words"]))
    assert found == (
        f"the teacher at {saved['other words']!r} has another tokenizer than the student; choose one with the same"
    )


def test_a_teacher_that_is_not_there_is_refused(tmp_path):
    missing = str(tmp_path / "nothing")
    assert "is not a folder" in refusal("causal", method=taught_by(missing))


# Data


class Bare(NoChanceLevel):
    """A task whose problems say what they have."""

    def reference(self, problem: Problem) -> str | None:
        return problem.fields.get("solution")

    def final_answer(self, problem: Problem) -> str | None:
        return problem.fields.get("answer")


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("sft", {}, "method.rollout demonstrations needs references, but the task's data has none; name other data"),
        ("opsd", {"answer": "1"}, "method.contexts reference needs the solution of each problem"),
        ("d_opsd_prompt", {}, "method.contexts reference needs the solution of each problem"),
        (
            {"name": "opsd", "contexts": [{"name": "reference", "source": "answer"}]},
            {"solution": "1"},
            "method.contexts reference needs the answer of each problem",
        ),
        (
            {"name": "d_opsd", "contexts": [{"name": "suffix", "prompt": "reference"}]},
            {},
            "method.contexts reference needs the solution of each problem",
        ),
    ],
    ids=str,
)
def test_a_method_that_needs_what_the_data_does_not_have_is_refused(method, fields, message):
    config = build_config({"task": "sudoku", "decode": {"length": 16, "block_length": 4}, "method": method})
    task: Any = Bare()
    object.__setattr__(config, "task", task)
    with pytest.raises(InputError) as caught:
        check_data(config, [Problem("p", fields)])
    assert str(caught.value).startswith(message)
    assert "name other" in str(caught.value)
    check_data(config, [])
    check_data(config, [Problem("p", {"solution": "1", "answer": "1"})])


# References that are too long to imitate


def references(lengths: Sequence[int], model: str = "causal", **changes: Any) -> str | None:
    """What is said of references of so many digits where eight tokens fit; the tokenizer reads one each."""
    tree = {"task": "sudoku", "model": MODELS[model], "decode": {"length": 8, "block_length": 4}, "method": "sft"}
    config = build_config({**tree, **changes})
    task: Any = Bare()
    object.__setattr__(config, "task", task)
    problems = [Problem(f"p{i}", {"solution": "1" * length} if length else {}) for i, length in enumerate(lengths)]
    return check_references(config, check_model(config), problems)


@pytest.mark.parametrize("model", MODELS)
def test_references_that_fit_are_not_spoken_of(model: str):
    assert references([1, 7, 8], model) is None
    assert references([9, 40], model, method="grpo") is None
    assert references([], model) is None


@pytest.mark.parametrize("model", MODELS)
def test_long_references_are_counted_before_the_run(model: str):
    assert references([8, 9, 3, 40], model) == (
        "2 of the 4 references of the training split are longer than decode.length 8 and are left out "
        "(rollouts/long_reference counts them); the longest needs 40"
    )


def test_of_a_large_split_the_first_references_are_read():
    lengths = [4] * REFERENCES_CHECKED + [40] * 50
    assert references(lengths) is None
    said = references([9, *lengths])
    assert said is not None
    assert said.startswith("1 of the first 1,000 of 1,051 references of the training split")


@pytest.mark.parametrize("model", MODELS)
def test_where_no_reference_fits_the_run_is_refused_and_the_longest_named(model: str):
    with pytest.raises(InputError) as caught:
        references([9, 40, 12], model)
    assert str(caught.value) == (
        "none of the 3 references of the training split fits decode.length 8; the longest needs 40: set decode.length "
        "to that or more"
    )


def test_a_problem_without_a_reference_is_named_before_the_run():
    with pytest.raises(InputError, match=r"^problem p2 has no reference for method\.rollout demonstrations; give"):
        references([3, 4, 0])


def test_training_in_float16_is_refused_with_or_without_adapters():
    for options, more in (({}, ""), ({"lora": {"rank": 2}}, ", or model.dtype to bfloat16")):
        assert refusal("causal", dtype="float16", **options) == (
            "model.dtype float16 is for evaluation: in training small gradients would become zero; set model.dtype to "
            f"float32 and optim.autocast to bfloat16{more}"
        )
    check("causal", dtype="bfloat16", lora={"rank": 2})


@pytest.mark.parametrize("name", ["grpo", "sdpo", "d_opsd", "rft", "later_step"])
def test_a_method_that_asks_for_no_reference_takes_any_data(name):
    config = build_config({"task": "sudoku", "method": name})
    task: Any = Bare()
    object.__setattr__(config, "task", task)
    check_data(config, [Problem("p", {})])


def test_a_bank_that_is_asked_for_what_a_problem_does_not_have_is_refused_by_the_data():
    bank = {"problem": "{problem}"}
    config = build_config({"task": "sudoku", "method": {"name": "sgsd", "skill_bank": bank}})
    check_data(config, [Problem("p", {"problem": "1"})])
    with pytest.raises(
        InputError, match=r"^method\.skill_bank\.problem \(for q\) asks for {problem}; use plain fields"
    ):
        check_data(config, [Problem("p", {"problem": "1"}), Problem("q", {"question": "1"})])


def test_a_folder_is_read_without_its_weights(tmp_path, saved):
    folder = Path(saved["causal"])
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(b"damaged")
    try:
        check("causal", method=taught_by(str(folder)))
    finally:
        weights.write_bytes(content)


@pytest.mark.parametrize("name", ["quickstart", "quickstart_ar"])
def test_the_quickstarts_use_words_that_their_models_know(name: str):
    config = load_config(name)
    assert check_tokenizer(config, check_model(config), config.task.problems("train")) == {}


@pytest.mark.parametrize(
    ("method", "prompt", "kinds"),
    [
        ("sft", "{puzzle}", []),
        ("sft", "Solve {puzzle}", ["prompts"]),
        ({"name": "opsd", "contexts": [{"name": "reference", "template": SLOTS}]}, "{puzzle}", []),
        (
            {"name": "opsd", "contexts": [{"name": "reference", "template": f"See {SLOTS}"}]},
            "{puzzle}",
            ["hints"],
        ),
        ("opsd", "{puzzle}", ["hints"]),
        (
            {"name": "opsd", "contexts": [{**REASONED, "template": SLOTS}]},
            "{puzzle}",
            ["hints"],
        ),
        ("sdpo", "{puzzle}", ["hints"]),
        ({"name": "rcsd", "contexts": [{"name": "rubric", "writing": {}, "template": SLOTS}]}, "{puzzle}", ["hints"]),
        (
            {"name": "rcsd", "contexts": [{"name": "rubric", "source": "data", "writing": None, "template": SLOTS}]},
            "{puzzle}",
            [],
        ),
    ],
)
def test_words_that_the_tokenizer_does_not_know_are_said_before_a_run(method: Any, prompt: str, kinds: list[str]):
    tree = {"task": {"name": "sudoku", "prompt": prompt, "answer": "{solution}"}, "model": MODELS["denoiser"]}
    config = build_config({**tree, "decode": {"length": 16, "block_length": 4}, "method": method})
    told = check_tokenizer(config, check_model(config), config.task.problems("train"))
    assert list(told) == kinds
    for kind in kinds:
        assert ("the prompts, such as 'Solve' of 'Solve " in told[kind]) == (kind == "prompts")
        assert len(told[kind]) < 500


def test_references_that_the_tokenizer_does_not_know_are_said_of_where_they_are_read(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"question": "1+1", "answer": "2 apples"}\n')
    task = {"name": "jsonl", "data": str(tmp_path / "a.jsonl"), "reference_field": "answer", "size_dev": 0}
    shown = {"name": "opsd", "contexts": [{"name": "reference", "template": SLOTS}]}
    for method, kinds in (("sft", ["completions"]), (shown, ["hints"]), ("grpo", [])):
        config = build_config(
            {"task": task, "model": RANDOM, "method": method, "decode": {"length": 16, "block_length": 4}}
        )
        told = check_tokenizer(config, check_model(config), config.task.problems("train"))
        assert list(told) == kinds
        assert all("such as 'apples' of '2 apples'" in sentence for sentence in told.values())


def test_missing_references_are_answered_with_the_key_that_names_them(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    task = {"name": "jsonl", "data": str(tmp_path / "a.jsonl"), "size_dev": 0}
    config = build_config({"task": task, "model": RANDOM, "method": "sft", "decode": {"length": 16, "block_length": 4}})
    with pytest.raises(InputError, match=r"set task\.reference_field to .*, such as task\.reference_field=answer$"):
        check_data(config, config.task.problems("train"))


NEEDY: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a rubric of the data": (
        {"name": "rubric", "source": "data"},
        {"rubric": ["is right"]},
        "method.contexts.0.field to the field that holds them, or method.contexts.0.source to written",
    ),
    "another's rubric": ({"name": "rubric", "source": "random", "field": "r"}, {"r": '["x"]'}, "in the field 'r'"),
    "a rubric and the solution": (
        {"name": "rubric", "source": "generic", "reference": True, "template": "{question}{hint}{reference}"},
        {"solution": "s"},
        "needs the solution of each problem",
    ),
    "a solution for the writer": (
        {"name": "rubric", "writing": {}, "prompt": "{question}{reference}"},
        {"solution": "s"},
        "needs the solution of each problem",
    ),
    "an answer for the critic": ({"name": "critique"}, {"answer": "a"}, "needs the answer of each problem"),
    "a solution for the critic": (
        {"name": "critique", "truth": "solution", "prompt": "{trace}"},
        {"solution": "s"},
        "needs the solution of each problem",
    ),
    "a reference": ("reference", {"solution": "s"}, "needs the solution of each problem"),
    "the answer": ({"name": "reference", "source": "answer"}, {"answer": "a"}, "needs the answer of each problem"),
}
"""Contexts that need something of the data, the fields of a problem that has it, and words of the refusal."""


class FieldTask(NoChanceLevel):
    """A task whose problems have what their fields hold."""

    def reference(self, problem: Problem) -> str | None:
        return problem.fields.get("solution")

    def final_answer(self, problem: Problem) -> str | None:
        return problem.fields.get("answer")


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "as the prompt of suffix"])
@pytest.mark.parametrize("name", NEEDY)
def test_a_context_whose_material_no_problem_has_is_refused(name: str, nested: bool):
    context, fields, words = NEEDY[name]
    context = {"name": "suffix", "prompt": context} if nested else context
    config = build_config({"task": "sudoku", "model": RANDOM, "method": {"contexts": [context], "gate": "all"}})
    config = replace(config, task=cast(Any, FieldTask()))
    bare = [Problem(str(i), {}) for i in range(3)]
    with pytest.raises(InputError) as caught:
        check_data(config, bare)
    assert words.replace("contexts.0.", f"contexts.0.{'prompt.' * nested}") in str(caught.value)
    check_data(config, [*bare, Problem("has", fields)])  # the others are left out and counted


@pytest.mark.parametrize(("given", "said"), [(None, "Now write this solution."), ("({hint}){question}", "()")])
def test_the_words_of_a_template_are_read_also_where_it_is_left_out(given: str | None, said: str):
    (text,) = _literal_texts(Reference(template=given))
    assert text.endswith(said)


@pytest.mark.parametrize("writer", [{"name": "server", "url": "http://127.0.0.1:9/v1", "model": "m"}, {"name": "base"}])
def test_what_a_server_is_asked_is_not_read_by_the_tokenizer_of_the_run(writer: dict[str, Any]):
    hint = {"name": "critique", "template": SLOTS, "prompt": "Correct {question}{truth}{trace}"}
    method = {"name": "step_align", "contexts": [{**hint, "writing": {"writer": writer}}]}
    config = build_config({"task": {"name": "sudoku"}, "model": RANDOM, "method": method})
    (context,) = config.method.contexts
    assert context.hint is not None
    assert ("Correct " in _literal_texts(context.hint)) == (writer["name"] == "base")
