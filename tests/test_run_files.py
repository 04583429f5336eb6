"""Whatever stands in the place of a file of a run, whoever reads it says in one sentence that names the file."""

import ast
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.config import build_config
from dllm_sd.errors import InputError
from dllm_sd.evaluation.comparison import compare_files
from dllm_sd.evaluation.recording import GradedAttempt, Record, begin, finish
from dllm_sd.export.model_card import read_results, settings_of
from dllm_sd.settings import Peers, PeerStudent
from dllm_sd.skills import Bank, Mistake, Skill, read_bank, write_bank
from dllm_sd.training.checkpoint import check_best, check_checkpoint, saved_log_sums, state_of
from dllm_sd.training.folder import read_report, read_run_config
from dllm_sd.training.log_files import LogSums, MetricsLog, check_logs
from dllm_sd.training.peers import _read_rounds
from dllm_sd.training.trainer import Trainer
from tests.sources import nodes
from tests.tiers import crossed, later

TREE: dict[str, Any] = {
    "updates": 2,
    "model": {
        "random_init": True,
        "tokenizer": "tiny",
        "shape": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    },
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}", "size_train": 64},
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 8},
    "method": {"name": "sft", "rollout": {"problems": 2}},
    "eval": {"every": 1, "problems": 2, "final_problems": 2},
    "checkpoint": {"every": 1},
    "log": {"progress": False, "trackers": [], "samples_every": 1},
}
PEERS = Peers(rounds=1, students=(PeerStudent("one", "a"), PeerStudent("two", "b")))
ROUND = {"round": 0, "scores": {"one": {"a": 0.5}, "two": {"a": 1}}, "lag": {"one": 0.5, "two": 0.0}}
BANK = Bank((Skill("gen_001", "t", "p", "w"),), (Mistake("err_001", "d", "w", "h"),))
BEST, LAST = Path("checkpoints/best"), Path("checkpoints/000002")


def attempts_of(run: Path) -> None:
    (run / "eval" / ".generations.0.jsonl").unlink(missing_ok=True)
    finish(run / "eval", ["a", "b"], ["trained"], 1)


