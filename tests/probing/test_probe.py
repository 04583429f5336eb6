"""Every named method can be probed on every backbone where it is defined; a run that is probed stays the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.cli.main import main
from dllm_sd.config import build_config, load_config
from dllm_sd.engines import DllmSd
from dllm_sd.methods import METHODS
from dllm_sd.probing.opening import opened
from dllm_sd.probing.verdict import verdict
from dllm_sd.training.metric_table import METRICS
from dllm_sd.training.trainer import Trainer
from tests.test_contract import IN_TURN, PAIRS, Pair, config_at, in_tiers, teachers  # noqa: F401
from tests.tiers import later

NAMED = [pair for pair in PAIRS if pair[0] in METHODS]
WITHOUT = {name for name, row in METHODS.items() if not row.method.target.asks_teachers}
"""Methods that imitate or reinforce, whose other policies teach nothing."""
BY_OTHERS = {"spd", "self_distillation", "self_retraining"}
"""Of these, methods that learn what other weights write."""


@pytest.mark.parametrize("pair", in_tiers(NAMED, IN_TURN[::3]), ids="-".join)
def test_a_named_method_is_probed(pair: Pair, teachers: Path, tmp_path: Path) -> None:  # noqa: F811
    config = config_at(tmp_path / "run", *pair, teachers)
    config = replace(config, eval=replace(config.eval, probe_problems=6))
    with opened(config) as (probe, problems):
        tree = probe(problems).tree()
    json.dumps(tree, allow_nan=False)
    assert not (tmp_path / "run").exists()
    assert tree["student"]["n"] == tree["problems"] == 6
    rules = {sentence["rule"] for sentence in tree["verdict"]["because"]}
    assert tree["has_teacher"] == (pair[0] not in WITHOUT)
    if pair[0] in WITHOUT:
        assert rules <= {"writer_against_student"} if pair[0] in BY_OTHERS else rules == {"no_teacher"}
        assert (tree["imitated"] is not None) == (pair[0] in BY_OTHERS)
        assert tree["groups"] == {}
        return
    assert rules
    assert tree["rollouts"]["made"] >= 6
    assert tree["groups"]["all"]["sites"] > 0
    assert tree["groups"]["all"]["share"] == pytest.approx(1)
    if tree["shares"] is not None:
        assert sum(tree["shares"].values()) == pytest.approx(1)
    assert {teacher["context"] for teacher in tree["teachers"]} <= set(range(len(config.method.contexts)))


@pytest.mark.learns_nothing
def test_a_teacher_without_any_hint_is_probed_too_also_within_a_run(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("".join(f'{{"question": "{n}", "answer": "none"}}\n' for n in range(20)))
    tree = {
        "run": str(tmp_path / "run"),
        "updates": 1,
        "model": {"path": "tiny_ar"},
        "task": {"name": "jsonl", "data": str(tmp_path / "own.jsonl"), "size_dev": 4},
        "decode": {"length": 4},
        "method": {"name": "sdpo", "rollout": {"problems": 2, "attempts": 2}},
        "eval": {"every": 0, "final_problems": 0, "probe_every": 1, "probe_problems": 2},
        "log": {"progress": False, "trackers": []},
    }
    config = build_config(tree)
    with opened(config) as (probe, problems):
        found = probe(problems).tree()
    assert found["rollouts"] == {"made": 4, "right": 0, "passing": 4, "hinted": 0}
    (sentence,) = found["verdict"]["because"]
    assert sentence["rule"] == "nothing_passes"
    assert "4 rollouts that pass method.gate has a hint, and none is correct" in sentence["says"]
    assert found["controls"] == {}
    assert Trainer(config).train()["updates_skipped"] == 1


def test_a_probe_leaves_the_servers_of_a_run_alone(teachers: Path, tmp_path: Path) -> None:  # noqa: F811
    config = config_at(tmp_path / "run", "d_opsd", "diffusion", teachers)
    engine = DllmSd(url=("http://127.0.0.1:1",), model="tiny")  # where nothing listens
    served = replace(config, decode=replace(config.decode, engine=engine))
    trees: list[Any] = []
    for one in (config, served):
        with opened(replace(one, eval=replace(one.eval, probe_problems=3))) as (probe, problems):
            trees.append(probe(problems).tree())
    assert trees[0] == trees[1]


def stripped(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "probe/"))} for line in lines]


@pytest.mark.parametrize("pair", [("d_opsd", "diffusion"), *later((("opsd_pmi", "autoregressive"),))], ids="-".join)
def test_a_run_that_is_probed_is_the_same_run(pair: Pair, teachers: Path, tmp_path: Path) -> None:  # noqa: F811
    for name, every in (("plain", 0), ("probed", 1)):
        config = config_at(tmp_path / name, *pair, teachers)
        Trainer(replace(config, eval=replace(config.eval, probe_every=every, probe_problems=3))).train()
    plain, probed = (stripped(tmp_path / name) for name in ("plain", "probed"))
    assert plain == probed
    (one, other) = ((tmp_path / name / "checkpoints").glob("*/*.safetensors") for name in ("plain", "probed"))
    assert [file.read_bytes() for file in sorted(one)] == [file.read_bytes() for file in sorted(other)] != []
    lines = [json.loads(line) for line in (tmp_path / "probed" / "metrics.jsonl").read_text().splitlines()]
    assert all("probe/student" in line for line in lines)
    names = {name for line in lines for name in line if "probe" in name}
    assert names >= {"probe/student", "probe/divergence", "time/probe"}
    assert names <= METRICS.keys()


@pytest.mark.parametrize("method", ["spd", "self_distillation"])
def test_of_a_method_that_imitates_other_weights_the_probe_says_how_accurate_these_are(
    method: str, tmp_path: Path
) -> None:
    """A projection onto two dimensions writes nothing right; the initial weights are the student's before training."""
    narrow = ["method.rollout.policy.rank=2"] if method == "spd" else []
    words = [f"method={method}", *narrow, "eval.probe_problems=24", f"run={tmp_path / 'run'}"]
    with opened(load_config("quickstart_ar", words)) as (probe, problems):
        found = probe(problems)
    assert found.imitated is not None
    assert found.imitated.teacher.n == found.imitated.student.n == 24
    assert found.imitated.student.accuracy > 0
    assert found.metrics["probe/imitated_gap"] == found.imitated.gap
    [sentence] = verdict(found)[1]
    if method == "spd":
        assert found.imitated.teacher.accuracy == 0
        assert (sentence.rule, sentence.promising) == ("writer_against_student", False)
    else:
        assert found.imitated.gap == 0
        assert (sentence.rule, sentence.promising) == ("writer_against_student", None)


