"""The laboratory: every published method has a claim, claims are complete, runs resume, verdicts follow the data."""

import time
from collections.abc import Callable
from dataclasses import replace
from math import inf, sqrt
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dllm_sd
from dllm_sd.config import load_config
from dllm_sd.errors import InputError, Stopped
from dllm_sd.methods import METHODS
from dllm_sd.tasks.task import Problem
from tools.lab import bases, page, run_values, runner
from tools.lab.bases import RECIPE, make_base
from tools.lab.claims import BASE, Base, Claim, Comparison, Laboratory, Row, Statement, in_order, read_laboratory
from tools.lab.data import MAKERS
from tools.lab.plot import Point, digest, plot_gains, plot_gaps, save
from tools.lab.records import RESULTS, Record, Records
from tools.lab.runner import TUNING_SEED, Runner, Work, schedule
from tools.lab.verdicts import Estimate, difference, interval, rank_correlation, verdict
from tools.method_choice import DOCS, _names

LABORATORY = read_laboratory()
TRIVIAL = """
bases:
  tiny: {about: shipped, path: tiny}
claims:
  trivial:
    title: two short runs
    source: none
    base: tiny
    config: quickstart
    tokens: 32
    set: [decode.batch_size=4, optim.warmup=0]
    rollouts: [method.rollout.problems=2, method.rollout.attempts=1]
    rates: [1.0e-4, 1.0e-3]
    seeds: [11]
    dev: 4
    test: 4
    probe: 4
    elsewhere: {few: [task.empties_min=4, task.empties_max=5]}
    rows:
      later_step: later_step
      sft: sft
      same: {method: later_step, like: later_step}
    statements:
      - says: it gains
        holds: [{row: later_step, against: base}]
"""


def laboratory(tmp_path: Path, text: str = TRIVIAL) -> Laboratory:
    file = tmp_path / "claims.yaml"
    file.write_text(text, encoding="utf-8")
    return read_laboratory(file)


def test_every_published_method_has_a_claim() -> None:
    tested = {row.method for claim in LABORATORY.claims.values() for row in claim.rows.values()}
    pages = [file for file in sorted((DOCS / "methods").glob("*.md")) if file.stem not in ("baselines", "later_step")]
    assert len(pages) == 11
    assert [file.stem for file in pages if not tested & set(_names(file))] == []
    assert tested <= set(METHODS)


SETTINGS = {"d_opsd_tenth": 3, **dict.fromkeys(("collapse", "purified_shortcut", "smollm2", "smollm2_long"), 1)}
"""Fewer than six: only rates, one factor at a time, and settings that another claim has found."""


@pytest.mark.parametrize("name", LABORATORY.claims)
def test_every_setting_of_every_row_is_a_config(name: str, tmp_path: Path) -> None:
    claim = LABORATORY.claims[name]
    work = Work(name, claim, Runner(LABORATORY, tmp_path, tmp_path), Records(tmp_path / "none.json"), "http://x/v1")
    for key, row in claim.rows.items():
        settings = claim.settings(row.like or key)
        assert len(settings) == SETTINGS.get(name, 6)
        for setting in settings:
            config = work.config(work.command(row, [*setting.overrides, "updates=10"]), tmp_path / "run")
            assert config.method.name == row.method
            assert config.optim.lr == setting.rate
    for overrides in claim.elsewhere.values():
        work.config(work.command(None, overrides))


