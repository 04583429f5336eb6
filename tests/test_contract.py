"""The contract of every named method on both backbones, through the trainer, with tiny random models.

What holds for all: the student learns, teachers keep to their own rule, no hint is in what the student reads, and
neither micro-batches nor processes nor a crash change a run. The first tier asks everything of a few pairs that
together have every part on some backbone (`FIRST`); `-m slow` asks it of all the others. Run as a script this file is
one of several processes.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dllm_sd.canvases import AllMaskedCanvas
from dllm_sd.cli.main import main
from dllm_sd.config import Config, build_config
from dllm_sd.errors import InputError
from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.network.site_head import SiteHead
from dllm_sd.objective.plan import MicroBatch
from dllm_sd.pairing import check_model
from dllm_sd.parallel.processes import close_process_group
from dllm_sd.policies.loading import build_policy
from dllm_sd.policies.weights import (
    BaseWeights,
    CheckpointWeights,
    EmaWeights,
    LiveWeights,
    SnapshotWeights,
    TeacherModel,
    trained,
)
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.skills import Bank, Mistake, Skill, format_pair, retrieve, write_bank
from dllm_sd.tasks import TASKS
from dllm_sd.tasks.sudoku import Sudoku
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import (
    Critique,
    Feedback,
    LaterStep,
    NoQuestion,
    Reference,
    Rubric,
    Sibling,
    Skills,
    Suffix,
)
from dllm_sd.training import learner as learner_module
from dllm_sd.training.learner import Learner
from dllm_sd.training.metric_table import described
from dllm_sd.training.trainer import Trainer
from dllm_sd.trajectory import NEVER
from tests import exact  # noqa: F401
from tests.teachers.briefs import prompts_of
from tools.stub_writer import StubWriter, running

ROOT = Path(__file__).parents[1]
Backbone = Literal["diffusion", "autoregressive"]
BACKBONES: tuple[Backbone, ...] = ("diffusion", "autoregressive")
HINTED = {"template": "{question}({hint})"}


@dataclass(frozen=True)
class Parity(Sudoku):
    """Sudoku that random models are right about half of the time, with prompts of unequal length."""

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        puzzle = problem.fields["puzzle"]
        return [{"role": "user", "content": f"{puzzle}{':' * (1 + puzzle.count('0', 0, 8))}" if question else ":"}]

    def generate(self, split: Any, index: int) -> Problem:
        made = super().generate(split, index)
        return replace(made, fields={**made.fields, "rubric": [f"{index}+", "2*3", f"-{index}"]})

    def grade(self, problem: Problem, completion: str) -> Grade:
        correct = sum(map(ord, completion)) % 2 == 0
        return Grade(correct, 1.0 if correct else 0.25 * (len(completion) % 3), completion[-2:] or None)


# The cases: every named method, and combinations that nobody has published.

SIZES: dict[str, dict[str, Any]] = {
    name: {"name": name, "rollout": {"problems": 3, **({} if name == "sft" else {"attempts": 1})}} for name in METHODS
}
for _name, _row in METHODS.items():
    if getattr(_row.method.rollout, "attempts", 1) > 1:
        SIZES[_name]["rollout"] |= {"problems": 2, "attempts": 3}
SIZES["d_opsd_reference"]["rollout"] |= {"problems": 4, "passes": 2}
SIZES["popd"]["rollout"]["horizon"] = {"initial_ratio": 0.25, "ratio_step": 0.25}
OTHER = {"name": "checkpoint", "path": "OTHER", "dtype": "float64"}
for _name in ("opd", "opd_sampled", "topd", "popd"):
    SIZES[_name]["teacher"] = [OTHER]
for _name in ("d_opsd_prompt", "opsd", "opsd_v3", "opsd_paper", "opsd_reference", "sdpo", "sdpo_paper"):
    SIZES[_name]["contexts"] = {"0": HINTED}
SIZES["demo_psd"]["contexts"] = {"0": HINTED}
for _name in ("sdpo", "demo_psd"):  # the vocabulary has 25 entries
    SIZES[_name]["support"] = {"k": 8}
SIZES["opsd_pmi"]["contexts"] = {"0": HINTED, "1": HINTED}
LINES = {"lines": True, **HINTED}
ASKED = {"writer": {"name": "server", "url": "URL", "model": "m", "retries": 0}}
TRIED = {"sampling": {"length": 8, "temperature": 1.5}, "tolerance": 1.0}
SIZES["rcsd_writer"]["contexts"] = {"0": HINTED}
SIZES["rcsd"]["contexts"] = {"0": {**LINES, "prompt": "{question}", "writing": TRIED}}
SIZES["rcsd_reference"]["contexts"] = {
    "0": {**LINES, "template": "{question}({hint}){reference}", "reasoning": {"length": 8, "instruction": "="}}
}
SIZES["rcsd_reference"]["support"] = {"k": 6}
SIZES["step_align"]["contexts"] = {"0": {**HINTED, "writing": ASKED}}
SIZES["d_step_align"]["contexts"] = {"0": {**HINTED, "writing": ASKED}}
SIZES["d_rcsd"]["contexts"] = {"0": {"prompt": LINES}}
SIZES["op_co_distill"]["contexts"] = {
    "0": {**HINTED, "solution": "{hint}", "comment": "{hint}", "anchored": False, "writing": ASKED}
}
SIZES["op_co_distill"]["support"] = {"k": 8}
SIZES["spd"]["rollout"]["policy"] = {"calibration": 3}
SIZES["sgsd"]["contexts"] = [{"name": "skills", "rank": rank, **HINTED} for rank in range(2)]
SIZES["sgsd"]["skill_bank"] = {
    "path": "BANK",
    "count": 2,
    "every": 1,
    "writing": {"sampling": {"length": 8}},
    "renewal": {"length": 8},
}


def varied(name: str, **changes: Any) -> dict[str, Any]:
    """A named method in its size here with other parts; `rollout` is added to its rollout."""
    rollout = {**SIZES[name]["rollout"], **changes.pop("rollout", {})}
    return {**SIZES[name], **changes, "rollout": rollout}


LORA = {"rank": 2, "alpha": 8}
BEHIND = {"contexts": ["nothing", "nothing"], "teacher": ["base", {"name": "snapshot", "every": 2}]}
REASONS = {"name": "reference", **HINTED, "reasoning": {"length": 8, "instruction": "=", "transition": "+-"}}
EXTRAS: dict[str, dict[str, Any]] = {
    "opsd reasoned": varied("opsd", contexts=[REASONS], teacher=[{"name": "ema", "decay": 0.5}]),
    "opsd reasoned, several passes": varied("opsd", contexts=[REASONS], rollout={"passes": 2}),
    "opsd_pmi, several passes": varied("opsd_pmi", rollout={"passes": 2}),
    "sdpo, several passes": varied("sdpo", rollout={"passes": 2}),
    "sgsd renewed between passes": varied(  # the bank needs what the gate rejects, in the second pass too
        "sgsd",
        gate="correct",
        rollout={"problems": 8, "attempts": 1, "passes": 2},
        teacher=[{"name": "ema", "decay": 0.5}, {"name": "snapshot", "every": 2}],
    ),
    "opsd truncated": varied("opsd", rollout={"horizon": {"name": "truncated", "ratio": 0.5}}),
    "opsd progressive": varied(
        "opsd",
        rollout={"horizon": {"name": "progressive", "initial_ratio": 0.25, "ratio_step": 0.375, "unit": "steps"}},
    ),
    "grpo, several passes": varied("grpo", rollout={"passes": 2}, **BEHIND),
    "diffu_grpo, several passes": varied("diffu_grpo", rollout={"passes": 2}, **BEHIND),
    "opd, several passes": varied(
        "opd",
        rollout={"passes": 2},
        contexts=["nothing", "nothing"],
        teacher=[OTHER, {"name": "snapshot", "every": 2}],
        target="each",
        support={"name": "top_k", "k": 6, "of": "rollout", "rest": "keep"},
    ),
    "opsd reasoned by another checkpoint": varied("opsd", contexts=[REASONS], teacher=[OTHER]),
    "opd lora": varied("opd"),
    "opsd lora": varied("opsd"),
    "sdpo lora": varied("sdpo"),
    "opsd_pmi lora": varied("opsd_pmi"),
    "opsd reasoned lora": varied("opsd", contexts=[REASONS], teacher=[{"name": "ema", "decay": 0.5}]),
    "suffix and reference": varied(
        "d_opsd",
        contexts=[{"name": "suffix", "prompt": {"name": "reference", **HINTED}}, {"name": "reference", **HINTED}],
        teacher=[{"name": "ema", "decay": 0.5}, "base"],
        target="each",
    ),
    "d_opsd truncated": varied(
        "d_opsd", gate="all", rollout={"attempts": 1, "horizon": {"name": "truncated", "ratio": 0.75}}
    ),
    "d_demo_psd progressive": varied(
        "d_demo_psd",
        gate="all",
        rollout={"attempts": 1, "horizon": {"name": "progressive", "initial_ratio": 0.5, "ratio_step": 0.25}},
    ),
    "later_step and a sibling": varied(
        "sdpo", canvases="decoder_steps", contexts=[{"name": "later_step", "prompt": {"name": "sibling", **HINTED}}]
    ),
}
CASES = SIZES | EXTRAS
ONLY_DIFFUSION = {
    *("d_rcsd",),
    *("d_opsd", "d_opsd_paper", "d_opsd_reference", "d_opsd_pmi", "d_demo_psd", "later_step"),
    *("suffix and reference", "d_opsd truncated", "d_demo_psd progressive", "later_step and a sibling"),
}
Pair = tuple[str, Backbone]
REACH: dict[Pair, list[int]] = {  # positions that each update's rollouts may reach
    ("topd", "diffusion"): [4, 4],
    ("topd", "autoregressive"): [2, 2],
    ("popd", "diffusion"): [4, 8],
    ("popd", "autoregressive"): [6, 11],
    ("opsd truncated", "diffusion"): [8, 8],
    ("opsd truncated", "autoregressive"): [11, 11],
    ("opsd progressive", "diffusion"): [4, 12],  # five steps begin the third block
    ("opsd progressive", "autoregressive"): [6, 14],
    ("d_opsd truncated", "diffusion"): [12, 12],
    ("d_demo_psd progressive", "diffusion"): [8, 12],
}
PAIRS: list[Pair] = [
    (case, kind) for case in CASES for kind in BACKBONES if kind == "diffusion" or case not in ONLY_DIFFUSION
]


def parts_of(part: Any) -> Iterator[str]:
    """The names of the classes of a method's parts, and of their parts."""
    if is_dataclass(part):
        yield type(part).__name__.lower()
        yield from (name for one in fields(part) for name in parts_of(getattr(part, one.name)))
    elif isinstance(part, tuple):
        yield from (name for one in part for name in parts_of(one))


