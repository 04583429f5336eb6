import json
from pathlib import Path

import pytest

import dllm_sd.reports.method_page as pages
from dllm_sd.cli.main import main
from dllm_sd.losses import ReverseKL
from dllm_sd.methods import METHODS
from dllm_sd.reports.method_page import measured, methods_page, parts, section
from dllm_sd.texts.rubric import RUBRIC_GOLD, RUBRIC_TEACHER_REFERENCE
from tools.make_methods_page import PAGES
from tools.method_choice import choice_page, correct_rollouts, needed_data, other_needs

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
CHOICES = {
    "d_opsd": (["answers"], "needed", []),
    "opsd": (["solutions"], "no", []),
    "opd": ([], "no", ["another checkpoint"]),
    "sdpo": (["answers"], "in the group", []),
    "sft": (["solutions"], "no", []),
    "grpo": (["answers"], "both", []),
    "self_distillation": ([], "no", []),
    "d_rcsd": (["answers", "rubrics"], "needed", []),
    "op_co_distill": (["answers"], "in the group", ["a second student"]),
    "step_align": (["answers"], "judged", ["a writer (default: base weights)"]),
}
RECORD = {
    **{"method": "opsd ratio=0.5", "backbone": "diffusion", "seeds": 3, "updates": 30, "skipped": 2},
    **{"before": [54.5, 54.5, 54.5], "after": [60.1, 61.0, 62.0], "best": [61.1, 61.0, 63.0]},
    **{"generated": 12345, "seconds": 33.3, "length": 16.0, "entropy": None},
}


@pytest.fixture
def one_record(monkeypatch):
    monkeypatch.setattr(pages, "_records", lambda: [RECORD])
    monkeypatch.setattr(pages, "_remarks", lambda: [])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_pages_in_the_documentation_are_made_from_the_table(path):
    assert path.read_text(encoding="utf-8") == PAGES[path](), "run python -m tools.make_methods_page"


@pytest.mark.parametrize("name", CHOICES)
def test_what_a_method_needs_follows_from_its_parts(name):
    method = METHODS[name].method
    assert (needed_data(method), correct_rollouts(method), other_needs(method)) == CHOICES[name]


def test_a_doubtful_gain_is_in_brackets_and_a_variant_is_named():
    rows = {line.split("`")[1]: line for line in choice_page().splitlines() if line.startswith("| [`")}
    assert list(rows) == list(METHODS)
    assert rows["d_opsd"].endswith("| +11.8 / - / - |")
    assert "| 40 / - |" in rows["d_opsd"]
    assert "-5.1 with clip=token" in rows["d_opsd_paper"]
    assert "(-45.8) / (-4.2)" in rows["sdpo"]


def test_the_page_names_every_method_with_its_source_and_what_to_know_of_it():
    flat = " ".join(PAGE.read_text(encoding="utf-8").split())
    for name, row in METHODS.items():
        assert f"## `{name}`" in flat
        assert " ".join(row.source.split()) in flat
        assert " ".join(row.note.split()) in flat


def test_parts_are_told_with_the_fields_that_are_not_their_defaults():
    told = parts(METHODS["sdpo"].method)
    assert told["teacher"] == ["ema (decay 0.95)"]
    assert told["support"] == ["top_k (k 100, of student, rest bucket)"]
    assert told["gate"] == ["all"]
    assert parts(METHODS["topd"].method)["rollout"][0].endswith("horizon truncated, horizon.ratio 0.1)")
    assert parts(METHODS["sft"].method)["contexts"] == []
    sdpo, own = METHODS["sdpo"].method, METHODS["demo_psd"].method
    assert parts(own, sdpo)["rollout"] == ["pass_at_k (problems 64)"]
    assert parts(sdpo, own)["rollout"] == ["pass_at_k (problems 32)"]


def test_every_method_is_described_as_a_change_of_an_earlier_one():
    names = list(METHODS)
    roots = [name for name in names if METHODS[name].parent is None]
    assert roots == ["d_opsd"]
    for i, name in enumerate(names):
        parent = METHODS[name].parent
        if parent is None:
            continue
        assert parent in names[:i], f"{name} comes before {parent}"
        changed = {
            slot for slot, part in vars(METHODS[name].method).items() if part != vars(METHODS[parent].method)[slot]
        }
        told = section(METHODS[name]).rpartition("but: ")[2]
        assert {words.split()[0] for words in " ".join(told.split()).split("; ")} == changed, name


def test_no_prompt_is_written_twice_and_none_is_missing():
    page = methods_page()
    for text in (RUBRIC_GOLD, RUBRIC_TEACHER_REFERENCE):
        assert page.count(text) == 1
    assert all(len(section(named)) < 1600 for named in METHODS.values())


def test_what_was_measured_names_methods_and_backbones_that_exist():
    for record in pages._records():
        assert record["method"].split()[0] in METHODS
        assert record["backbone"] in ("diffusion", "autoregressive", "autoregressive reader")
        assert len(record["before"]) == len(record["after"]) == len(record["best"]) == record["seeds"]


def test_a_measured_row_shows_each_seed(one_record):
    assert "| `opsd ratio=0.5` | 3 | 54.5 | 60.1, 61.0, 62.0 | 61.1, 61.0, 63.0 | 30 (2) | 12,345 | 33 | 16.0 |  |" in (
        methods_page()
    )
    assert measured("opsd") == [RECORD]
    assert measured("opsd_pmi") == []


def test_show_says_where_the_method_comes_from_and_what_was_measured(one_record, capsys):
    assert main(["show", "quickstart_ar", "method=opsd"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert METHODS["opsd"].source in said
    assert "opsd ratio=0.5 on the tiny diffusion model: 54.5 -> 60.1, 61.0, 62.0 % after 30 updates (3 seeds)" in said
    assert json.dumps("with settings of its own") not in said


@pytest.mark.parametrize("kind", ["withdrawn", "premise", "setting"])
def test_a_withdrawn_figure_is_shown_nowhere_and_a_doubtful_one_with_its_doubt(one_record, monkeypatch, capsys, kind):
    remark = {"backbone": "diffusion", "methods": ["opsd ratio=0.5"], "kind": kind, "date": "2026-01-02"}
    monkeypatch.setattr(pages, "_remarks", lambda: [remark | {"reason": "its teacher was deaf"}])
    assert main(["show", "quickstart_ar", "method=opsd"]) == 0
    said, page = " ".join(capsys.readouterr().out.split()), methods_page()
    assert page.count("its teacher was deaf") == page.count("2026-01-02") == 1
    assert ("54.5 -> 60.1" in said) == ("| 60.1, 61.0, 62.0 |" in page) == (kind != "withdrawn")
    assert ("its teacher was deaf" in said) == (kind != "withdrawn")
    assert ("| `opsd ratio=0.5` * |" in page) == (kind == "premise")


def test_every_remark_is_about_a_record_that_exists():
    records = {(record["backbone"], record["method"]) for record in pages._records()}
    for remark in pages._remarks():
        assert remark["kind"] in ("withdrawn", "premise", "setting")
        assert {(remark["backbone"], name) for name in remark["methods"]} <= records
        assert remark["methods"]
        assert remark["reason"]


def test_the_papers_of_one_clip_clip_each_entry():
    """App. C.1 of arXiv 2606.18195; OPSD v3 does so too."""
    for name in ("d_opsd_paper", "d_opsd_reference", "opsd_v3", "rcsd_reference"):
        assert getattr(METHODS[name].method.divergence, "clip", None) == "entry"
    assert METHODS["d_opsd_paper"].method.divergence == ReverseKL(clip="entry", clip_at=0.05)
