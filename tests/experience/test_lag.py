"""Rollouts one batch ahead: with which weights a batch is made, and that a run goes on with the batch that it had."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.config import build_config
from dllm_sd.errors import InputError
from dllm_sd.network.finite import fingerprint
from dllm_sd.policies.weights import trained
from dllm_sd.training.learner import Learner
from dllm_sd.training.trainer import Trainer
from tests.tiers import later

UPDATES = 4
LORA, PASSES = "autoregressive, LoRA", "diffusion, two passes"
CASES: dict[str, dict[str, Any]] = {
    LORA: {
        "model": {"path": "tiny_ar", "lora": {"rank": 4}},
        "method": {
            **{"name": "opsd", "temperature": 1.0, "trust": {"name": "importance_cap"}},
            "rollout": {"problems": 2, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            "contexts": [{"name": "reference", "template": "({hint}){question}"}],
        },
    },
    PASSES: {
        "model": {"path": "tiny"},
        "method": {"name": "d_opsd", "rollout": {"problems": 2, "attempts": 1, "passes": 2}, "gate": "all"},
    },
}


def tree(run: Path, lag: int, case: dict[str, Any]) -> dict[str, Any]:
    method = {**case["method"], "rollout": {**case["method"]["rollout"], "lag": lag}}
    return {
        **{"run": str(run), "seed": 1, "updates": UPDATES, "model": case["model"], "method": method},
        "task": {"name": "sudoku", "prompt": "{puzzle}:", "answer": "{steps}\n{solution}", "size_train": 64},
        "decode": {"length": 8, "block_length": 4},
        "optim": {"lr": 0.01, "warmup": 0, "schedule": "constant"},
        "eval": {"every": 0, "final_problems": 0},
        "checkpoint": {"every": 1, "keep": 9},
        "log": {"progress": False, "trackers": []},
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if not key.startswith("time/")} for line in lines if line["update"]]


@dataclass
class Lagged:
    """A whole run, and which weights (as the number of steps that they have had) decoded each of its batches."""

    run: Path
    case: dict[str, Any]
    decoded: list[int]

    @property
    def passes(self) -> int:
        return self.case["method"]["rollout"].get("passes", 1)


@pytest.fixture(scope="module", params=[*later(CASES[LORA]), CASES[PASSES]], ids=[LORA, PASSES])
def lagged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lagged:
    run, decoded = tmp_path_factory.mktemp("lag") / "run", list[int]()
    trainer = Trainer(build_config(tree(run, 1, request.param)))
    engine, steps = trainer.pipeline.engine, [fingerprint(trained(trainer.policy).values())]

    class Observed:
        """The local decoder, which notes how many steps the weights have had."""

        decoder = engine.decoder

        def complete(self, *args: Any, **options: Any) -> None:
            now = fingerprint(trained(trainer.policy).values())
            if now != steps[-1]:
                steps.append(now)
            decoded.append(len(steps) - 1)
            self.decoder.complete(*args, **options)

    engine.decoder = Observed()
    trainer.train()
    return Lagged(run, request.param, decoded)


def test_a_batch_is_decoded_with_the_weights_before_the_one_in_front_of_it(lagged: Lagged):
    made = [line for line in metrics(lagged.run) if "rollouts/lag" in line]
    count = UPDATES // lagged.passes
    assert [line["update"] for line in made] == [1 + lagged.passes * batch for batch in range(count)]
    assert [line["rollouts/lag"] for line in made] == [0, *[lagged.passes] * (count - 1)]
    assert lagged.decoded == [0, *range(count - 1)]


def test_a_run_that_is_killed_goes_on_with_the_batch_that_ran_ahead(lagged: Lagged, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(lagged.run, run)
    last = UPDATES - 1 if lagged.passes > 1 else UPDATES - 2  # between two passes, and between two batches
    for folder in (run / "checkpoints").iterdir():
        if folder.name != f"{last:06d}":
            shutil.rmtree(folder)
    (run / "report.json").unlink()
    Trainer(build_config(tree(run, 1, lagged.case))).train()
    assert metrics(run) == metrics(lagged.run)


def test_a_run_that_breaks_between_two_passes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = Learner.step

    def broken(self: Learner, plan: Any, rollouts: Any, update: int, *rest: Any) -> Any:
        if update == 2:
            raise FloatingPointError("not finite")
        return step(self, plan, rollouts, update, *rest)

    config = build_config(tree(tmp_path / "run", 1, CASES[PASSES]))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", broken)
        with pytest.raises(FloatingPointError):
            Trainer(config).train()
    Trainer(config).train()
    assert [line["update"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "diffu_grpo", "rollout": {"lag": 1}}, "takes its ratios to the weights"),
        ({"name": "d_opsd", "rollout": {"lag": 1, "policy": "base"}}, "does not follow it"),
        ({"name": "sft", "rollout": {"lag": 1}}, "lag"),
        ({"name": "d_opsd", "rollout": {"lag": 2}}, "method.rollout.lag"),
    ],
)
def test_losses_that_compare_with_the_policy_of_the_rollouts_are_refused(
    tmp_path: Path, method: dict[str, Any], words: str
):
    with pytest.raises(InputError, match=words):
        build_config({**tree(tmp_path, 1, CASES[PASSES]), "method": method})
