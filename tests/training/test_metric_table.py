"""What metrics mean, what trackers call them, and which are sent."""

from pathlib import Path

import pytest

from dllm_sd.losses import TARGETS, TRUSTS
from dllm_sd.reports.metrics_page import metrics_page
from dllm_sd.training.left_out import LEFT_OUT_WORDS, REASONS
from dllm_sd.training.metric_table import GROUPS, METRICS, Sent, described, meaning, result_values, shown_name

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == metrics_page(), "run python tools/make_metrics_page.py"


def test_every_name_in_a_tracker_is_in_a_group_and_of_one_metric():
    shown = [shown_name(name) for name in METRICS]
    assert {name.split("/")[0] for name in shown} <= set(GROUPS)
    assert len(set(shown)) == len(shown)
    given = {"loss": "train/loss", "eval/accuracy": "eval/accuracy", "advantage/error": "teacher/advantage/error"}
    given |= {"of_a_plugin": "train/of_a_plugin", "plugin/part": "train/plugin/part"}
    assert {name: shown_name(name) for name in given} == given
    assert (
        shown_name("writers/dropped/a\nb: \N{LATIN SMALL LETTER U WITH DIAERESIS}") == "teacher/writers/dropped/a_b_ _"
    )


def test_whatever_a_part_measures_and_a_run_leaves_out_is_in_the_table():
    parts = [*TARGETS.values(), *TRUSTS.values()]
    measured = [name for part in parts for name in getattr(part, "measured", ())]
    assert measured
    names = [*measured, *LEFT_OUT_WORDS, *(f"{start}any" for start in REASONS)]
    assert [name for name in names if described(name) is None] == []


def test_every_meaning_is_a_sentence():
    texts = [metric.meaning for metric in METRICS.values()] + [meaning("test/best/accuracy/4 x 2")]
    assert [text for text in texts if not text.endswith(".") or (not text[0].isupper() and not text[0].isdigit())] == []


@pytest.mark.parametrize(
    ("name", "logged", "sent"),
    [
        ("loss", [0, 0, 1], [0, 0, 1]),
        ("loss", [None, 2.0], [None, 2.0]),
        ("rollouts/rejected", [0, 0, 3, 0], [None, None, 3, 0]),
        ("rollouts/rejected", [2, 2], [2, 2]),
        ("rollouts/problems", [64, 64, 60, 64], [None, None, 60, 64]),
        ("of_a_plugin", [0, 0], [0, 0]),
    ],
)
def test_a_value_is_sent_once_it_says_something(name: str, logged: list[float | None], sent: list[float | None]):
    choose = Sent()
    assert [choose({"update": i, name: value}).get(name) for i, value in enumerate(logged)] == sent
    for cut in range(len(logged)):  # a run that goes on sends what it would have sent
        goes_on = Sent({"update": i, name: value} for i, value in enumerate(logged[:cut]))
        assert [goes_on({"update": 9, name: value}).get(name) for value in logged[cut:]] == sent[cut:]


def test_test_results_have_names_and_meanings():
    values = result_values("best", {"trained": {"accuracy": 0.5, "n": 4}, "4 x 2!": {"accuracy": 0.25, "score": 0.5}})
    assert values == {"test/best/accuracy": 0.5, "test/best/accuracy/4 x 2_": 0.25, "test/best/score/4 x 2_": 0.5}
    assert meaning("test/before/accuracy") == "Accuracy on the test split of the initial weights."
