"""The command line: a tiny run from beginning to end, what it leaves behind, and how it ends."""

import errno
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.summary.writer.record_writer import RecordWriter

from dllm_sd.arguments import COMMANDS
from dllm_sd.arguments.listing import KINDS
from dllm_sd.cli.evaluate import evaluation_folder, refuse_other_model
from dllm_sd.cli.main import main, parser
from dllm_sd.cli.sample import END, _frame, _status
from dllm_sd.config import load_config, to_tree
from dllm_sd.errors import InputError
from dllm_sd.evaluation.recording import VERDICTS, begin
from dllm_sd.export.model_card import _parts
from dllm_sd.files import locking
from dllm_sd.methods import METHODS
from dllm_sd.reports.tables import describe_part
from dllm_sd.training import trainer
from dllm_sd.training.log_files import LOG_FILES, STARTS
from dllm_sd.training.trainer import Trainer
from tests.tiers import later

TREE: dict[str, Any] = {
    "run": "run",
    "updates": 2,
    "model": {
        "random_init": True,
        "tokenizer": "tiny",
        "shape": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    },
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}", "size_train": 64},
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 4},
    "method": {"name": "sft", "rollout": {"problems": 4}},
    "optim": {"lr": 1e-3},
    "eval": {
        "every": 1,
        "problems": 4,
        "final_problems": 4,
        "schedules": {"one step": {"block_length": 16, "tokens_per_step": 16}},
    },
    "checkpoint": {"every": 1},
    "log": {"progress": False, "samples_every": 1},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that holds a config and the finished run of it."""
    home = tmp_path_factory.mktemp("home")
    (home / "small.yaml").write_text(yaml.safe_dump(TREE), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["train", "small.yaml"]) == 0
    return home


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_its_folder_and_nothing_else(home: Path):
    assert {path.name for path in home.iterdir()} == {"small.yaml", "run"}
    names = {path.name for path in (home / "run").iterdir()}
    assert names == {"config.yaml", *LOG_FILES, STARTS, "report.json", VERDICTS, "report.html", "checkpoints", "tb"}
    assert {path.name for path in (home / "run" / "checkpoints").iterdir()} == {"000001", "000002", "best"}
    assert len(list((home / "run" / "tb").iterdir())) == 1


def test_the_written_config_is_the_resolved_one(home: Path):
    assert load_config(str(home / "run" / "config.yaml")) == load_config(str(home / "small.yaml"))


def test_the_metrics_hold_one_line_an_update(home: Path):
    lines = lines_of(home / "run" / "metrics.jsonl")
    assert [line["update"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert math.isfinite(line["loss"])
        assert line["sites"] > 0
        assert {"lr", "grad_norm", "divergence", "student/entropy", "updates_skipped"} <= line.keys()
        assert {"rollouts/kept", "rollouts/length", "rollouts/too_long"} <= line.keys()
        assert not {"rollouts/pass_rate", "rollouts/first_try"} & line.keys()  # references are not graded
        assert {"time/rollouts", "time/learning", "time/eval", "eval/accuracy"} <= line.keys()


def test_the_samples_are_rollouts_with_their_verdict(home: Path):
    samples = lines_of(home / "run" / "samples.jsonl")
    assert [sample["update"] for sample in samples] == [1, 1, 2, 2]
    for sample in samples:
        assert sample["problem"].startswith("sudoku/train/")
        assert sample["generation"] == sample["solution"]
        assert sample["correct"] is True


def test_the_report_compares_before_after_and_best(home: Path):
    report = json.loads((home / "run" / "report.json").read_text())
    assert {"task", "n", "accuracy", "ci95", "pass_at_k", "settings"} <= report.keys()
    assert (report["task"], report["n"], report["updates"]) == ("sudoku", 4, 2)
    for name in ("before", "after", "best"):
        assert report[name].keys() == {"trained", "one step"}
        assert report[name]["one step"]["tokens_per_step"] == 16
    for schedule, tested in report["best"].items():
        verdicts = [line for line in lines_of(home / "run" / VERDICTS) if line["schedule"] == schedule]
        assert len({line["id"] for line in verdicts}) == tested["n"] == 4
        assert sum(line["correct"] for line in verdicts) / len(verdicts) == tested["accuracy"]


def test_the_environment_of_a_run_is_written_at_its_start(home: Path):
    (start,) = lines_of(home / "run" / "environment.jsonl")
    assert start["update"] == 0
    assert start["versions"]["torch"] == torch.__version__
    assert (start["device"], start["processes"]) == ("cpu", 1)


def test_the_report_page_of_a_run_holds_its_curves_and_traces(home: Path):
    text = (home / "run" / "report.html").read_text(encoding="utf-8")
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    (run,) = data["runs"]
    assert run["metrics"]["update"] == [0, 1, 2]
    assert run["traces"] == lines_of(home / "run" / "traces.jsonl")


def test_a_finished_run_is_reported_again_and_not_trained_again(home: Path, capsys: pytest.CaptureFixture[str]):
    weights = home / "run" / "checkpoints" / "000002" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(["train", "small.yaml"]) == 0
    assert "2 updates" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before
    assert len(lines_of(home / "run" / "metrics.jsonl")) == 3


def test_training_changes_the_weights(home: Path):
    first, second = (load_file(home / f"run/checkpoints/00000{i}/model.safetensors") for i in (1, 2))
    assert first.keys() == second.keys()
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


def test_eval_reports_beside_the_run_and_keeps_the_report_of_training(home: Path, capsys: pytest.CaptureFixture[str]):
    trained = (home / "run" / "report.json").read_bytes()
    assert main(["eval", "run", "eval.final_problems=3"]) == 0
    report = json.loads((home / "run" / "eval" / "sudoku" / "report.json").read_text())
    assert {"task", "n", "accuracy", "ci95", "pass_at_k", "settings"} <= report.keys()
    assert (report["task"], report["n"], report["settings"]["evaluated"]) == ("sudoku", 3, "run")
    assert "written to run/eval/sudoku: report.json, generations.jsonl" in capsys.readouterr().out
    assert (home / "run" / "report.json").read_bytes() == trained


def test_eval_of_the_run_agrees_with_the_report_of_training(home: Path, tmp_path: Path):
    assert main(["eval", "run", "--out", str(tmp_path / "new")]) == 0
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    trained = json.loads((home / "run" / "report.json").read_text())["best"]["trained"]
    for key, value in trained.items():
        assert key.startswith("time/") or report[key] == value
    assert report["schedules"]["trained"]["accuracy"] == report["accuracy"]
    lines = [json.loads(line) for line in (tmp_path / "new" / "generations.jsonl").read_text().splitlines()]
    mine = [line["correct"] for line in lines if line["schedule"] == "trained"]
    assert sum(mine) / len(mine) == report["accuracy"]
    assert {line["schedule"] for line in lines} == report["schedules"].keys()


def test_eval_of_a_model_writes_to_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "tiny", "--task", "sudoku", "eval.final_problems=2"]) == 0
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {f"eval/tiny/sudoku/{name}" for name in ("report.json", "generations.jsonl", "settings.json")}


def test_two_models_have_two_folders_and_none_replaces_the_results_of_another(tmp_path: Path):
    models = ("tiny", "Qwen/Qwen3-4B", "runs/a/merged", "/data/runs/a/merged", "b/merged")
    folders = [evaluation_folder(model, None, "sudoku") for model in models]
    assert folders[:3] == [Path("eval", name, "sudoku") for name in ("tiny", "Qwen-Qwen3-4B", "runs-a-merged")]
    assert len(set(folders)) == len(models)
    assert evaluation_folder("tiny", "runs/a/peft", "sudoku") == Path("eval", "tiny+runs-a-peft", "sudoku")
    refuse_other_model(tmp_path, "a-b")
    begin(tmp_path, {"evaluated": "a/b"})
    refuse_other_model(tmp_path, "a/b")
    refuse_other_model(tmp_path, "./a/b")
    with pytest.raises(InputError, match=r"holds the evaluation of 'a/b'; give .*'a-b'.* another --out"):
        refuse_other_model(tmp_path, "a-b")


def test_sample_shows_every_step_and_the_text(capsys: pytest.CaptureFixture[str]):
    assert main(["sample", "run", "0123012301230123"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["0", "1", "2", "3", "4"]
    assert lines[0].split()[1] == "\u00b7" * 16


def test_sample_applies_the_prompt_of_the_task_and_judges_what_it_knows(capsys: pytest.CaptureFixture[str]):
    problem = load_config("small.yaml").task.problems("test")[3]
    outs = []
    for prompt in ("test:3", problem.fields["puzzle"]):
        assert main(["sample", "run", prompt]) == 0
        outs.append(capsys.readouterr().out.splitlines())
    assert outs[0] == outs[1]
    assert re.fullmatch(r"(right|wrong) \(sudoku/test/3; (no answer was read|answer read: \S+)\)", outs[0][-1])
    told = re.fullmatch(
        r"probability of its (\d+) tokens: mean ([\d.]+); lowest [\d.]+ of '.*' at step \d", outs[0][-2]
    )
    assert told is not None
    assert 0 < float(told[2]) <= 1
    assert main(["sample", "run", "0" * 16]) == 0
    assert not re.search("right|wrong", capsys.readouterr().out)
    assert main(["sample", "run", "test:99999999"]) == 2
    assert "test:99999999 does not exist; the test split holds" in capsys.readouterr().err


def test_a_canvas_shows_line_breaks_as_a_sign_and_a_growing_text_no_masks():
    class Policy:
        causal, mask_id, end_ids = False, 9, (4,)

        def text(self, tokens: list[int]) -> str:
            return {1: "a", 2: "\n", 3: ""}[tokens[0]]

    policy: Any = Policy()
    frames = [[9, 9, 9, 9, 9], [1, 2, 3, 4, 9]]
    assert _frame(policy, frames).plain == f"a\u23ce\u25a1{END}\u00b7"
    assert _status(policy, frames).plain.strip() == "step 1: 4 of 5 positions"
    policy.causal = True
    assert _frame(policy, [[1, 2, 9, 9]]).plain == "a\u23ce"
    assert _status(policy, frames).plain == ""


def test_show_and_model_cards_can_tell_the_parts_of_every_method():
    for name, row in METHODS.items():
        for slot, group in to_tree(row.method).items():
            for part in group if isinstance(group, list) else [group]:
                words = describe_part(part)
                assert not isinstance(part, dict) or words.startswith(part.get("name", "")), (name, slot)
        assert f"target {to_tree(row.method)['target']['name']}" in _parts(row.method), name


def test_show_prints_the_config_and_the_parts_of_the_method(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "small.yaml", "method=d_opsd_paper", "seed=7"]) == 0
    out = capsys.readouterr().out
    assert "seed: 7" in out
    assert all(part in out for part in ("pass_at_k", "teacher_top", "all_masked", "reverse_kl", "average"))


def test_training_goes_on_where_an_override_asks_for_more(home: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert main(["train", "small.yaml", f"run={run}", "updates=1", "eval.every=0"]) == 0
    assert main(["train", "small.yaml", f"run={run}", "updates=3", "eval.every=0", "resume=force"]) == 0
    assert [line["update"] for line in lines_of(run / "metrics.jsonl")] == [0, 1, 2, 3]


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def interrupted(self: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupted)
    assert main(["train", "small.yaml", f"run={tmp_path / 'run'}"]) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def broken(self: Trainer) -> None:
        raise FloatingPointError("the loss of update 1 is not finite")

    monkeypatch.setattr(Trainer, "train", broken)
    assert main(["train", "small.yaml", f"run={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().err == "dllm-sd: the loss of update 1 is not finite\n"


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/file")


@pytest.mark.parametrize("where", ["save_run", *later("write_file", "MetricsLog.write", "RecordWriter.write")])
def test_a_disk_that_is_full_ends_a_run_with_1_and_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
):
    owners: dict[str, Any] = {"MetricsLog": trainer.MetricsLog, "RecordWriter": RecordWriter}
    owner, _, name = where.rpartition(".")
    command = ["train", "small.yaml", f"run={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(owners.get(owner, trainer), name, full)
        assert main(command) == 1
    said = capsys.readouterr().err
    assert said == (
        "dllm-sd: cannot read or write '/full/file': No space left on device; fix that, and the same "
        "command continues from the last saved update\n"
    )
    assert main(command) == 0
    assert [line["update"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_refused_with_2(
    monkeypatch: pytest.MonkeyPatch, home: Path, capsys: pytest.CaptureFixture[str], code: int
):
    def refuse(self: Any, path: Path) -> int:
        raise OSError(code, os.strerror(code), str(path))

    before = sorted(home.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(locking.FolderLock, "_lock", refuse)
        assert main(["train", "small.yaml"]) == 2
    assert capsys.readouterr().err == (
        f"dllm-sd: cannot write to run folder 'run': {os.strerror(code)}; give another run=...\n"
    )
    assert [path for path in sorted(home.rglob("*")) if path.parent.name != "tb"] == [
        path for path in before if path.parent.name != "tb"
    ]


@pytest.mark.parametrize("content", ['{"task": "sudo', "{}", *later("", "[]", "\x00")])
def test_a_damaged_report_is_written_anew(home: Path, tmp_path: Path, content: str):
    shutil.copytree(home / "run", tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text(content)
    assert main(["train", "small.yaml", f"run={tmp_path / 'run'}"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["best"]["trained"]["accuracy"] == json.loads((home / "run" / "report.json").read_text())["accuracy"]


@pytest.mark.learns_nothing
def test_a_run_that_learnt_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    method = ["method={name: rft, rollout: {problems: 4, attempts: 1}}", "updates=1"]
    settings = [f"run={tmp_path / 'run'}", "eval={every: 0, final_problems: 0}"]
    assert main(["train", "small.yaml", *settings, *method]) == 3
    assert capsys.readouterr().err == (
        "dllm-sd: nothing was learnt: all 1 updates were skipped (4 rollouts rejected by method.gate): take easier "
        "problems, raise method.rollout.attempts, or begin with method=sft\n"
    )


@pytest.mark.slow
def test_bad_input_ends_a_process_with_2_and_one_line(tmp_path: Path):
    """In this process tests/test_bad_input.py asks it of all kinds of bad input."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(TREE))
    command = [sys.executable, "-m", "dllm_sd", "train", "small.yaml", "updates=no"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dllm-sd: updates must be a whole number")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


OTHERS = (
    *(["eval", "tiny", "--task", "sudoku"], ["eval", "runs/none"], ["sample", "tiny", "hi"], ["serve", "tiny"]),
    *(["export", "runs/none", "--to", "peft", "out"], ["probe", "quickstart"]),
)
"""Commands that take settings of a config."""
LIGHT = [
    *(["--help"], ["--version"], ["train"], ["trian", "quickstart"], ["train", "quickstart", "--lr", "1e-4"]),
    *([name, "--help"] for name in COMMANDS),
    *(["train", "quickstart", word] for word in ("optm.lr=1", "lr=1", "method=dopsd", "method.divergence=kl")),
    *(["train", "quickstrat"], ["train", "runs/nope"], ["show", "quickstart", "batch_size=4"]),
    *([*words, wrong] for words in OTHERS for wrong in ("optm.lr=1", "decode.lenght=16", "task.prompt")),
    *(["list", kind, "--json"] for kind in KINDS),
    *(["explain", "optim.lr", "--json"], ["explain", "*.ratio"], ["explain", "optm"], ["schema"]),
]


def test_help_and_usage_errors_load_no_library_of_models():
    program = """
import sys
from dllm_sd.cli.main import main
for words in {words}:
    try:
        main(words)
    except SystemExit:
        pass
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program.replace("{words}", repr(LIGHT))], capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    commands = [line.split(" -m ")[-1] for line in examples.splitlines() if re.search("dllm[-_]sd ", line)]
    words = [shlex.split(re.sub(r"^.*?dllm[-_]sd ", "", line), comments=True) for line in commands]
    assert words
    assert all(parser().parse_known_args(each)[0].command == COMMANDS[name] for each in words)
