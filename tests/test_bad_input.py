"""Whatever is wrong with the input: status 2, one line on stderr, no traceback, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dllm_sd.cli.main import main
from dllm_sd.config import build_config, to_yaml
from dllm_sd.errors import InputError
from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.model import Model, Shape
from tests.tiers import crossed, later

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TREE: dict[str, Any] = {
    "run": "run",
    "updates": 1,
    "model": {"random_init": True, "tokenizer": "tiny", "shape": SHAPE},
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}", "size_train": 64},
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 4},
    "method": {"name": "sft", "rollout": {"problems": 4}},
    "eval": {"every": 0, "final_problems": 0},
    "log": {"progress": False, "trackers": []},
}
GSM8K = {"name": "gsm8k", "prompt": "{question}", "answer": "{answer}", "size_dev": 1}
GOOD = '{"question": "12", "answer": "1 #### 3"}'

Refuse = Callable[..., str]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Trains in an empty working folder; returns the exit status."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def train(*overrides: str, **changes: Any) -> int:
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({**TREE, **changes}), encoding="utf-8")
        return main(["train", str(tmp_path / "small.yaml"), *overrides])

    return train


@pytest.fixture
def refuse(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Trains, expects a refusal and returns its line; what the working folder holds stays as it was."""

    def refuse(*overrides: str, leaves: set[str] | None = None, **changes: Any) -> str:
        before = {path.name for path in Path().iterdir()}
        capsys.readouterr()
        assert train(*overrides, **changes) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("dllm-sd: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert {path.name for path in Path().iterdir()} == before | (leaves or set())
        return err.removeprefix("dllm-sd: ").removesuffix("\n")

    return refuse


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a data file outside the working folder and returns its path."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=3", "unknown key 'sed'; did you mean 'seed'?"),
        ("updates=[1]", "updates must be a whole number, not [1]"),
        ("method.gate=corect", "method.gate.name 'corect' is unknown; did you mean 'correct'?"),
        ("decode.block_length=5", "decode.block_length 5 does not divide decode.length 16; choose a divisor"),
        ("decode.steps=2", "decode.steps must be at least the number of blocks, 4"),
        (
            "eval.schedules.fast.block_length=5",
            "eval.schedules.fast.block_length 5 does not divide eval.schedules.fast.length 16; choose a divisor",
        ),
        ("seed", "override 'seed' is not of the form key=value"),
        ("model.quantization=4bit", "model.quantization cannot be trained itself; set model.lora as well"),
    ],
)
def test_a_mistake_in_the_config_is_refused_before_anything_is_made(refuse: Refuse, override: str, message: str):
    assert refuse(override).startswith(message)


def test_an_unknown_config_is_refused(capsys: pytest.CaptureFixture[str]):
    for command in ("train", "show"):
        assert main([command, "quikstart"]) == 2
        assert capsys.readouterr().err == ("dllm-sd: there is no config file 'quikstart'; did you mean 'quickstart'?\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{GOOD}\n{{"question": "1\n', ", line 2 is not valid JSON; write one JSON object on each line."),
        (f'{GOOD}\n{{"question": "1"}}\n', ", line 2 has no field 'answer' (it has question); add it"),
        (f'{GOOD}\n\n{{"question": "1", "answer": "3"}}\n', ", line 3: answer has no '#### N' at its end; add it"),
        (f'{GOOD}\n{{"question": 1, "answer": "#### 3"}}\n', ", line 2: field 'question' must be a string, not 1"),
        ("", " holds no problems; give a file with at least one."),
        (f"{GOOD}\n", "The train split holds no problems; set task.data to a file with more rows"),
    ],
)
def test_a_bad_line_of_data_is_refused_with_file_and_line(
    refuse: Refuse, write: Callable[[str, str], str], text: str, message: str
):
    refused = refuse(task={**GSM8K, "data": write("train.jsonl", text)})
    assert message in refused
    assert "train.jsonl" in refused or "task.data" in refused