def test_methods_that_imitate_or_reinforce_have_no_teacher() -> None:
    assert {"sft", "rft", "diffu_grpo", "spd"} <= WITHOUT
    assert not {"opsd", "d_opsd", "sdpo", "sgsd", "opd"} & WITHOUT


@pytest.mark.slow
def test_of_a_useless_teacher_the_probe_says_so_and_training_with_it_loses(tmp_path: Path) -> None:
    short = ["updates=10", "optim.warmup=2", "method.rollout.problems=48", "eval.every=10", "eval.problems=128"]
    quiet = ["eval.final_problems=0", "log.progress=false", "log.trackers=[]", "eval.probe_problems=32"]
    promising, change = dict[str, Any](), dict[str, float]()
    for problem in ("own", "another"):
        words = [f"method.contexts.0.problem={problem}", *short, *quiet, f"run={tmp_path / problem}"]
        config = load_config("quickstart_ar", words)
        with opened(config) as (probe, problems):
            found = probe(problems, controls=False)
        promising[problem] = verdict(found)[0]
        Trainer(config).train()
        lines = [json.loads(line) for line in (tmp_path / problem / "metrics.jsonl").read_text().splitlines()]
        change[problem] = lines[-1]["eval/accuracy"] - lines[0]["eval/accuracy"]
    print(promising, change)
    assert promising == {"own": True, "another": False}
    assert found.teachers[0].gap.ci95[1] < 0
    assert change["own"] > change["another"] < 0


TINY = ["--problems", "4", "decode.batch_size=32"]


def test_the_command_writes_json_and_says_in_words_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe.json"
    assert main(["probe", "quickstart", *TINY, "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    tree = json.loads(printed)
    assert json.loads(out.read_text()) == tree
    assert tree["config"] == "quickstart"
    assert tree["settings"]["eval"]["probe_problems"] == 4
    assert tree["teachers"][0]["revealed"] == 0.75  # three of four blocks
    assert main(["probe", "quickstart", "method=sft", "decode.length=16", *TINY]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "verdict: undecided - this method has no teacher, so there is nothing to compare the student with" in words


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["task.size_dev=0"], "the dev split holds no problems"),
        (["--problems", "0"], "--problems"),
        (["--out", "/proc/none/probe.json"], "--out"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["probe", "quickstart", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
