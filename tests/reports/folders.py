"""Run folders written by hand, for tests of reports: what a run of two updates leaves, without training."""

import json
from pathlib import Path
from typing import Any

from dllm_sd.config import build_config, to_yaml

HOSTILE = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>&amp;\u2028 \N{SNOWMAN}"
"""Text that would do harm if it were taken for a part of the page."""
TEST = {"n": 64, "accuracy": 0.5, "score": 0.75, "ci95": [0.38, 0.62], "length": 4.0}


def site(position: int, divergence: float = 0.25, **changes: Any) -> dict[str, Any]:
    """One traced site: token 1 is drawn."""
    student = {"drawn": 0.7, "top": [[1, 0.7], [2, 0.2], [3, 0.1]]}
    teacher = {"drawn": 0.9, "top": [[1, 0.9], [3, 0.06], [2, 0.04]]}
    numbers = {"divergence": [divergence], "clipped": [min(divergence, 0.05)], "trust": [1.0]}
    where = {"canvas": position, "step": position, "position": position, "token": 1}
    return {**where, **numbers, "student": student, "teachers": [teacher], **changes}


def trace(update: int, slot: int = 0, **changes: Any) -> dict[str, Any]:
    """One line of traces.jsonl: four positions, revealed from left to right."""
    canvases = [{"step": step, "masked": [step, 4], "shown": [[step + 1, 4]]} for step in range(4)]
    return {
        **{
            "update": update,
            "slot": slot,
            "problem": "p",
            "occurrence": 0,
            "attempt": 0,
            "correct": True,
            "score": 1.0,
        },
        **{"parsed": "x", "gated": False, "causal": False, "prompt": [2, 3], "tokens": [1, 1, 1, 1]},
        **{"reveal_step": [0, 1, 2, 3], "length": 4, "blocks": [0, 2], "teachers": [], "canvases": canvases},
        **{"graded": 4, "sites": [site(i, 0.02 * (i + 1)) for i in range(4)]},
        "pieces": {"1": "one", "2": "two", "3": "three"},
        **changes,
    }


def metrics(*accuracies: float) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with an evaluation at each update, from the initial weights on."""
    return [
        {"update": i, "loss": 1.0 / (i + 1) if i else None, "eval/accuracy": accuracy, "rollouts/generated": 10 * i}
        for i, accuracy in enumerate(accuracies)
    ]


def write_run(folder: Path, **changes: Any) -> Path:
    """Write a run; changes name files without their ending, None leaves a file out."""
    tree = {
        "run": str(folder),
        "model": {"path": "tiny"},
        "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"},
        "method": {"name": "d_opsd", "divergence": {"name": "jsd", "beta": 0.5}},
        "optim": {"lr": 3e-4},
        "updates": 2,
        **changes.get("config", {}),
    }
    report = {
        **{"task": "sudoku", "updates": 2, "updates_skipped": 0, "stopped": None, "best_update": 1},
        **{"best_dev_accuracy": 0.6, "left_out": {"rollouts/rejected": 7}, "warnings": [], "dev_problems": 100},
        **{name: {"trained": {**TEST, "accuracy": a}} for name, a in (("before", 0.5), ("after", 0.6), ("best", 0.7))},
    }
    start = {
        "update": 0,
        "started": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13.0"},
        "commit": "c0ffee",
        "cores": 2,
    }
    files: dict[str, list[Any] | None] = {
        "metrics": metrics(0.5, 0.6, 0.55),
        "traces": [trace(1), trace(2)],
        "environment": [start],
        "report": [report],
        **{name: value for name, value in changes.items() if name != "config"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(build_config(tree)), encoding="utf-8")
    for name, lines in files.items():
        if lines is not None:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / (f"{name}.json" if name == "report" else f"{name}.jsonl")).write_text(text, encoding="utf-8")
    return folder
