"""Configs: what is shipped is right, overrides reach every key, every mistake is one sentence that names the key."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dllm_sd import METHODS
from dllm_sd.config import apply_overrides, build_config, load_config, shipped_configs, to_tree, to_yaml
from dllm_sd.errors import InputError
from dllm_sd.losses.divergences import ReverseKL
from dllm_sd.losses.sites import TeacherTop
from dllm_sd.policies.weights import BaseWeights, EmaWeights, PeerWeights
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.teachers import LaterStep, Suffix
from tests.tiers import spread

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
TREE: dict[str, Any] = {
    "task": {"name": "sudoku"},
    "decode": {"length": 16, "block_length": 4},
    "method": "d_opsd",
}


def build(*overrides: str, **changes: Any) -> Any:
    return build_config(apply_overrides(copy.deepcopy({**TREE, **changes}), overrides))


def refusal(*overrides: str, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        build(*overrides, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_shipped_config_says_how_it_is_run_and_whether_it_was_measured(file: Path):
    lines = file.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert re.match(
        rf"# (dllm-sd|accelerate launch .*-m dllm_sd) train (configs/)?{re.escape(file.stem)}( |$|\.yaml)", header[0]
    )
    assert any("measured" in line.lower() or "not yet reproduced" in line.lower() for line in header)


@pytest.mark.parametrize("file", spread(CONFIGS, 3), ids=lambda file: file.stem)
def test_a_shipped_config_is_valid_and_comes_back_from_its_own_yaml(file: Path):
    config = load_config(str(file))
    assert build_config(yaml.safe_load(to_yaml(config))) == config
    assert load_config(file.stem) == config


def sources() -> list[tuple[str, str, Path]]:
    """Checkpoints that shipped configs take from the runs of others: whose, and as a student's start or a writer."""
    found = []
    for file in CONFIGS:
        if not re.search(r"^ *(- *)?\{?.*\b(start|path): *runs/", file.read_text(encoding="utf-8"), re.MULTILINE):
            continue  # reading it takes long
        config = load_config(str(file))
        starts = [("start", one.start) for one in config.peers.students] if config.peers else []
        paths = [*starts, *(("writer", one.path) for one in config.method.models() if isinstance(one, PeerWeights))]
        found += [(file.stem, kind, Path(path)) for kind, path in paths if path is not None]
    return found


