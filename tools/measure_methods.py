"""Measure the named methods on the tiny models, and write what `docs/methods.md` and `dllm-sd show` say of them.

python tools/measure_methods.py run FOLDER [NAME ...]   # methods or backbones; an hour; goes on where it stopped
python tools/measure_methods.py collect FOLDER          # -> dllm_sd/assets/measured.json

Runs of a backbone share the number of updates and of completions in each of them (a rule that tries
again until solved makes more), learning rate and schedule. Nothing is tuned for a method.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import dllm_sd

SEEDS = (1, 2, 3)
UPDATES = 30
JOBS = int(os.environ.get("MEASURE_JOBS", "2"))
MEASURED = Path(dllm_sd.__file__).parent / "assets" / "measured.json"

_ONE = ["method.rollout.problems=64", "method.rollout.attempts=1"]
_GROUP = ["method.rollout.problems=16", "method.rollout.attempts=4"]
_RETRY = ["method.rollout.problems=64"]
_PLAIN_SAMPLING = ["method.rollout.temperature=1.0", "method.rollout.top_k=0", "method.rollout.top_p=1.0"]
_AT_ONE = [*_PLAIN_SAMPLING, "method.temperature=1.0"]
_HINT = "({hint}){question}"


def _hints(*places: int) -> list[str]:
    """The tiny models read a hint in brackets before the question."""
    return [f"method.contexts.{place}.template={_HINT}" for place in places]


_SHARED: dict[str, list[str]] = {
    "sft": _RETRY,
    "rft": _RETRY,
    "rft_trajectory": _RETRY,
    "grpo": _GROUP,
    "opsd": [*_ONE, *_AT_ONE, *_hints(0)],
    "opsd_paper": [*_ONE, *_AT_ONE, *_hints(0)],
    "opsd_reference": [*_ONE, *_AT_ONE, *_hints(0)],
    "opsd_pmi": [*_ONE, *_AT_ONE, *_hints(0, 1)],
    "d_opsd_prompt": [*_RETRY, *_hints(0)],
    "sdpo": [*_GROUP, *_hints(0)],
    "sdpo_paper": [*_GROUP, *_hints(0)],
    "demo_psd": [*_GROUP, *_hints(0)],
    "opd": [*_ONE, "method.teacher.0.path=TEACHER"],
    "opd_sampled": [*_ONE, "method.teacher.0.path=TEACHER"],
    "topd": [*_ONE, "method.teacher.0.path=TEACHER"],
    "popd": [*_ONE, "method.teacher.0.path=TEACHER"],
}
_SHORTCUT = ["method.contexts.0.source=answer"]

RUNS: dict[str, dict[str, list[str]]] = {
    "autoregressive": {
        **_SHARED,
        "popd": [*_SHARED["popd"], "method.rollout.horizon.start=8", "method.rollout.horizon.step=2"],
        "topd ratio=0.25": [*_SHARED["topd"], "method.rollout.horizon.ratio=0.25"],
        "topd ratio=0.5": [*_SHARED["topd"], "method.rollout.horizon.ratio=0.5"],
        "opsd_reference answer": [*_SHARED["opsd_reference"], *_SHORTCUT],
        "opsd_pmi answer": [*_SHARED["opsd_pmi"], *_SHORTCUT, "method.contexts.1.source=answer"],
    },
    "diffusion": {
        **_SHARED,
        **dict.fromkeys(
            ("d_opsd", "d_opsd_paper", "d_opsd_reference", "d_opsd_pmi", "d_demo_psd", "later_step"), _RETRY
        ),
        "d_opsd_reference": ["method.rollout.problems=64", "method.rollout.passes=4"],
        "later_step": _ONE,
        "diffu_grpo": _GROUP,
        "popd": [*_SHARED["popd"], "method.rollout.horizon={name: progressive, start: 1, step: 1, every: 8}"],
        "topd ratio=0.5": [*_SHARED["topd"], "method.rollout.horizon.ratio=0.5"],
    },
}
"""Backbone: what is measured (a method, and what tells a variant of it): overrides beside the method's own row."""

