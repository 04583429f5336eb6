"""Trackers as they are: a run without a network, with the real package, each in a process of its own."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from dllm_sd.files.plain_yaml import write_yaml
from dllm_sd.files.typed_json import own_json
from dllm_sd.training.tracker_kinds import TRACKERS

SECRET = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = {"WANDB_MODE": "offline", "COMET_START_ONLINE": "0", "SWANLAB_MODE": "offline"}
SECRETS = ("WANDB_API_KEY", "COMET_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")
TREE = {
    "model": {
        "random_init": True,
        "tokenizer": "tiny",
        "shape": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    },
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}", "size_train": 64},
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 4},
    "method": {"name": "d_opsd", "gate": "all", "rollout": {"problems": 2, "attempts": 1}},
    "eval": {"every": 1, "problems": 2, "final_problems": 2},
    "checkpoint": {"every": 1},
}


def train(folder: Path, home: Path, name: str, until: int) -> str:
    """Train in a process of its own; return what it printed on stderr."""
    code = "import sys; from dllm_sd.config import load_config; from dllm_sd.training.trainer import Trainer; "
    code += "Trainer(load_config('c.yaml', sys.argv[2:])).train(int(sys.argv[1]))"
    log = f"log={{trackers: [{name}], progress: false, samples_every: 1}}"
    environment = {
        **os.environ,
        **OFFLINE,
        **dict.fromkeys(SECRETS, SECRET),
        "HOME": str(home),
        "PYTHONPATH": os.getcwd(),
    }
    command = [sys.executable, "-c", code, str(until), "run=run", "updates=3", log]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def contents(folder: Path) -> Iterator[bytes]:
    """What files hold, also those in archives."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    yield from map(archive.read, archive.namelist())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_without_a_network_is_written_by_the_tracker_into_the_run_folder_and_goes_on(tmp_path: Path, name: str):
    if find_spec(TRACKERS[name].package) is None:
        pytest.skip(f"{name} is not installed; pip install 'dllm-sd[{name}]'")
    folder, home = tmp_path / "work", tmp_path / "home"
    home.mkdir()
    folder.mkdir()
    (folder / "c.yaml").write_text(write_yaml(TREE))
    trackers = folder / "run" / "trackers"
    ids = []
    for until in (1, 3):
        said = train(folder, home, name, until)
        assert "the tracker" not in said
        ids += [] if name == "tensorboard" else [own_json((trackers / "runs.json").read_bytes())["ids"]]
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "run"]
    assert all(one == ids[0] and list(one) == [name] for one in ids)
    place = folder / "run" / "tb" if name == "tensorboard" else trackers
    written = b"".join((*contents(place), *(str(path).encode() for path in place.rglob("*"))))
    assert b"train/loss" in written
    everything = b"".join((written, *contents(folder), *contents(home)))
    assert SECRET.encode() not in everything


@pytest.mark.slow
def test_mlflow_has_every_value_once_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    (tmp_path / "c.yaml").write_text(write_yaml(TREE))
    for until in (1, 3):
        train(tmp_path, tmp_path, "mlflow", until)
    client = mlflow.MlflowClient((tmp_path / "run" / "trackers" / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'dllm-sd'")
    (run,) = client.search_runs([experiment.experiment_id])
    lines = [own_json(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    logged = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    assert logged == {line["update"]: line["loss"] for line in lines if line.get("loss") is not None}
    assert run.info.run_name == "run"
    assert run.data.params["optim.lr"] == "5e-06"
    assert {"test/before/accuracy", "test/best/accuracy"} <= run.data.metrics.keys()
