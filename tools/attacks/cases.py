"""Small runs with every kind of state, which are attacked. Each takes about a second in a forked child."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_sd.skills import Bank, Mistake, Skill, write_bank
from dllm_sd.tasks import TASKS
from dllm_sd.tasks.sudoku import Sudoku
from dllm_sd.tasks.task import Grade, Problem
from tools.attacks.child import die_with_parent
from tools.stub_writer import StubWriter, steps_or_entries

CONFIG = "config.yaml"
Words = tuple[str, ...]


@dataclass(frozen=True)
class Coin(Sudoku):
    """Sudoku whose grade is random: a completion is correct if the sum of its character codes is even."""

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade by the text alone."""
        correct = sum(map(ord, completion)) % 2 == 0
        return Grade(correct, 1.0 if correct else 0.25 * (len(completion) % 3), completion[-2:] or None)


def add_task() -> None:
    """Register the task."""
    TASKS["coin"] = Coin


@dataclass(frozen=True)
class Case:
    """A command and the files that its folder holds before it."""

    name: str
    tree: Mapping[str, Any]
    """The content of `config.yaml` in the working folder."""
    command: Words = ("train", CONFIG, "run=run")
    before: tuple[Words, ...] = ()
    """Commands that are run undisturbed before it."""
    files: Mapping[str, str] = field(default_factory=dict)

    def prepare(self, folder: Path, url: str) -> None:
        """Write the files that the command reads; ``url`` is that of the writer."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.tree, indent=1).replace("URL", url))
        for name, text in self.files.items():
            (folder / name).write_text(text)
        write_bank(BANK, folder / "skills.json")


BANK = Bank(
    tuple(Skill(f"gen_{i:03d}", f"{i}{i}", f"{i}+{i}", "=0") for i in range(1, 4)),
    tuple(Mistake(f"err_{i:03d}", f"{i}*{i}", "=1", f"{i}-{i}") for i in range(5, 8)),
)
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODEL = {"random_init": True, "tokenizer": "tiny", "dtype": "float64", "shape": {**SHAPE, "initializer_range": 0.3}}
CAUSAL = {**MODEL, "as": "autoregressive"}
HINTED = {"template": "{question}({hint})"}
ASKED = {"writer": {"name": "server", "url": "URL", "model": "m", "retries": 0}, "sampling": {"length": 8}}
LORA = {"rank": 2, "alpha": 8}
BASE: dict[str, Any] = {
    "seed": 3,
    "updates": 2,
    "model": MODEL,
    "task": {"name": "coin", "prompt": "{puzzle}", "answer": "{solution}", "size_train": 64, "size_test": 6},
    "decode": {"length": 8, "block_length": 4, "tokens_per_step": 2},
    "method": {"name": "d_opsd", "gate": "all", "rollout": {"problems": 3, "attempts": 1}},
    "optim": {"lr": 0.02, "max_grad_norm": 1.0},
    "eval": {"every": 1, "problems": 8, "final_problems": 0},
    "checkpoint": {"every": 1, "keep": 1},
    "log": {"progress": False, "trackers": [], "samples_every": 1, "samples": 1},
}
SUMS = "".join(
    json.dumps({"question": f"{i}+{i}=", "answer": str(i % 3), "domain": "small" if i % 2 else "large"}) + "\n"
    for i in range(1, 25)
)
PEER = {"writer": "peer", "sampling": {"length": 4, "temperature": 1.0}, "tolerance": 1.0}
TUTORED = {
    **HINTED,
    "name": "feedback",
    "solution": "{hint}",
    "comment": "{hint}",
    "prompt": "{response}{question}",
    "anchored": False,
    "writing": PEER,
}
SECTIONS = ("task", "eval", "log", "checkpoint")


def tree(**changes: Any) -> dict[str, Any]:
    """The base config with other sections; in `SECTIONS` only the given keys are replaced."""
    merged = {key: {**BASE[key], **value} if key in SECTIONS else value for key, value in changes.items()}
    return {**BASE, **merged}


def method(name: str = "d_opsd", **changes: Any) -> dict[str, Any]:
    """A method that keeps every rollout."""
    return {"name": name, "gate": "all", "rollout": {"problems": 3, "attempts": 1}, **changes}


TWICE = {"problems": 3, "attempts": 1, "passes": 2}
SKILLED = {
    "contexts": [{"name": "skills", "rank": rank, **HINTED} for rank in range(2)],
    "skill_bank": {"path": "skills.json", "count": 2, "every": 1, "writing": ASKED, "extraction": {"threshold": 1.0}},
}
SKILLED_RUN = {"model": CAUSAL, "decode": {"length": 8}}
STUDENTS = [{"name": "one", "domain": "small"}, {"name": "two", "domain": "large"}]
PAIRED = {
    "model": {**CAUSAL, "lora": LORA},
    "decode": {"length": 6},
    "method": {
        "name": "op_co_distill",
        "rollout": {"problems": 2, "attempts": 2},
        "contexts": [TUTORED],
        "support": {"k": 8},
    },
    "peers": {"rounds": 2, "problems": 2, "attempts": 2, "students": STUDENTS, "tolerance": 9.0},
    "eval": {"every": 0, "final_problems": 0},
}
SCHEDULED = {"final_problems": 4, "schedules": {"fast": {"tokens_per_step": 4}}}
EVALUATE: Words = ("eval", "run", "--out", "scores", "--attempts", "2", "eval.temperature=1.0")
TRAIN: Words = ("train", CONFIG, "run=run")

CASES = {
    case.name: case
    for case in (
        Case("plain", tree()),
        Case("tensorboard", tree(updates=1, log={"trackers": ["tensorboard"]})),
        Case("passes", tree(updates=3, method=method(rollout=TWICE))),
        Case("ema", tree(method=method(teacher=[{"name": "ema", "decay": 0.5}]))),
        Case("snapshot", tree(updates=3, method=method(teacher=[{"name": "snapshot", "every": 2}]))),
        Case("bank", tree(**SKILLED_RUN, method=method("sgsd", **SKILLED))),
        Case("bank in passes", tree(updates=3, **SKILLED_RUN, method=method("sgsd", **SKILLED, rollout=TWICE))),
        Case("texts", tree(method=method("d_step_align", contexts={"0": {**HINTED, "writing": ASKED}}))),
        Case("lora", tree(model={**MODEL, "lora": LORA})),
        Case("schedules", tree(eval=SCHEDULED)),
        Case("patience", tree(updates=4, eval={"patience": 1, "temperature": 0.0})),
        Case("fresh", tree(), (*TRAIN, "resume=fresh"), ((*TRAIN, "seed=4"),)),
        Case("force", tree(), (*TRAIN, "resume=force", "optim.lr=0.01", "updates=3"), (TRAIN,)),
        Case("peers", {**tree(**PAIRED), "task": {"name": "jsonl", "data": "sums.jsonl", "size_dev": 8}},
             files={"sums.jsonl": SUMS}),
        Case("eval", tree(eval=SCHEDULED), EVALUATE, ((*TRAIN, "eval.final_problems=0"),)),
        Case("export", tree(), ("export", "run", "--to", "merged", "model"), (TRAIN,)),
    )
}  # fmt: skip

EVERYTHING = Case(
    "everything",
    tree(
        updates=3,
        **SKILLED_RUN,
        method=method("sgsd", **SKILLED, rollout=TWICE, teacher=[{"name": "ema", "decay": 0.5}, "base"]),
        checkpoint={"keep": 2},
    ),
)
"""A run with an EMA teacher, a skill bank, and rollouts that serve two passes."""


@contextmanager
def writer() -> Iterator[str]:
    """Start a local server in a process of its own, since this process forks; yield its URL."""
    server = StubWriter(steps_or_entries)
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server.serve_forever()
    url = server.url
    server.server_close()
    try:
        yield url
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
