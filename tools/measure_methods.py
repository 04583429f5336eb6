"""Measures the named methods on the tiny models, for `docs/methods.md` and `dllm-sd show`.

python tools/measure_methods.py run FOLDER [NAME ...]   # methods or backbones; an hour; goes on where it stopped
python tools/measure_methods.py collect FOLDER          # -> dllm_sd/assets/measured.json

All runs of a backbone have the same number of updates, completions per update (more with retries until solved),
learning rate and schedule. Nothing is tuned for a single method.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from make_tiny_reader import corrected
from stub_writer import StubWriter, running

import dllm_sd

SEEDS = (1, 2, 3)
UPDATES = 30
JOBS = int(os.environ.get("MEASURE_JOBS", "2"))
ADVANTAGE = tuple(f"advantage/{of}" for of in ("prefix", "error", "after", "localisation", "right"))
"""Means over the first three updates, while the weights are nearly the initial ones."""
MEASURED = Path(dllm_sd.__file__).parent / "assets" / "measured.json"

_ONE = ["method.rollout.problems=64", "method.rollout.attempts=1"]
_GROUP = ["method.rollout.problems=16", "method.rollout.attempts=4"]
_RETRY = ["method.rollout.problems=64"]
_PLAIN_SAMPLING = ["method.rollout.temperature=1.0", "method.rollout.top_k=0", "method.rollout.top_p=1.0"]
_AT_ONE = [*_PLAIN_SAMPLING, "method.temperature=1.0"]
_HINT = "({hint}){question}"


def _hints(*places: int) -> list[str]:
    """Templates for the contexts ``places``: the tiny models read a hint in brackets before the question."""
    return [f"method.contexts.{place}.template={_HINT}" for place in places]


_SHARED: dict[str, list[str]] = {
    "sft": _RETRY,
    "rft": _RETRY,
    "rft_trajectory": _RETRY,
    "grpo": _GROUP,
    "opsd": [*_ONE, *_AT_ONE, *_hints(0)],
    "opsd_v3": [*_ONE, *_AT_ONE, *_hints(0)],
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

_TEXT = "template: '({hint}){question}'"
_RUBRIC = "name: rubric, lines: true, " + _TEXT


def _read(context: str) -> list[str]:
    """Overrides for one attempt at each of 64 problems, with this context."""
    return [*_ONE, *_AT_ONE, f"method.contexts=[{{{context}}}]"]


def _written_by(writer: str) -> list[str]:
    """Overrides for rubrics that a writer writes from the question alone."""
    sampling = "{length: 24, temperature: 0.7, top_p: 0.95}"
    return _read(f"{_RUBRIC}, prompt: '?{{question}}', writing: {{writer: {writer}, sampling: {sampling}}}")


def _critique(form: str) -> list[str]:
    """Overrides for critiques by a server that corrects every rollout perfectly."""
    writing = "{writer: {name: server, url: CRITIC, model: critic}}"
    prompt = "prompt: '{question}|{truth}|{trace}'"
    return _read(f"name: critique, form: {form}, {prompt}, {_TEXT}, writing: {writing}")


_BANK = [
    "method.skill_bank={path: READER/bank.json, count: 4, every: 0}",
    "method.contexts=[{}]".format(", ".join(f"{{name: skills, rank: {rank}, {_TEXT}}}" for rank in range(4))),
]
_FEEDBACK = "name: feedback, anchored: false, solution: '{hint}', comment: '{hint}', prompt: '{response}?{question}'"
_FEEDBACK_WRITING = "writing: {writer: peer, sampling: {length: 24, temperature: 1.0}, tolerance: 1.0}"
_STUDENTS = ", ".join(f"{{name: {name}, domain: {name}, path: READER/{name}}}" for name in ("few", "many"))
_PEERS = f"{{rounds: 2, problems: 256, attempts: 1, temperature: 0.0, students: [{_STUDENTS}]}}"
_ASKING = ["task.prompt='?{rows}:'", "task.answer_field=lines", "task.reference_field=lines"]
_DEGRADED = ("random", "noisy", "reduced")
_FORMS = ("verbatim_prefix", "full_quote", "no_trace")
_DIGITS = (
    "task={name: jsonl, data: READER/train.jsonl, data_test: READER/test.jsonl, prompt: '{puzzle}', "
    "answer_field: solution, reference_field: solution, size_dev: 512}"
)
_SPD = {name: ["method.rollout.problems=64"] for name in ("spd", "self_distillation", "self_retraining")}


def _grown(first: float, step: float, every: int) -> list[str]:
    """Overrides for a progressive horizon, in shares of the completion."""
    return [f"method.rollout.horizon={{initial_ratio: {first}, ratio_step: {step}, every: {every}}}"]


RUNS: dict[str, dict[str, list[str]]] = {
    "autoregressive": {
        **_SHARED,
        "popd": [*_SHARED["popd"], *_grown(8 / 72, 2 / 72, 1)],
        **_SPD,
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
        "d_opsd_paper clip=token": [*_RETRY, "method.divergence.clip=token"],
        "d_opsd_reference": ["method.rollout.problems=64", "method.rollout.passes=4"],
        "later_step": _ONE,
        **_SPD,
        "d_rcsd": [*_RETRY, _DIGITS, f"method.contexts=[{{name: suffix, prompt: {{{_RUBRIC}, source: data}}}}]"],
        "d_step_align": [*_critique("verbatim_prefix"), _DIGITS],
        "diffu_grpo": _GROUP,
        "popd": [*_SHARED["popd"], *_grown(0.25, 0.25, 8)],
        "topd ratio=0.5": [*_SHARED["topd"], "method.rollout.horizon.ratio=0.5"],
    },
    "autoregressive reader": {
        "rcsd_writer": [*_ONE, *_AT_ONE, *_hints(0), *_ASKING],
        "rcsd gold": _read(f"{_RUBRIC}, source: data, writing: null"),
        "rcsd learned": _written_by("{name: checkpoint, path: WRITER}"),
        "rcsd unlearned": _written_by("base"),
        **{f"rcsd {kind}": _read(f"{_RUBRIC}, source: {kind}, writing: null") for kind in _DEGRADED},
        "rcsd none": _read("name: nothing"),
        "rcsd_reference": _read(
            "name: rubric, lines: true, source: data, writing: null, reference: true, "
            "template: '({hint}{reference}){question}'"
        ),
        **{f"step_align {form}": _critique(form) for form in _FORMS},
        "step_align reverse_kl": [*_critique(_FORMS[0]), "method.divergence=reverse_kl"],
        "sgsd": [*_ONE, *_AT_ONE, *_BANK],
        "op_co_distill": [
            *(*_GROUP, f"method.contexts=[{{{_FEEDBACK}, {_TEXT}, {_FEEDBACK_WRITING}}}]", f"peers={_PEERS}"),
        ],
        "sdpo": [*_GROUP, *_hints(0)],
        "sft": _RETRY,
        "opsd_paper": [*_ONE, *_AT_ONE, *_hints(0)],
    },
}
"""By backbone and measurement (a method, and words that name its variant): the overrides of the named method."""

# With 64 completions an update most methods collapse at the learning rate of quickstart_ar (docs/log.md).
_RATE = {"autoregressive": ["optim.lr=3e-4"], "diffusion": []}
_BASE = {"autoregressive": "quickstart_ar", "diffusion": "quickstart"}
_READER = [
    "task={name: jsonl, data: READER/train.jsonl, data_test: READER/test.jsonl, prompt: '{rows}:', "
    "reference_field: worked, size_dev: 512}",
    "decode.length=88",
]
_OWN = {
    "autoregressive": [],
    "diffusion": [],
    "autoregressive reader": ["model.path=READER/ar", *_READER],
}
_TEACHER = {
    "autoregressive": [
        "configs/tiny_ar_sft.yaml",
        *("model.shape.hidden_size=128", "model.shape.intermediate_size=340", "model.shape.num_attention_heads=8"),
        *("optim.lr=2e-3", "eval.every=500", "eval.final_problems=0", "checkpoint.every=500"),
    ],
    "diffusion": ["quickstart", "seed=100", "eval.schedules={}"],
}
"""The autoregressive teacher is a wider model trained on the same text, the diffusion one the quickstart's result."""
_COMMON = ["eval.every=10", "eval.problems=512", "eval.final_problems=1024", "eval.schedules={}", "eval.collapse=0"]
_COMMON += [f"updates={UPDATES}", "log.progress=false", "log.trackers=[]", "checkpoint.every=30"]


