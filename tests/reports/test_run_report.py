"""The report: what it reads of a run, what it says where something is missing, and that data stays data."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.cli.main import main
from dllm_sd.config import load_config
from dllm_sd.evaluation.comparison import mcnemar
from dllm_sd.evaluation.estimates import wilson_interval
from dllm_sd.evaluation.recording import VERDICTS, Verdict, write_verdicts
from dllm_sd.reports.report_page import page, write_report
from dllm_sd.reports.run_report import flat, read_runs, report_settings
from dllm_sd.training.outcome import MUCH
from tests.reports.folders import HOSTILE, metrics, trace, write_run


class Elements(HTMLParser):
    """The elements of a page, the text outside of scripts and styles, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.scripts, self._inside = "", list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        self.scripts += [""] * (tag == "script")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def page_of(*folders: Path) -> Elements:
    return Elements(page(read_runs(folders)))


def test_a_report_shows_results_warnings_settings_and_environment(tmp_path: Path) -> None:
    words = page_of(write_run(tmp_path / "mine")).words
    for expected in (
        *("50.0 %", "60.0 %", "70.0 %", "38.0 to 62.0", "+20.0 points", "update 1"),
        *("7 rollouts rejected by method.gate", "The method is d_opsd, changed", "method.divergence", "jsd"),
        *("optim.lr", "0.0003", "5e-06", "2026-01-02T03:04:05+00:00", "c0ffee", "2.13.0"),
    ):
        assert expected in words, expected


def test_results_on_the_dev_split_are_called_that(tmp_path: Path) -> None:
    test = {"trained": {"n": 5, "accuracy": 0.4, "ci95": [0.1, 0.7]}}
    report = {"split": "dev", "updates": 2, "before": test, "after": test, "best": test}
    words = page_of(write_run(tmp_path, report=[report])).words
    assert "test split" not in words
    assert "dev split" in words


def test_the_curves_and_the_traces_are_those_of_the_run(tmp_path: Path) -> None:
    data = page_of(write_run(tmp_path / "mine")).data
    (run,) = data["runs"]
    assert run["metrics"]["update"] == [0, 1, 2]
    assert run["metrics"]["loss"] == [None, 0.5, pytest.approx(1 / 3)]
    assert run["metrics"]["eval/accuracy"] == [0.5, 0.6, 0.55]
    assert (run["best"], run["collapse"]) == (1, None)
    assert run["teachers"] == ["suffix"]
    assert run["traces"] == [trace(1), trace(2)]


def test_dev_accuracies_have_intervals_over_the_problems_that_were_graded(tmp_path: Path) -> None:
    lines = [{**line, "eval/too_long": 10} for line in metrics(0.5, 0.6, 0.55)]
    words = page_of(write_run(tmp_path / "mine", metrics=lines)).words
    for accuracy in (0.5, 0.6, 0.55):
        low, high = wilson_interval(accuracy, 90)
        assert f"{100 * accuracy:.1f} % {100 * low:.1f} to {100 * high:.1f}" in words
    report = {"updates": 2, "before": {}, "after": {}, "best": {}}  # of an earlier version
    assert "55.0 %" in page_of(write_run(tmp_path / "older", report=[report])).words


def test_two_runs_without_an_evaluation_are_compared_by_their_final_tests(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, config={"seed": seed}) for name, seed in (("one", 1), ("two", 2)))
    write_verdicts(one / VERDICTS, {"trained": [Verdict(f"p{i}", "d", (i < 2,)) for i in range(12)]})
    write_verdicts(two / VERDICTS, {"trained": [Verdict(f"p{i}", "d", (i > 3,)) for i in range(12)]})
    words = page_of(one, two).words
    assert "cannot be compared" not in words
    assert f"{mcnemar(2, 8):.2g}" in words
    assert "right in one only2right in two only8" in words.replace("\n", "")


