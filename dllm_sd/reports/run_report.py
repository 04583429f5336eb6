"""Reads a run folder into the plain data that its report shows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from dllm_sd.config import Config, build_config, to_tree
from dllm_sd.errors import InputError, shown
from dllm_sd.files.reading import read_own
from dllm_sd.files.typed_json import build, own_json
from dllm_sd.methods.differences import named_differences
from dllm_sd.training.folder import CONFIG, REPORT, read_run_config
from dllm_sd.training.left_out import in_words
from dllm_sd.training.log_files import LOG_FILES, STARTS, read_log
from dllm_sd.training.outcome import MUCH

TRACES_BYTES = 3_000_000
"""About how much of traces.jsonl a report holds, over all of its runs; updates in between are left out."""
Rows = list[tuple[str, Any, Any]]
"""Keys with their values in the run, and those that they are compared with."""

UNREAD = {"prompts": "the prompts", "completions": "the references that it imitates", "hints": "the teachers' prompts"}
"""The kinds of text whose unknown tokens a run counts, in words."""


@dataclass(frozen=True)
class RunReport:
    """What a report shows of one run."""

    folder: Path
    name: str
    """Shortest end of the path that tells the runs of a report apart."""
    tree: Mapping[str, Any]
    """The config as it was written."""
    report: Mapping[str, Any] | None
    """report.json; None where the run has not ended."""
    metrics: Sequence[Mapping[str, Any]]
    traces: Sequence[Mapping[str, Any]]
    """Lines of traces.jsonl."""
    traced_updates: tuple[int, int]
    """How many updates have traces here, and in the run."""
    start: Mapping[str, Any]
    """Last line of environment.jsonl; empty without one."""
    missing: tuple[str, ...]
    """Sentences on what the run lacks."""
    former_end: int | None = None
    """The update at which the run ended before it was given more updates, if it has not ended again."""
    method: str | None = None
    """The named method that the run's was made from, or is closest to; None where the config cannot be read."""
    method_changes: Rows = field(default_factory=list)
    """Where the method differs from that one."""
    changes: Rows = field(default_factory=list)
    """Other settings that are not at their defaults."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All settings by dotted key, except for the folder of the run; empty where the config cannot be read."""

    @property
    def imitates_references(self) -> bool:
        """Whether it trains on the data's references, which count as correct without being graded."""
        rollout = (self.tree.get("method") or {}).get("rollout")
        name = rollout.get("name") if isinstance(rollout, Mapping) else rollout
        return name == "demonstrations"

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Dev accuracy by update."""
        return [(line["update"], line["eval/accuracy"]) for line in self.metrics if "eval/accuracy" in line]

    @property
    def dev_problems(self) -> int | None:
        """How many dev problems an evaluation graded; None where the report does not say."""
        too_long = next((line["eval/too_long"] for line in reversed(self.metrics) if "eval/too_long" in line), 0)
        problems = (self.report or {}).get("dev_problems")
        return problems - too_long if isinstance(problems, int) and problems > too_long else None

    @property
    def best(self) -> int | None:
        """The update of the best weights; None without an evaluation."""
        if self.report is not None and self.report.get("best_dev_accuracy", -1) >= 0:
            return self.report["best_update"]
        return max(self.curve, key=lambda point: (point[1], point[0]))[0] if self.curve else None

    @property
    def collapse(self) -> int | None:
        """The first evaluation whose accuracy is far below the best one before it; None if there is none."""
        fall, best = (self.tree.get("eval") or {}).get("collapse") or MUCH, -math.inf
        for update, accuracy in self.curve:
            best = max(best, accuracy)
            if accuracy < best - fall:
                return update
        return None

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before the figures."""
        report = self.report or {}
        sentences = [*report.get("warnings", ())]
        if report.get("stopped") and report.get("outcome") != "collapsed":
            sentences.append(f"The run stopped early: {report['stopped']}.")
        if self.collapse is not None and "outcome" not in report:  # else the warnings of the run say it
            sentences.append(f"The dev accuracy collapsed: at update {self.collapse} it is far below its best.")
        if left_out := in_words(report.get("left_out", {})):
            sentences.append(f"Left out: {', '.join(left_out)}.")
        sentences += [_unread(kind, share) for kind in UNREAD if (share := self._most(f"rollouts/unknown_{kind}"))]
        return sentences

    @property
    def drawn(self) -> list[Mapping[str, Any]]:
        """The metrics without the pass rates that earlier versions logged of references."""
        left_out = {"rollouts/pass_rate", "rollouts/first_try"} if self.imitates_references else set[str]()
        return [{name: value for name, value in line.items() if name not in left_out} for line in self.metrics]

    def _most(self, metric: str) -> float:
        """The highest value of a metric; 0 where the run has none."""
        return max((value for line in self.metrics if isinstance(value := line.get(metric), int | float)), default=0.0)