@pytest.mark.parametrize("name", LABORATORY.claims)
def test_the_data_are_of_the_commands_that_the_claims_give_today(name: str, tmp_path: Path) -> None:
    """A row whose setting has changed is run again before the page is written: ``python -m tools.lab run CLAIM``."""
    claim, records = LABORATORY.claims[name], Records(RESULTS / f"{name}.json")
    work = Work(name, claim, Runner(LABORATORY, tmp_path, tmp_path), records, "")
    digests = {base: bases.digest(base, LABORATORY.bases) for base in (claim.base, *claim.needs)}
    for one in records.of("base", BASE):
        assert one.key == " ".join(work.command(None, [f"seed={claim.seeds[0]}"]))
    for key, row in claim.rows.items():
        overrides = {setting.name: setting.overrides for setting in claim.settings(row.like or key)}
        seeds = {"tune": [TUNING_SEED], "final": list(claim.seeds)}
        shown = [one for stage in ("tune", "final") for one in records.of(stage, key)
                 if one.setting in overrides and one.seed in seeds[stage]]  # fmt: skip
        for one in shown:
            updates = one.key.rpartition(" updates=")[2].partition(" ")[0]
            more = [*overrides[one.setting], f"updates={updates}", f"seed={one.seed}"]
            assert one.key == " ".join(work.command(row, more)), one.name
        probes = records.of("probe", key) if claim.probe else []
        for one in probes:
            more = [f"seed={TUNING_SEED}", f"eval.probe_problems={claim.probe}"]
            assert one.key == " ".join(work.command(row, more)), one.name
        for one in (*shown, *probes):
            assert one.made.get("bases", digests) == digests, one.name


def test_every_base_is_shipped_or_has_a_recipe(tmp_path: Path) -> None:
    for name, base in LABORATORY.bases.items():
        if base.path is None:
            assert base.config is not None, name
            load_config(base.config, [text.replace("LAB/", f"{tmp_path}/") for text in base.set])
        assert base.data is None or base.data in MAKERS
        assert set(base.needs) <= set(LABORATORY.bases)


def test_statements_and_controls_name_rows_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'absent'"):
        laboratory(tmp_path, TRIVIAL.replace("row: later_step, against", "row: absent, against"))
    with pytest.raises(InputError, match="the base 'gone'"):
        laboratory(tmp_path, TRIVIAL.replace("base: tiny", "base: gone"))
    with pytest.raises(InputError, match="'metod'"):
        laboratory(tmp_path, TRIVIAL.replace("{method: later_step, like", "{metod: later_step, like"))
    with pytest.raises(InputError, match="no claim 'x'"):
        in_order(["x"], LABORATORY)


def test_first_statements_come_first_and_every_row_once() -> None:
    order = schedule(LABORATORY.claims)
    assert sorted(order) == sorted((name, row) for name, claim in LABORATORY.claims.items() for row in claim.rows)
    firsts = [(name, row) for name, claim in LABORATORY.claims.items() for row in claim.statements[0].rows]
    assert max(map(order.index, firsts)) < len(order) - 1
    first_claim, second = list(LABORATORY.claims)[:2]
    begun = order[: order.index((second, next(iter(LABORATORY.claims[second].rows))))]
    assert {row for name, row in begun if name == first_claim} == LABORATORY.claims[first_claim].statements[0].rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Laboratory, Path]:
    """The trivial claim, stopped by Ctrl-C in its third run, gone on with, and its results."""
    folder = tmp_path_factory.mktemp("lab")
    lab = laboratory(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dllm_sd, "train", _interrupted(3))
        with pytest.raises(KeyboardInterrupt):
            Runner(lab, folder / "work", folder / "results").run(lab.claims)
    before = Records(folder / "results" / "trivial.json")
    assert before.of("base", BASE)
    assert not before.of("final", "later_step")
    assert Runner(lab, folder / "work", folder / "results").run(lab.claims)
    return lab, folder