def facts_of(run: Path) -> dict[str, Any]:
    """What a report must say, from the one beside the run."""
    whole = json.loads((run.parent / "report.json").read_text())
    return {name: whole[name] for name in ("task", "updates", "best_update", "best_dev_accuracy", "stopped", "before")}


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "card": ("report.json", read_results),
    "report": ("report.json", lambda run: read_report(run, facts_of(run))),
    "config": ("config.yaml", lambda run: build_config(read_run_config(run))),
    "settings": ("config.yaml", settings_of),
    "sums": ("metrics.jsonl", lambda run: MetricsLog(run, 2).summed_up(1)),
    "metrics": ("metrics.jsonl", lambda run: check_logs(run, 2, None)),
    "samples": ("samples.jsonl", lambda run: check_logs(run, 2, None)),
    "same metrics": ("metrics.jsonl", lambda run: check_logs(run, 2, saved_log_sums(run / LAST))),
    "rounds": ("rounds.json", lambda run: _read_rounds(run, PEERS)),
    "state": (str(LAST / "state.json"), lambda run: check_checkpoint(run / LAST)),
    "weights": (str(LAST / "model.safetensors"), lambda run: check_checkpoint(run / LAST)),
    "best state": (str(BEST / "state.json"), lambda run: check_best(run, state_of(run / LAST))),
    "best weights": (str(BEST / "model.safetensors"), lambda run: check_best(run, state_of(run / LAST))),
    "attempts": ("eval/generations.jsonl", attempts_of),
    "own attempts": ("eval/.generations.0.jsonl", lambda run: Record(run / "eval", "trained", 0)),
    "comparison": ("eval/generations.jsonl", lambda run: compare_files(run / "eval", run / "eval")),
    "bank": ("bank.json", lambda run: read_bank(str(run / "bank.json"))),
}
"""Who reads a file of a run: the file, and how it is read."""
LINES = (".jsonl",)
TEXTS = {
    "empty": "",
    "list": "[]",
    "number": "3",
    "text": '"text"',
    "null": "null",
    "NUL bytes": "\0" * 999,
    "deep": "[" * 100_000,
    "deep objects": '{"update":' * 50_000,
    "no UTF-8": "\udcff\udcfe",
    "twice": '{"update": 1, "update": 2}',
    "NaN": "NaN",
}
OTHERS = ("missing", "folder", "loop", "pipe", "cut off", "50 MB")
FORGIVEN = {
    **{("card", kind): None for kind in ("missing",)},
    **{("report", kind): None for kind in ("missing", "cut off", "50 MB", *TEXTS)},
    **{(reader, "missing"): None for reader in ("metrics", "samples")},
    **{(reader, kind): None for reader in ("metrics", "samples") for kind in ("empty", "loop")},
    **{("rounds", kind): [] for kind in ("missing", "list")},
    ("sums", "empty"): LogSums(),
}
"""Nothing is there yet, or what is there will be written anew: what is read then."""
ANYTHING = {("own attempts", "missing"), ("own attempts", "empty"), ("settings", "list")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, evaluated, with the files that only some runs have."""
    run = tmp_path_factory.mktemp("files") / "run"
    Trainer(build_config({**TREE, "run": str(run)})).train()
    shutil.copyfile(run / "report.json", run.parent / "report.json")
    (run / "rounds.json").write_text(json.dumps([{**ROUND, "tutors": {"one": True, "two": False}}], indent=1))
    write_bank(BANK, run / "bank.json")
    begin(run / "eval", {})
    record = Record(run / "eval", "trained", 0)
    for problem in "ab":
        record.append(GradedAttempt(problem, "0" * 12, 0, "12", problem == "a", 0.5, None, 2, 1))
    finish(run / "eval", ["a", "b"], ["trained"], 1)
    shutil.copyfile(run / "eval" / "generations.jsonl", run / "eval" / ".generations.0.jsonl")
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copyfile(whole.parent / "report.json", tmp_path / "report.json")
    return shutil.copytree(whole, tmp_path / "run")


def damage(file: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    content = file.read_bytes()
    end = b"\n" if file.suffix in LINES else b""
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "cut off":
        file.write_bytes(content[:-20] + end)
    elif kind == "50 MB":
        with file.open("wb") as sparse:
            sparse.truncate(50 * 2**20)
            sparse.seek(0, os.SEEK_END)
            sparse.write(end)
    elif kind != "missing":
        text = TEXTS[kind].encode("utf-8", "surrogateescape")
        file.write_bytes(text + (end if text else b""))


def refusal(read: Callable[[Path], Any], run: Path, file: Path) -> str | None:
    """The one sentence with which a file is refused; None where it is read."""
    try:
        read(run)
    except InputError as error:
        said = str(error)
        assert file.name in said or str(file.parent) in said, said
        assert "\n" not in said
        assert "; " in said, "a remedy"
        assert len(said) < 600 + 3 * len(str(file))
        return said
    return None


@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_damaged_is_read(run: Path, reader: str):
    name, read = READERS[reader]
    assert refusal(read, run, run / name) is None
    assert reader != "report" or read(run) is not None


@pytest.mark.parametrize(("reader", "kind"), crossed(READERS, [*OTHERS, *TEXTS]))
def test_something_else_in_the_place_of_a_file_is_named(run: Path, reader: str, kind: str):
    name, read = READERS[reader]
    damage(run / name, kind)
    if (reader, kind) in FORGIVEN:
        assert read(run) == FORGIVEN[reader, kind]
    elif (reader, kind) in ANYTHING:
        refusal(read, run, run / name)
    else:
        assert refusal(read, run, run / name) is not None


def places(tree: Any, path: tuple[Any, ...] = (), deep: int = 4) -> Iterator[tuple[Any, ...]]:
    """Where values stand in a tree, down to some depth."""
    if path:
        yield path
    if deep:
        for key in tree if isinstance(tree, Mapping) else range(len(tree)) if isinstance(tree, list) else ():
            yield from places(tree[key], (*path, key), deep - 1)


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A tree with another value, or without the key where this is ``...``."""
    tree = json.loads(json.dumps(tree))
    at = tree
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return tree


WRONG = (..., None, "text", -1, 1.5, 2**70, math.nan, True, [], [1], {}, {"odd": [None]})


@pytest.mark.parametrize("every", [7, *later(1)])
@pytest.mark.parametrize("reader", [name for name, (file, _) in READERS.items() if file.endswith((".json", ".jsonl"))])
def test_a_value_of_any_kind_anywhere_is_read_or_named(run: Path, reader: str, every: int):
    """Each place gets each of the twelve values, or the places take turns in which of them they get."""
    name, read = READERS[reader]
    file = run / name
    text, refused = file.read_text(), 0
    first, _, rest = text.partition("\n") if file.suffix in LINES else (text, "", "")
    tree = json.loads(first)
    checked = [path for path in places(tree) if not ("settings" in path[:-1] or "before" in path[:-2])]
    for path, value in [*product(checked, WRONG)][::every]:  # the rest is the config's own, and the task's
        line = json.dumps(changed(tree, path, value))
        file.write_text(f"{line}\n{rest}" if file.suffix in LINES else line)
        refused += refusal(read, run, file) is not None
    assert refused or reader in ("report", "own attempts", "same metrics")


READ_DIRECTLY = {
    "files.reading": "the one way",
    "limits": "the system's own figures",
    "files.locking": "who has the lock; whatever stands there",
    "reports.method_page": "what is shipped with the package",
    "reports.report_page": "what is shipped with the package",
    "keys": "what is shipped with the package",
    "cli.listing": "what is shipped with the package",
    "cli.schema": "what is shipped with the package",
    "training.environment": "the system's own words on the processor",
    "tasks.grader_worker": "what the process that started it asks, and the system's own figures",
    "tasks.own_grader": "what the process that it started answers",
    "evaluation.tally": "what this process has just written",
    "evaluation.recording": "settings that are compared with what they must be",
    "export.exporting": "files of the base model, as they are",
    "training.folder": "the config, to be put back as it was",
    "training.trainer": "values as JSON gives them back",
    "writers.cache": "damaged texts are counted and asked for again",
    "writers.server": "what a server answered",
    "engines.servers": "what a server answered",
}
"""Modules that read files or JSON past `reading` and `typed_json`, and why they may."""


def test_nothing_else_reads_files_past_the_one_way_to_do_so():
    found = set[str]()
    for module, node in nodes():
        if isinstance(node, ast.Attribute):
            loads = node.attr in ("loads", "load") and getattr(node.value, "id", "") == "json"
            if loads or node.attr in ("read_bytes", "read_text"):
                found.add(module)
    assert found == set(READ_DIRECTLY)