def test_a_missing_data_file_is_refused(refuse: Refuse):
    refused = refuse(task={**GSM8K, "data": "no/where.jsonl"})
    assert refused.startswith("task.data: no/where.jsonl cannot be read (No such file or directory)")


def test_a_run_of_which_every_prompt_is_too_long_is_refused(refuse: Refuse):
    task = {**TREE["task"], "size_train": 8}
    refused = refuse("max_prompt=15", task=task, leaves={"run"})
    assert refused == "every training prompt is longer than max_prompt 15; raise it"
    refused = refuse("max_prompt=15", "eval.every=1", "run=other", task=task, leaves={"other"})
    assert refused.startswith("no problem is left to evaluate (256 prompts exceed max_prompt 15)")


def test_long_prompts_are_left_out_and_counted_but_never_cut(
    train: Callable[..., int], write: Callable[[str, str], str]
):
    rows = [{"question": "1" * (8 + 8 * (i % 2)), "answer": f"#### {i}"} for i in range(9)]
    data = write("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert train("max_prompt=8", "updates=4", task={**GSM8K, "size_dev": 0, "data": data}) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][1:]
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    dropped = [line["rollouts/too_long"] for line in lines]
    assert dropped == sorted(dropped)
    assert dropped[-1] > 0
    assert {sample["question"] for sample in samples} == {"1" * 8}
    assert json.loads(Path("run/report.json").read_text())["too_long"] == dropped[-1]


def save_tokenizer(folder: Path, **special: str) -> str:
    """A tokenizer of single digits."""
    words = ["<unk>", "</s>", "<pad>", "[MASK]", *"0123456789"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_without_a_mask_or_end_token_is_refused_until_it_is_named(
    refuse: Refuse, train: Callable[..., int], tmp_path: Path
):
    ends = save_tokenizer(tmp_path / "ends", eos_token="</s>")
    masks = save_tokenizer(tmp_path / "masks", mask_token="[MASK]")
    refused = refuse(f"model.tokenizer={ends}")
    assert refused.endswith("has no mask token; name it in model.mask_token")
    refused = refuse(f"model.tokenizer={ends}", "model.mask_token='<m>'")
    assert refused.endswith("has no mask token '<m>'; name it in model.mask_token")
    assert "has no end token; set eos_token" in refuse(f"model.tokenizer={masks}")
    assert train(f"model.tokenizer={ends}", "model.mask_token='[MASK]'") == 0


LATER = (
    "method.contexts reveals later blocks, to which a block-causal model cannot attend, so the teacher would have no"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.block_length=8"], "decode.block_length is 4, but this model is block-causal with blocks of 8"),
        (
            ["model.block_length=4", "eval.schedules.wide.block_length=8"],
            "eval.schedules.wide.block_length is 8, but this model is block-causal with blocks of 4",
        ),
        (["model.block_length=4", "method=d_opsd"], LATER),
        (["model.block_length=4", "method=d_opsd_paper"], LATER),
        (["model.block_length=4", "method=diffu_grpo"], "method.canvases all_masked hides blocks that a block-causal"),
        (["model.block_length=0"], "model.block_length is 0; give a whole number from 1 to 1048576, or null"),
        (["model.thinking=false"], "model.thinking is set, but the chat template has no thinking switch; leave it out"),
        (["model.mask_token=25"], "model.shape has 25 embedding rows, but the tokenizer knows 25 tokens and the mask"),
        (["model.end_tokens=['<end>']"], "the tokenizer of model.shape has no token '<end>'; fix model.end_tokens"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", ["show", "train"])
def test_what_the_model_cannot_do_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    overrides: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(TREE), encoding="utf-8")
    assert main([command, "small.yaml", *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == "" or command == "show"  # which shows the config first
    assert err.startswith(f"dllm-sd: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.slow
def test_a_block_causal_model_trains_with_a_suffix_of_the_active_block(train: Callable[..., int]):
    contexts = [{"name": "suffix", "scope": "active_block", "ratio": 0.5}]
    method = {"name": "d_opsd", "gate": "all", "contexts": contexts, "rollout": {"problems": 2, "attempts": 1}}
    assert train("model.block_length=4", "decode.tokens_per_step=1", method=method) == 0
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["sites"] > 0
    assert line["loss"] > 0


@pytest.mark.slow
def test_a_model_that_writes_from_left_to_right_trains_as_what_it_is_and_as_a_diffusion_model(
    refuse: Refuse, train: Callable[..., int], tmp_path: Path
):
    folder = save_tokenizer(tmp_path / "model", eos_token="</s>")
    config: Any = LlamaConfig(vocab_size=14, bos_token_id=None, eos_token_id=None, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)
    refused = refuse("method=d_opsd", model={"path": folder})
    assert refused.startswith("method.contexts suffix reveals tokens after the graded position")
    refused = refuse("decode.block_length=5", model={"path": folder, "as": "diffusion"})
    assert refused.startswith("decode.block_length 5 does not divide decode.length 16")
    assert train("run=causal", "decode.block_length=5", model={"path": folder}) == 0  # which has no blocks
    assert train("run=denoiser", model={"path": folder, "as": "diffusion"}) == 0


def damage(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda content: content[:40], r"config.json is not JSON"),
        ("model.safetensors", lambda content: content[:-100], "model.safetensors of the checkpoint"),
        ("model.safetensors", lambda content: b"", "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    refuse: Refuse, tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str
):
    policy = build_policy(Model(random_init=True, tokenizer="tiny", shape=Shape(**SHAPE)))
    model: Any = policy.module.model
    model.save_pretrained(tmp_path / "model")
    damage(tmp_path / "model" / name, change)
    refused = refuse(model={"path": str(tmp_path / "model"), "tokenizer": "tiny"})
    assert message in refused


@pytest.mark.parametrize("arguments", [["eval", "./nowhere"], ["sample", "./nowhere", "0123"]])
def test_a_model_that_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error == "dllm-sd: model.path './nowhere' is not a folder; give a checkpoint folder or a hub name\n"
    assert not list(tmp_path.iterdir())


def test_a_refused_run_can_be_started_again_with_the_mistake_corrected(refuse: Refuse, train: Callable[..., int]):
    assert "is not a folder" in refuse("model={path: ./nowhere}")
    assert train() == 0


def test_the_folder_of_another_run_is_refused_until_told_what_to_do(refuse: Refuse, train: Callable[..., int]):
    assert train() == 0
    refused = refuse("seed=9", leaves={"run"})
    assert refused == (
        "run folder 'run' holds a run with another seed (0, not 9); give another run=..., "
        "resume=force to continue it anyway, or resume=fresh to discard it"
    )
    assert "another method.rollout.problems (4, not 5)" in refuse("method.rollout.problems=5", leaves={"run"})
    assert train("updates=2", "seed=9", "resume=force") == 0
    assert Path("run/metrics.jsonl").read_text().count("\n") == 3
    assert train("seed=9", "resume=fresh") == 0
    assert Path("run/metrics.jsonl").read_text().count("\n") == 2


def test_a_finished_run_goes_on_when_it_is_given_more_updates(
    refuse: Refuse, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert train("optim.schedule=linear") == 0
    capsys.readouterr()
    assert train("optim.schedule=linear", "updates=2") == 0
    said = capsys.readouterr().err
    assert "the run in 'run' gets 2 updates instead of 1; the learning rate now follows its linear schedule" in said
    assert [json.loads(line)["update"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert json.loads(Path("run/report.json").read_text())["updates"] == 2
    assert main(["train", "run", "updates=3"]) == 0
    assert "gets 3 updates instead of 2" in capsys.readouterr().err
    assert "another updates (3, not 2)" in refuse("optim.schedule=linear", "updates=2", leaves={"run"})
    assert "another optim.schedule" in refuse("updates=4", leaves={"run"})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("seed=-1", "seed is -1"),
        ("optim.lr=-1", "optim.lr is -1"),
        ("model.mask_token=foo", "has no mask token 'foo'"),
        ("model.tokenizer=./none", "'./none'"),
        ("model.lora={targets: [nope]}", "model.lora.targets names 'nope'"),
        ("model.lora={start: ./none}", "'./none'"),
        ("task.data=none.jsonl", "none.jsonl cannot be read"),
        ("model.lora={modules_to_save: [nope]}", "model.lora.modules_to_save names 'nope'"),
        ("method={name: d_opsd, contexts: []}", "method.contexts is empty, but method.target plain learns from a"),
        ("method=opd", "method.teacher.0.path is missing"),
        ("decode.suppress=[99]", "decode.suppress names token 99"),
        ("log.trackers=[mlflow]", "mlflow"),
    ],
)
def test_a_wrong_value_is_told_before_the_conflict_with_the_run_in_the_folder(refuse: Refuse, wrong: str, words: str):
    Path("run").mkdir()
    Path("run/config.yaml").write_text(to_yaml(build_config({**TREE, "seed": 7})))
    Path("run/metrics.jsonl").write_text("")
    assert "holds a run with another seed (7, not 0)" in refuse()
    refused = refuse(wrong)
    assert words in refused
    assert "holds a run" not in refused


def test_more_problems_than_a_split_holds_are_told(train: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    sizes = {"size_dev": 3, "size_test": 2}
    assert train("eval.problems=100", "eval.every=1", "eval.final_problems=50", task={**TREE["task"], **sizes}) == 0
    said = capsys.readouterr().err
    assert "eval.problems is 100, but there are 3 such problems; all of them are taken" in said
    assert "eval.final_problems is 50, but there are 2 such problems" in said
    assert main(["eval", "run", "eval.final_problems=4"]) == 0
    said = capsys.readouterr().err
    assert "eval.final_problems is 4, but there are 2 such problems" in said
    assert "eval.problems" not in said


def test_a_run_that_was_given_relative_paths_is_found_from_another_working_folder(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("rows.jsonl").write_text("".join(json.dumps({"question": f"{i}", "answer": f"{i}"}) + "\n" for i in range(8)))
    Path("mine.py").write_text("def score(problem, completion):\n    return 1.0\n")
    Path("plug.py").write_text("")
    shutil.copytree(str(files("dllm_sd") / "assets" / "tiny"), "model")
    task = {"name": "jsonl", "data": "rows.jsonl", "grader": "mine.py:score", "reference_field": "answer"}
    settings: dict[str, Any] = {"task": task, "model": {"path": "model"}, "plugins": ["plug.py"]}
    assert train(**settings) == 0
    run = str(Path("run").absolute())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["show", run]) == 0
    assert main(["train", run, "updates=2"]) == 0
    assert main(["eval", run, "eval.final_problems=1"]) == 0
    assert main(["sample", run, "train:0"]) == 0
    monkeypatch.chdir(tmp_path / "work")
    capsys.readouterr()
    assert train("updates=2", **settings) == 0  # the relative names mean the same files
    Path("rows.jsonl").rename("moved.jsonl")
    Path("other").mkdir()
    Path("other/rows.jsonl").write_text('{"question": "1", "answer": "1"}\n' * 8)
    assert train("updates=2", **{**settings, "task": {**task, "data": "moved.jsonl"}}) == 2
    assert "another task.data" in capsys.readouterr().err


def test_a_damaged_checkpoint_of_the_run_is_refused(refuse: Refuse, train: Callable[..., int]):
    assert train() == 0
    damage(Path("run/checkpoints/000001/optimizer.safetensors"), lambda content: content[:50])
    refused = refuse("updates=2", "resume=force", leaves={"run"})
    assert refused.startswith("checkpoint run/checkpoints/000001/optimizer.safetensors is missing or damaged")
    assert refused.endswith("use resume=fresh to begin again")


def test_a_run_folder_that_holds_something_else_is_refused_and_left_alone(refuse: Refuse):
    Path("file").write_text("mine")
    assert refuse("run=file") == "run 'file' is a file; name a folder"
    assert refuse("run=file/below").startswith("cannot write to run folder 'file/below'")
    Path("folder/checkpoints").mkdir(parents=True)
    Path("folder/config.yaml").write_text("site_name: mine")
    for resume in ("auto", "force", "fresh"):
        assert refuse("run=folder", f"resume={resume}").startswith(
            "run folder 'folder' is not empty and does not hold a run"
        )
    assert Path("folder/config.yaml").read_text() == "site_name: mine"
    assert Path("folder/checkpoints").is_dir()


def test_a_report_folder_that_is_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("mine")
    assert main(["eval", "tiny", "--task", "sudoku", "--out", "out", "eval.final_problems=2"]) == 2
    assert capsys.readouterr().err == "dllm-sd: cannot write to 'out': File exists; give another --out\n"


ODD = ("coin", "sudoku", None, 5, [1], {}, {"name": 5}, {"name": None}, {"nope": 1})
"""What may stand where a config has a section, by mistake."""


SECTIONS = ("task", "model", "method", "decode", "eval", "optim", "log", "peers")


@pytest.mark.parametrize("every", [False, *later(True)], ids=["a command each", "every command"])
@pytest.mark.parametrize(("section", "kind"), crossed(SECTIONS, ["run", "recipe"]))
def test_whatever_stands_in_a_section_of_a_runs_or_recipes_config_every_command_answers_in_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    section: str,
    kind: str,
    every: bool,
):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def loaded(*_: Any) -> None:
        raise InputError("the config was good")

    monkeypatch.setattr("dllm_sd.cli.run_or_model.build_policy", loaded)
    file = tmp_path / "run" / {"run": "config.yaml", "recipe": "recipe.yaml"}[kind]
    good = {name: part for name, part in TREE.items() if name in ("task", "model", "decode", "method")}
    said: set[str] = set()
    for number, odd in enumerate((*ODD, None)):
        tree = {**good, section: odd}
        if odd is ODD[0]:
            del tree[section]
        file.write_text(yaml.safe_dump(tree))
        few = "task.size_test=4" if section == "eval" else "eval.final_problems=4"
        tasks = [[], ["--task", "sudoku"], ["--task", "countdown"]]
        commands = [["eval", "run", *task, few] for task in tasks]
        commands += [["sample", "run", "hi"], ["sample", "run", "hi", "--task", "sudoku"]]
        commands += [["export", "run", "--to", "merged", "out"]] if kind == "run" else []
        in_turn = (number + SECTIONS.index(section)) % len(commands)
        for command in commands if every else [commands[in_turn]]:
            assert main(command) == 2
            said.add(capsys.readouterr().err)
    assert all(words.startswith("dllm-sd: ") and words.count("\n") == 1 for words in said)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["eval", "tiny", "--task", "sudoku"], "decode.suppress=[25]"),
        (["eval", "tiny", "--task", "sudoku"], "eval.schedules={slow: {suppress: [3, 99999999999]}}"),
        (["sample", "tiny", "hi", "--task", "sudoku"], "decode.suppress=[25]"),
        (["sample", "tiny", "hi", "--task", "sudoku"], "eval.decode={suppress: [3, 99999999999]}"),
    ],
)
def test_a_token_that_the_model_lacks_cannot_be_suppressed_wherever_a_model_is_loaded(
    command: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main([*command, key]) == 2
    assert "suppress names token" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("out", ["a/" * 250 + "b", "x" * 300, "a\0b", "b/" * 2000])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_graded(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("lines.jsonl").write_text('{"generation": "3", "answer": "3"}\n')
    with pytest.raises(SystemExit, match="2"):
        main(["grade", "lines.jsonl", "--task", "gsm8k", "--out", out])
    assert "which no file can be named" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"lines.jsonl"}
