"""The best weights of a run are read when it goes on, and not only when they are tested at its end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.config import Config, build_config
from dllm_sd.errors import InputError
from dllm_sd.training.trainer import Trainer
from tests.tiers import later
from tests.training.test_folder import TINY


def config(run: Path, **changes: Any) -> Config:
    settings = {"updates": 3, "eval": {"every": 1, "problems": 2, "final_problems": 2}, "checkpoint": {"every": 1}}
    return build_config({**TINY, **settings, "run": str(run), **changes})


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which two updates are done, the second of them the best."""
    run = tmp_path_factory.mktemp("best") / "run"
    Trainer(config(run)).train(2)
    shutil.copytree(run / "checkpoints" / "best", run.parent / "former")
    state = json.loads((run / "checkpoints" / "000002" / "state.json").read_text())
    assert state["best_update"] == 2
    Trainer(config(run.parent / "other")).train(1)
    return run


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def replaced(file: Path, best: Path) -> None:
    shutil.rmtree(best)
    shutil.copytree(file, best)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "flipped weights": ("model.safetensors", lambda best: flipped(best / "model.safetensors")),
    "no weights": ("model.safetensors", lambda best: (best / "model.safetensors").unlink()),
    "empty weights": ("model.safetensors", lambda best: (best / "model.safetensors").write_bytes(b"")),
    "flipped state": ("state.json", lambda best: flipped(best / "state.json")),
    "no state": ("state.json", lambda best: (best / "state.json").unlink()),
    "nothing": ("state.json", shutil.rmtree),
    "earlier": ("state.json", lambda best: replaced(best.parents[2] / "other/checkpoints/best", best)),
}


def stamps(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


FIRST = ("flipped weights",)


@pytest.mark.parametrize("kind", [*FIRST, *later(*(kind for kind in DAMAGE if kind not in FIRST))])
def test_damaged_best_weights_are_refused_when_a_run_goes_on_and_force_chooses_anew(
    begun: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(begun.parent, tmp_path, dirs_exist_ok=True)
    run, (name, damage) = tmp_path / "run", DAMAGE[kind]
    damage(run / "checkpoints" / "best")
    before = stamps(run)
    with pytest.raises(InputError) as refused:
        Trainer(config(run))
    said = str(refused.value)
    assert said.startswith(f"checkpoint {run / 'checkpoints' / 'best' / name} is missing or damaged (")
    assert "; put back a copy of it, or train with resume=force to choose the best weights anew" in said
    assert "\n" not in said
    assert stamps(run) == before
    report = Trainer(config(run, resume="force")).train()
    assert "; the best weights are chosen again" not in said
    assert capsys.readouterr().err.count("is missing or damaged") == 1
    assert report["best_update"] == 3
    assert report["best"].keys() == {"trained"}
    assert Trainer(config(run, resume="force")).train()["best_update"] == 3


def test_a_run_that_chose_none_needs_none(tmp_path: Path):
    settings = {"eval": {"every": 0, "final_problems": 0}}
    Trainer(config(tmp_path / "run", **settings)).train(1)
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()
    assert Trainer(config(tmp_path / "run", **settings)).train()["best_update"] == 0