@pytest.mark.parametrize(("name", "kind", "path"), sources(), ids=str)
def test_what_a_shipped_config_takes_from_a_run_its_first_lines_say_how_to_make(name: str, kind: str, path: Path):
    header = [line for line in (CONFIGS[0].parent / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    asked, run = load_config(name), str(path.parent.parent)
    shipped = {load_config(file.stem).run: file.stem for file in CONFIGS}
    commands = [line[1:].split() for line in header if line.startswith("#   dllm-sd train")]
    if run in shipped:
        assert shipped[run] in " ".join(header)
        made = load_config(shipped[run])
    else:
        (words,) = [words for words in commands if f"run={run}" in words]
        made = load_config(words[2], words[3:])
    assert made.run == run
    last = int(path.name)
    assert last == made.updates or last % made.checkpoint.every == 0
    assert last > made.updates - made.checkpoint.every * made.checkpoint.keep
    assert made.model.path == asked.model.path
    assert made.model.lora == asked.model.lora
    if kind == "start":
        assert not made.method.rollout.decodes


def test_every_shipped_config_is_found_by_name():
    assert set(shipped_configs()) == {file.stem for file in CONFIGS}


@pytest.mark.parametrize("name", spread(METHODS, 3))
def test_every_named_method_comes_back_from_its_own_yaml(name: str):
    config = build(f"method={name}")
    assert config.method == METHODS[name].method
    assert build_config(yaml.safe_load(to_yaml(config))) == config


def test_what_a_config_leaves_out_of_a_method_is_that_of_the_method():
    method = build(method={"name": "d_opsd_paper", "rollout": {"problems": 3}}).method
    assert method.rollout == PassAtK(problems=3)
    assert method.sites == METHODS["d_opsd_paper"].method.sites


def test_the_run_folder_is_named_after_the_config_unless_it_names_one(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("task: sudoku\ndecode: {length: 16, block_length: 4}")
    assert load_config(str(tmp_path / "mine.yaml")).run == "runs/mine"
    assert load_config(str(tmp_path / "mine.yaml"), ["run=elsewhere"]).run == "elsewhere"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=5", "seed", 5),
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.max_grad_norm=null", "optim.max_grad_norm", None),
        ("optim.betas=[0.9, 0.95]", "optim.betas", (0.9, 0.95)),
        ("log.progress=false", "log.progress", False),
        ("run=some where", "run", "some where"),
        ("model.lora.rank=8", "model.lora.rank", 8),
        ("model.lora.targets=[q_proj]", "model.lora.targets", ("q_proj",)),
        ("decode.threshold=9e-1", "decode.threshold", 0.9),
        ("method=rft", "method", METHODS["rft"].method),
        ("method.rollout.problems=4", "method.rollout", PassAtK(problems=4)),
        ("method.contexts.0.ratio=0.5", "method.contexts", (Suffix(ratio=0.5),)),
        ("method.contexts=later_step", "method.contexts", (LaterStep(),)),
        ("method.contexts=[{name: later_step, ahead: 2}]", "method.contexts", (LaterStep(ahead=2),)),
        ("method.teacher.0.name=ema", "method.teacher", (EmaWeights(),)),
        ("method.sites=teacher_top", "method.sites", TeacherTop()),
        ("method.sites.name=teacher_top", "method.sites", TeacherTop()),
        ("method.sites={name: teacher_top, count: 2}", "method.sites", TeacherTop(count=2)),
        ("task.empties_max=8", "task.empties_max", 8),
        ("eval.schedules.fast.tokens_per_step=4", "eval.schedules", {"fast": {"tokens_per_step": 4}}),
        ("eval.schedules.warm.temperature=1e-1", "eval.schedules", {"warm": {"temperature": 0.1}}),
    ],
)
def test_an_override_reaches_its_key(override: str, path: str, value: Any):
    config = build(override)
    found = config
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    assert build_config(yaml.safe_load(to_yaml(config))) == config


def test_a_method_written_as_a_name_grows_into_a_mapping_under_an_override():
    method = build("method.sites.name=teacher_top", "method.sites.count=3", "method.teacher=base").method
    assert (method.sites, method.teacher, method.divergence) == (TeacherTop(count=3), (BaseWeights(),), ReverseKL())


def test_a_replaced_method_forgets_the_changes_to_the_former_one():
    assert build("method=rft", method={"name": "d_opsd", "rollout": {"problems": 3}}).method == METHODS["rft"].method


@pytest.mark.parametrize(
    ("tree", "overrides", "left"),
    [
        ({"task": {"name": "sudoku", "answer": "{x}"}}, ["task.name=jsonl"], {"task": {"name": "jsonl"}}),
        ({"task": {"name": "jsonl", "data": "a"}}, ["task.name=jsonl"], {"task": {"name": "jsonl", "data": "a"}}),
        (
            {"task": {"name": "sudoku", "answer": "{x}", "data": "old"}},
            ["task.data=new", "task.name=jsonl", "task.size_dev=1"],
            {"task": {"data": "new", "name": "jsonl", "size_dev": 1}},
        ),
        (
            {"method": {"name": "d_opsd", "contexts": [{"name": "suffix", "ratio": 0.5}, {"name": "nothing"}]}},
            ["method.contexts.0.name=reference"],
            {"method": {"name": "d_opsd", "contexts": [{"name": "reference"}, {"name": "nothing"}]}},
        ),
        (
            {"method": {"name": "d_opsd", "gate": "all"}},
            ["method.name=rft"],
            {"method": {"name": "rft", "gate": "all"}},
        ),
        ({"method": "d_opsd"}, ["method.sites.name=all"], {"method": {"name": "d_opsd", "sites": {"name": "all"}}}),
        ({}, ["task.name=jsonl"], {"task": {"name": "jsonl"}}),
    ],
)
def test_the_name_of_another_part_drops_the_keys_of_the_former(
    tree: dict[str, Any], overrides: list[str], left: dict[str, Any]
):
    before = copy.deepcopy(tree)
    assert apply_overrides(tree, overrides) == left
    assert tree == before


def test_a_field_in_braces_without_quotes_is_explained():
    said = refusal("task.name=jsonl", "task.prompt={quesion}")
    assert said == 'task.prompt must be text, and {quesion} is a mapping in YAML; put it in quotes: "{quesion}"'


def test_overrides_apply_in_their_order():
    assert build("seed=5", "seed=6").seed == 6


def test_a_part_of_another_name_starts_from_its_own_defaults():
    tree = to_tree(build("method.sites.name=teacher_top", method={"name": "d_opsd", "sites": {"name": "revealed"}}))
    assert tree["method"]["sites"] == {"name": "teacher_top", "count": None, "by": "probability"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("optim.warm_up=1", "unknown key 'optim.warm_up'; did you mean 'optim.warmup'?"),
        ("model.shape.hiden_size=8", "unknown key 'model.shape.hiden_size'; did you mean 'model.shape.hidden_size'?"),
        ("method.divergance=jsd", "unknown key 'method.divergance'; did you mean 'method.divergence'?"),
        (
            "method.contexts.0.ration=1",
            "unknown key 'method.contexts.0.ration'; did you mean 'method.contexts.0.r",
        ),
        (
            "method.teacher.0.decay=0.9",
            "unknown key 'method.teacher.0.decay'; the part ema has it: leave it out, or set method.teach",
        ),
        ("method.gate=corect", "method.gate.name 'corect' is unknown; did you mean 'correct'?"),
        ("method.gate.name=[1]", "method.gate.name [1] is unknown; choose from all, correct, score, mixed"),
        ("method=d_opds", "method 'd_opds' is unknown; did you mean 'd_opsd'?"),
        ("method.name=d_opds", "method 'd_opds' is unknown; did you mean 'd_opsd'?"),
        ("task=sudoky", "task.name 'sudoky' is unknown; did you mean 'sudoku'?"),
        ("task.name=gsm8", "task.name 'gsm8' is unknown; did you mean 'gsm8k'?"),
        (
            "eval.schedules.fast.block=8",
            "unknown key 'eval.schedules.fast.block'; did you mean 'eval.schedules.fast.b",
        ),
        ("zzz=1", "unknown key 'zzz'; known keys: task, run, seed, "),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest_known_one(override: str, message: str):
    assert refusal(override).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("updates=ten", "updates must be a whole number, not 'ten'"),
        ("updates=true", "updates must be a whole number, not True"),
        ("updates=1.5", "updates must be a whole number, not 1.5"),
        ("updates=null", "updates must be a whole number, not None"),
        ("optim.lr=high", "optim.lr must be a number, not 'high'"),
        ("optim.lr=true", "optim.lr must be a number, not True"),
        ("optim.betas=0.9", "optim.betas must be a list, not 0.9"),
        ("optim.betas=[0.9, b]", "optim.betas.1 must be a number, not 'b'"),
        ("optim.schedule=sine", "optim.schedule is 'sine'; choose from constant, linear, cosine"),
        ("log.progress=1", "log.progress must be true or false, not 1"),
        ("run=3", "run must be text, not 3"),
        ("model=[1]", "model must be a mapping of keys, not [1]"),
        ("model=tiny", "model must be a mapping of keys, not 'tiny'"),
        ("seed.x=1", "seed must be a whole number, not {'x': 1}"),
        ("method=[]", "method must be a mapping of keys, not []"),
        ("method.gate=3", "method.gate must name a part (all, correct, score, mixed), not 3"),
        ("method.contexts.2.name=suffix", "method.contexts.1 is missing; list entries are numbered from 0"),
        ("task={empties_min: 7}", "task.name is missing; choose from sudoku, "),
        ("task=null", "task must name a part (sudoku, "),
        ("eval.schedules=[1]", "eval.schedules must be a mapping, not [1]"),
        ("eval.schedules.fast=3", "eval.schedules.fast must be a mapping of keys, not 3"),
        ("seed", "override 'seed' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("seed=[1", "override 'seed=[1' is not valid YAML: a [ is not closed"),
        (
            "seed=!!python/name:os.system",
            "override 'seed=!!python/name:os.system' is not valid YAML: leave out the tag",
        ),
        ("seed={a: 1, a: 2}", "override 'seed={a: 1, a: 2}' is not valid YAML: the key 'a' is given twice"),
        ("seed.=1", "override 'seed.=1' is not of the form key=value"),
        (".seed=1", "override '.seed=1' is not of the form key=value"),
        ("method.contexts.ratio=1", "method.contexts is a list; number its entries from 0, as in method.contexts.0"),
        ("method.contexts.999999999.name=suffix", "method.contexts.1 is missing; list entries are numbered from 0"),
        ("method.contexts[0].ratio=1", "unknown key 'method.contexts[0]'; did you mean 'method.contexts'?"),
    ],
)
def test_a_wrong_value_is_refused_with_the_key(override: str, message: str):
    assert refusal(override).startswith(message)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("decode.temperature=-1", "decode.temperature is -1; give a number from 0.001 to 1000, or 0"),
        ("decode={length: 16, block_length: 4, threshold: 0.9, steps: 8}", "set decode.steps to null"),
        ("decode={length: 16, block_length: 4, threshold: 0.9, order: random}", "set decode.order to confidence"),
        ("decode.top_p=0", "decode.top_p is 0; give a number above 0 and at most 1"),
        (
            "method.rollout.horizon={name: truncated, ratio: 0}",
            "method.rollout.horizon.ratio is 0; give a number above 0 and at most 1",
        ),
        ("method.contexts.0.ratio=1.5", "method.contexts.0.ratio is 1.5; give a number from 0 to 1"),
        ("method.rollout.attempts=0", "method.rollout.attempts is 0; give a whole number from 1 to"),
        ("method.rollout.keep=all", "set method.rollout.until_solved to false"),
        ("method.contexts=[]", "method.contexts is empty, but method.target plain learns from a teacher"),
        ("method.target=sampled", "set both or neither"),
        ("method.canvases=random_masks", "set method.canvases to decoder_steps"),
        ("method.teacher=[base, live]", "method.teacher lists 2 weights for 1 contexts"),
        (
            "method.sites={name: teacher_top, count: 0}",
            "method.sites.count is 0; give a whole number of at least 1, or null",
        ),
        ("method.support={name: top_k, k: 0}", "method.support.k is 0; give a whole number of at least 1"),
        ("task.empties_min=0", "task.empties_min is 0; give a whole number of at least 1"),
        ("task.prompt='{nothing}'", "task.prompt asks for {nothing}"),
        ("updates=0", "updates is 0; give a whole number of at least 1"),
        ("run=", "run is empty"),
        ("optim.lr=0", "optim.lr is 0; give a number above 0 and at most 1000"),
        ("optim.betas=[0.9]", "optim.betas lists 1 values; give 2"),
        ("optim.betas=[0.9, 1.5]", "optim.betas.1 is 1.5; give a number of at least 0 and below 1"),
        ("optim.weight_decay=-1", "optim.weight_decay is -1; give a number from 0 to 1000"),
        ("optim.max_grad_norm=0", "optim.max_grad_norm is 0; give a number above 0, or null"),
        ("optim.final_lr=2", "optim.final_lr is 2; give a number from 0 to 1"),
        ("eval.attempts=4", "set eval.temperature above 0"),
        ("eval.temperature=-1", "eval.temperature is -1; give a number from 0.001 to 1000, or 0"),
        ("eval.collapse=10", "eval.collapse is 10; give a number from 0 to 1"),
        ("checkpoint.every=0", "checkpoint.every is 0; give a whole number of at least 1"),
        ("log.samples_every=0", "log.samples_every is 0; give a whole number of at least 1"),
        ("model.lora.rank=0", "model.lora.rank is 0; give a whole number from 1 to"),
        ("model.shape.num_attention_heads=3", "model.shape.hidden_size must be a multiple"),
        ("model.shape.hidden_size=0", "model.shape.hidden_size is 0; give a whole number from 1 to"),
    ],
)
def test_what_has_no_meaning_is_refused_by_the_part_itself(override: str, words: str):
    assert words in refusal(override)


def test_a_config_without_a_task_is_refused():
    with pytest.raises(InputError, match=r"^the config has no task; set task\.name to one of sudoku, "):
        build_config({"seed": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: [1", "is not valid YAML: a [ is not closed by ], or a comma is missing between its entries in line 1"),
        (b"- task\n- seed\n", "must hold keys such as model, task and method"),
        (b"", "must hold keys such as model, task and method"),
        (b"task: \xff\n", "cannot be read ('utf-8' codec"),
        (b"task: sudoku\nseed: !!python/name:os.system\n", "is not valid YAML: leave out the tag"),
        (b"task: sudoku\nseed: 2024-01-01\n", "seed must be a whole number, not '2024-01-01'"),
        (b"task: sudoku\nseed: 1\nseed: 2\n", "the key 'seed' is given twice in line 3"),
        (b"task: sudoku\nsede: 3\n", "unknown key 'sede'; did you mean 'seed'?"),
    ],
)
def test_an_unreadable_config_is_refused_in_one_sentence(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_config(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_refused_with_a_hint():
    with pytest.raises(InputError, match=r"^there is no config file 'quikstart'; did you mean 'quickstart'\?$"):
        load_config("quikstart")
    with pytest.raises(InputError, match=r"^there is no config file 'zzz'; shipped configs: .*quickstart"):
        load_config("zzz")


def test_configs_of_published_settings_do_as_their_papers_say():
    for name in ("qwen3_4b_opsd", "qwen3_4b_opsd_pmi"):
        config = load_config(name)
        assert config.model.thinking is False
        assert [context.hint.thinking for context in config.method.contexts if context.hint] == [True] * (
            len(config.method.contexts) - (name == "qwen3_4b_opsd_pmi")
        )
        assert (config.held_out().length, config.eval.thinking, config.decode.length) == (38912, True, 1024)
        assert config.eval.final_problems == 30
    for name in ("qwen3_4b_opsd", "qwen3_4b_opsd_pmi", "qwen3_8b_sdpo", "qwen3_4b_demo_psd", "r1_distill_1.5b_topd"):
        assert load_config(name).optim.betas == (0.9, 0.999)
    rollout: Any = load_config("llada_8b_sudoku").method.rollout
    assert (rollout.keep, rollout.until_solved, rollout.attempts) == ("best", False, 8)
    for name in ("llada_8b_gsm8k", "llada_8b_math", "llada_8b_countdown", "llada_8b_sudoku"):
        divergence: Any = load_config(name).method.divergence
        assert (divergence.clip, divergence.clip_at) == ("entry", 0.04 if name == "llada_8b_math" else 0.05)


def test_held_out_problems_are_answered_with_settings_of_their_own_and_schedules_change_those() -> None:
    config = build("eval.decode.length=64", "eval.schedules.short.steps=4", "eval.schedules.long.length=128")
    assert config.decode.length != 64
    assert config.held_out() == replace(config.decode, length=64)
    assert config.held_out("short") == replace(config.decode, length=64, steps=4)
    assert config.held_out("long") == replace(config.decode, length=128)
    assert build_config(to_tree(config)) == config
    with pytest.raises(InputError, match=r"eval\.decode has no key 'lenght'|unknown key 'eval\.decode\.lenght'"):
        build("eval.decode.lenght=64")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task.name=jsonl", "task.data=a"], ["prompt, answer"]),
        (["task=jsonl", "task.data=a"], ["prompt, answer"]),
        (["task.prompt=x", "task.name=jsonl"], ["answer"]),
        (["task={name: jsonl, data: a, prompt: x}"], ["answer"]),
        (["task.name=sudoku"], []),
        (["task.prompt=x", "method=sft"], []),
    ],
)
def test_keys_of_another_task_are_dropped_and_that_is_said(overrides: list[str], said: list[str]):
    heard: list[str] = []
    tree = {"task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"}}
    apply_overrides(tree, overrides, heard.append)
    start = "the task is jsonl instead of the config's sudoku, whose keys are dropped: "
    assert heard == [f"{start}{keys}" for keys in said]