def _unread(kind: str, share: float) -> str:
    """The warning that a share of the tokens of a kind of text is the unknown token, which hides what stood there."""
    return (
        f"The model cannot read all of {UNREAD[kind]}: up to {max(100 * share, 0.1):.1f} % of their tokens are unknown "
        f"to the tokenizer (rollouts/unknown_{kind})."
    )


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run, or the runs of two students in it.

    Raises:
        InputError: if it is neither.
    """
    tree = read_run_config(folder) if (folder / CONFIG).is_file() else {}
    if not {"task", "method"} <= tree.keys():
        raise InputError(
            f"{shown(str(folder))} is not a run: it has no {CONFIG} with a task and a method; name a folder that "
            "dllm-sd train wrote"
        )
    students = sorted(path.parent for path in folder.glob(f"students/*/{CONFIG}"))
    return students or [folder]


def read_runs(folders: Sequence[Path]) -> list[RunReport]:
    """Read runs, and those of the students of peers.

    Raises:
        InputError: naming the folder that is no run, or the file and line that no run wrote.
    """
    found = list(dict.fromkeys(run for folder in folders for run in runs_in(folder)))
    return [_read(run, name, TRACES_BYTES // len(found)) for run, name in zip(found, _names(found), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = next((n for n in range(1, 50) if len({part[-n:] for part in parts}) == len(parts)), 50)
    return ["/".join(part[-depth:]) for part in parts]


def _read(folder: Path, name: str, budget: int) -> RunReport:
    tree, missing = read_run_config(folder), list[str]()
    metrics = [*_lines(folder / LOG_FILES[0])]
    report = _report(folder / REPORT, missing)
    former_end = None if report is None else _former_end(tree, report, metrics)
    if former_end is not None:
        report = None
        missing.append(
            f"The run was given more updates after its end at update {former_end} and has not ended again. The figures "
            "are those so far; the test results of its former end are left out."
        )
    if not any("eval/accuracy" in line for line in metrics):
        missing.append("The run has no evaluation on the dev split (eval.every 0, or none was reached).")
    if report is not None and not report.get("best"):
        missing.append(
            "Initial, last and best weights were not compared on the test split; set eval.final_problems for that."
        )
    traces, updates = _traces(folder / LOG_FILES[2], budget)
    if not updates[1]:
        missing.append("There are no traces of rollouts (log.trace or log.samples is 0, or an earlier version ran).")
    starts = [*_lines(folder / STARTS)]
    if not starts:
        missing.append("Versions and hardware are not known: the run has no environment.jsonl.")
    try:
        settings = report_settings(build_config(tree))
    except InputError as error:  # a config of another version, or one that names a part of a plugin
        missing.append(f"The config is not compared with defaults: {error}.")
        settings = {}
    start = starts[-1] if starts else {}
    return RunReport(
        folder, name, tree, report, metrics, traces, updates, start, tuple(missing), former_end, **settings
    )


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    yield from read_log(file) if file.is_file() else ()


def _report(file: Path, missing: list[str]) -> dict[str, Any] | None:
    """report.json; None, and a sentence, where there is none or it is damaged."""
    if not file.is_file():
        missing.append("The run has not ended: it has no report.json. The figures are those so far.")
        return None
    try:
        tree = own_json(read_own(file, "train the run to its end again"))
        build(_Report, tree)
    except ValueError as error:
        missing.append(f"The file report.json is damaged ({error}); its figures are left out.")
        return None
    return tree


def _former_end(tree: Mapping[str, Any], report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """The update that a report is of, if the run is to go on after it, or has done so; else None."""
    end, wanted = report["updates"], tree.get("updates", Config.updates)
    logged = max((line["update"] for line in metrics), default=0)
    extended = isinstance(wanted, int) and wanted > end and not report.get("stopped")
    return end if extended or logged > end else None


@dataclass(frozen=True)
class _Report:
    """The entries of report.json that a report reads, whatever version wrote it."""

    partial: ClassVar[bool] = True
    updates: int
    before: Mapping[str, Mapping[str, Any]]
    after: Mapping[str, Mapping[str, Any]]
    best: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Trace:
    """The entries of a line of traces.jsonl that the viewer reads."""

    partial: ClassVar[bool] = True
    update: int
    slot: int
    problem: str
    attempt: int
    correct: bool
    score: float
    gated: bool
    causal: bool
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    reveal_step: tuple[int, ...]
    length: int
    blocks: tuple[int, ...]
    teachers: tuple[Mapping[str, Any], ...]
    canvases: tuple[Mapping[str, Any], ...]
    graded: int
    sites: tuple[Mapping[str, Any], ...]
    pieces: Mapping[str, str]


def _traces(file: Path, budget: int) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """Lines of traces.jsonl of evenly spread updates, and how many updates these are of how many."""
    sizes: dict[int, int] = {}
    for line in _lines(file):
        sizes[line["update"]] = sizes.get(line["update"], 0) + len(str(line))
    updates = sorted(sizes)
    count = len(updates)
    while count > 2 and sum(sizes[update] for update in _spread(updates, count)) > budget:
        count = max(2, count * 3 // 4)
    chosen = set(_spread(updates, count))
    lines = [line for line in _lines(file) if line["update"] in chosen]
    for line in lines:
        try:
            build(_Trace, line)
        except ValueError as error:
            raise InputError(
                f"{file}: a line of update {line['update']} was not written by a run ({error}); remove the file to do "
                "without the viewer"
            ) from error
    return lines, (len(chosen), len(updates))


def _spread(updates: Sequence[int], count: int) -> list[int]:
    """``count`` of the updates, the first and the last among them, evenly spread."""
    if count >= len(updates):
        return [*updates]
    return [updates[round(i * (len(updates) - 1) / (count - 1))] for i in range(count)]


def report_settings(config: Config) -> dict[str, Any]:
    """The entries of `RunReport` on a config: its named method, and how it differs from that and from the defaults."""
    tree, changes = to_tree(config), Rows()
    for f in fields(config):
        if f.name not in ("method", "run", "resume"):
            changes += _unequal(flat(tree[f.name], f.name), flat(_defaults(getattr(config, f.name), f), f.name))
    named = named_differences(config.method)
    method: Rows = [(change.key, change.value, change.former) for change in named.changes]
    settings = {key: value for key, value in flat(tree).items() if key not in ("run", "resume")}
    return {"method": named.name, "method_changes": method, "changes": changes, "settings": settings}


def _unequal(now: Mapping[str, Any], former: Mapping[str, Any]) -> Rows:
    """The keys of two flat trees whose values differ, with both values; None stands for a key that is not there."""
    keys = dict.fromkeys([*now, *former])
    return [(key, now.get(key), former.get(key)) for key in keys if now.get(key) != former.get(key)]


def _defaults(value: Any, f: Any) -> Any:
    """The tree of the defaults of a config's entry; a task, which has to be chosen, has those of its class."""
    if f.default is not MISSING:
        return to_tree(f.default)
    tree = {}
    for inner in fields(value) if is_dataclass(value) else ():
        default = inner.default_factory() if inner.default_factory is not MISSING else inner.default
        if default is not MISSING:
            tree[inner.name] = to_tree(default, inner.metadata.get("parts"))
    return tree


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree by dotted key, without empty mappings and lists."""
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    leaves: dict[str, Any] = {}
    for key, value in pairs:
        leaves |= flat(value, f"{path}.{key}" if path else str(key))
    return leaves if pairs or not path or tree in ({}, []) else {path: tree}
