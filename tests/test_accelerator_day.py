"""The script for a day with a GPU: the table of its results, and a rehearsal on the CPU."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tools.accelerator_table import outcome, printed, read, table


def result(**changes: Any) -> dict[str, Any]:
    return {"step": "decode", "status": 0, "seconds": 7, "command": [], "printed": ["ratio 3", "a | b"], **changes}


def test_the_table_has_what_every_step_printed():
    assert table([result(), result(step="4bit", status=1, printed=["1", "2", "3", "4"])]).splitlines()[2:] == [
        "| decode | done | 7 | ratio 3 |",
        "|  |  |  | a \\| b |",
        "| 4bit | failed with exit status 1 | 7 | 2 |",
        "|  |  |  | 3 |",
        "|  |  |  | 4 |",
    ]
    assert table([result(status=124, printed=[])]).splitlines()[2:] == [
        "| decode | ran out of time | 7 | nothing printed |"
    ]
    assert outcome(137) == "ran out of time"


def test_a_result_that_was_cut_off_and_lines_that_are_no_results_are_left_out(tmp_path: Path):
    file, log = tmp_path / "results.jsonl", tmp_path / "decode.log"
    assert read(file) == []
    file.write_text(json.dumps(result()) + "\n" + json.dumps(result())[:20])
    assert read(file) == [result()]
    log.write_bytes(b"torch 2.13, 1 threads\n\n" + b"x" * 300 + b"\xff\n" + b"".join(b"%d\n" % i for i in range(11)))
    assert printed(log) == ["x" * 200, *map(str, range(11))]


@pytest.mark.slow
def test_the_rehearsal_runs_every_step(tmp_path: Path):
    script = Path(__file__).parent.parent / "tools" / "accelerator_day.sh"
    subprocess.run([script, "--rehearse", tmp_path / "out"], check=True, capture_output=True)
    results = {x["step"]: x for x in read(tmp_path / "out" / "results.jsonl")}
    names = {"matmul", "decode", "update", "tests", "forwards", "graphs", "loss", "optimizer", "4bit", "gloo"}
    assert results.keys() == names
    failed = {name: x["printed"] for name, x in results.items() if x["status"]}
    assert failed.keys() <= {"4bit", "tests"}, failed  # without bitsandbytes, without a GPU
    assert (tmp_path / "out" / "table.md").read_text() == table([*results.values()])
