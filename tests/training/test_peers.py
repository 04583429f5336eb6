"""Two students that teach each other: what the gate decides, who comments on whom, and that a stop changes nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dllm_sd.config import Config, build_config
from dllm_sd.errors import InputError
from dllm_sd.policies.weights import Peer, Teacher
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import Feedback
from dllm_sd.training import peers as peers_module
from dllm_sd.training.peers import by_domain, lags, student_config, train_peers
from dllm_sd.training.trainer import Trainer

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
HINT = {"template": "{question}({hint})", "solution": "{hint}", "comment": "{hint}", "prompt": "{response}{question}"}
WRITING = {"writer": "peer", "sampling": {"length": 6, "temperature": 1.0}, "tolerance": 1.0}


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """A run of two rounds with two updates of each student, over sums of two domains that a random model answers."""
    rows = [
        {"question": f"{i}+{i}=", "answer": str(i % 3), "domain": "small" if i % 2 else "large"} for i in range(1, 41)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(run: str = "run", **changes: Any) -> Config:
        model = {"random_init": True, "as": "autoregressive", "tokenizer": "tiny", "dtype": "float64"}
        shape = {**SHAPE, "initializer_range": 0.3}
        method = {
            "name": "op_co_distill",
            "rollout": {"problems": 2, "attempts": 2},
            "contexts": [{"name": "feedback", **HINT, "anchored": False, "writing": WRITING}],
            "support": {"k": 8},
        }
        students = [{"name": "one", "domain": "small"}, {"name": "two", "domain": "large"}]
        tree = {
            "run": str(tmp_path / run),
            "seed": 3,
            "updates": 4,
            "model": {**model, "shape": shape, "lora": {"rank": 2, "alpha": 8}},
            "task": {"name": "jsonl", "data": str(data), "size_dev": 8},
            "decode": {"length": 6, "batch_size": 8},
            "method": method,
            "peers": {"rounds": 2, "problems": 4, "attempts": 2, "students": students, "tolerance": 9.0},
            "optim": {"lr": 0.02, "weight_decay": 0.0},
            "eval": {"every": 0},
            "checkpoint": {"every": 1},
            "log": {"progress": False, "tensorboard": False},
        }
        return build_config({**tree, **changes})

    return build


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(bool((value == second[name]).all()) for name, value in first.items())


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith(("time/", "writers/c"))} for line in lines]


def test_a_lag_is_the_relative_distance_to_the_better_student_summed_over_domains():
    assert lags({"a": {"x": 100, "y": 70}, "b": {"x": 70, "y": 100}}) == pytest.approx({"a": 0.3, "b": 0.3})
    # The initial scores of the paper's pair Phys-Chem: only the student that is better at chemistry may tutor.
    found = lags({"phys": {"p": 51.6, "c": 37.3}, "chem": {"p": 48.6, "c": 56.3}})
    assert found == pytest.approx({"phys": (56.3 - 37.3) / 56.3, "chem": (51.6 - 48.6) / 51.6})
    assert [value <= 0.2 for value in found.values()] == [False, True]
    assert lags({"a": {"x": 0.0}, "b": {"x": 0.0}}) == {"a": 0, "b": 0}


def test_the_validation_problems_are_as_many_of_each_domain():
    problems = [Problem(str(i), {"domain": "a" if i < 6 else "b"}) for i in range(9)]
    found = by_domain(problems, "domain", 5)
    assert {name: [one.id for one in some] for name, some in found.items()} == {"a": ["0", "1"], "b": ["6", "7"]}


def test_each_student_learns_while_the_other_as_it_was_comments(config, monkeypatch):
    tutors: list[tuple[str, str | None]] = []
    start = Trainer.__init__

    def noting(self: Trainer, settings: Config) -> None:
        start(self, settings)
        hint = settings.method.contexts[0]
        assert isinstance(hint, Feedback)
        path = hint.writing.writer.path if hint.writing and isinstance(hint.writing.writer, Peer) else None
        tutors.append((Path(settings.run).name, path and str(Path(path).relative_to(Path(settings.run).parents[1]))))
        for weights_of, model in self.models.items():
            if isinstance(weights_of, Peer):
                kept = weights(Path(str(weights_of.path)))
                assert isinstance(model, Teacher)
                assert all(bool((model.copy[name] == value).all()) for name, value in kept.items())

    monkeypatch.setattr(Trainer, "__init__", noting)
    settings = config()
    report = train_peers(settings)
    assert tutors == [
        *(("one", None), ("two", None)),  # scored
        *(("one", "rounds/0/two"), ("two", "rounds/0/one")),
        *(("one", None), ("two", None)),
        *(("one", "rounds/1/two"), ("two", "rounds/1/one")),
    ]
    run = Path(settings.run)
    assert [entry["round"] for entry in report["rounds"]] == [0, 1]
    assert report["rounds"] == json.loads((run / "rounds.json").read_text())
    assert all(entry["scores"]["one"].keys() == {"large", "small"} for entry in report["rounds"])
    for name in ("one", "two"):
        assert [line["update"] for line in metrics(run / "students" / name)] == [0, 1, 2, 3, 4]
        assert sum(line.get("writers/written", 0) for line in metrics(run / "students" / name)) == 16
        assert not same(run / "rounds" / "0" / name, run / "rounds" / "1" / name)


def test_a_tutor_frozen_by_phase_is_as_it_was_when_the_phase_began(config):
    settings = config()
    settings = replace(settings, peers=replace(settings.peers, freeze="phase"))
    assert settings.peers is not None
    train_peers(settings)
    second = student_config(settings, settings.peers.students[1], Peer("x"))
    written = (Path(second.run) / "config.yaml").read_text()
    assert f"path: {Path(settings.run) / 'rounds' / '2' / 'one'}" in written


def test_a_student_whose_tutor_knows_too_little_learns_as_without_a_peer(config, monkeypatch):
    monkeypatch.setattr(peers_module, "lags", lambda scores: {"one": 0.0, "two": 9.1})
    settings = config()
    assert settings.peers is not None
    report = train_peers(settings)
    assert [entry["tutors"] for entry in report["rounds"]] == [{"one": True, "two": False}] * 2
    alone = replace(student_config(settings, settings.peers.students[0], None), run=f"{settings.run}_alone")
    Trainer(alone).train()
    students = Path(settings.run) / "students"
    assert metrics(Path(alone.run)) == metrics(students / "one")
    assert same(Path(alone.run) / "checkpoints" / "000004", students / "one" / "checkpoints" / "000004")
    assert not any("writers/written" in line for line in metrics(students / "one"))
    assert any("writers/written" in line for line in metrics(students / "two"))


def test_a_run_stopped_in_the_middle_of_a_phase_ends_as_if_nothing_had_happened(config, monkeypatch):
    whole, broken = config("whole"), config("broken")
    train_peers(whole)
    update = Trainer._update

    def failing(self: Trainer, number: int) -> dict[str, Any]:
        if Path(self.config.run).name == "two" and number == 4:
            raise KeyboardInterrupt
        return update(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", failing)
        with pytest.raises(KeyboardInterrupt):
            train_peers(broken)
    train_peers(broken)
    one, other = Path(whole.run), Path(broken.run)
    assert (one / "rounds.json").read_text() == (other / "rounds.json").read_text()
    for name in ("one", "two"):
        assert metrics(one / "students" / name) == metrics(other / "students" / name)
        last = Path("students", name, "checkpoints", "000004")
        assert same(one / last, other / last)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "sdpo"}, "set method to op_co_distill"),
        ({"updates": 3}, "a multiple of peers.rounds"),
        ({"field": "topic"}, "has no field 'topic'"),
        ({"students": [{"name": "one", "domain": "a"}]}, "two students"),
        ({"paths": True}, "two adapters need one base"),
    ],
)
def test_students_that_cannot_teach_each_other_are_refused_in_one_sentence(config, changes, says):
    def build() -> None:
        settings = config(**{key: value for key, value in changes.items() if key in ("method", "updates")})
        peers = settings.peers
        if "field" in changes:
            peers = replace(peers, field="topic")
        if "students" in changes:
            peers = replace(peers, students=peers.students[:1])
        if "paths" in changes:
            first, second = peers.students
            peers = replace(peers, students=(replace(first, path="elsewhere"), second))
        peers_module.check_peers(replace(settings, peers=peers))

    with pytest.raises(InputError, match=says) as refusal:
        build()
    assert "\n" not in str(refusal.value)
