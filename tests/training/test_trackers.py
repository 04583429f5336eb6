"""What a run sends to trackers, and what happens if one of them fails."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import plugin_data_pb2

from dllm_sd.config import Config, build_config, to_tree
from dllm_sd.errors import InputError
from dllm_sd.training import trackers
from dllm_sd.training.tracker_kinds import TRACKERS, TrackedRun, Tracker
from dllm_sd.training.trackers import Trackers, check_trackers, hyperparameters, run_name


def config(run: Path, *names: str, **changes: Any) -> Config:
    return build_config({"run": str(run), "task": "sudoku", "log": {"trackers": list(names)}, **changes})


class Spy(Tracker):
    """Keeps what it is given; fails while ``broken`` is set."""

    package = "json"
    opened: ClassVar[list["Spy"]] = []
    broken = False

    def open(self, run: TrackedRun) -> Any:
        self.check()
        self.got: list[Any] = []
        self.opened.append(self)
        return self

    def check(self) -> None:
        if type(self).broken:
            raise ConnectionError("no route to https://user:secret@host/path")

    def settings(self, values: Any) -> None:
        self.got.append(("settings", values))

    def numbers(self, values: Any, meanings: Any, update: int) -> None:
        self.check()
        assert values.keys() == meanings.keys()
        self.got.append((update, values))

    def close(self) -> None:
        self.got.append("closed")


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> type[Spy]:
    monkeypatch.setattr(Spy, "opened", [])
    monkeypatch.setattr(Spy, "broken", False)
    monkeypatch.setitem(TRACKERS, "wandb", Spy)
    return Spy


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(InputError) as refused:
        check_trackers(config(tmp_path, name).log)
    assert str(refused.value) == (
        f"log.trackers names {name}, which is not installed; run pip install 'dllm-sd[{name}]', or leave it out"
    )


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ({"tensorboard": False, "trackers": ["wandb"]}, "log.tensorboard and log.trackers are both set"),
        ({"trackers": ["tensorbord"]}, "log.trackers.0 is 'tensorbord'; choose from tensorboard, wandb"),
        ({"trackers": ["wandb", "wandb"]}, "log.trackers names wandb twice; name it once"),
        ({"project": ""}, "log.project is empty"),
    ],
)
def test_wrong_settings_are_refused(log: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        build_config({"task": "sudoku", "log": log})


@pytest.mark.parametrize(("value", "trackers"), [(True, ("tensorboard",)), (False, ())])
def test_the_key_of_before_still_switches_tensorboard(value: bool, trackers: tuple[str, ...]):
    log = build_config({"task": "sudoku", "log": {"tensorboard": value}}).log
    assert (log.trackers, log.tensorboard) == (trackers, None)
    assert build_config(to_tree(build_config({"task": "sudoku", "log": {"tensorboard": value}}))).log == log


def test_tensorboard_has_the_runs_name_groups_meanings_hyperparameters_samples_and_pictures(tmp_path: Path):
    run = tmp_path / "mine"
    run.mkdir()
    for update, earlier in ((-1, []), (1, [{"update": 1, "loss": 0.5}])):  # the second goes on, in a renamed folder
        log = Trackers(config(run, "tensorboard"), update, earlier)
        log.results("before", {"trained": {"accuracy": 0.25}}, 0)
        for step in range(update + 1, update + 4):
            values = {"loss": step / 2, "sites": 3, "rollouts/rejected": 0, "note": "text", "empty": None}
            log.numbers({"update": step, **values})
        log.sample({"update": 1, "problem": "p", "generation": "12"}, 0)
        log.pictures({"rollouts/trajectory": Image.new("RGB", (8, 8))}, 1)
        log.close()
        run = run.rename(tmp_path / "yours")
    events = EventMultiplexer().AddRunsFromDirectory(str(run / "tb"))
    events.Reload()
    assert list(events.Runs()) == ["mine"]
    assert sorted(events.Runs()["mine"]["scalars"]) == ["test/before/accuracy", "train/loss", "train/sites"]
    assert [(event.step, event.value) for event in events.Scalars("mine", "train/loss")][-3:] == [
        *((2, 1.0), (3, 1.5), (4, 2.0))
    ]
    assert events.SummaryMetadata("mine", "train/loss").summary_description == (
        "The loss of the update, over all processes; null if the update was skipped."
    )
    assert events.Runs()["mine"]["images"] == ["rollouts/trajectory"]
    assert "samples/0/text_summary" in events.Runs()["mine"]["tensors"]
    content = events.SummaryMetadata("mine", "_hparams_/session_start_info").plugin_data.content
    data: Any = plugin_data_pb2  # its classes are made when it is imported
    start = data.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["task.name"].string_value == "sudoku"
    assert start.hparams["optim.lr"].number_value == 5e-6
    assert not (run / "trackers").exists()


def test_hyperparameters_are_plain_values_without_what_may_change(tmp_path: Path):
    task = {"name": "sudoku", "prompt": "{puzzle}" + "x" * 999}
    values = hyperparameters(config(tmp_path, optim={"betas": [0.5, 0.75]}, task=task))
    assert values["optim.betas"] == "0.5, 0.75"
    assert len(str(values["task.prompt"])) == 200
    assert not [name for name in values if name.split(".")[0] in ("run", "log", "resume", "checkpoint", "cache")]
    assert all(value is None or type(value) in (bool, int, float, str) for value in values.values())


def test_a_run_is_called_as_its_folder_and_a_peer_with_the_name_of_both():
    assert run_name(Path("runs/a")) == "a"
    assert run_name(Path("runs/pair/students/first")) == "pair-first"
    assert run_name(Path(".")) == Path.cwd().name


def test_a_run_that_goes_on_is_the_same_run_in_the_tracker(tmp_path: Path, spy: type[Spy]):
    for update in (-1, 3, 5):
        Trackers(config(tmp_path, "wandb"), update).close()
    first, *others = spy.opened
    assert first.run.new
    assert [(other.run.id, other.run.name, other.run.new) for other in others] == [
        (first.run.id, tmp_path.name, False)
    ] * 2
    assert [line.got for line in spy.opened] == [[first.got[0], "closed"], ["closed"], ["closed"]]
    assert first.got[0][0] == "settings"
    (tmp_path / "trackers" / "runs.json").write_text("{}")
    with pytest.raises(InputError, match=r"runs.json .* remove it to begin new runs in the trackers"):
        Trackers(config(tmp_path, "wandb"), 5)


def test_a_tracker_that_fails_is_told_once_tried_ever_less_and_counted(
    tmp_path: Path, spy: type[Spy], capsys: pytest.CaptureFixture[str]
):
    log = Trackers(config(tmp_path, "wandb"), -1)
    for update in range(20):
        spy.broken = 3 <= update < 12
        log.numbers({"update": update, "loss": 1.0})
    log.close()
    got = [update for update, _ in spy.opened[0].got[1:-1]]
    assert got == [0, 1, 2, *range(13, 20)]  # it fails at 3, 5 and 8, and is left alone for 1, 2 and 4 values
    assert capsys.readouterr().err == (
        "dllm-sd: the tracker wandb failed (ConnectionError: no route to https://host/path); the run continues, tries "
        "it again from time to time, and counts what it misses\n"
    )
    assert log.warnings == ["the tracker wandb missed 10 of 22 writes; metrics.jsonl has all values"]


def test_a_tracker_that_cannot_be_opened_refuses_a_new_run_and_is_left_out_of_one_that_goes_on(
    tmp_path: Path, spy: type[Spy], capsys: pytest.CaptureFixture[str]
):
    spy.broken = True
    said = "the tracker wandb cannot be opened (ConnectionError: no route to https://host/path)"
    with pytest.raises(InputError) as refused:
        Trackers(config(tmp_path, "wandb"), -1)
    assert str(refused.value) == f"{said}; log in, choose its offline mode, or take it out of log.trackers"
    log = Trackers(config(tmp_path, "wandb"), 3)
    log.numbers({"update": 4, "loss": 1.0})
    assert capsys.readouterr().err == (
        f"dllm-sd: {said}; the run continues without it, and metrics.jsonl has all values\n"
    )
    assert log.warnings == [said]
