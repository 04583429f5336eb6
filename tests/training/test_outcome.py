"""What a run says of itself at its end, and what is said wherever its best weights are those that it began with."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dllm_sd.cli import train as train_command
from dllm_sd.cli.main import main
from dllm_sd.config import Config, build_config, load_config, to_yaml
from dllm_sd.errors import InputError
from dllm_sd.evaluation.evaluate import final_problems
from dllm_sd.network.finite import fingerprint
from dllm_sd.training.checkpoint import State
from dllm_sd.training.log_files import Course, LogSums, MetricsLog, course_of
from dllm_sd.training.outcome import about_device, initial_of, outcome_of, prompt_differences, warnings_of
from dllm_sd.training.trainer import Trainer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def tree_at(folder: Path, **changes: Any) -> dict[str, Any]:
    """Four updates of `sft` on sixteen rows, of which a random model gets none right."""
    data = folder / "data.jsonl"
    rows = [{"question": f"{a}{b}", "answer": str((a + b) % 4)} for a in range(4) for b in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = folder / "test.jsonl"
    test.write_text('{"question": "44", "answer": "0"}\n')
    task = {"name": "jsonl", "data": str(data), "data_test": str(test), "size_dev": 2, "reference_field": "answer"}
    model = {"random_init": True, "as": "autoregressive", "tokenizer": "tiny_ar", "shape": SHAPE}
    tree = {
        "run": str(folder / "run"),
        "updates": 4,
        "model": {**model, "lora": {"rank": 2, "alpha": 4}},
        "task": task,
        "decode": {"length": 4, "batch_size": 8},
        "method": {"name": "sft", "rollout": {"problems": 2}},
        "optim": {"lr": 1e-2},
        "eval": {"every": 2, "problems": 2, "final_problems": 0},
        "checkpoint": {"every": 2},
        "log": {"progress": False, "trackers": []},
    }
    return {**tree, **changes}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which no evaluation was as good as that of the initial weights."""
    folder = tmp_path_factory.mktemp("worse")
    with pytest.MonkeyPatch.context() as patch:
        measure = Trainer._accuracy

        def falling(self: Trainer, *arguments: Any) -> Any:
            report = measure(self, *arguments)
            object.__setattr__(report, "accuracy", 1.0 / (1 + self.state.update))
            return report

        patch.setattr(Trainer, "_accuracy", falling)
        Trainer(build_config(tree_at(folder))).train()
    return folder / "run"


def test_of_weights_that_are_equally_good_on_dev_the_later_ones_are_the_best(tmp_path: Path):
    report = Trainer(build_config(tree_at(tmp_path))).train()
    assert (report["best_dev_accuracy"], report["best_update"]) == (0.0, 4)
    (warning,) = report["warnings"]
    assert warning.startswith("no answer was right in any evaluation on the dev split")
    checkpoints = tmp_path / "run" / "checkpoints"
    best, last = weights(checkpoints / "best"), weights(checkpoints / "000004")
    assert all(torch.equal(value, last[name]) for name, value in best.items())
    assert initial_of(checkpoints / "best") is None


def test_a_run_that_goes_on_says_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = tree_at(tmp_path, log={"progress": True, "trackers": []})
    Trainer(build_config(settings)).train(2)
    assert "continuing" not in capsys.readouterr().err
    Trainer(build_config(settings)).train()
    assert "continuing from update 2 of 4\n" in capsys.readouterr().err
    Trainer(build_config(settings)).train()
    assert "continuing" not in capsys.readouterr().err


def test_a_tie_is_no_progress_to_a_run_that_waits_for_it(tmp_path: Path):
    settings = tree_at(tmp_path, eval={"every": 1, "problems": 2, "patience": 3})
    report = Trainer(build_config(settings)).train()
    assert (report["updates"], report["stopped"]) == (3, "no better dev accuracy in 3 evaluations")


def test_the_report_and_the_command_say_that_the_initial_weights_were_the_best(
    worse: Path, capsys: pytest.CaptureFixture[str]
):
    report = json.loads((worse / "report.json").read_text())
    (sentence,) = report["warnings"]
    assert "initial ones: no evaluation up to update 4 was as good" in sentence
    assert "--weights last" in sentence
    assert main(["train", str(worse / "config.yaml"), f"run={worse}"]) == 0
    assert f"dllm-sd: {sentence}\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "export", "sample", "start", "writer"])