@pytest.mark.parametrize(
    ("accuracies", "update"),
    [((0.5, 0.6, 0.5 + MUCH), None), ((0.5, 0.7, 0.65, 0.55, 0.4), 3), ((0.9, 0.1), 1), ((), None)],
)
def test_a_collapse_is_the_first_evaluation_far_below_the_best(
    tmp_path: Path, accuracies: tuple[float, ...], update: int | None
) -> None:
    (run,) = read_runs([write_run(tmp_path, report=None, metrics=metrics(*accuracies))])
    assert run.collapse == update
    assert any("collapsed" in warning for warning in run.warnings) == (update is not None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"report": None}, "has not ended"),
        ({"metrics": [{"update": 1, "loss": 0.5}]}, "no evaluation on the dev split"),
        ({"traces": None}, "no traces of rollouts"),
        ({"environment": None}, "Versions and hardware are not known"),
        ({"report": [{"updates": 2, "before": {}, "after": {}, "best": {}}]}, "not compared on the test split"),
        ({"report": ["a list?"]}, "report.json is damaged"),
        (dict.fromkeys(("report", "metrics", "traces", "environment")), "has not ended"),
    ],
)
def test_a_report_opens_and_says_what_is_missing(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    elements = page_of(write_run(tmp_path, **changes))
    assert sentence in elements.words
    assert elements.data["runs"]


def test_a_run_without_any_figure_says_so_instead_of_showing_no_curve(tmp_path: Path) -> None:
    sentence = "No update and no evaluation has finished"
    assert sentence in page_of(write_run(tmp_path / "killed", report=None, metrics=None)).words
    assert sentence not in page_of(write_run(tmp_path / "run")).words


def test_references_have_no_pass_rate_in_a_report(tmp_path: Path) -> None:
    lines = [{"update": 1, "loss": 0.5, "rollouts/pass_rate": 1.0, "rollouts/first_try": 1.0, "rollouts/length": 3.0}]
    rates = {"rollouts/pass_rate", "rollouts/first_try"}
    imitating = {"method": {"name": "sft", "rollout": {"name": "demonstrations"}}}
    (run,) = page_of(write_run(tmp_path / "sft", metrics=lines, config=imitating)).data["runs"]
    assert run["references"]
    assert "rollouts/length" in run["metrics"]
    assert not rates & run["metrics"].keys()
    (run,) = page_of(write_run(tmp_path / "run", metrics=lines)).data["runs"]
    assert not run["references"]
    assert rates <= run["metrics"].keys()


def test_text_of_data_is_never_a_part_of_the_page(tmp_path: Path) -> None:
    report = {"updates": 1, "before": {}, "after": {}, "best": {}, "warnings": [HOSTILE], "stopped": HOSTILE}
    pieces = {"1": HOSTILE, "2": "\ud800", "3": "three"}
    entry = trace(1, problem=HOSTILE, pieces=pieces, teachers=[{"prompt": [1], "hint": HOSTILE, "weight": 1.0}])
    changes: dict[str, Any] = {
        "config": {"task": {"name": "sudoku", "prompt": "{puzzle}" + HOSTILE, "answer": HOSTILE}},
        "report": [report],
        "traces": [entry],
        "environment": [{"update": 0, "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}, HOSTILE: HOSTILE}],
    }
    folders = [write_run(tmp_path / f"{i}<script>", **changes) for i in range(2)]
    elements, plain = page_of(*folders), page_of(write_run(tmp_path / "plain"), write_run(tmp_path / "other"))
    assert len(elements.scripts) == len(plain.scripts) == 4
    assert {tag for tag, _ in elements.elements} <= {tag for tag, _ in plain.elements} | {"p", "li"}
    assert not [attributes for _, attributes in elements.elements if any(name.startswith("on") for name in attributes)]
    assert elements.words.count(HOSTILE) >= 6
    assert elements.data["runs"][0]["traces"][0]["pieces"] == pieces
    write_report(folders, tmp_path / "out.html")
    assert "</script><script>window" not in (tmp_path / "out.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["prompts", "completions", "hints"])
def test_a_report_warns_of_text_that_the_model_cannot_read(tmp_path: Path, kind: str) -> None:
    lines = metrics(0.5, 0.6, 0.55)
    shares = [{f"rollouts/unknown_{kind}": share} for share in (None, 0.71, 0.25)]
    unread = [{**line, **share} for line, share in zip(lines, shares, strict=True)]
    said = "up to 71.0 % of their tokens are unknown to the tokenizer"
    for name, log, count in (("unread", unread, 1), ("read", [{**line, **shares[0]} for line in lines], 0)):
        (run,) = read_runs([write_run(tmp_path / name, metrics=log)])
        assert sum(said in warning and kind in warning for warning in run.warnings) == count


def test_a_page_loads_nothing(tmp_path: Path) -> None:
    text = page(read_runs([write_run(tmp_path)]))
    elements = Elements(text).elements
    assert not [
        name for _, attributes in elements for name in attributes if name in ("src", "href", "srcset", "action")
    ]
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?(?!data:)", text)
    (policy,) = (str(a["content"]) for tag, a in elements if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy


def test_numbers_that_are_not_finite_are_left_out_of_curves(tmp_path: Path) -> None:
    lines = [{"update": 1, "loss": float("nan"), "grad_norm": float("inf")}, {"update": 2, "loss": 2.0, "grad_norm": 1}]
    (run,) = page_of(write_run(tmp_path, metrics=lines, report=None)).data["runs"]
    assert run["metrics"] == {"update": [1, 2], "loss": [None, 2.0], "grad_norm": [None, 1]}


def test_two_runs_stand_side_by_side_and_are_compared_problem_by_problem(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, config={"seed": seed}) for name, seed in (("one", 1), ("two", 2)))
    assert "cannot be compared problem by problem" in page_of(one, two).words
    verdicts = {"one": [True, False, False, False, False, False], "two": [False, True, True, True, True, True]}
    for folder in (one, two):
        (folder / "eval" / "sudoku").mkdir(parents=True)
        lines = [
            {"id": f"p{i}", "digest": "d", "attempt": 0, "generation": "g", "correct": right, "score": float(right)}
            for i, right in enumerate(verdicts[folder.name])
        ]
        text = "".join(json.dumps({**line, "parsed": None, "schedule": "trained"}) + "\n" for line in lines)
        (folder / "eval" / "sudoku" / "generations.jsonl").write_text(text)
    words = page_of(one, two).words
    assert "+66.67" in words
    assert f"{mcnemar(1, 5):.2g}" in words
    assert "seed" in words
    for folder in (one, two):  # with several schedules each heads a column
        file = folder / "eval" / "sudoku" / "generations.jsonl"
        file.write_text(file.read_text() + file.read_text().replace('"trained"', '"4 x 2"'))
    assert "as in training4 x 2problems in both" in page_of(one, two).words


def test_two_runs_show_the_settings_that_differ_and_fold_all_others(tmp_path: Path) -> None:
    other: dict[str, Any] = {"method": {"name": "rft"}, "optim": {"lr": 3e-4, "warmup": 5}}
    folders = [write_run(tmp_path / "one"), write_run(tmp_path / "two", config=other)]
    text = page(read_runs(folders))
    differ, folded = (
        text.split("Settings that differ")[1].split('<section id="curves">')[0],
        text.split("<details>")[1:],
    )
    rows = re.findall(r"<tr><td><code>([^<]*)</code></td><td>([^<]*)</td><td>([^<]*)</td></tr>", differ)
    values = {key: (one, two) for key, one, two in rows}
    assert values["method.name"] == ("d_opsd", "rft")
    assert values["method.divergence.name"] == ("jsd", "token_nll")
    assert values["method.contexts.0.name"] == ("suffix", "-")
    assert values["optim.warmup"] == ("0", "5")  # a default is shown as its value
    assert not {"optim.lr", "method.contexts.0.nested"} & values.keys()  # equal; not set, and of a part of one run
    assert len(folded) == 2
    assert all("optim.lr" in one for one in folded)
    assert "<details>" not in page(read_runs(folders[:1]))


@pytest.mark.parametrize("shown", ["before its next evaluation", "after it"])
def test_a_run_that_was_given_more_updates_has_not_ended(tmp_path: Path, shown: str) -> None:
    lines = metrics(0.5, 0.6, 0.55, *([0.65] if shown == "after it" else []))
    folder = write_run(tmp_path / "mine", config={"updates": 4}, metrics=lines)
    words = page_of(folder).words
    assert "given more updates after its end at update 2" in words
    assert "not finished" in words
    assert "70.0 %" not in words  # the test result of the former end
    other = write_run(tmp_path / "other")
    for run in (folder, other):
        write_verdicts(run / VERDICTS, {"trained": [Verdict(f"p{i}", "d", (i < 2,)) for i in range(12)]})
    assert "mine was given more updates after its end at update 2" in page_of(folder, other).words


def test_a_run_that_stopped_early_has_ended(tmp_path: Path) -> None:
    report = {"updates": 2, "before": {}, "after": {}, "best": {}, "stopped": "no new best"}
    words = page_of(write_run(tmp_path, config={"updates": 4}, report=[report])).words
    assert "more updates" not in words
    assert "The run stopped early: no new best" in words


def test_two_students_are_reported_together(tmp_path: Path) -> None:
    write_run(tmp_path / "pair")
    for name in ("a", "b"):
        write_run(tmp_path / "pair" / "students" / name)
    assert [run.name for run in read_runs([tmp_path / "pair"])] == ["a", "b"]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "run") for place in ("x", "y")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["x/run", "y/run"]


def test_the_traces_in_a_report_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path, traces=[trace(update, slot) for update in range(1, 21) for slot in range(2)])
    whole, size = read_runs([folder])[0], len(str(trace(1)))
    assert whole.traced_updates == (20, 20)
    monkeypatch.setattr("dllm_sd.reports.run_report.TRACES_BYTES", 20 * size)
    (run,) = read_runs([folder])
    kept = sorted({line["update"] for line in run.traces})
    assert run.traced_updates == (len(kept), 20)
    assert 5 <= len(kept) <= 10
    assert (kept[0], kept[-1]) == (1, 20)


@pytest.mark.parametrize("name", ["quickstart", "quickstart_ar", "tiny_sft", "llada_8b_gsm8k"])
def test_the_settings_of_a_report_are_what_the_config_changes(name: str) -> None:
    config = load_config(name)
    shown = report_settings(config)
    changed = {key: value for key, value, _ in shown["changes"]}
    assert changed.get("updates", 500) == config.updates
    assert changed.get("optim.lr", 5e-6) == config.optim.lr
    assert not [key for key, value, was in (*shown["changes"], *shown["method_changes"]) if value == was]
    assert shown["method"] is not None


def test_leaves_of_a_tree_have_dotted_keys() -> None:
    assert flat({"a": {"b": [1, {"c": None}]}, "d": {}, "e": []}) == {"a.b.0": 1, "a.b.1.c": None}


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, "is not a run"),
        (lambda folder: folder.write_text("x"), "is not a run"),
        (lambda folder: (folder.mkdir(), (folder / "config.yaml").write_text("a: 1\n")), "is not a run"),
        (lambda folder: write_run(folder, metrics=["no object"]), "metrics.jsonl:1"),
        (lambda folder: write_run(folder, traces=[{"update": 1, "slot": 0}]), "traces.jsonl"),
        (lambda folder: write_run(folder, traces=[trace(1, sites="none")]), "traces.jsonl"),
    ],
)
def test_what_is_no_run_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Any, words: str
) -> None:
    prepare(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("out", [".", "missing/out.html", "run/config.yaml/out.html"])
def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert main(["report", "run", "--out", out]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["report", "run"]) == 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(write_run(tmp_path / "run")), "--out", str(tmp_path / "o"), "lr=1"]) == 2
    assert "lr=1" in capsys.readouterr().err
