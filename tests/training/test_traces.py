"""traces.jsonl: what it says is what the loss computed, of the sites it says, and a run is the same without it."""

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd.config import build_config
from dllm_sd.network.site_head import run_at_sites
from dllm_sd.network.view import View
from dllm_sd.objective.equation import Graded, grade_micro_batch
from dllm_sd.objective.plan import Plan
from dllm_sd.training.learner import Learner
from dllm_sd.training.traces import Pieces
from dllm_sd.training.trainer import Trainer
from dllm_sd.trajectory import NEVER

COMMON: dict[str, Any] = {
    "seed": 3,
    "updates": 1,
    "optim": {"lr": 3e-4, "tokens_per_batch": 256},
    "eval": {"every": 0, "final_problems": 0},
    "log": {"progress": False, "trackers": [], "samples": 3},
}
SUDOKU = {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"}
CLIPPED = {"name": "jsd", "beta": 0.5, "clip": "entry", "clip_at": 0.001}
RUNS: dict[str, dict[str, Any]] = {
    "suffix": {
        "model": {"path": "tiny", "dtype": "float64"},
        "task": SUDOKU,
        "decode": {"length": 16, "block_length": 4, "tokens_per_step": 2},
        "method": {"name": "d_opsd", "rollout": {"problems": 4, "attempts": 2}, "divergence": CLIPPED},
    },
    "chosen by the teacher": {
        "model": {"path": "tiny", "dtype": "float64"},
        "task": SUDOKU,
        "decode": {"length": 16, "block_length": 4, "tokens_per_step": 1},
        "method": {"name": "d_opsd", "rollout": {"problems": 4, "attempts": 2}, "sites": {"name": "teacher_top"}},
    },
    "hint": {
        "model": {"path": "tiny_ar", "dtype": "float64"},
        "task": {**SUDOKU, "prompt": "{puzzle}:", "answer": "{steps}\n{solution}"},
        "decode": {"length": 24},
        "method": {
            "name": "opsd",
            "rollout": {"problems": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            "contexts": [{"name": "reference", "template": "({hint}){question}"}],
            "divergence": CLIPPED,
            "temperature": 1.25,
        },
    },
}


def config_of(name: str, run: Path, **log: Any) -> Any:
    tree = json.loads(json.dumps({**COMMON, **RUNS[name], "run": str(run)}))
    tree["log"] |= log
    return build_config(tree)


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "traces.jsonl").read_text(encoding="utf-8").splitlines()]


def logits_at(run_model: Callable[[View, Any], Any], ids: Tensor, mask: Tensor, sites: Tensor) -> Tensor:
    """Logits ``[m v]`` of a whole forward pass."""
    everywhere = torch.nn.functional.pad(sites, (ids.shape[1] - sites.shape[1], 0))
    return run_model(View(ids, mask, everywhere), lambda hidden, head: head(hidden))


class Watched(SimpleNamespace):
    """What the test computes of the update before the step is taken."""

    plan: Plan
    graded: Graded
    logp: Tensor
    """``[m 1+c v]``."""


