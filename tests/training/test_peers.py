"""Two students that teach each other: what the gate decides, who comments on whom, and that a stop changes nothing."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dllm_sd.config import Config, build_config
from dllm_sd.errors import InputError, shown
from dllm_sd.evaluation.evaluate import evaluate_run
from dllm_sd.policies.loading import build_policy
from dllm_sd.policies.weights import PeerWeights, TeacherModel, trained
from dllm_sd.pretrained.blueprint import model_folder
from dllm_sd.pretrained.model import Model
from dllm_sd.settings import Peers, PeerStudent
from dllm_sd.tasks.jsonl import Jsonl
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import Feedback, Sibling
from dllm_sd.training import peers as peers_module
from dllm_sd.training.checkpoint import load_weights
from dllm_sd.training.log_files import LOG_FILES, STARTS
from dllm_sd.training.peers import by_domain, lags, may_tutor, same_start, student_config, train_peers
from dllm_sd.training.trainer import Trainer
from tests.tiers import later
from tools.attacks.contents import contents, differences

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
HINT = {"template": "{question}({hint})", "solution": "{hint}", "comment": "{hint}", "prompt": "{response}{question}"}
WRITING = {"writer": "peer", "sampling": {"length": 6, "temperature": 1.0}, "tolerance": 1.0}


@pytest.fixture(autouse=True)
def lag_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models solve nothing, and comment here all the same."""
    monkeypatch.setattr(peers_module, "may_tutor", lambda own, lag, tolerance: lag <= tolerance)


def builder(folder: Path) -> Callable[..., Config]:
    """Of runs of two rounds with two updates of each student, over sums of two domains that a random model answers."""
    rows = [
        {"question": f"{i}+{i}=", "answer": str(i % 3), "domain": "small" if i % 2 else "large"} for i in range(1, 41)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(run: str = "run", rounds: int = 2, **changes: Any) -> Config:
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
            "run": str(folder / run),
            "seed": 3,
            "updates": 4,
            "model": {**model, "shape": shape, "lora": {"rank": 2, "alpha": 8}},
            "task": {"name": "jsonl", "data": str(data), "size_dev": 8},
            "decode": {"length": 6, "batch_size": 8},
            "method": method,
            "peers": {"rounds": rounds, "problems": 4, "attempts": 2, "students": students, "tolerance": 9.0},
            "optim": {"lr": 0.02, "weight_decay": 0.0},
            "eval": {"every": 0, "final_problems": 0},
            "checkpoint": {"every": 1},
            "log": {"progress": False, "trackers": []},
        }
        return build_config({**tree, **changes})

    return build


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    return builder(tmp_path)


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


def test_who_has_solved_nothing_comments_on_nobody_and_equals_comment_on_each_other():
    for scores in ({"a": {"x": 0.0, "y": 0.0}, "b": {"x": 0.0, "y": 0.0}}, {"a": {"x": 0.0}, "b": {"x": 0.4}}):
        found = {name: may_tutor(own, lags(scores)[name], 9.0) for name, own in scores.items()}
        assert found == {name: any(own.values()) for name, own in scores.items()}
    assert all(may_tutor({"x": 0.5, "y": 0.1}, lag, 0.0) for lag in lags({key: {"x": 0.5} for key in "ab"}).values())
    assert [may_tutor({"x": 0.5}, lag, 0.2) for lag in (0.2, 0.200001)] == [True, False]
    assert not may_tutor({"x": 0.5}, 0.0, None)


def test_students_that_begin_alike_are_told_so():
    def pair(**second: Any) -> tuple[PeerStudent, PeerStudent]:
        return PeerStudent("one", "x", start="a", path="p"), PeerStudent(
            "two", "y", **{"start": "a", "path": "p", **second}
        )

    sentence = same_start(pair())
    assert sentence is not None
    assert "one and two begin with the same weights" in sentence
    assert "peers.students.N.start" in sentence
    assert same_start(pair(start="b")) is same_start(pair(path="q")) is None