def command(backbone: str, name: str, seed: int, folder: Path, critic: str) -> list[str]:
    """The command line of one run."""
    method, kind = name.split()[0], backbone.split()[0]
    paths = {
        "TEACHER": folder / f"teacher_{backbone}",
        "READER": folder / "reader",
        "WRITER": folder / f"writer_{seed}",
        "CRITIC": critic,
    }
    run_folder = f"run={folder / backbone.replace(' ', '_') / name.replace(' ', '_') / str(seed)}"
    overrides = [_BASE[kind], *_OWN[backbone], f"method={method}", *RUNS[backbone][name], *_COMMON, *_RATE[kind]]
    for placeholder, value in paths.items():
        overrides = [text.replace(placeholder, str(value)) for text in overrides]
    return ["train", *overrides, f"seed={seed}", run_folder]


def run(folder: Path, names: list[str]) -> None:
    """Train teachers and readers first, then everything else, `JOBS` runs at a time with one thread each."""
    wanted = [
        (backbone, name)
        for backbone, runs in RUNS.items()
        for name in runs
        if not names or name in names or name.split()[0] in names or backbone in names
    ]
    for backbone in dict.fromkeys(backbone for backbone, _ in wanted):
        needed = " ".join(text for owner, name in wanted if owner == backbone for text in RUNS[backbone][name])
        if "TEACHER" in needed:
            teach(backbone, folder)
        if "READER" in needed or _OWN[backbone]:
            make_reader(folder)
    with running(StubWriter(critic)) as server, ThreadPoolExecutor(JOBS) as pool:
        if any(name == "rcsd learned" for _, name in wanted):
            list(pool.map(lambda seed: learn_to_write(folder, seed), SEEDS))
        jobs = [command(backbone, name, seed, folder, server.url) for seed in SEEDS for backbone, name in wanted]
        for number, outcome in enumerate(pool.map(_call, jobs), 1):
            print(f"{number} of {len(jobs)}: {outcome}", flush=True)