SLOTS = {"name", *(one.name for one in fields(Method))}


def named_in(tree: Any, key: str = "name") -> Iterator[str]:
    """The names of parts that the sizes of a case put in a method."""
    if isinstance(tree, dict):
        yield from (name for inner, value in tree.items() for name in named_in(value, inner))
    elif isinstance(tree, list):
        yield from (name for one in tree for name in named_in(one, key))
    elif isinstance(tree, str) and key in SLOTS and tree not in METHODS:
        yield tree.replace("_", "")


def traits(pair: Pair) -> set[str]:
    """What a pair tries: its backbone, its parts, adapters, and rollouts that serve several updates."""
    case, kind = pair
    found = {kind, *parts_of(METHODS[CASES[case]["name"]].method), *named_in(CASES[case])}
    found |= {"lora"} if "lora" in case else set()
    return found | ({"passes"} if updates_of(case) > 2 else set())


def covering(pairs: Iterable[Pair]) -> set[Pair]:
    """Few pairs that have all that any pair has on some backbone.

    Always the next with most that is not yet there; of several of these, one on the backbone that has fewer as yet.
    """
    tries = {pair: traits(pair) for pair in pairs}
    left, chosen, on = set().union(*tries.values()), set[Pair](), Counter[str]()
    while left:
        best = max(tries, key=lambda pair: (len(tries[pair] & left), -on[pair[1]]))
        chosen.add(best)
        on[best[1]] += 1
        left -= tries[best]
    return chosen


