"""The run folder: one configuration each, and nothing is lost that was not given up."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from dllm_sd.config import build_config, to_tree
from dllm_sd.errors import InputError
from dllm_sd.training.folder import CONTENTS, prepare_folder, read_tree


def config(run: Path, **changes: Any) -> Any:
    tree = {"run": str(run), "task": "sudoku", "decode": {"length": 16, "block_length": 4}, "method": "d_opsd"}
    return build_config({**tree, **changes})


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
    assert read_tree(tmp_path / "a" / "b") == to_tree(config(tmp_path / "a" / "b"))


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
    assert read_tree(tmp_path) == to_tree(config(tmp_path, **changes))


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
        ({"eval": {"schedules": {"a": {"block_length": 8}}}}, "eval.schedules.a (None, not {'block_length': 8})"),
    ],
)
def test_another_config_is_refused_by_the_first_key_that_differs(tmp_path: Path, changes: dict[str, Any], key: str):
    begin(tmp_path)
    refused = refusal(tmp_path, **changes)
    assert refused.startswith(f"run folder {str(tmp_path)!r} holds a run with another {key}")
    assert refused.endswith("resume=force to continue it all the same, or resume=fresh to discard it")
    assert read_tree(tmp_path) == to_tree(config(tmp_path))


def test_a_key_that_only_the_former_run_had_is_a_difference(tmp_path: Path):
    begin(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**to_tree(config(tmp_path)), "extra": 1}))
    assert "another extra (1, not None)" in refusal(tmp_path)


def test_a_run_that_never_began_may_be_corrected(tmp_path: Path):
    prepare_folder(config(tmp_path))
    prepare_folder(config(tmp_path, seed=1))
    assert read_tree(tmp_path)["seed"] == 1


def test_force_goes_on_with_the_new_config(tmp_path: Path):
    begin(tmp_path)
    prepare_folder(config(tmp_path, seed=1, resume="force"))
    assert (tmp_path / "metrics.jsonl").exists()
    assert read_tree(tmp_path)["seed"] == 1
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
    assert read_tree(tmp_path)["seed"] == 1


@pytest.mark.parametrize("resume", ["auto", "force", "fresh"])
@pytest.mark.parametrize("files", [{"notes.txt": "mine"}, {"config.yaml": "site: mine", "report.json": "{}"}])
def test_files_of_others_are_left_alone(tmp_path: Path, resume: str, files: dict[str, str]):
    (tmp_path / "checkpoints").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert "is not empty and holds no run; give another run=..." in refusal(tmp_path, resume=resume)
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
