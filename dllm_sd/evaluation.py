"""Evaluation: decode held-out problems with the training sampler, grade them with the training grader, report."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import gather_object

from dllm_sd.config import Config
from dllm_sd.errors import InputError
from dllm_sd.policies.denoising import Denoising
from dllm_sd.policies.policy import Policy
from dllm_sd.randomness import make_key
from dllm_sd.rollouts import Prompted, prompt_tokens
from dllm_sd.tasks.task import Problem, Task


@dataclass(frozen=True)
class Item:
    """One problem's attempts, in order."""

    problem: str
    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """Accuracy over ``n`` problems; `accuracy` averages over attempts (avg@k)."""

    n: int
    accuracy: float
    ci95: tuple[float, float]
    score: float
    pass_at_k: dict[int, float]
    length: float
    tokens_per_step: float
    too_long: int
    seconds: float

    def tree(self) -> dict[str, Any]:
        """For report.json."""
        return {
            **{name: getattr(self, name) for name in ("n", "accuracy", "score", "length", "tokens_per_step")},
            "ci95": list(self.ci95),
            "pass_at_k": {str(k): value for k, value in self.pass_at_k.items()},
            "too_long": self.too_long,
            "time/seconds": self.seconds,
        }


def evaluate(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    decode: Denoising,
    *,
    temperature: float = 0.0,
    attempts: int = 1,
    seed: int = 0,
    max_prompt: int = 512,
    rank: int = 0,
    world: int = 1,
) -> tuple[Report, list[Item]]:
    """Decode and grade every problem.

    Randomness is keyed by (seed, problem, attempt) and the model's mode is restored, so that an evaluation leaves no
    trace in training. Problems are dealt to ``world`` processes; all of them get the whole result.

    Raises:
        InputError: if no problem is left to evaluate.
    """
    start = time.perf_counter()
    prompted = [prompt_tokens(policy, task, problem, max_prompt) for problem in problems[rank::world]]
    mine = [item for item in prompted if item is not None]
    items = _attempts(policy, task, mine, replace(decode, temperature=temperature), attempts, seed) if mine else []
    dropped = len(prompted) - len(mine)
    if world > 1:
        items = sorted(gather_object(list(enumerate(items))), key=lambda pair: pair[0])
        items = [item for _, item in items]
        dropped = sum(gather_object([dropped]))
    if not items:
        raise InputError(f"no problem is left to evaluate ({dropped} prompts exceed max_prompt {max_prompt}); raise it")
    return _report(items, dropped, time.perf_counter() - start), items


def evaluate_run(
    policy: Policy,
    config: Config,
    problems: Sequence[Problem],
    rank: int,
    world: int,
    overrides: Mapping[str, Any] | None = None,
) -> Report:
    """Evaluate with the settings of a run: in training and by ``dllm-sd eval`` alike.

    ``overrides`` replace fields of `decode` (another schedule).
    """
    report, _ = evaluate(
        policy,
        config.task,
        problems,
        replace(config.decode, **(overrides or {})),
        temperature=config.eval.temperature,
        attempts=config.eval.attempts,
        seed=config.seed,
        max_prompt=config.max_prompt,
        rank=rank,
        world=world,
    )
    return report


def _attempts(
    policy: Policy, task: Task, prompted: Sequence[Prompted], decode: Denoising, attempts: int, seed: int
) -> list[Item]:
    rows = [item for item in prompted for _ in range(attempts)]
    keys = [make_key(seed, item.problem.id, attempt, "evaluate") for item in prompted for attempt in range(attempts)]
    trajectory = policy.decode([item.prompt for item in rows], decode, keys)
    lengths, steps = trajectory.length.tolist(), trajectory.num_steps.tolist()
    texts = [policy.text(tokens[:length].tolist()) for tokens, length in zip(trajectory.tokens, lengths, strict=True)]
    grades = [task.grade(item.problem, text) for item, text in zip(rows, texts, strict=True)]

    def of(values: Sequence[Any], i: int) -> tuple[Any, ...]:
        return tuple(values[i * attempts : (i + 1) * attempts])

    return [
        Item(
            problem=item.problem.id,
            texts=of(texts, i),
            correct=of([grade.correct for grade in grades], i),
            scores=of([grade.score for grade in grades], i),
            lengths=of(lengths, i),
            steps=of(steps, i),
        )
        for i, item in enumerate(prompted)
    ]


def _report(items: Sequence[Item], dropped: int, seconds: float) -> Report:
    attempts = len(items[0].correct)
    share = [sum(item.correct) / attempts for item in items]
    accuracy = math.fsum(share) / len(items)
    tokens = sum(sum(item.lengths) for item in items)
    return Report(
        n=len(items),
        accuracy=accuracy,
        ci95=wilson_interval(accuracy, len(items)),
        score=math.fsum(sum(item.scores) / attempts for item in items) / len(items),
        pass_at_k={
            k: math.fsum(pass_at_k(attempts, sum(item.correct), k) for item in items) / len(items)
            for k in sorted({1, attempts})
        },
        length=tokens / (len(items) * attempts),
        tokens_per_step=tokens / max(1, sum(sum(item.steps) for item in items)),
        too_long=dropped,
        seconds=seconds,
    )


def pass_at_k(attempts: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` attempts is correct (arXiv 2107.03374, Eq. 1)."""
    return 1.0 - math.comb(attempts - correct, k) / math.comb(attempts, k)


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share observed over ``n`` independent problems (Wilson, 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def first(problems: Sequence[Problem], count: int) -> list[Problem]:
    """The first ``count`` problems of a split (all of them if there are fewer)."""
    return [problems[i] for i in range(min(count, len(problems)))]