def updates_of(case: str) -> int:
    """Rollouts that serve two updates are followed by one of the next."""
    return 3 if CASES[case]["rollout"].get("passes", 1) > 1 else 2


FIRST = covering(PAIRS)
"""Every part on some backbone."""


def in_tiers(pairs: Iterable[Pair], first: Container[Pair] = FIRST) -> list[Any]:
    """Pairs as parameters of a test: those of ``first`` in the first tier, the others in the second."""
    return [pytest.param(pair, marks=() if pair in first else pytest.mark.slow) for pair in pairs]


def runs(first: Container[Pair]) -> pytest.MarkDecorator:
    """The pairs of a test that trains each once more."""
    return pytest.mark.parametrize("pair", in_tiers(PAIRS, first), indirect=True, ids=" on ".join)


IN_TURN = [pair for pair in PAIRS if pair in FIRST]
"""Of two tests that train each pair once more the first tier has every fourth pair each; two processes train all."""


def model_of(case: str, kind: Backbone, seed: int = 1) -> dict[str, Any]:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return {
        "random_init": True,
        "as": kind,
        "tokenizer": "tiny",
        "dtype": "float64",
        "shape": {**shape, "initializer_range": 0.3},
        "seed": seed,
        "lora": LORA if "lora" in case else None,
    }


def config_at(run: Path, case: str, kind: Backbone, teachers: Path, tokens: int = 10**6, rows: int = 64) -> Config:
    """The config of a case; ``tokens`` and ``rows`` say how much is computed at a time."""
    method = json.dumps(CASES[case]).replace("OTHER", str(teachers / kind))
    method = method.replace("BANK", str(teachers / "bank.json")).replace("URL", (teachers / "url").read_text())
    method = json.loads(method)
    steps = {"diffusion": {"length": 16, "block_length": 4, "tokens_per_step": 2}, "autoregressive": {"length": 22}}
    answer = {"diffusion": "{solution}", "autoregressive": "{steps}\n{solution}"}
    return build_config(
        {
            "run": str(run),
            "seed": 5,
            "updates": updates_of(case),
            "model": model_of(case, kind),
            "task": {"name": "parity", "answer": answer[kind], "empties_min": 1, "empties_max": 1},
            "decode": {**steps[kind], "batch_size": rows},
            "method": method,
            "optim": {"lr": 0.02, "weight_decay": 0.0, "max_grad_norm": 1.0, "tokens_per_batch": tokens},
            "eval": {"every": 0, "final_problems": 0},
            "checkpoint": {"every": 1, "keep": 9},
            "log": {"progress": False, "trackers": [], "samples_every": 1},
        }
    )