def test_wherever_the_initial_weights_are_taken_for_the_best_that_is_said(
    command: str, worse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    best = str(worse / "checkpoints" / "best")
    if command == "eval":
        assert main(["eval", str(worse), "--out", str(tmp_path / "out")]) == 0
    elif command == "export":
        assert main(["export", str(worse), "--to", "merged", str(tmp_path / "out")]) == 0
        assert "the initial ones, which no training has changed" in (tmp_path / "out" / "README.md").read_text()
    elif command == "sample":
        assert main(["sample", str(worse), "00"]) == 0
    else:
        tree = tree_at(tmp_path)
        tree["task"]["data"] = str(worse.parent / "data.jsonl")
        if command == "start":
            tree["model"]["lora"]["start"] = best
        else:
            context = {"name": "rubric", "writing": {"writer": {"name": "peer", "path": best}}}
            tree["method"] = {"name": "rcsd", "contexts": [context]}
        Trainer(build_config(tree))
    assert capsys.readouterr().err.count(f"{best}: the best weights on the dev split are the initial ones") == 1


def test_nothing_is_said_where_the_last_weights_are_taken(
    worse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["export", str(worse), "--to", "merged", "--weights", "last", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    shutil.copytree(worse / "checkpoints" / "best", tmp_path / "rounds" / "0")
    assert initial_of(tmp_path / "rounds" / "0") is None  # kept on purpose


@pytest.mark.parametrize(
    "steps", [{"lr": 1e-30}, {"lr": 1e-4, "eps": 1.0, "weight_decay": 0.0, "max_grad_norm": 1e-30}]
)
def test_a_run_whose_steps_change_no_weight_says_so(steps: dict[str, float], tmp_path: Path):
    run = tmp_path / "run"
    model = {"random_init": True, "as": "autoregressive", "tokenizer": "tiny_ar", "shape": SHAPE, "dtype": "bfloat16"}
    trainer = Trainer(build_config(tree_at(tmp_path, model=model, optim={**steps, "pure_bfloat16": True})))
    before = {name: value.detach().clone() for name, value in trainer.policy.module.named_parameters()}
    report = trainer.train()
    after = weights(run / "checkpoints" / "000004")
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed == []
    assert report["warnings"][0].startswith("nothing was learnt: none of 4 updates changed a weight")
    assert report["outcome"] == "nothing learnt"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("weights_unchanged") for line in lines] == [None, 1, 1, 1, 1]


def test_a_run_without_a_rollout_to_learn_from_says_that_alone():
    sums = LogSums({"rollouts/rejected": 5, "rollouts/too_long": 2}, unchanged=True)
    (sentence,) = warnings_of(State(3, skipped=3), sums)
    assert sentence.startswith("nothing was learnt: all 3 updates were skipped (5 rollouts ")
    assert "2 problems longer than max_prompt" in sentence
    assert sentence.endswith("): take easier problems, raise method.rollout.attempts, or begin with method=sft")
    (sentence,) = warnings_of(State(3, skipped=3), LogSums({"rollouts/no_hint": 5}, unchanged=True))
    failed = {"rollouts/rejected": 5, "rollouts/grader_failed": 5}
    assert warnings_of(State(3, skipped=3), LogSums(failed, unchanged=True))[0].endswith("grader failed)")
    assert "): see what the hints of method.contexts need; if it is a successful attempt, take easier" in sentence
    assert warnings_of(State(), LogSums()) == []


@pytest.mark.parametrize(
    ("state", "sums", "outcome", "words"),
    [
        (State(3, skipped=3), LogSums(), "nothing learnt", ["nothing was learnt: all 3 updates were skipped"]),
        (State(3), LogSums(unchanged=True), "nothing learnt", ["nothing was learnt: none of 3 updates changed"]),
        (State(3, skipped=2), LogSums(), "learnt", []),
        (State(0, skipped=0), LogSums(), "learnt", []),
        (State(9, best_update=9, best_accuracy=0.0), LogSums(last_accuracy=0.0), "learnt", ["no answer was right in"]),
        (State(9, best_accuracy=0.5), LogSums(last_accuracy=0.45), "learnt", ["the best weights on the dev split are"]),
        (
            State(9, best_update=3, best_accuracy=0.5, stopped="dev accuracy fell from 50.0 % to 45.0 %"),
            LogSums(last_accuracy=0.45),
            "collapsed",
            ["the run collapsed at update 9: dev accuracy fell from 50.0 % to 45.0 %; .* of update 3$"],
        ),
        (
            State(9, best_update=0, best_accuracy=0.5, stopped="dev accuracy fell from 50.0 % to 0.0 %"),
            LogSums(last_accuracy=0.0),
            "collapsed",
            ["the run collapsed at update 9", "the best weights on the dev split are the initial ones"],
        ),
        (
            State(9, best_update=3, best_accuracy=0.5, stopped="no better dev accuracy in 2 evaluations"),
            LogSums(last_accuracy=0.375),
            "learnt",
            ["the last weights are much worse than the best ones .*, 37.50 % against 50.00 %; .* update 3$"],
        ),
    ],
)
def test_how_a_run_ended_is_one_word_and_its_reasons(state: State, sums: LogSums, outcome: str, words: list[str]):
    assert outcome_of(state, sums.unchanged) == outcome
    found = warnings_of(state, sums)
    assert len(found) == len(words)
    assert [re.match(start, said) is not None for start, said in zip(words, found, strict=True)] == [True] * len(words)


@pytest.mark.parametrize(
    ("loss", "entropy", "accuracy", "is_said"),
    [
        ((0.094, 0.044), (1.7, 4.2), (0.34, 0.0), True),
        ((0.094, 0.044), (1.7, 4.2), None, True),
        ((0.094, -0.044), (0.0, 0.3), (0.34, 0.33), True),
        ((0.094, 0.044), (1.7, 4.2), (0.34, 0.34), False),  # no worse on the dev split
        ((0.094, 0.1), (1.7, 4.2), (0.34, 0.0), False),  # the loss rose too
        ((0.094, 0.044), (1.7, 2.5), (0.34, 0.0), False),
        ((0.094, 0.044), (0.01, 0.15), (0.34, 0.0), False),  # many times as much, but hardly any
        (None, (1.7, 4.2), (0.34, 0.0), False),
        ((0.094, 0.044), None, (0.34, 0.0), False),
    ],
)
def test_a_loss_that_falls_while_the_student_becomes_undecided_is_warned_of(
    loss: tuple[float, float] | None,
    entropy: tuple[float, float] | None,
    accuracy: tuple[float, float] | None,
    is_said: bool,
):
    values = {"loss": loss, "student/entropy": entropy, "eval/accuracy": accuracy}
    sums = LogSums(courses={name: Course(*pair) for name, pair in values.items() if pair is not None})
    found = [said for said in warnings_of(State(9), sums) if said.startswith("loss and entropy diverge")]
    assert len(found) == is_said
    if is_said and accuracy == (0.34, 0.0):
        assert "fell from 0.094 to 0.044 and dev accuracy from 34.00 % to 0.00 %" in found[0]
        assert "entropy rose from 1.70 to 4.20 nats" in found[0]


def test_the_course_of_a_metric_is_that_of_its_lines(tmp_path: Path):
    log = MetricsLog(tmp_path, -1)
    log.write({"update": 0, "eval/accuracy": 0.5})
    for update in range(1, 10):
        loss = {"loss": None} if update == 2 else {"loss": float(update), "student/entropy": 1.0 / update}
        log.write({"update": update, **loss, **({"eval/accuracy": 0.25} if update == 9 else {})})
    courses = log.summed_up(1).courses
    assert courses["loss"] == Course((1 + 3) / 2, (8 + 9) / 2)
    assert courses["student/entropy"].last == pytest.approx((1 / 8 + 1 / 9) / 2)
    assert courses["eval/accuracy"] == Course(0.5, 0.25)
    assert course_of("loss", [1.0] * 5) is None
    assert course_of("eval/accuracy", [1.0]) is None


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        (["learnt"], 0),
        ([None], 0),
        (["nothing learnt"], 3),
        (["collapsed"], 3),
        (["learnt", "collapsed"], 3),
        (["learnt", "learnt"], 0),
    ],
)
def test_the_exit_status_says_whether_a_run_learnt(
    monkeypatch: pytest.MonkeyPatch, outcomes: list[str | None], status: int
):
    reports = {Path(str(i)): {"outcome": outcome} if outcome else {} for i, outcome in enumerate(outcomes)}
    monkeypatch.setattr(train_command, "train_config", lambda config: reports)
    monkeypatch.setattr(train_command, "print_training", lambda report, folder: None)
    monkeypatch.setattr(train_command, "write_report", lambda runs, out: None)
    assert main(["train", "quickstart"]) == status