@lru_cache
def traced_run(name: str, folder: Path) -> tuple[Trainer, Watched]:
    """A run of one update, and the loss of the same update in one piece, without a tracer."""
    sites = 30 if name == "hint" else 512  # fewer than are graded, and more
    trainer = Trainer(config_of(name, Path(mkdtemp(dir=folder)), trace=sites))
    seen, step = Watched(), Learner.step

    def watching(self: Learner, plan: Plan, *rest: Any) -> Any:
        batch = plan.micro_batch()
        module = trainer.module.train()
        with torch.no_grad():
            student = partial(run_at_sites, module)
            graded = grade_micro_batch(self.method, batch, student, self.teachers)
            inputs = [(batch.canvases.ids, batch.canvases.mask), *((x.ids, x.mask) for x in batch.teacher_inputs)]
            logits = [logits_at(student, *pair, graded.sites) for pair in inputs]
        seen.plan, seen.graded = plan, graded
        seen.logp = torch.stack([(x / self.method.temperature).log_softmax(-1) for x in logits], 1)
        return step(self, plan, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", watching)
        trainer.train()
    return trainer, seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are that several tests read."""
    return tmp_path_factory.mktemp("traced")


@pytest.fixture(
    scope="module", params=["suffix", "hint", pytest.param("chosen by the teacher", marks=pytest.mark.slow)]
)
def traced(request: pytest.FixtureRequest, folder: Path) -> tuple[Trainer, Watched]:
    return traced_run(request.param, folder)


def sites_of(trainer: Trainer, seen: Watched) -> dict[tuple[int, int, int], int]:
    """The row ``m`` of each site in the whole update, by rollout, decoding step (0 if autoregressive) and position."""
    canvas, position = seen.graded.sites.nonzero(as_tuple=True)
    rows, steps = seen.plan.rows[canvas], seen.plan.steps[canvas]
    return {key: m for m, key in enumerate(zip(rows.tolist(), steps.tolist(), position.tolist(), strict=True))}


def row_in(trainer: Trainer, entry: dict[str, Any]) -> int:
    assert trainer.rollouts is not None
    names = [(one.problem.id, one.attempt) for one in trainer.rollouts.kept]
    return names.index((entry["problem"], entry["attempt"]))


def test_the_numbers_of_a_trace_are_those_of_the_loss(traced: tuple[Trainer, Watched]) -> None:
    trainer, seen = traced
    number, compared, clips = sites_of(trainer, seen), 0, 0
    for entry in lines_of(trainer.run):
        for site in entry["sites"]:
            step = 0 if entry["causal"] else site["step"]
            m, row = number[row_in(trainer, entry), step, site["position"]], row_in(trainer, entry)
            assert sum(site["divergence"]) == pytest.approx(float(seen.graded.value[m]), rel=1e-9, abs=1e-14)
            assert sum(site["clipped"]) == pytest.approx(float(seen.graded.clipped[m]), rel=1e-9, abs=1e-14)
            canvas = int(((seen.plan.rows == row) & (seen.plan.steps == step)).nonzero()[0])
            term = sum(d * t for d, t in zip(site["clipped"], site["trust"], strict=True))
            assert term * float(seen.plan.coefficient[canvas]) == pytest.approx(float(seen.graded.term[m]), rel=1e-6)
            for one, logp in zip((site["student"], *site["teachers"]), seen.logp[m], strict=True):
                best = logp.exp().topk(5)
                assert one["drawn"] == pytest.approx(float(logp[site["token"]].exp()), rel=1e-5)
                assert [p for _, p in one["top"]] == pytest.approx(best.values.tolist(), rel=1e-5)
                assert [token for token, _ in one["top"]] == best.indices.tolist()
            compared, clips = compared + 1, clips + (site["clipped"] != site["divergence"])
    graded = sum(entry["graded"] for entry in lines_of(trainer.run))
    assert 10 < compared <= trainer.config.log.trace
    assert compared == graded or graded > trainer.config.log.trace
    assert clips > 0 or trainer.method.divergence.clip == "none"  # type: ignore[attr-defined]


def test_a_trace_says_what_the_decoder_and_the_teacher_saw(traced: tuple[Trainer, Watched]) -> None:
    trainer, _ = traced
    entries = lines_of(trainer.run)
    assert [entry["slot"] for entry in entries] == list(range(len(entries)))
    assert {entry["gated"] for entry in entries} <= {True, False}
    for entry in entries:
        if entry["gated"]:
            assert entry["sites"] == []
            continue
        rollout = trainer.rollouts.kept[row_in(trainer, entry)]  # type: ignore[union-attr]
        assert entry["reveal_step"] == rollout.trajectory.reveal_step[0].tolist()
        text = trainer.policy.text(entry["tokens"][: entry["length"]])
        assert rollout.text == text
        hidden = set(trainer.policy.non_text_ids)
        shown = [t for t in entry["tokens"][: entry["length"]] if t not in hidden]
        assert "".join(entry["pieces"][str(token)] for token in shown) == text
        for teacher, brief in zip(entry["teachers"], rollout.briefs, strict=True):
            assert teacher["prompt"] == (None if brief.prompt is None else [*brief.prompt])
            assert teacher["hint"] == brief.text
        for site in entry["sites"]:
            canvas = entry["canvases"][site["canvas"]]
            assert entry["reveal_step"][site["position"]] != NEVER
            for ranges in canvas["shown"]:  # a graded site is never revealed to a teacher
                assert not any(a <= site["position"] < b for a, b in zip(ranges[::2], ranges[1::2], strict=True))
            assert site["token"] == entry["tokens"][site["position"]]


def test_a_run_is_the_same_without_traces(folder: Path, tmp_path: Path) -> None:
    plain, traced = Trainer(config_of("suffix", tmp_path / "plain", trace=0)), traced_run("suffix", folder)[0]
    plain.train()
    lines: list[list[dict[str, Any]]] = []
    for trainer in (plain, traced):
        text = (trainer.run / "metrics.jsonl").read_text()
        lines.append([{k: v for k, v in json.loads(line).items() if "time/" not in k} for line in text.splitlines()])
    assert lines[0] == lines[1]
    first, second = (trainer.policy.module.state_dict() for trainer in (plain, traced))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not (plain.run / "traces.jsonl").exists()
    assert any(entry["sites"] for entry in lines_of(traced.run))


def test_a_piece_is_the_text_of_a_token_within_a_text() -> None:
    words = ["▁two", "▁words", "<s>"]
    spelt = {0: " two", 1: " words", 2: "", 3: "\N{REPLACEMENT CHARACTER}"}
    policy = SimpleNamespace(
        text=lambda tokens: "".join(spelt[token] for token in tokens).removeprefix(" "),
        chat=SimpleNamespace(tokenizer=SimpleNamespace(convert_ids_to_tokens=lambda i: [*words, "<0xE2>"][i])),
    )
    pieces = Pieces(policy)
    assert [pieces[token] for token in range(4)] == [" two", " words", "<s>", "<0xE2>"]