# What is seen of a run.


@dataclass
class Read:
    """One forward of the student or a teacher in the loss."""

    ids: Tensor
    mask: Tensor
    sites: Tensor
    logits: Tensor

    def rows(self) -> list[list[int]]:
        """The ids that attention may look at, row by row."""
        return [ids[mask].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]


@dataclass
class Piece:
    """A micro-batch: what the teachers read, then what the student read."""

    update: int
    rollouts: Rollouts
    rows: list[int]
    """Index of the rollout of each row."""
    steps: list[int]
    teachers: list[tuple[TeacherModel, Read]] = field(default_factory=list)
    student: Read | None = None


@dataclass
class Seen:
    """An uninterrupted run in one process."""

    config: Config
    trainer: Trainer
    initial: dict[str, Tensor]
    others: dict[int, dict[str, Tensor]]
    """By teacher: the weights of the other checkpoints before training."""
    pieces: list[Piece]

    @property
    def run(self) -> Path:
        return Path(self.config.run)

    def weights(self, update: int) -> dict[str, Tensor]:
        """The student's after ``update`` updates."""
        return self.initial if update == 0 else load_file(checkpoint_of(self.run, update) / "model.safetensors")

    def weights_of(self, teacher: TeacherModel, update: int) -> dict[str, Tensor]:
        """What a teacher of the student's shape must have after ``update`` updates, from its rule."""
        rule = teacher.weights
        if isinstance(rule, LiveWeights):
            return self.weights(update)
        if isinstance(rule, SnapshotWeights):
            return self.weights(update // rule.every * rule.every)
        average = self.initial
        for done in range(1, update + 1 if isinstance(rule, EmaWeights) else 1):
            assert isinstance(rule, EmaWeights)
            live = self.weights(done)
            average = {name: rule.decay * value + (1 - rule.decay) * live[name] for name, value in average.items()}
        return average


@contextmanager
def watched(pieces: list[Piece]) -> Iterator[None]:
    """Write down what student and teachers read in the loss, from the ids that enter the network's module."""
    now: list[Any] = []  # the update, the rollouts, and the teacher that is asked
    learn, grade, ask = Learner.step, learner_module.grade_micro_batch, TeacherModel.__call__

    def learning(self: Learner, plan: Any, rollouts: Rollouts, update: int, *rest: Any) -> Any:
        now[:] = [update, rollouts, None]
        try:
            return learn(self, plan, rollouts, update, *rest)
        finally:
            now.clear()

    def grading(method: Any, batch: MicroBatch, *rest: Any) -> Any:
        pieces.append(Piece(now[0], now[1], batch.canvases.rows.tolist(), batch.canvases.steps.tolist()))
        return grade(method, batch, *rest)

    def asking(self: TeacherModel, view: Any) -> Any:
        now[2] = self
        try:
            return ask(self, view)
        finally:
            now[2] = None

    def reading(module: SiteHead, ids: Tensor, mask: Tensor, sites: Tensor, **options: Any) -> Any:
        if not now:
            return forward(module, ids, mask, sites, **options)
        rows, inner = options["rows"], options["read"]
        rows = torch.arange(len(ids)) if rows is None else rows

        def looking(hidden: Tensor, head: Any) -> Any:
            read = Read(ids[rows].clone(), mask[rows].clone(), sites.clone(), head(hidden).detach().clone())
            if now[2] is not None:
                assert not hidden.requires_grad
                pieces[-1].teachers.append((now[2], read))
            else:
                assert hidden.requires_grad
                assert pieces[-1].student is None
                pieces[-1].student = read
            return inner(hidden, head)

        return forward(module, ids, mask, sites, **{**options, "read": looking})

    forward = SiteHead.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteHead, "forward", reading)
        patch.setattr(Learner, "step", learning)
        patch.setattr(learner_module, "grade_micro_batch", grading)
        patch.setattr(TeacherModel, "__call__", asking)
        yield


def copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def checkpoint_of(run: Path, update: int) -> Path:
    return run / "checkpoints" / f"{update:06d}"


PASSING = ("time/", "writers/cached")
"""What may differ between a run and its repetition: how long it took, and what was on the disk already."""


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith(PASSING)} for line in lines]


def save_teacher(folder: Path, kind: Backbone) -> None:
    """Another random model with its tokenizer, as a checkpoint."""
    policy = build_policy(build_config({"task": {"name": "parity"}, "model": model_of("", kind, seed=2)}).model)
    network: Any = policy.module.model
    assert policy.chat is not None
    network.save_pretrained(folder / kind)
    policy.chat.tokenizer.save_pretrained(folder / kind)