def test_bfloat16_is_warned_of_where_it_is_slow(tmp_path: Path):
    configs = [build_config(tree_at(tmp_path, optim={"autocast": "bfloat16"})), build_config(tree_at(tmp_path))]
    (said,) = about_device(configs[0], "cpu")
    assert said == (
        "optim.autocast bfloat16 is several times as slow as float32 on most CPUs; set optim.autocast=null to be faster"
    )
    assert about_device(configs[1], "cpu") == about_device(configs[0], "cuda") == []


@pytest.mark.parametrize(("wanted", "problems", "said"), [(None, 1, None), (0, 0, None), (5, 1, None)])
def test_models_are_tested_by_default(tmp_path: Path, wanted: int | None, problems: int, said: str | None):
    found, sentence = final_problems(build_config(tree_at(tmp_path, eval={"final_problems": wanted})))
    assert (len(found), sentence) == (problems, said)


def test_a_task_without_a_test_split_is_said_and_refused_only_if_one_is_asked_for(tmp_path: Path):
    task = {"name": "sudoku", "size_test": 0}
    found, said = final_problems(build_config(tree_at(tmp_path, task=task, eval={})))
    assert found == []
    assert said is not None
    assert said.startswith("there will be no test results: task.size_test is 0")
    with pytest.raises(InputError, match=r"task\.size_test is 0"):
        final_problems(build_config(tree_at(tmp_path, task=task, eval={"final_problems": 3})))
    large = build_config(tree_at(tmp_path, task={"name": "sudoku"}, eval={}))
    assert len(final_problems(large)[0]) == 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_change_of_any_single_number_changes_the_fingerprint(dtype: torch.dtype):
    values = [torch.randn(64, 33, generator=torch.Generator().manual_seed(1)).to(dtype), torch.zeros(3, dtype=dtype)]
    before = fingerprint(values)
    assert fingerprint([value.clone() for value in values]) == before
    for place in (0, 1000, 64 * 33 - 1):
        changed = [value.clone() for value in values]
        changed[0].view(-1)[place] *= 1 + 2 * torch.finfo(dtype).eps
        assert fingerprint(changed) != before
    assert fingerprint([values[0], torch.full((3,), 1e-30, dtype=dtype)]) != before