# With 64 completions an update most methods collapse at the learning rate of quickstart_ar (docs/log.md).
_RATE = {"autoregressive": ["optim.lr=3e-4"], "diffusion": []}
_BASE = {"autoregressive": "quickstart_ar", "diffusion": "quickstart"}
_TEACHER = {
    "autoregressive": [
        "configs/tiny_ar_sft.yaml",
        *("model.shape.hidden_size=128", "model.shape.intermediate_size=340", "model.shape.num_attention_heads=8"),
        *("optim.lr=2e-3", "eval.every=500", "eval.final_problems=0", "checkpoint.every=500"),
    ],
    "diffusion": ["quickstart", "seed=100", "eval.schedules={}"],
}
"""The autoregressive teacher is a wider body that imitated the same text, the diffusion one the quickstart's result."""
_COMMON = ["eval.every=10", "eval.problems=512", "eval.final_problems=1024", "eval.schedules={}", "eval.collapse=0"]
_COMMON += [f"updates={UPDATES}", "log.progress=false", "log.tensorboard=false", "checkpoint.every=30"]


def command(backbone: str, name: str, seed: int, folder: Path) -> list[str]:
    """One run."""
    method = name.split()[0]
    teacher = str(folder / f"teacher_{backbone}")
    overrides = [text.replace("TEACHER", teacher) for text in RUNS[backbone][name]]
    where = f"run={folder / backbone / name.replace(' ', '_') / str(seed)}"
    return ["train", _BASE[backbone], f"method={method}", *overrides, *_COMMON, *_RATE[backbone], f"seed={seed}", where]


def run(folder: Path, names: list[str]) -> None:
    """Train the teachers of on-policy distillation, then everything, `JOBS` runs at a time with one thread each."""
    wanted = [
        (backbone, name)
        for backbone, runs in RUNS.items()
        for name in runs
        if not names or name.split()[0] in names or backbone in names
    ]
    for backbone in dict.fromkeys(backbone for backbone, name in wanted if "TEACHER" in " ".join(RUNS[backbone][name])):
        teach(backbone, folder)
    jobs = [command(backbone, name, seed, folder) for seed in SEEDS for backbone, name in wanted]
    with ThreadPoolExecutor(JOBS) as pool:
        for number, said in enumerate(pool.map(_call, jobs), 1):
            print(f"{number} of {len(jobs)}: {said}", flush=True)


def teach(backbone: str, folder: Path) -> None:
    """The better model that on-policy distillation learns from (`_TEACHER`)."""
    teacher, made = folder / f"teacher_{backbone}", folder / f"teacher_{backbone}_run"
    if teacher.is_dir():
        return
    if backbone == "autoregressive":
        data = folder / "tiny_ar_data"
        maker = [sys.executable, str(Path(__file__).with_name("make_tiny_asset.py")), "data", str(data)]
        subprocess.run(maker, check=True)
        settings = [*_TEACHER[backbone], f"task.data={data / 'train.jsonl'}"]
    else:
        settings = _TEACHER[backbone]
    print(_call(["train", *settings, "log.progress=false", "log.tensorboard=false", f"run={made}"]), flush=True)
    print(_call(["export", str(made), "--to", "merged", str(teacher)]), flush=True)


def _call(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dllm_sd", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = (done.stderr or done.stdout).strip().splitlines() or [""]
    return f"{arguments[-1]}: {'done' if done.returncode == 0 else said[-1]}"


def collect(folder: Path) -> None:
    """Means over seeds of every run that ended, and each seed's gain."""
    records = []
    for backbone, runs in RUNS.items():
        for name in runs:
            found = sorted((folder / backbone / name.replace(" ", "_")).glob("*/report.json"))
            if found:
                records.append({"method": name, "backbone": backbone, **_summary([file.parent for file in found])})
    MEASURED.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(f"{len(records)} rows written to {MEASURED}")


def _summary(runs: list[Path]) -> dict[str, Any]:
    reports = [json.loads((run / "report.json").read_text(encoding="utf-8")) for run in runs]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]

    def accuracies(which: str) -> list[float]:
        return [round(100 * report[which]["trained"]["accuracy"], 1) for report in reports]

    def last(key: str) -> float | None:
        found = [[line[key] for line in log if line.get(key) is not None] for log in lines]
        return round(mean(mean(values[-5:]) for values in found), 3) if all(found) else None

    def total(key: str) -> float:
        return mean(sum(line.get(key) or 0 for line in log) for log in lines)

    return {
        "seeds": len(runs),
        "updates": round(mean(report["updates"] for report in reports)),
        "skipped": round(mean(report["updates_skipped"] for report in reports)),
        "before": accuracies("before"),
        "after": accuracies("after"),
        "best": accuracies("best"),
        "generated": round(total("rollouts/generated")),
        "seconds": round(total("time/rollouts") + total("time/learning"), 1),
        "length": last("eval/length"),
        "entropy": last("student/entropy"),
    }


if __name__ == "__main__":
    task, where, *rest = sys.argv[1:]
    run(Path(where), rest) if task == "run" else collect(Path(where))