BANK = Bank(
    tuple(Skill(f"gen_{i:03d}", f"{i}{i}", f"{i}+{i}", "=0") for i in range(1, 4)),
    tuple(Mistake(f"err_{i:03d}", f"{i}*{i}", "=1", f"{i}-{i}") for i in range(5, 8)),
)


@pytest.fixture(scope="module", autouse=True)
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the other checkpoints; the task is known while this module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "parity", Parity)
        folder = tmp_path_factory.mktemp("teachers")
        for kind in BACKBONES:
            save_teacher(folder, kind)
        write_bank(BANK, folder / "bank.json")
        with running(StubWriter()) as server:
            (folder / "url").write_text(server.url)
            yield folder


@lru_cache(maxsize=1)  # the tests of a pair come one after another; more would hold every model
def seen(pair: Pair, teachers: Path) -> Seen:
    """The uninterrupted run of a pair, watched."""
    config = config_at(Path(mkdtemp(dir=teachers.parent)) / "run", *pair, teachers)
    trainer = Trainer(config)
    initial = copied(trained(trainer.policy))
    others = {
        i: copied(dict(teacher.policy.module.named_parameters()))
        for i, teacher in enumerate(trainer.learner.teachers)
        if isinstance(teacher.weights, CheckpointWeights)
    }
    pieces: list[Piece] = []
    with watched(pieces):
        trainer.train()
    return Seen(config, trainer, initial, others, pieces)


@pytest.fixture(scope="module", params=in_tiers(PAIRS), ids=lambda pair: " on ".join(pair))
def pair(request: pytest.FixtureRequest) -> Pair:
    """A method and a backbone on which it is defined."""
    return request.param


@pytest.fixture
def whole(pair: Pair, teachers: Path) -> Seen:
    """The pair's run."""
    return seen(pair, teachers)


# The contract.


def test_the_student_learns_and_its_metrics_are_finite(pair: Pair, whole: Seen) -> None:
    start, *lines = metrics_of(whole.run)
    assert {key: value for key, value in start.items() if not key.startswith("calibration/")} == {"update": 0}
    assert [line["update"] for line in lines] == list(range(1, updates_of(pair[0]) + 1))
    for line in lines:
        assert line["updates_skipped"] == 0
        assert line["sites"] > 0
        assert line["grad_norm"] > 0
        for key, value in line.items():
            assert key == "update" or described(key) is not None, f"{key} is not in training/metric_table.py"
            assert isinstance(value, int | float), key
            assert math.isfinite(value), key
    last = whole.weights(updates_of(pair[0]))
    for name, value in last.items():  # without weight decay nothing but a gradient moves it
        assert not torch.equal(value, whole.initial[name]), name
        assert torch.isfinite(value).all(), name


def test_teachers_move_by_their_own_rule_only(pair: Pair, whole: Seen) -> None:
    last = updates_of(pair[0])
    for i, teacher in enumerate(whole.trainer.learner.teachers):
        for name, value in teacher.policy.module.named_parameters():
            student = teacher.policy is whole.trainer.policy
            assert value.requires_grad == (student and name in whole.initial), name
            assert value.grad is None, name
        assert not any(value.requires_grad for value in teacher.copy.values())
        if isinstance(teacher.weights, CheckpointWeights):
            now = dict(teacher.policy.module.named_parameters())
            assert whole.others[i].keys() == now.keys()
            assert all(torch.equal(value, now[name]) for name, value in whole.others[i].items())
        elif isinstance(teacher.weights, BaseWeights):
            assert teacher.copy or whole.config.model.lora
            assert all(torch.equal(value, whole.initial[name]) for name, value in teacher.copy.items())
        elif isinstance(teacher.weights, EmaWeights | SnapshotWeights):
            assert teacher.copy.keys() == whole.initial.keys()
            for name, value in whole.weights_of(teacher, last).items():
                torch.testing.assert_close(teacher.copy[name], value, rtol=1e-14, atol=1e-15, msg=name)
        else:
            assert isinstance(teacher.weights, LiveWeights)
            assert teacher.copy == {}