def _interrupted(at: int) -> Callable[..., Any]:
    """`dllm_sd.train`, whose call number ``at`` is interrupted after the run's first update."""
    calls, train = [0], dllm_sd.train

    def call(config: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return train(config)

    return call


@pytest.mark.slow
def test_a_claim_is_probed_tuned_and_run_with_fresh_seeds(finished: tuple[Laboratory, Path]) -> None:
    lab, folder = finished
    claim, records = lab.claims["trivial"], Records(folder / "results" / "trivial.json")
    for row in ("later_step", "sft"):
        assert len(records.of("tune", row)) == 2
        finals = records.of("final", row)
        assert [one.seed for one in finals] == [11]
        best = max(records.of("tune", row), key=lambda one: one.values["accuracy"]).setting
        assert {one.setting for one in finals} == {best}
        assert all(one.values["n"] == 4 and "elsewhere/few" in one.values for one in finals)
        assert all(one.made["versions"]["torch"] and one.values["core_seconds"] > 0 for one in finals)
    assert not records.of("tune", "same")
    assert len(records.of("final", "same")) == 1
    assert records.of("probe", "later_step")[0].found["verdict"]["because"]
    generated = {one.values["generated"] for row in ("later_step", "same") for one in records.of("final", row)}
    assert generated == {32.0}
    assert all(one.values["generated"] == 0 and one.values["updates"] == 1 for one in records.of("final", "sft"))
    assert not list((folder / "work" / "runs" / "trivial").iterdir())
    assert verdict(claim.statements[0], claim, records) in ("reproduced", "not reproduced", "not reproduced, undecided")


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(
    finished: tuple[Laboratory, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, folder = finished
    before = (folder / "results" / "trivial.json").read_bytes()
    monkeypatch.setattr(dllm_sd, "train", _interrupted(1))
    assert Runner(lab, folder / "work", folder / "results").run(lab.claims)
    assert (folder / "results" / "trivial.json").read_bytes() == before


def test_when_the_minutes_are_over_the_rest_is_left_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = laboratory(tmp_path)
    monkeypatch.setattr(runner, "make_base", lambda *_: time.sleep(60))
    assert not Runner(lab, tmp_path / "work", tmp_path / "results").run(lab.claims, minutes=0.0005)
    assert not Records(tmp_path / "results" / "trivial.json").of("final", "sft")


@pytest.mark.slow
def test_a_run_that_cannot_go_on_counts_with_its_last_weights(
    finished: tuple[Laboratory, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, folder = finished
    train = dllm_sd.train

    def stopped(config: Any) -> None:
        train(config)
        raise Stopped("the loss is not finite")

    monkeypatch.setattr(dllm_sd, "train", stopped)
    claim = lab.claims["trivial"]
    (tmp_path / "trivial.json").write_bytes((folder / "results" / "trivial.json").read_bytes())
    records = Records(tmp_path / "trivial.json")
    work = Work("trivial", claim, Runner(lab, tmp_path / "work", tmp_path), records, "")
    work._trained("final", "sft", claim.settings("sft")[0], 99, "test")
    [record] = [one for one in records.of("final", "sft") if one.seed == 99]
    assert record.found == {"stopped": "the loss is not finite"}
    assert record.values["n"] == 4


def test_accuracies_of_peers_are_told_by_student_and_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three problems of one domain and one of the other, a student that solves the latter alone has a quarter."""
    problems = [Problem(str(i), {"domain": domain}) for i, domain in enumerate("aaab")]
    solved = {"first": "a", "second": "b"}

    def report(student: str, config: Any, asked: list[Problem], *_: Any) -> SimpleNamespace:
        right = [problem.fields["domain"] == solved[student] for problem in asked]
        return SimpleNamespace(accuracy=mean(right), length=3.0)

    monkeypatch.setattr(run_values, "_policies", lambda *_: [(name, name) for name in solved])
    monkeypatch.setattr(run_values, "evaluate_run", report)
    config: Any = SimpleNamespace(
        task=SimpleNamespace(problems=lambda split: problems), peers=SimpleNamespace(field="domain")
    )
    assert run_values.measured(config, None, "test", 9) == {
        "accuracy": 50.0,
        "length": 3.0,
        "n": 4.0,
        **{"accuracy/first": 75.0, "accuracy/first/a": 100.0, "accuracy/first/b": 0.0},
        **{"accuracy/second": 25.0, "accuracy/second/a": 0.0, "accuracy/second/b": 100.0},
    }


@pytest.mark.slow
def test_the_tables_tell_the_numbers_of_the_data(finished: tuple[Laboratory, Path]) -> None:
    lab, folder = finished
    text = page.with_tables(f"head\n{page.START}\nold\n{page.END}\ntail\n", lab, folder / "results")
    assert text.startswith("head\n")
    assert text.endswith("tail\n")
    assert "old" not in text
    finals = Records(folder / "results" / "trivial.json").of("final", "sft")
    told = ", ".join(f"{one.values['accuracy']:.1f}" for one in finals)
    assert finals[0].setting == "lr 0.001"
    assert f"| `sft` | lr 0.001 (highest rate tried) | {told} |" in text


def test_the_page_is_written_from_the_data() -> None:
    written = page.PAGE.read_text(encoding="utf-8")
    assert written == page.with_tables(written, LABORATORY, RESULTS), "run python -m tools.lab table"


def test_intervals_are_those_of_student() -> None:
    one = interval([50.0, 52.0, 54.0])
    assert (one.value, one.half) == pytest.approx((52.0, 4.303 * 2 / sqrt(3)))
    apart = difference([50.0, 52.0, 54.0], [40.0, 42.0, 44.0])
    assert (apart.value, apart.half) == pytest.approx((10.0, 2.776 * 2 * sqrt(2 / 3)))
    against_base = difference([50.0, 52.0, 54.0], [40.0], exact=True)
    assert (against_base.value, against_base.half) == pytest.approx((12.0, 4.303 * 2 / sqrt(3)))
    assert interval([50.0]).half == inf


def test_rank_correlation_is_that_of_hand_made_ranks() -> None:
    assert rank_correlation([(1, 10), (2, 20), (3, 30)]) == pytest.approx(1.0)
    assert rank_correlation([(1, 30), (2, 20), (3, 10)]) == pytest.approx(-1.0)
    # ranks 0, 1, 2, 3 against 0, 1.5, 1.5, 3: covariance 4.5, variances 5 and 4.5
    assert rank_correlation([(1, 1), (2, 5), (3, 5), (4, 9)]) == pytest.approx(4.5 / sqrt(5 * 4.5))
    assert rank_correlation([(1, 1), (2, 1), (3, 1)]) is None


def tuned(claim: Claim, records: Records) -> None:
    """Add tuning runs, of which that with the smallest rate is the best."""
    for setting in claim.settings("row"):
        records.add(Record("row", "tune", "", setting.name, 1, {"accuracy": 50.0 - setting.rate}))


def test_what_was_measured_by_another_command_is_measured_anew(tmp_path: Path) -> None:
    records = Records(tmp_path / "x.json")
    old = Record("row", "final", "train a=1", "lr 0.1", 11, {"accuracy": 1.0})
    records.add(old)
    bases = {"tiny": "1f"}
    assert records.find(old.name, "train a=1", bases) == old  # from before bases were noted
    assert Records(tmp_path / "x.json").find(old.name, "train a=2", bases) is None
    noted = replace(old, made={"bases": bases})
    records.add(noted)
    assert records.find(old.name, "train a=1", bases) == noted
    assert records.find(old.name, "train a=1", {"tiny": "2e"}) is None
    records.add(Record("row", "final", "train a=2", "lr 0.1", 11, {"accuracy": 2.0}))
    assert [one.values["accuracy"] for one in Records(tmp_path / "x.json").of("final", "row")] == [2.0]


def test_a_base_of_another_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    (tmp_path / "bases" / "mine" / RECIPE).write_text("another", encoding="utf-8")
    with pytest.raises(InputError, match="another recipe"):
        make_base("mine", {"mine": Base("about", config="quickstart")}, tmp_path)


def test_data_of_other_code_are_made_anew_and_a_base_of_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, made = tmp_path / "code.py", list[str]()

    def maker(folder: Path) -> None:
        made.append(code.read_text())
        (folder / "train.jsonl").write_text(code.read_text())

    monkeypatch.setattr(bases, "SOURCES", [code])
    monkeypatch.setattr(bases, "MAKERS", {"numbers": maker})
    mine = {"mine": Base("about", config="quickstart", data="numbers")}
    code.write_text("1")
    data = bases.make_data("numbers", tmp_path)
    target = tmp_path / "bases" / "mine"
    target.mkdir(parents=True)
    (target / RECIPE).write_text(f"{mine['mine']!r}\n{bases.contents(data)}", encoding="utf-8")
    make_base("mine", mine, tmp_path)
    assert made == ["1"]
    code.write_text("2")
    with pytest.raises(InputError, match="from other data"):
        make_base("mine", mine, tmp_path)
    assert made == ["1", "2"]


@pytest.mark.parametrize(
    ("after", "promising", "said"),
    [
        ([50.0, 51.0, 52.0], True, "reproduced"),
        ([40.2, 41.0, 45.0], True, "not reproduced, undecided"),
        ([30.0, 31.0, 32.0], True, "not reproduced"),
        ([50.0, 51.0], True, "not run yet"),
        ([50.0, 51.0, 52.0], False, "premise not met"),
    ],
)
def test_a_verdict_follows_the_runs(tmp_path: Path, after: list[float], promising: bool, said: str) -> None:
    statement = Statement("it gains", (Comparison("row", BASE),))
    claim = Claim("t", "s", "tiny", "quickstart", {"row": Row("opsd")}, (statement,), 100, rates=(1e-4, 1e-3))
    records = Records(tmp_path / "x.json")
    records.add(Record(BASE, "base", "", values={"accuracy": 40.0}))
    records.add(Record("row", "probe", "", found={"verdict": {"promising": promising, "because": []}}))
    tuned(claim, records)
    for seed, accuracy in zip(claim.seeds, after, strict=False):
        records.add(Record("row", "final", "", "lr 0.0001", seed, {"accuracy": accuracy}))
    records.add(Record("row", "final", "", "lr 0.001", claim.seeds[-1], {"accuracy": 99.0}))  # another setting
    assert verdict(statement, claim, Records(tmp_path / "x.json")) == said


def test_a_margin_lets_a_row_be_a_little_smaller_and_base_may_stand_first(tmp_path: Path) -> None:
    loses = Statement("it loses", (Comparison(BASE, "row"),))
    keeps = Statement("it keeps", (Comparison("row", BASE, margin=2.0),))
    claim = Claim(
        "t", "s", "tiny", "quickstart", {"row": Row("opsd", gated=False)}, (loses, keeps), 100, rates=(1e-4, 1e-3)
    )
    records = Records(tmp_path / "x.json")
    records.add(Record(BASE, "base", "", values={"accuracy": 40.0}))
    tuned(claim, records)
    for seed in claim.seeds:
        records.add(Record("row", "final", "", "lr 0.0001", seed, {"accuracy": 39.0}))
    assert [verdict(one, claim, records) for one in (loses, keeps)] == ["reproduced", "reproduced"]
    keeps_less = Statement("it keeps", (Comparison("row", BASE, margin=0.5),))
    assert verdict(keeps_less, claim, records) == "not reproduced"


def test_the_plots_are_of_the_data() -> None:
    """Each file holds the digest of the numbers that it shows; ``python -m tools.lab table`` draws them anew."""
    shown = {page.GAPS: digest(list(page.all_points(LABORATORY, RESULTS))),
             page.GAINS: digest(page.all_gains(LABORATORY, RESULTS))}  # fmt: skip
    for file, numbers in shown.items():
        assert numbers.encode() in file.read_bytes(), file


def test_a_plot_shows_every_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [Point("a", "x", 10.0, 2.0), Point("b", "y", -5.0, -30.0), Point("b", "z", 0.0, 1.0)]
    [axes] = plot_gaps(points).axes
    drawn = [(float(x), float(y)) for group in axes.collections for x, y in np.asarray(group.get_offsets())]
    assert drawn == [(10.0, 2.0), (-5.0, -30.0), (0.0, 1.0)]
    gains = {"a": {"x": Estimate(2.0, 0.5)}, "b": {"y": Estimate(-30.0, inf), "z": Estimate(1.0, 0.25)}}
    figure = plot_gains(gains)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["y", "z"]
    save(figure, tmp_path / "gains.png", digest(gains))
    assert digest(gains).encode() in (tmp_path / "gains.png").read_bytes()
    assert digest(gains) != digest({**gains, "a": {"x": Estimate(2.1, 0.5)}})
