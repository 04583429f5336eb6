"""The run folder: one configuration each, and nothing is lost that was not given up."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from dllm_sd.config import build_config, load_config, to_tree
from dllm_sd.errors import InputError
from dllm_sd.training import trainer as trainer_module
from dllm_sd.training.folder import CONTENTS, RunFolder, read_report, read_run_config
from dllm_sd.training.trainer import Trainer
from tests.tiers import later, newest, spread

TINY: dict[str, Any] = {
    "updates": 1,
    "model": {
        "random_init": True,
        "tokenizer": "tiny",
        "shape": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    },
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}", "size_train": 64},
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 4},
    "method": {"name": "sft", "rollout": {"problems": 2}},
    "eval": {"every": 0, "final_problems": 0},
    "log": {"progress": False, "trackers": []},
}


def config(run: Path, **changes: Any) -> Any:
    tree = {"run": str(run), "task": "sudoku", "decode": {"length": 16, "block_length": 4}, "method": "d_opsd"}
    return build_config({**tree, **changes})


def prepare_folder(settings: Any) -> None:
    """What a run does that is not refused, and ends."""
    folder = RunFolder(settings)
    with folder.changing():
        pass
    folder.release()


def begin(run: Path, **changes: Any) -> None:
    """A run that has written its first line."""
    prepare_folder(config(run, **changes))
    (run / "metrics.jsonl").write_text('{"update": 0}\n')


def refusal(run: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        prepare_folder(config(run, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_folder_is_made_with_its_parents_and_holds_the_resolved_config(tmp_path: Path):
    prepare_folder(config(tmp_path / "a" / "b"))
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.yaml"]
    assert read_run_config(tmp_path / "a" / "b") == to_tree(config(tmp_path / "a" / "b"))


def test_an_empty_folder_is_taken(tmp_path: Path):
    prepare_folder(config(tmp_path))
    assert (tmp_path / "config.yaml").is_file()


def test_the_same_config_goes_on(tmp_path: Path):
    begin(tmp_path)
    prepare_folder(config(tmp_path))
    assert (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"resume": "auto"},
        {"log": {"progress": False, "samples": 5}},
        {"checkpoint": {"every": 3, "keep": 9}},
    ],
)
def test_what_cannot_change_the_outcome_may_change(tmp_path: Path, changes: dict[str, Any]):
    begin(tmp_path)
    prepare_folder(config(tmp_path, **changes))
    assert read_run_config(tmp_path) == to_tree(config(tmp_path, **changes))


@pytest.mark.parametrize("resume", ["fresh", "force"])
def test_a_run_is_continued_by_its_folder_or_its_config_however_it_was_started(tmp_path: Path, resume: str):
    begin(tmp_path, resume=resume)
    for name in (tmp_path, tmp_path / "config.yaml"):
        assert load_config(str(name)).resume == "auto"
    assert load_config(str(tmp_path), ["resume=force"]).resume == "force"
    stored = tmp_path / "config.yaml"  # earlier versions stored how a run was started
    stored.write_text(stored.read_text().replace("resume: auto", f"resume: {resume}"))
    prepare_folder(load_config(str(tmp_path)))
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_run_of_before_a_key_existed_goes_on_with_the_default_of_that_key(tmp_path: Path):
    begin(tmp_path)
    stored = tmp_path / "config.yaml"
    tree = yaml.safe_load(stored.read_text())
    for part, key in ((tree["method"]["contexts"][0], "ratio"), (tree["optim"], "autocast"), (tree, "cache")):
        assert key in part
        del part[key]
    stored.write_text(yaml.safe_dump(tree))
    prepare_folder(config(tmp_path))
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_folder_may_be_moved(tmp_path: Path):
    begin(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    prepare_folder(config(tmp_path / "new"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed (0, not 1)"),
        ({"updates": 9}, "updates (500, not 9)"),
        ({"method": "rft"}, "method.canvases.name ('decoder_steps', not 'random_masks')"),
        ({"method": {"name": "d_opsd", "rollout": {"attempts": 2}}}, "method.rollout.attempts (8, not 2)"),
        ({"model": {"lora": {"rank": 2}}}, "model.lora (None, not {'rank': 2, "),
        ({"optim": {"betas": [0.9, 0.9]}}, "optim.betas ([0.9, 0.99], not [0.9, 0.9])"),
        ({"method": {"contexts": [{"name": "suffix", "ratio": 0.5}]}}, "method.contexts.0.ratio (0.25, not 0.5)"),
        ({"eval": {"schedules": {"a": {"block_length": 8}}}}, "eval.schedules.a (None, not {'block_length': 8})"),
    ],
)
def test_another_config_is_refused_by_the_first_key_that_differs(tmp_path: Path, changes: dict[str, Any], key: str):
    begin(tmp_path)
    refused = refusal(tmp_path, **changes)
    assert refused.startswith(f"run folder {str(tmp_path)!r} holds a run with another {key}")
    assert refused.endswith("resume=force to continue it anyway, or resume=fresh to discard it")
    assert read_run_config(tmp_path) == to_tree(config(tmp_path))


def test_a_key_that_only_the_former_run_had_is_a_difference(tmp_path: Path):
    begin(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**to_tree(config(tmp_path)), "extra": 1}))
    assert "another extra (1, not None)" in refusal(tmp_path)


def test_a_run_that_never_began_may_be_corrected(tmp_path: Path):
    prepare_folder(config(tmp_path))
    prepare_folder(config(tmp_path, seed=1))
    assert read_run_config(tmp_path)["seed"] == 1


def test_force_goes_on_with_the_new_config(tmp_path: Path):
    begin(tmp_path)
    prepare_folder(config(tmp_path, seed=1, resume="force"))
    assert (tmp_path / "metrics.jsonl").exists()
    assert read_run_config(tmp_path)["seed"] == 1
    prepare_folder(config(tmp_path, seed=1))


def test_fresh_discards_the_run_and_only_the_run(tmp_path: Path):
    begin(tmp_path)
    for name in CONTENTS:
        if Path(name).suffix == "":
            (tmp_path / name / "deep").mkdir(parents=True)
        else:
            (tmp_path / name).touch()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_tree(config(tmp_path))))
    (tmp_path / "notes.txt").write_text("mine")
    prepare_folder(config(tmp_path, seed=1, resume="fresh"))
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "notes.txt"}
    assert read_run_config(tmp_path)["seed"] == 1


@pytest.mark.parametrize("resume", ["auto", "force", "fresh"])
@pytest.mark.parametrize("files", [{"notes.txt": "mine"}, {"config.yaml": "site: mine", "report.json": "{}"}])
def test_files_of_others_are_left_alone(tmp_path: Path, resume: str, files: dict[str, str]):
    (tmp_path / "checkpoints").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert "is not empty and does not hold a run; give another run=..." in refusal(tmp_path, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", *files}
    assert all((tmp_path / name).read_text() == text for name, text in files.items())


def test_a_file_is_no_run_folder(tmp_path: Path):
    (tmp_path / "run").touch()
    assert refusal(tmp_path / "run").endswith("is a file; name a folder")
    assert refusal(tmp_path / "run" / "below").startswith("cannot write to run folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    assert "Permission denied; give another run=..." in refusal(tmp_path / "run")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("content", [b"a: [1", b"- 1", b"\xff"])
def test_a_damaged_config_in_the_folder_is_refused_in_one_sentence(tmp_path: Path, content: bytes):
    begin(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    assert refusal(tmp_path).endswith("; give another folder")


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that a folder holds, by path; None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with somebody's notes in it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    Trainer(config(run, **TINY)).train()
    (run / "written" / "ab").mkdir(parents=True)
    (run / "written" / "ab" / "text.json").write_text("{}")
    (run / "notes.txt").write_text("mine")
    return run


BEFORE = ["build_policy", "build_optimizer", "prepare", "latest_checkpoint", "restore_run"]
"""Steps that the folder does not know of."""


STEPS = ["MetricsLog", "RolloutPipeline", *BEFORE]
HOLDS = [*product(["a run", "no files", "nothing"], ["auto", "fresh", "force"])]


def reads_no_checkpoint(step: str, holds: str, resume: str) -> bool:
    """Whether a run in such a folder does not come to a step that reads one."""
    fresh = resume == "fresh"
    return (step == "latest_checkpoint" and fresh) or (step == "restore_run" and (fresh or holds != "a run"))


@pytest.mark.parametrize(
    "case",
    newest(
        {
            (step, *folder): {step, folder}
            for folder, step in product(HOLDS, STEPS)
            if not reads_no_checkpoint(step, *folder)
        }
    ),
    ids=" ".join,
)
def test_a_refusal_at_any_step_leaves_the_folder_as_it_was(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, str]
):
    step, holds, resume = case
    run, resumed = tmp_path / "run", holds == "a run" and resume != "fresh"
    if holds != "nothing":
        shutil.copytree(finished, run) if holds == "a run" else run.mkdir()
    before = tree(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        if step in BEFORE:
            assert tree(tmp_path).keys() - before.keys() <= {"run", "run/.lock"}
        else:
            for name in ("written", "tb"):
                (run / name).mkdir(exist_ok=True)
        raise InputError("refused")

    monkeypatch.setattr(trainer_module, step, refuse)
    with pytest.raises(InputError, match="refused"):
        Trainer(config(run, **TINY, resume=resume))
    if resumed:  # folders that a run goes on to fill are no change
        shutil.rmtree(run / "tb", ignore_errors=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("resume", ["auto", *later("force", "fresh")])
@pytest.mark.parametrize(
    ("damage", "changes", "says"),
    [
        (None, {"model": {**TINY["model"], "lora": {"targets": ["nope"]}}}, "another model.lora|model.lora.targets"),
        (None, {"model": {"path": "./nowhere"}}, "is not a folder"),
        (None, {"seed": 1}, "another seed"),
        ("checkpoints/000001/optimizer.safetensors", {}, "optimizer.safetensors"),
        ("checkpoints/000001/state.json", {}, "state.json"),
        ("metrics.jsonl", {}, "metrics.jsonl"),
        ("config.yaml", {}, "config.yaml|holds no run"),
    ],
)
def test_what_a_user_gets_wrong_leaves_the_folder_as_it_was(
    finished: Path, tmp_path: Path, resume: str, damage: str | None, changes: dict[str, Any], says: str
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    if damage:
        (run / damage).write_text("{]\n")
    accepted = (damage not in (None, "config.yaml") and resume == "fresh") or ("seed" in changes and resume != "auto")
    before = tree(tmp_path)
    if accepted:
        Trainer(config(run, **{**TINY, **changes}, resume=resume))
        return
    with pytest.raises(InputError, match=says) as refused:
        Trainer(config(run, **{**TINY, **changes}, resume=resume))
    assert "\n" not in str(refused.value)
    assert tree(tmp_path) == before


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Whether a process of its own that does this was killed, before the file operation of this number."""
    if (child := os.fork()) == 0:
        left = [number]

        def count(event: str, _: Any) -> None:
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(count)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.slow
def test_a_run_killed_while_it_replaces_another_leaves_the_one_or_the_other(finished: Path, tmp_path: Path):
    new, kept, number = config(tmp_path / "run", **TINY, seed=1, resume="fresh"), set(), 0
    shutil.copytree(finished, tmp_path / "run")
    old = tree(tmp_path / "run")
    while killed_at(number, lambda: prepare_folder(new)):
        for again in range(3):  # what puts that in order may be killed as well
            killed_at(again, lambda: prepare_folder(config(tmp_path / "run", **TINY, resume="force")))
        RunFolder(config(tmp_path / "run", **TINY, resume="force")).release()
        left = {name: content for name, content in tree(tmp_path / "run").items() if name != ".config.yaml.partial"}
        kept.add("old" if left.keys() == old.keys() else "new")
        if left.keys() != old.keys():
            assert left.keys() == {"config.yaml", "notes.txt"}
            shutil.rmtree(tmp_path / "run")
            shutil.copytree(finished, tmp_path / "run")
        else:
            assert {**left, "config.yaml": b""} == {**old, "config.yaml": b""}
        number += 1
    assert number > 10
    assert kept == {"old", "new"}