def test_the_validation_problems_are_as_many_of_each_domain():
    problems = [Problem(str(i), {"domain": "a" if i < 6 else "b"}) for i in range(9)]
    found = by_domain(problems, "domain", 5)
    assert {name: [one.id for one in some] for name, some in found.items()} == {"a": ["0", "1"], "b": ["6", "7"]}


def tutors_noted(patch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Who is trained or scored, and the folder of whose weights comment; these are what stands there."""
    tutors: list[tuple[str, str | None]] = []
    start = Trainer.__init__

    def noting(self: Trainer, settings: Config) -> None:
        start(self, settings)
        hint = settings.method.contexts[0]
        assert isinstance(hint, Feedback)
        path = hint.writing.writer.path if hint.writing and isinstance(hint.writing.writer, PeerWeights) else None
        tutors.append((Path(settings.run).name, path and str(Path(path).relative_to(Path(settings.run).parents[1]))))
        for weights_of, model in self.models.items():
            if isinstance(weights_of, PeerWeights):
                kept = weights(Path(str(weights_of.path)))
                assert isinstance(model, TeacherModel)
                assert all(bool((model.copy[name] == value).all()) for name, value in kept.items())

    patch.setattr(Trainer, "__init__", noting)
    return tutors


def test_each_student_learns_while_the_other_as_it_was_comments(learnt):
    report, run = learnt.report, Path(learnt.config().run)
    assert learnt.tutors == [
        *(("one", None), ("two", None)),  # scored
        *(("one", "rounds/0/two"), ("two", "rounds/0/one")),
        *(("one", None), ("two", None)),
        *(("one", "rounds/1/two"), ("two", "rounds/1/one")),
    ]
    assert [entry["round"] for entry in report["rounds"]] == [0, 1]
    assert report["rounds"] == json.loads((run / "rounds.json").read_text())
    assert all(entry["scores"]["one"].keys() == {"large", "small"} for entry in report["rounds"])
    for name in ("one", "two"):
        assert [line["update"] for line in metrics(run / "students" / name)] == [0, 1, 2, 3, 4]
        assert sum(line.get("writers/written", 0) for line in metrics(run / "students" / name)) == 16
        assert not same(run / "rounds" / "0" / name, run / "rounds" / "1" / name)


@pytest.mark.slow
def test_a_tutor_frozen_by_phase_is_as_it_was_when_the_phase_began(config):
    settings = config()
    settings = replace(settings, peers=replace(settings.peers, freeze="phase"))
    assert settings.peers is not None
    train_peers(settings)
    second = student_config(settings, settings.peers.students[1], PeerWeights("x"))
    written = (Path(second.run) / "config.yaml").read_text()
    assert f"path: {Path(settings.run) / 'rounds' / '2' / 'one'}" in written


@pytest.mark.parametrize("rounds", [1, *later(2)])
def test_a_student_whose_tutor_knows_too_little_learns_as_without_a_peer(config, monkeypatch, rounds):
    monkeypatch.setattr(peers_module, "lags", lambda scores: {"one": 0.0, "two": 9.1})
    settings = config(updates=rounds, rounds=rounds)
    assert settings.peers is not None
    report = train_peers(settings)
    assert [entry["tutors"] for entry in report["rounds"]] == [{"one": True, "two": False}] * rounds
    alone = replace(student_config(settings, settings.peers.students[0], None), run=f"{settings.run}_alone")
    Trainer(alone).train()
    students = Path(settings.run) / "students"
    assert metrics(Path(alone.run)) == metrics(students / "one")
    last = Path("checkpoints", f"{rounds:06d}")
    assert same(Path(alone.run) / last, students / "one" / last)
    assert not any("writers/written" in line for line in metrics(students / "one"))
    assert any("writers/written" in line for line in metrics(students / "two"))


def assert_same_run(one: Path, other: Path) -> None:
    """What is said of the rounds, and both students' metrics and last weights."""
    assert (one / "rounds.json").read_text() == (other / "rounds.json").read_text()
    for name in ("one", "two"):
        assert metrics(one / "students" / name) == metrics(other / "students" / name)
        last = Path("students", name, "checkpoints", "000004")
        assert same(one / last, other / last)


def test_a_run_that_went_away_in_the_middle_of_a_phase_ends_as_if_nothing_had_happened(learnt, moments):
    config = learnt.config()
    run, whole = Path(config.run), learnt.begun.with_name("whole")
    run.rename(whole)
    try:
        learnt.begun.rename(run)  # at the place of which its files speak
        train_peers(config)
        assert [*moments] == [("two", 4)]
        assert_same_run(whole, run)
    finally:
        shutil.rmtree(run)
        whole.rename(run)


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_of_a_phase_ends_as_if_nothing_had_happened(learnt, moments, monkeypatch):
    whole, broken = learnt.config(), learnt.config("broken")
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
    assert_same_run(Path(whole.run), Path(broken.run))


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


# The gate.


@pytest.mark.parametrize(
    ("scores", "lag", "tutors"),
    [
        ([[65.1, 48.1], [56.0, 51.6]], [0.067829, 0.139785], [True, True]),  # Mat-Phys of the paper's Table 1
        ([[56.3, 56.1], [37.6, 65.1]], [0.138249, 0.332149], [True, False]),  # Chem-Mat
        ([[51.6, 37.3], [48.6, 56.3]], [0.337478, 0.058140], [False, True]),  # Phys-Chem
        ([[100, 70], [70, 100]], [0.3, 0.3], [False, False]),  # the example of Sec. 3.2
        ([[0.75, 0.5], [0.6, 0.5]], [0, 0.2], [True, True]),  # just the tolerance; 0.15 / 0.75 is more in floats
        ([[0, 1], [0, 0.9]], [0, 0.1], [True, True]),  # a domain that nobody knows says nothing
    ],
)
def test_only_who_is_at_most_the_tolerance_behind_may_tutor(scores, lag, tutors):
    found = lags({name: {"a": own[0], "b": own[1]} for name, own in zip(("one", "two"), scores, strict=True)})
    assert [*found.values()] == pytest.approx(lag, abs=1e-6)
    pair = (PeerStudent(name="one", domain="a"), PeerStudent(name="two", domain="b"))
    tolerance = Peers(students=pair).tolerance
    assert [may_tutor({"a": 1.0}, value, tolerance) for value in found.values()] == tutors


def test_a_domain_with_few_problems_bounds_the_share_of_all():
    problems = [Problem(str(i), {"domain": "c" if i == 8 else "ab"[i % 2]}) for i in range(9)]
    assert {name: [one.id for one in some] for name, some in by_domain(problems, "domain", 60).items()} == {
        "a": ["0"],
        "b": ["1"],
        "c": ["8"],
    }
    assert [len(some) for some in by_domain(problems[:8], "domain", 60).values()] == [4, 4]
    assert [len(some) for some in by_domain(problems[:8], "domain", 1).values()] == [1, 1]


# Whose weights tutor.


@dataclass
class Moment:
    """A student before one of its updates."""

    live: dict[str, torch.Tensor]
    tutor: dict[str, torch.Tensor]


Moments = dict[tuple[str, int], Moment]


def copied(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Moments:
    return noted(monkeypatch)


def noted(patch: pytest.MonkeyPatch) -> Moments:
    """Both students before each of their updates; one rollout in two is right, whatever it says."""
    found: Moments = {}
    update = Trainer._update

    def noting(self: Trainer, number: int) -> dict[str, Any]:
        tutors = [model.copy for part, model in self.models.items() if isinstance(part, PeerWeights)]
        found[self.run.name, number] = Moment(copied(trained(self.policy)), copied(tutors[0] if tutors else {}))
        return update(self, number)

    def parity(self: Jsonl, problem: Problem, completion: str) -> Grade:
        correct = sum(map(ord, completion)) % 2 == 0
        return Grade(correct, float(correct), completion)

    patch.setattr(Trainer, "_update", noting)
    patch.setattr(Jsonl, "grade", parity)
    return found


@dataclass
class Learnt:
    """A run, its report, and whether the students' weights were whole whenever they were scored."""

    config: Callable[..., Config]
    report: Any
    whole: list[bool]
    moments: "Moments"
    tutors: list[tuple[str, str | None]]
    begun: Path
    """The folder of the run as it was before the last update of the second student."""


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """A run that nothing disturbed, with the grades of `moments`."""
    folder = tmp_path_factory.mktemp("learnt")
    config, inside, evaluate, begun = builder(folder), [False], peers_module.evaluate_run, folder / "begun"
    seen: list[bool] = []

    @contextmanager
    def gathered(accelerator: Any, module: Any) -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def evaluating(*arguments: Any) -> Any:
        seen.append(inside[0])
        return evaluate(*arguments)

    def keeping(self: Trainer, number: int) -> dict[str, Any]:
        if (self.run.name, number) == ("two", 4):
            shutil.copytree(config().run, begun)
        return update(self, number)

    with pytest.MonkeyPatch.context() as patch:
        moments, update, tutors = noted(patch), Trainer._update, tutors_noted(patch)
        patch.setattr(Trainer, "_update", keeping)
        patch.setattr(peers_module, "may_tutor", lambda own, lag, tolerance: lag <= tolerance)
        patch.setattr(peers_module, "gathered", gathered)
        patch.setattr(peers_module, "evaluate_run", evaluating)
        report = train_peers(config())
    return Learnt(config, report, seen, moments, tutors, begun)


def changed(settings: Config, **changes: Any) -> Config:
    """Other settings of the peers."""
    assert settings.peers is not None
    return replace(settings, peers=replace(settings.peers, **changes))


def whole_weights(settings: Config) -> Config:
    return replace(settings, model=replace(settings.model, lora=None), optim=replace(settings.optim, lr=0.003))


@pytest.mark.parametrize(
    ("kind", "freeze"),
    [
        ("lora", "round"),
        *later(("lora", "phase"), ("full", "round"), ("full", "phase")),
    ],
)
def test_a_tutor_has_the_weights_of_the_rounds_start_or_of_the_phases(learnt, config, moments, kind, freeze):
    if (kind, freeze) == ("lora", "round"):
        settings, moments = learnt.config(), learnt.moments
    else:
        settings = changed(config() if kind == "lora" else whole_weights(config()), freeze=freeze)
        train_peers(settings)
    assert sorted(moments) == [(name, number) for name in ("one", "two") for number in (1, 2, 3, 4)]
    one, two = ([moments[name, number] for number in (1, 2, 3, 4)] for name in ("one", "two"))
    assert not any(equal(a.live, b.live) for some in (one, two) for a, b in pairwise(some))
    for number in (0, 1):  # of the first round, in which two learns second
        assert equal(one[number].tutor, two[0].live)
        assert equal(two[number].tutor, one[0 if freeze == "round" else 2].live)
    for number in (2, 3):
        assert equal(one[number].tutor, two[2].live)
        last = weights(Path(settings.run) / "students" / "one" / "checkpoints" / "000004")
        assert equal(two[number].tutor, one[2].live if freeze == "round" else last)


def test_the_record_of_the_rounds_says_what_both_students_scored(config, moments):
    settings = changed(config(updates=2), tolerance=0.0)
    report = train_peers(settings)
    assert settings.peers is not None
    written = json.loads((Path(settings.run) / "rounds.json").read_text())
    assert [entry.keys() for entry in written] == [{"round", "scores", "too_long", "lag", "tutors", "after"}] * 2
    assert written[0]["after"] == written[1]["scores"]
    assert written == report["rounds"]
    for student in settings.peers.students:  # the last weights, whichever were the best
        policy = build_policy(student_config(settings, student, None).model)
        load_weights(policy, Path(settings.run) / "rounds" / "2" / student.name)
        asked = by_domain(settings.task.problems("dev"), "domain", 4)
        measured = replace(settings, eval=replace(settings.eval, attempts=2, temperature=1.0))
        found = {domain: evaluate_run(policy, measured, some, 0, 1).accuracy for domain, some in asked.items()}
        assert found == written[-1]["after"][student.name]
    scored = [*(entry["scores"] for entry in written), written[-1]["after"]]
    lines = [json.loads(line) for line in (Path(settings.run) / "metrics.jsonl").read_text().splitlines()]
    assert [line.pop("update") for line in lines] == [0, 1, 2]
    assert lines == [
        {f"eval/accuracy/{name}/{domain}": value for name, own in one.items() for domain, value in own.items()}
        for one in scored
    ]
    for number, entry in enumerate(written):
        assert entry["round"] == number
        assert entry["scores"].keys() == entry["lag"].keys() == entry["tutors"].keys() == {"one", "two"}
        assert entry["lag"] == lags(entry["scores"])
        assert entry["too_long"] == {name: dict.fromkeys(own, 0) for name, own in entry["scores"].items()}
        assert entry["tutors"] == {name: value == 0 for name, value in entry["lag"].items()}
        for scores in entry["scores"].values():  # two problems of each domain, two attempts at each
            assert all(4 * score == int(4 * score) and 0 <= score <= 1 for score in scores.values())
    assert {score for entry in written for own in entry["scores"].values() for score in own.values()} - {0.0, 1.0}


@pytest.mark.slow
@pytest.mark.learns_nothing
@pytest.mark.parametrize("rounds", [1, 2])
def test_where_nobody_has_solved_anything_nobody_comments(config, monkeypatch, rounds):
    monkeypatch.setattr(peers_module, "may_tutor", may_tutor)
    monkeypatch.setattr(Jsonl, "grade", lambda self, problem, completion: Grade(False, 0.0, None))
    settings = config(updates=rounds, rounds=rounds)
    report = train_peers(settings)
    assert [entry["tutors"] for entry in report["rounds"]] == [{"one": False, "two": False}] * rounds
    assert report["rounds"][-1]["after"] == {name: {"large": 0.0, "small": 0.0} for name in ("one", "two")}
    for name in ("one", "two"):
        lines = metrics(Path(settings.run) / "students" / name)
        assert not any("writers/written" in line for line in lines)
        assert [line.get("rollouts/no_hint") for line in lines[1:]] == [4] * rounds


def test_a_student_that_is_no_tutor_never_comments(config):
    settings = config(updates=1, rounds=1)
    assert settings.peers is not None
    one, two = settings.peers.students
    settings = replace(settings, peers=replace(settings.peers, students=(one, replace(two, tutor=False))))
    report = train_peers(settings)
    assert [entry["tutors"] for entry in report["rounds"]] == [{"one": True, "two": False}]
    written = {
        name: any("writers/written" in line for line in metrics(Path(settings.run) / "students" / name))
        for name in ("one", "two")
    }
    assert written == {"one": False, "two": True}


@pytest.mark.slow
def test_behind_a_shut_gate_a_student_learns_as_by_self_distillation_alone(config, moments, monkeypatch):
    monkeypatch.setattr(peers_module, "lags", lambda scores: {"one": 9.1, "two": 9.1})
    settings = config()
    train_peers(settings)
    students = Path(settings.run) / "students"
    sibling = Sibling(template=HINT["template"], at_least=0.5, overflow="cut")
    alone = replace(
        settings,
        run=f"{settings.run}_alone",
        peers=None,
        method=replace(settings.method, contexts=(sibling,)),
    )
    Trainer(alone).train()
    lines = metrics(Path(alone.run))
    assert lines[-1]["updates_skipped"] < 4
    for name in ("one", "two"):
        assert metrics(students / name) == lines
        last = Path("checkpoints", "000004")
        assert equal(weights(students / name / last), weights(Path(alone.run) / last))


@pytest.mark.slow
def test_two_adapters_begin_with_what_other_runs_trained(config, moments, tmp_path):
    settings, starts = config(updates=1, rounds=1), []
    for seed in (1, 2):
        other = build_policy(settings.model)
        generator = torch.Generator().manual_seed(seed)
        for value in trained(other).values():
            value.data.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
        other.module.model.save_pretrained(tmp_path / str(seed))
        starts.append(copied(trained(other)))
    students = tuple(
        replace(student, start=str(tmp_path / str(seed)))
        for seed, student in zip((1, 2), settings.peers.students, strict=True)
    )
    train_peers(changed(settings, students=students))
    assert equal(moments["one", 1].live, starts[0])
    assert equal(moments["one", 1].tutor, starts[1])
    assert equal(moments["two", 1].live, starts[1])
    assert equal(moments["two", 1].tutor, starts[0])


# Stops.


@pytest.mark.slow
def test_wherever_a_run_is_stopped_it_ends_as_if_nothing_had_happened(config, moments, monkeypatch):
    def settings_at(run: str) -> Config:
        settings = whole_weights(config(run))
        return replace(settings, checkpoint=replace(settings.checkpoint, every=25))  # none in the middle of a phase

    def stop(place: str, when: Callable[..., bool]) -> Callable[..., Any]:
        owner = Trainer if place == "_update" else peers_module
        former = getattr(owner, place)

        def stopping(*arguments: Any) -> Any:
            if when(*arguments):
                raise RuntimeError("power cut")
            return former(*arguments)

        patch.setattr(owner, place, stopping)
        return former

    kept: list[Path] = []
    stops: dict[str, tuple[str, Callable[..., bool]]] = {
        "the second phase": ("_update", lambda self, number: self.run.name == "two" and number == 4),
        "a first phase": ("_update", lambda self, number: self.run.name == "one" and number == 2),
        "the scores": ("_begin", lambda config, student, number, length: student.name == "two" and number == 1),
        "between phases": ("_keep", lambda trainer, run, number, student: kept.append(run) or len(kept) == 3),
    }
    whole = settings_at("whole")
    train_peers(whole)
    for name, (place, when) in stops.items():
        broken = settings_at(name.replace(" ", "_"))
        with monkeypatch.context() as patch:
            stop(place, when)
            with pytest.raises(RuntimeError, match="power cut"):
                train_peers(broken)
        train_peers(broken)
        one, other = Path(whole.run), Path(broken.run)
        assert (one / "rounds.json").read_text() == (other / "rounds.json").read_text(), name
        for student in ("one", "two"):
            assert metrics(one / "students" / student) == metrics(other / "students" / student), name
            last = Path("students", student, "checkpoints", "000004")
            assert equal(weights(one / last), weights(other / last)), name


def halved(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def a_number(file: Path) -> None:
    file.write_text("7\n")


def without_its_first_line(file: Path) -> None:
    file.write_bytes(file.read_bytes().partition(b"\n")[2])


def changed_by_a_space(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" \n")


@pytest.mark.slow
def test_whatever_of_either_student_is_damaged_a_refusal_leaves_the_whole_folder_as_it_was(
    config, moments, monkeypatch, tmp_path
):
    settings, update = config(checkpoint={"every": 1, "keep": 1}), Trainer._update

    def stopping(self: Trainer, number: int) -> dict[str, Any]:
        if self.run.name == "one" and number == 4:
            raise RuntimeError("power cut")
        return update(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", stopping)
        with pytest.raises(RuntimeError, match="power cut"):
            train_peers(settings)
    run, spare = Path(settings.run), tmp_path / "spare"
    shutil.copytree(run, spare)
    read = [file for file in run.rglob("*.*") if file.is_file() and {"students", "1", "rounds.json"} & {*file.parts}]
    read = [file for file in read if file.name not in (".lock", STARTS)]
    assert {file.name for file in read} >= {"config.yaml", *LOG_FILES, "state.json", "model.safetensors", "rounds.json"}
    for file in read:
        deeds = [halved if file.name != "config.yaml" else a_number]
        deeds += [without_its_first_line, Path.unlink] if file.name in LOG_FILES else []
        deeds += [changed_by_a_space] if file.name == "state.json" else []
        for deed in deeds:
            deed(file)
            before = contents(run)
            with pytest.raises(InputError) as refusal:
                train_peers(settings)
            named = (str(file), str(file.parent), str(file.parents[1]), shown(str(file)))  # long ones are shortened
            assert any(name in str(refusal.value) for name in named), (deed, file)
            assert not differences(before, contents(run)), (deed, file)
            shutil.rmtree(run)
            shutil.copytree(spare, run)


def test_a_finished_run_is_not_run_again_and_keeps_its_report(learnt, moments):
    settings = learnt.config()
    assert train_peers(settings) == learnt.report
    assert not moments
    assert json.loads((Path(settings.run) / "report.json").read_text()) == learnt.report


def test_a_run_of_another_config_is_not_continued(learnt):
    settings = learnt.config()
    other = replace(settings, optim=replace(settings.optim, lr=0.5))
    with pytest.raises(InputError, match=r"holds a run with another optim.lr \(0.02, not 0.5\)"):
        train_peers(other)
    with pytest.raises(InputError, match="holds a run with another peers"):
        train_peers(changed(settings, tolerance=0.1))


def test_students_are_scored_with_whole_weights(learnt):
    assert learnt.whole == [True] * 12  # before, between and after two rounds, two students, two domains


# Refusals.


def refused(settings: Config) -> str:
    with pytest.raises(InputError) as refusal:
        peers_module.check_peers(settings)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_data_of_one_domain_is_refused_before_anything_is_written(config):
    settings = config()
    rows = Path(settings.task.data).read_text().replace("large", "small")
    Path(settings.task.data).write_text(rows)
    assert refused(config()) == ("all dev problems are of one domain (peers.field 'domain'); give task data of two")
    with pytest.raises(InputError, match="of one domain"):
        train_peers(config())
    assert not Path(settings.run).exists()


def test_a_students_adapter_without_adapters_to_train_is_refused(config):
    students = [{"name": "one", "domain": "small"}, {"name": "two", "domain": "large", "start": "folder"}]
    whole = {"random_init": True, "tokenizer": "tiny", "lora": None}
    with pytest.raises(InputError) as refusal:
        config(model=whole, peers={"students": students})
    assert str(refusal.value) == (
        "peers.students.1.start is an adapter, but model.lora is null; set model.lora, or name whole weights in "
        "peers.students.1.path"
    )
    config(model={**whole, "lora": {"rank": 2}}, peers={"students": students})


def test_students_of_different_kinds_or_tokenizers_are_refused(config, tmp_path):
    settings = config()
    other = tmp_path / "other"
    shutil.copytree(model_folder("tiny_ar"), other)
    words = (other / "tokenizer.json").read_text()
    assert '"+":' in words
    (other / "tokenizer.json").write_text(words.replace('"+":', '"#":'))

    def pair(first: str, second: str) -> Config:
        one, two = settings.peers.students
        students = (replace(one, path=first), replace(two, path=second))
        return replace(settings, model=Model(), peers=replace(settings.peers, students=students))

    assert "of different kinds; choose two checkpoints of the same architecture" in refused(pair("tiny", "tiny_ar"))
    assert "have different tokenizers" in refused(pair("tiny_ar", str(other)))
    peers_module.check_peers(pair("tiny_ar", "tiny_ar"))
