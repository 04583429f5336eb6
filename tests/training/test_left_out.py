"""Whatever a run leaves out has a name in its metrics, stands in its report, and is told once at its end."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dllm_sd
from dllm_sd.cli.main import main
from dllm_sd.reports import tables
from dllm_sd.rollouts.rules import COUNTS
from dllm_sd.training.left_out import LEFT_OUT_WORDS, REASONS, in_words, is_left_out, left_out

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ROWS = [{"question": f"{a}{b}", "answer": str((a + b) % 4)} for a in range(4) for b in range(4)]
TREE: dict[str, Any] = {
    "updates": 2,
    "model": {"random_init": True, "as": "autoregressive", "tokenizer": "tiny_ar", "shape": SHAPE},
    "task": {"name": "jsonl", "data": "data.jsonl", "data_test": "test.jsonl", "size_dev": 2},
    "decode": {"length": 4, "batch_size": 8},
    "method": {"name": "sft", "rollout": {"problems": 8}},
    "eval": {"every": 0, "final_problems": 1},
    "log": {"progress": False, "trackers": []},
}
REFERENCED = {"reference_field": "answer"}
OUT_OF_REACH = {"name": "rft", "rollout": {"problems": 4, "attempts": 1}}
HINT = {"template": "{question}({hint})"}


def longer(row: dict[str, str], key: str, by: int = 9) -> dict[str, str]:
    return {**row, key: row[key] * by}


Rows = list[dict[str, str]]
CASES: dict[str, tuple[dict[str, Any], Rows, Rows]] = {
    "data/in_test": ({}, ROWS, ROWS[:3]),
    "data/in_dev": ({}, [*ROWS, *ROWS], []),
    "rollouts/too_long": ({"max_prompt": 6}, [*ROWS, *(longer(row, "question") for row in ROWS)], []),
    "eval/too_long": (
        {"max_prompt": 6, "eval": {"every": 1, "problems": 8, "final_problems": 1}, "task": {"size_dev": 8}},
        [*ROWS, *(longer(row, "question") for row in ROWS)],
        [],
    ),
    "rollouts/long_reference": ({}, [*ROWS, *(longer(row, "answer") for row in ROWS)], []),
    "rollouts/grader_failed": ({"method": OUT_OF_REACH, "task": {"grader": "reward.py:score"}}, ROWS, []),
    "rollouts/rejected": ({"method": OUT_OF_REACH}, ROWS, []),
    "rollouts/no_hint": ({"method": {"name": "sdpo", "rollout": {"problems": 2, "attempts": 2}}}, ROWS, []),
    "rollouts/long_hint": (
        {"method": {"name": "opsd", "rollout": {"problems": 2}, "contexts": {"0": {**HINT, "longest": 3}}}},
        ROWS,
        [],
    ),
    "writers/dropped/": (
        {"method": {"name": "rcsd", "rollout": {"problems": 2}, "contexts": [
            {"name": "rubric", **HINT, "writing": {"writer": "base", "sampling": {"length": 4}, "tolerance": 1.0}}
        ]}},
        ROWS,
        [],
    ),
}  # fmt: skip
"""A metric, and a run in which it counts something: changes of the config, the training rows, more test rows."""


@pytest.mark.learns_nothing  # some cases leave out all that there is
@pytest.mark.parametrize("name", CASES)
def test_what_a_run_leaves_out_is_counted_reported_and_told_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    changes, rows, tested = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    test_rows = [{"question": "99", "answer": "0"}, *tested]
    Path("reward.py").write_text("def score(problem, completion):\n    return {problem['answer']: 1.0}[completion]\n")
    for file, some in (("data", rows), ("test", test_rows)):
        Path(f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    tree = {**TREE, **changes, "task": {**TREE["task"], **REFERENCED, **changes.get("task", {})}}
    Path("config.yaml").write_text(json.dumps({**tree, "run": "run"}))
    status = main(["train", "config.yaml"])
    out = capsys.readouterr()
    report = json.loads(Path("run/report.json").read_text())
    assert status == (3 if report["updates_skipped"] == report["updates"] else 0)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    found = {key: count for key, count in report["left_out"].items() if key.startswith(name)}
    assert found
    assert sum(found.values()) > 0
    cumulative = name in ("rollouts/too_long", "eval/too_long")
    for key, count in found.items():
        logged = [line[key] for line in lines if key in line]
        assert count == (logged[-1] if cumulative else sum(logged))
    for sentence in in_words(found):
        assert out.out.count(sentence) == 1
    for count_name, (words, kept) in tables.EVALUATION_COUNTS.items():  # what the test split lost, in the table
        lost = any(report[which]["trained"][count_name] for which in ("before", "after", "best"))
        assert out.out.count(f"{words} ({kept})") == lost
    if name == "data/in_test":
        assert found[name] == 3
        assert "of the 16 rows of task.data, 3 occur in the test split too; training leaves them out" in out.err
    if name == "data/in_dev":
        assert found[name] in (2, 1)  # the copies of two dev rows, which may be of each other
        assert f"{found[name]} occur in the dev split too" in out.err


def test_counts_are_summed_once_for_all_updates_that_share_rollouts():
    lines = [{"update": 0, "data/in_test": 4, "bank/left_out/long": 1, "eval/too_long": 2}]
    for update in range(1, 7):
        rollouts = {"rollouts/rejected": (update + 1) // 2, "rollouts/too_long": update, "writers/dropped/no_text": 1}
        lines.append({"update": update, **rollouts, "bank/left_out/long": 1, "rollouts/kept": 9, "eval/too_long": 2})
    assert left_out(lines, 2) == {
        "data/in_test": 4,
        "bank/left_out/long": 7,
        "eval/too_long": 2,
        "rollouts/rejected": 6,
        "rollouts/too_long": 6,
        "writers/dropped/no_text": 3,
    }
    assert left_out(lines, 1)["rollouts/rejected"] == 12
    assert left_out([{"update": 1, "rollouts/rejected": 0}], 1) == {}


def test_every_name_has_words_of_its_own():
    counts = {**dict.fromkeys(LEFT_OUT_WORDS, 2), **{f"{start}reason": 3 for start in REASONS}}
    said = in_words(counts)
    assert len({*said}) == len(counts)
    assert all(is_left_out(name) for name in counts)
    assert in_words(dict.fromkeys(counts, 0)) == []


KEPT = {*COUNTS, "cut_hint", "written", "cached", "unmerged/", "layers/"} - {"rejected", "no_hint", "long_hint"}
"""Counts of what is not left out."""


def counted() -> set[str]:
    """The keys of all that the package counts in ``counts``; of a key with a reason its beginning."""
    found = set[str]()
    for file in Path(dllm_sd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            targets = [node.target] if isinstance(node, ast.AugAssign) else getattr(node, "targets", [])
            for target in targets:
                if isinstance(target, ast.Subscript) and getattr(target.value, "id", "") == "counts":
                    key = target.slice.values[0] if isinstance(target.slice, ast.JoinedStr) else target.slice
                    found |= {str(key.value)} if isinstance(key, ast.Constant) else set()
    return found


def test_whatever_is_counted_anywhere_is_known_as_kept_or_as_left_out():
    places: list[Callable[[str], str]] = ["rollouts/{}".format, "writers/{}".format, "bank/{}".format]
    found = counted()
    for key in found - KEPT:
        assert any(is_left_out(place(key)) for place in places), key
    assert {"long_reference", "rejected", "dropped/", "left_out/", "skipped/"} <= found
    assert not any(is_left_out(place(key)) for key in KEPT for place in places)