def teach(backbone: str, folder: Path) -> None:
    """Train the larger or longer-trained teacher of on-policy distillation (`_TEACHER`)."""
    teacher, made = folder / f"teacher_{backbone}", folder / f"teacher_{backbone}_run"
    if teacher.is_dir():
        return
    if backbone == "autoregressive":
        data = folder / "tiny_ar_data"
        _tool("make_tiny_asset.py", "data", str(data))
        settings = [*_TEACHER[backbone], f"task.data={data / 'train.jsonl'}"]
    else:
        settings = _TEACHER[backbone]
    _make([*settings], made, teacher)


def make_reader(folder: Path) -> None:
    """Make the tiny reader and its data, and two copies that were trained further on easy or on hard puzzles."""
    reader = folder / "reader"
    if not (reader / "bank.json").is_file():
        _tool("make_tiny_reader.py", str(reader))
    sources = [f"model.tokenizer={reader / 'tokenizer'}", f"task.data={reader / 'imitated.jsonl'}"]
    _make(["configs/tiny_reader_sft.yaml", *sources], reader / "ar_run", reader / "ar")
    imitation = ["method=sft", *_RETRY, "updates=100", "eval.final_problems=0", *_RATE["autoregressive"]]
    settings = [text.replace("READER", str(reader)) for text in _OWN["autoregressive reader"]]
    for domain in ("few", "many"):
        data = [f"task.data={reader / domain}.jsonl", "task.data_test=null"]
        _make(["quickstart_ar", *settings, *data, *imitation], reader / f"{domain}_run", reader / domain)


def learn_to_write(folder: Path, seed: int) -> None:
    """Train the writer of "rcsd learned" (Stage I of RCSD), longer and at the learning rate of quickstart_ar."""
    overrides = command("autoregressive reader", "rcsd_writer", seed, folder, "")[1:-1]
    longer = ["updates=240", "eval.every=40", "checkpoint.every=40", "optim.lr=1e-3"]
    _make([*overrides, *longer], folder / f"writer_{seed}_run", folder / f"writer_{seed}")


def critic(question: str) -> str:
    """Answer ``puzzle:|solution|trace`` with the corrected trace."""
    puzzle, solution, trace = question.split("|", 2)
    return corrected(puzzle.rstrip(":").replace(" ", ""), solution.replace(" ", ""), trace)


def _make(settings: list[str], made: Path, target: Path) -> None:
    """Train and export the best weights, unless ``target`` exists."""
    if not target.is_dir():
        print(_call(["train", *settings, "log.progress=false", "log.trackers=[]", f"run={made}"]), flush=True)
        print(_call(["export", str(made), "--to", "merged", str(target)]), flush=True)


def _tool(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(Path(__file__).with_name(name)), *arguments], check=True)


def _call(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dllm_sd", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    output = (done.stderr or done.stdout).strip().splitlines() or [""]
    return f"{arguments[-1]}: {'done' if done.returncode == 0 else output[-1]}"


def collect(folder: Path) -> None:
    """Summarise every finished run over its seeds, and write the records."""
    records = []
    for backbone, runs in RUNS.items():
        for name in runs:
            method_folder = folder / backbone.replace(" ", "_") / name.replace(" ", "_")
            for variant, finished in _reports(method_folder).items():
                records.append({"method": f"{name}{variant}", "backbone": backbone, **_summary(finished)})
    MEASURED.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(f"{len(records)} rows written to {MEASURED}")


def _reports(folder: Path) -> dict[str, list[Path]]:
    """The runs of all seeds; those of two students under the name of each."""
    students = sorted({path.parent.name for path in folder.glob("*/students/*/report.json")})
    if students:
        return {
            f" {name}": sorted(path.parent for path in folder.glob(f"*/students/{name}/report.json"))
            for name in students
        }
    runs = sorted(path.parent for path in folder.glob("*/report.json"))
    return {"": runs} if runs else {}


def _summary(runs: list[Path]) -> dict[str, Any]:
    reports = [json.loads((run / "report.json").read_text(encoding="utf-8")) for run in runs]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]

    def accuracies(which: str) -> list[float]:
        return [round(100 * report[which]["trained"]["accuracy"], 1) for report in reports]

    def values_of(key: str) -> list[list[float]]:
        return [[line[key] for line in log if line.get(key) is not None] for log in lines]

    def last(key: str) -> float | None:
        logged = values_of(key)
        return round(mean(mean(values[-5:]) for values in logged), 3) if all(logged) else None

    def first(key: str) -> float | None:
        logged = values_of(key)
        return round(mean(mean(values[:3]) for values in logged), 3) if all(logged) else None

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
        **{name: value for name in ADVANTAGE if (value := first(name)) is not None},
    }


if __name__ == "__main__":
    task, where, *rest = sys.argv[1:]
    run(Path(where), rest) if task == "run" else collect(Path(where))
