"""Hints that somebody writes, asked through `build_teacher_prompts` of a writer that follows a script."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dllm_sd.decoding.settings import Decoding
from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.model import Model, Shape
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.rollouts.rules import PassAtK, gather
from dllm_sd.skills.retrieval import SkillPair
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import AnyContext
from dllm_sd.teachers.context import no_pairs
from dllm_sd.teachers.prompts import Sources, build_teacher_prompts
from dllm_sd.teachers.writing import Writing
from dllm_sd.trajectory import Trajectory
from dllm_sd.writers import Request, Written

BATCH = (3, 7)


class Asks:
    """Asks with a system text; its data may lack a solution or an answer."""

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        asked = problem.fields["question"] if question else ""
        return [{"role": "system", "content": "S|"}, {"role": "user", "content": asked}]

    def reference(self, problem: Problem) -> str | None:
        return problem.fields.get("solution")

    def final_answer(self, problem: Problem) -> str | None:
        return problem.fields.get("answer")


class Letters:
    """A policy whose tokens are characters, so that prompts can be read."""

    def encode(self, messages: Sequence[Mapping[str, str]], thinking: bool | None = None) -> list[int]:
        return [ord(letter) for message in messages for letter in message["content"]]

    def encode_completion(self, text: str, ended: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


TASK: Any = Asks()
POLICY: Any = Letters()


@cache
def any_trajectory() -> Trajectory:
    """One for all rollouts, of which only the text counts here."""
    shape = Shape(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    policy = build_policy(Model(random_init=True, tokenizer="tiny", shape=shape))
    return policy.demonstration([4], [5, 1], Decoding(length=4, block_length=4))


@dataclass
class Script:
    """Answers every request by its last message, and notes what it was asked."""

    answer: Callable[[str], Written | str]
    asked: list[tuple[Writing, list[Request]]] = field(default_factory=list)

    def __call__(self, writing: Writing, requests: Sequence[Request]) -> list[Written]:
        self.asked.append((writing, list(requests)))
        found = [self.answer(request.messages[-1]["content"]) for request in requests]
        return [Written(one, None) if isinstance(one, str) else one for one in found]

    @property
    def requests(self) -> list[Request]:
        """All of them."""
        return [request for _, requests in self.asked for request in requests]

    @property
    def contents(self) -> list[str]:
        """What they ask; each is one message of the user."""
        assert all(len(one.messages) == 1 and one.messages[0]["role"] == "user" for one in self.requests)
        return [one.messages[0]["content"] for one in self.requests]


def rolled(*attempts: tuple[Problem, Sequence[tuple[str, float]]]) -> Rollouts:
    """The attempts at each problem, as text and score; all are kept."""
    tried = [
        [Rollout(problem, i, text, Grade(s == 1, s, None), any_trajectory()) for i, (text, s) in enumerate(texts)]
        for problem, texts in attempts
    ]
    return gather(PassAtK(attempts=9, keep="all", until_solved=False), All(), tried)


def nobody(*_: Any) -> list[Any]:
    raise AssertionError("nobody was to write")


def informed(
    rollouts: Rollouts,
    *contexts: AnyContext,
    write: Any = nobody,
    problems: Sequence[Problem] | None = None,
    pairs: Callable[[Problem, int], Sequence[SkillPair]] = no_pairs,
    batch: tuple[int, int] = BATCH,
) -> Rollouts:
    """Teacher prompts under a task of plain questions; its training problems are those of the rollouts unless given."""
    own = list({rollout.problem.id: rollout.problem for rollout in rollouts.chosen}.values())
    sources = Sources(own if problems is None else problems, write, pairs)
    return build_teacher_prompts(rollouts, contexts, TASK, POLICY, nobody, batch, sources)


def prompts(rollouts: Rollouts, context: int = 0) -> list[str]:
    """What one teacher reads, behind the system text."""
    texts = [POLICY.text(rollout.briefs[context].prompt or ()) for rollout in rollouts.kept]
    assert all(text.startswith("S|") for text in texts)
    return [text.removeprefix("S|") for text in texts]


def places(rollouts: Rollouts) -> list[tuple[str, int]]:
    """Which rollouts are left: problem and attempt."""
    return [(rollout.problem.id, rollout.attempt) for rollout in rollouts.kept]


def drops(rollouts: Rollouts) -> dict[str, float]:
    """What was dropped, by reason."""
    return {name[8:]: count for name, count in rollouts.counts.items() if name.startswith("dropped/")}