@pytest.fixture
def stages(tmp_path: Path):
    """The shipped second stage of RCSD, and where its writer was trained, with overrides of either."""

    def build(first: list[str], second: list[str]) -> list[str]:
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.yaml").write_text(to_yaml(load_config("qwen3_8b_rcsd_writer", first)))
        writer = f"method.contexts.0.writing.writer={{name: peer, path: {run / 'checkpoints' / '001000'}}}"
        config: Config = load_config("qwen3_8b_rcsd", [writer, *second])
        return prompt_differences(config)

    return build


PROMPT = "task.prompt='Mark {question} by a list.'"


@pytest.mark.parametrize(
    ("first", "second", "keys"),
    [
        ([], [], []),
        ([PROMPT], [], [("task.prompt", "method.contexts.0.prompt")]),
        ([], ["method.contexts.0.prompt='Mark {question} by a list.'"], [("task.prompt", "method.contexts.0.prompt")]),
        ([PROMPT], ["method.contexts.0.prompt='Mark {question} by a list.'"], []),
        (["task.prompt='Mark {text} by a list.'"], ["method.contexts.0.prompt='Mark {question} by a list.'"], []),
        (["task.system=Be brief."], [], [("task.system", "method.contexts.0")]),
        (["model.thinking=true"], [], [("model.thinking", "method.contexts.0.writing.sampling.thinking")]),
        ([], ["method.contexts.0.writing.sampling.thinking=null"], [("model.thinking", "sampling.thinking")]),
        (["task.grader=exact", PROMPT], [], []),  # no writer of rubrics
    ],
)
def test_a_writer_that_is_prompt_differences_than_it_was_trained_is_named_with_both_keys(stages, first, second, keys):
    said = stages(first, second)
    assert len(said) == len(keys)
    for sentence, (theirs, ours) in zip(said, keys, strict=True):
        assert theirs in sentence
        assert ours in sentence
        assert "\n" not in sentence


def test_a_writer_that_is_no_checkpoint_of_a_run_is_not_looked_at(tmp_path: Path):
    writer = f"method.contexts.0.writing.writer={{name: peer, path: {tmp_path}}}"
    assert prompt_differences(load_config("qwen3_8b_rcsd", [writer])) == []
    assert prompt_differences(load_config("quickstart")) == []