def test_a_run_killed_before_its_first_config_stood_can_be_started(tmp_path: Path):
    number = 0
    while killed_at(number, lambda: prepare_folder(config(tmp_path / "run"))):
        prepare_folder(config(tmp_path / "run"))
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
        shutil.rmtree(tmp_path / "run")
        number += 1
    assert number > 1


@pytest.mark.parametrize(
    "name", spread([*CONTENTS, "checkpoints/000001", "eval/sudoku/report.json", "students/one/tb"], 4)
)
@pytest.mark.parametrize("resume", ["auto", "fresh"])
def test_links_out_of_the_folder_are_refused_and_not_followed(tmp_path: Path, name: str, resume: str):
    begin(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "elsewhere" / ("file" if path.suffix else ""))
    before = tree(tmp_path)
    assert refusal(tmp_path / "run", resume=resume) == (
        f"{str(path)!r} is a symbolic link, and a run writes inside its folder only; replace the link by "
        "what it points to, or give another run=..."
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("x" * 300, "run is ", ", which no file can be named; give another path"),
        ("a\0b", "run is ", ", which no file can be named; give another path"),
        ("/dev/null/run", "cannot write to run folder ", "; give another run=..."),
        ("/proc/run", "cannot write to run folder ", "; give another run=..."),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_in_one_short_sentence(tmp_path: Path, name: str, start: str, end: str):
    said = refusal(tmp_path / name)
    assert said.startswith(start)
    assert said.endswith(end)
    assert len(said) < 400
    assert not list(tmp_path.iterdir())


def test_what_is_refused_while_two_students_are_met_leaves_their_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin(tmp_path / "run")
    before = tree(tmp_path)
    folder = RunFolder(config(tmp_path / "run", resume="fresh"))

    def meet() -> None:
        with folder.changing():
            begin(tmp_path / "run" / "students" / "one")
            (tmp_path / "run" / "rounds.json").touch()
            raise InputError("the second student")

    with pytest.raises(InputError, match="the second student"):
        meet()
    folder.release()
    assert tree(tmp_path) == before


TESTED = {"trained": {"n": 2, "accuracy": 0.5, "ci95": [0.1, 0.9]}}
FACTS = {"task": "sudoku", "updates": 2, "stopped": None, "best_dev_accuracy": -1.0, "before": TESTED, "time/all": 1.5}


@pytest.mark.parametrize("key", [*FACTS, "after", "best"])
def test_a_report_that_is_not_of_the_run_as_it_is_now_is_none(tmp_path: Path, key: str) -> None:
    report = {**FACTS, **TESTED["trained"], "after": TESTED, "best": TESTED, "settings": {}}
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert read_report(tmp_path, FACTS) == report
    for value in ("x", 7, 10**30, True, [], {}, {"trained": {"n": 2}}, {"other": TESTED["trained"]}, {"trained": None}):
        file.write_text(json.dumps({**report, key: value}))
        assert read_report(tmp_path, FACTS) is None, value
    file.write_text(json.dumps({name: value for name, value in report.items() if name != key}))
    assert read_report(tmp_path, FACTS) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_a_damaged_report_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    assert read_report(tmp_path, FACTS) is None


def test_a_run_killed_before_its_second_report_does_not_show_the_first(tmp_path: Path) -> None:
    first = build_config({**TINY, "run": str(tmp_path / "run")})
    Trainer(first).train()
    stale = (tmp_path / "run" / "report.json").read_bytes()
    longer = replace(first, updates=2, resume="force")
    Trainer(longer).train()
    (tmp_path / "run" / "report.json").write_bytes(stale)
    assert Trainer(longer).train()["updates"] == 2


def test_what_a_killed_run_did_not_come_to_remove_is_removed_by_the_next(tmp_path: Path) -> None:
    settings = build_config({**TINY, "run": str(tmp_path / "run"), "checkpoint": {"keep": 1}})
    Trainer(settings).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("000000", ".000000.partial", ".000001.old"):
        shutil.copytree(checkpoints / "000001", checkpoints / name)
    Trainer(settings).train()
    assert [path.name for path in checkpoints.iterdir()] == ["000001"]