def test_student_and_teachers_answer_with_the_weights_that_they_must_have(
    pair: Pair, whole: Seen, teachers: Path
) -> None:
    model = whole.config.model
    policy, plain = build_policy(model), build_policy(replace(model, lora=None))

    def logits(read: Read, weights: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for name, value in trained(policy).items():
                value.copy_(weights[name])
            return policy.module(read.ids, read.mask, read.sites)

    for update in range(1, updates_of(pair[0]) + 1):
        piece = next(piece for piece in whole.pieces if piece.update == update)
        assert piece.student is not None
        assert len(piece.teachers) == len(whole.config.method.contexts)
        assert_close(piece.student.logits, logits(piece.student, whole.weights(update - 1)))
        for i, (teacher, read) in enumerate(piece.teachers):
            assert teacher is whole.trainer.learner.teachers[i]
            if isinstance(teacher.weights, CheckpointWeights):
                other = build_policy(replace(whole.config.model, seed=2))
                with torch.no_grad():
                    assert_close(read.logits, other.module(read.ids, read.mask, read.sites))
                continue
            assert_close(read.logits, logits(read, whole.weights_of(teacher, update - 1)))
            if isinstance(teacher.weights, BaseWeights):  # of an adapted model: the same without an adapter
                with torch.no_grad():
                    assert_close(read.logits, plain.module(read.ids, read.mask, read.sites))


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_no_hint_is_in_what_the_student_reads(pair: Pair, whole: Seen) -> None:
    policy, task, contexts = whole.trainer.policy, whole.config.task, whole.config.method.contexts
    revealed = [0] * len(contexts)
    read_by = {update: set() for update in range(1, updates_of(pair[0]) + 1)}
    for piece in whole.pieces:
        student = piece.student
        assert student is not None
        rows = student.rows()
        assert len(rows) == len(piece.rows)
        for place, (row, index, step) in enumerate(zip(rows, piece.rows, piece.steps, strict=True)):
            rollout = piece.rollouts.kept[index]
            read_by[piece.update].add((rollout.problem.id, rollout.attempt))
            prompt = policy.encode(task.messages(rollout.problem))
            written = len(row) - len(prompt)
            assert_prompt(whole, row[: len(prompt)], prompt)
            canvas = row[len(prompt) :]
            assert_canvas(whole, canvas, rollout, step)
            assert_sites(whole, student, place, canvas)
            for i, (context, (_, read)) in enumerate(zip(contexts, piece.teachers, strict=True)):
                other = read.rows()[place]
                own, behind = other[: len(other) - written], other[len(other) - written :]
                if context.hint is None:
                    assert own == row[: len(prompt)]
                else:
                    assert_hinted(whole, own, context.hint, rollout, piece.rollouts)
                assert_sites(whole, read, place, behind)
                differs = [at for at in range(written) if behind[at] != canvas[at]]
                assert not differs or isinstance(context, Suffix | LaterStep)
                for at in differs:  # shown to the teacher, hidden from the student
                    assert canvas[at] == policy.mask_id
                    assert behind[at] == int(rollout.trajectory.tokens[0, at])
                revealed[i] += len(differs)
    for context, count in zip(contexts, revealed, strict=True):
        assert (count > 0) == isinstance(context, Suffix | LaterStep)
    assert all(read_by.values())


def assert_prompt(whole: Seen, found: Sequence[int], prompt: Sequence[int]) -> None:
    """The task's own prompt; some tokens are masked where that is the rule of the canvases."""
    if isinstance(whole.config.method.canvases, AllMaskedCanvas) and whole.config.model.as_ == "diffusion":
        mask = whole.trainer.policy.mask_id
        found = [token if token != mask else asked for token, asked in zip(found, prompt, strict=True)]
    assert list(found) == list(prompt)


def assert_canvas(whole: Seen, canvas: Sequence[int], rollout: Rollout, step: int) -> None:
    """What the decoder saw at this step, a random mask of the completion, or the whole of what was written."""
    trajectory, mask = rollout.trajectory, whole.trainer.policy.mask_id
    tokens, revealed = trajectory.tokens[0].tolist(), trajectory.reveal_step[0].tolist()
    if whole.config.model.as_ == "autoregressive":
        assert canvas == tokens[: revealed.index(NEVER) if NEVER in revealed else len(tokens)]
    elif step < 0:
        assert all(found in (mask, token) for found, token in zip(canvas, tokens, strict=True))
    else:
        known = [NEVER < when < step for when in revealed]
        assert canvas == [token if show else mask for token, show in zip(tokens, known, strict=True)]


def assert_sites(whole: Seen, read: Read, row: int, canvas: Sequence[int]) -> None:
    """Graded is what is masked for everybody; autoregressive, all that was written."""
    sites = read.sites[row][read.mask[row]][-len(canvas) :].tolist()
    assert sum(sites) == int(read.sites[row].sum())
    if whole.config.model.as_ == "autoregressive":
        leave = whole.trainer.policy.formatting if whole.config.method.sites.content else ()
        assert sites == [token not in leave for token in canvas]
    else:
        assert any(sites)
        assert all(canvas[at] == whole.trainer.policy.mask_id for at, site in enumerate(sites) if site)


def assert_hinted(whole: Seen, found: Sequence[int], hint: Any, rollout: Rollout, rollouts: Rollouts) -> None:
    """The teacher's prompt is the hint's, and its tokens are in it one after another."""
    policy, task, problem = whole.trainer.policy, whole.config.task, rollout.problem
    reasoning = f"\n\n{hint.reasoning.instruction}" if hint.reasoning else ""
    question, texts, more = task.messages(problem)[0]["content"], [""], ""
    if isinstance(hint, Reference):
        question = question if hint.question else ":"
        texts = [task.reference(problem) or ""]
        assert texts[0].endswith(problem.fields["solution"])
    elif isinstance(hint, Rubric | Critique | Feedback):
        place = [context.hint for context in whole.config.method.contexts].index(hint)
        note = rollout.briefs[place].text
        assert note
        texts = [note]
        more = task.reference(problem) or "" if isinstance(hint, Rubric) and hint.reference else ""
    elif isinstance(hint, Sibling):
        others = [one for one in rollouts.chosen if one.problem.id == problem.id and one.grade.correct]
        texts = [one.text for one in others if hint.own or one.attempt != rollout.attempt]
        texts = texts[:1] if hint.choice == "first" else texts
        assert texts
    elif isinstance(hint, Skills):
        place = whole.config.method.contexts.index(hint)
        note = rollout.briefs[place].text
        assert note is not None
        assert note == format_pair(retrieve(BANK, question, 2)[hint.rank])
        texts = [note]
    else:
        assert isinstance(hint, NoQuestion)
        question, texts = ":", [""]
    prompts = {
        text: policy.encode([{"role": "user", "content": f"{question}({text}){more}{reasoning}"}]) for text in texts
    }
    if isinstance(hint, NoQuestion):
        prompts = {"": policy.encode([{"role": "user", "content": ":"}])}
    if hint.reasoning:
        (prompt,) = prompts.values()
        end = policy.encode_completion(hint.reasoning.transition, ended=False)
        analysis = found[len(prompt) : len(found) - len(end)]
        assert list(found) == [*prompt, *analysis, *end]
        assert len(analysis) <= hint.reasoning.length
    else:
        assert list(found) in prompts.values()
    tokens = [policy.encode_completion(text, ended=False) for text in prompts]
    assert any(found[at : at + len(part)] == part for part in tokens for at in range(len(found) - len(part) + 1))


@pytest.mark.parametrize("pair", in_tiers(REACH), ids=" on ".join)
def test_nothing_behind_the_horizon_is_written_or_graded(pair: Pair, teachers: Path) -> None:
    whole = seen(pair, teachers)
    reached = False
    for piece in whole.pieces:
        reach, length = REACH[pair][piece.update - 1], whole.config.decode.length
        trajectories = [rollout.trajectory for rollout in piece.rollouts.chosen]
        reached |= max(int(trajectory.written) for trajectory in trajectories) == reach
        assert all(bool((trajectory.reveal_step[0, reach:] == NEVER).all()) for trajectory in trajectories)
        assert piece.student is not None
        if pair[1] == "diffusion":
            assert not piece.student.sites[:, reach - length :].any()
        else:
            assert int(piece.student.sites.sum(1).max()) <= reach
    assert reached  # others ended before


@pytest.mark.parametrize("pair", in_tiers(pair for pair in PAIRS if "reasoned" in pair[0]), ids=" on ".join)
def test_an_analysis_is_written_with_the_weights_of_its_teacher(pair: Pair, teachers: Path) -> None:
    whole = seen(pair, teachers)
    config, (teacher,) = whole.config, whole.trainer.learner.teachers
    (context,), passes = config.method.contexts, config.method.rollout.passes
    assert context.hint is not None
    assert context.hint.reasoning is not None
    settings = replace(config.decode, length=context.hint.reasoning.length, temperature=1.0)
    for piece in whole.pieces:
        batch = (piece.update - 1) // passes
        other = isinstance(teacher.weights, CheckpointWeights)
        policy = build_policy(replace(config.model, seed=2) if other else config.model)
        with torch.no_grad():
            for name, value in ({} if other else trained(policy)).items():
                value.copy_(whole.weights_of(teacher, batch * passes)[name])
        for rollout in piece.rollouts.kept:
            content = f"{config.task.messages(rollout.problem)[0]['content']}({config.task.reference(rollout.problem)})"
            prompt = policy.encode([{"role": "user", "content": f"{content}\n\n="}])
            key = make_key(config.seed, batch, rollout.problem.id, rollout.attempt, "analysis", 0)
            written = policy.decode([prompt], settings, [key])
            text = policy.text(written.tokens[0, : int(written.length)].tolist()).strip()
            opening = policy.encode_completion(f"{text}+-", ended=False)
            assert prompts_of(rollout) == ((*prompt, *opening),)


@runs(IN_TURN[1::4])
def test_an_update_is_the_same_in_one_piece_and_in_many(
    pair: Pair, whole: Seen, teachers: Path, tmp_path: Path
) -> None:
    config = config_at(tmp_path / "run", *pair, teachers, tokens=1, rows=5)
    pieces: list[Piece] = []
    with watched(pieces):
        Trainer(config).train()
    assert {len(piece.rows) for piece in pieces} == {1}
    assert len(whole.pieces) == updates_of(pair[0])
    assert [len(piece.rows) for piece in whole.pieces] == [
        line["canvases"] for line in metrics_of(tmp_path / "run")[1:]
    ]
    assert_same(whole.run, tmp_path / "run", updates_of(pair[0]))


def assert_same(one: Path, other: Path, update: int) -> None:
    """Metrics and trained weights agree to 1e-9."""
    first, second = metrics_of(one), metrics_of(other)
    assert len(first) == len(second) == update + 1
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"rollouts/decoded", "rollouts/generated"}:  # attempts made early fill free rows
            same = a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-9, abs=1e-12)
            assert same, f"{key} of update {a['update']}: {a[key]} and {b[key]}"
    x, y = (load_file(checkpoint_of(run, update) / "model.safetensors") for run in (one, other))
    assert x.keys() == y.keys()
    for name in x:
        assert (x[name] - y[name]).abs().max() <= 1e-9 * x[name].abs().max(), name


@runs(IN_TURN[::4])
def test_a_run_that_crashed_after_its_first_update_ends_as_if_nothing_had_happened(
    pair: Pair, whole: Seen, teachers: Path, tmp_path: Path
) -> None:
    run, last = tmp_path / "run", updates_of(pair[0])
    shutil.copytree(whole.run, run)
    (run / "report.json").unlink()
    for update in range(2, last + 1):  # its metrics were written, its checkpoint was not
        shutil.rmtree(checkpoint_of(run, update))
    trainer = Trainer(config_at(run, *pair, teachers))
    assert trainer.resumed
    assert trainer.state.update == 1
    assert (trainer.rollouts is not None) == (whole.config.method.rollout.passes > 1)
    if "renewed" in pair[0]:
        assert trainer.rollouts is not None
        assert len(trainer.rollouts.kept) < len(trainer.rollouts.chosen)
    trainer.train()
    assert metrics_of(run) == metrics_of(whole.run)
    assert (run / "samples.jsonl").read_bytes() == (whole.run / "samples.jsonl").read_bytes()
    folders = [checkpoint_of(path, last) for path in (whole.run, run)]
    names = sorted(file.name for file in folders[0].glob("*.safetensors"))
    assert names == sorted(file.name for file in folders[1].glob("*.safetensors"))
    for name in names:
        x, y = (load_file(folder / name) for folder in folders)
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key].nan_to_num(7.0), y[key].nan_to_num(7.0)), f"{name}: {key}"


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(teachers: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, "--main_process_port", "0", str(Path(__file__)), str(tmp_path), str(teachers)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for pair in IN_TURN:
        try:
            assert_same(seen(pair, teachers).run, tmp_path / "-".join(pair), updates_of(pair[0]))
        except AssertionError as error:
            raise AssertionError(f"{' on '.join(pair)}: {error}") from error


def work(folder: Path, teachers: Path) -> None:
    """What two processes do together."""
    torch.set_num_threads(1)
    TASKS["parity"] = Parity
    for pair in IN_TURN:
        # Few sequences: one at a time, so that a process may have nothing left while the other still works.
        tokens = 1 if pair[1] == "autoregressive" else 1000
        trainer = Trainer(config_at(folder / "-".join(pair), *pair, teachers, tokens))
        assert trainer.world == 2
        trainer.train()
    close_process_group()


def test_the_first_tier_has_every_part_on_some_backbone() -> None:
    wanted = {trait for pair in PAIRS for trait in traits(pair)}
    assert wanted == {trait for pair in FIRST for trait in traits(pair)}
    assert wanted >= {*BACKBONES, "passatk", "ema", "progressive", "lora", "passes"}
    assert len(FIRST) < len(PAIRS) / 4
    for some in (IN_TURN, IN_TURN[1::4], IN_TURN[::4]):  # a part that one backbone has alone leaves that choice
        kinds = Counter(kind for _, kind in some)
        assert min(kinds[kind] for kind in BACKBONES) >= max(1, len(some) // 4)


# What is not defined.

REVEALS = "reveals tokens after the graded position, which an autoregressive model cannot attend to"


def test_a_method_is_refused_where_it_is_not_defined_and_nowhere_else(teachers: Path, tmp_path: Path) -> None:
    refused: dict[Pair, str] = {}
    for case in CASES:
        for kind in BACKBONES:
            try:
                check_model(config_at(tmp_path / "run", case, kind, teachers))
            except InputError as error:
                refused[case, kind] = str(error)
    assert refused.keys() == {(case, "autoregressive") for case in ONLY_DIFFUSION}
    assert all(REVEALS in message for message in refused.values())


def test_what_is_not_defined_is_refused_in_one_sentence_before_anything_is_written(
    teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"every": 0, "final_problems": 0}
    config = json.dumps({"model": model_of("", "autoregressive"), "task": {"name": "parity"}, "eval": few})
    (tmp_path / "small.yaml").write_text(config)
    for name in sorted(ONLY_DIFFUSION & METHODS.keys()):
        assert main(["train", str(tmp_path / "small.yaml"), f"method={name}", f"run={tmp_path / 'run'}"]) == 2
        out, error = capsys.readouterr()
        context = "later_step" if name == "later_step" else "suffix"
        assert out == ""
        assert error == (
            f"dllm-sd: method.contexts {context} {REVEALS}; put a hint into the prompt instead (reference, sibling), "
            "or set model.as=diffusion to train this checkpoint as a masked diffusion model\n"
        )
        assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
