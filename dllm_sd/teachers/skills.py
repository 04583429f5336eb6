"""Skills and mistakes from other problems in the teacher's prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dllm_sd.errors import InputError
from dllm_sd.files.writing import Place
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Natural, Ranged, Size
from dllm_sd.skills import (
    PAIR,
    RETRIEVERS,
    Bank,
    Extraction,
    Lexical,
    Retriever,
    SkillPair,
    check_pair,
    format_pair,
    retrieve,
)
from dllm_sd.tasks.datafile import Generated, render
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.teachers.context import HintInputs, TeacherPrompt
from dllm_sd.teachers.hints import Prompt, check_template
from dllm_sd.teachers.writing import Writing
from dllm_sd.writers import Sampling

SKILLS = """\
Notes from work on other problems. They may or may not fit this one; use what helps, in your own way, and do not \
mention them:
---
{hint}
---

{question}"""


@dataclass(frozen=True)
class SkillBankConfig(Ranged, key="method.skill_bank"):
    """The bank of skills of a run (SGSD, arXiv 2605.28791)."""

    path: Place | None = None
    """JSON file of the bank. None makes a bank at the start of the run, from `memories` attempts of the model at
    training problems."""
    retriever: Retriever = field(default_factory=Lexical, metadata={"parts": RETRIEVERS})
    """How the skills and mistakes that fit a problem are found."""
    count: Size = 8
    """Pairs of a skill and a mistake that are found for each problem; there must be a context for each."""
    problem: str | None = None
    """The text of a problem in retrieval and extraction, a template over the problem's
    fields such as `{problem}` (SGSD); None takes the whole prompt."""
    memories: Size = 256
    """Attempts at training problems from which the first bank is extracted."""
    attempt: Sampling | None = None
    """How these attempts are decoded; None decodes as many tokens as the run does, at temperature 1, with the student's
    thinking switch. The released code: 38912 tokens, temperature 1, top-p 0.95, thinking on."""
    every: Natural = 25
    """Updates between two updates of the bank, from the rollouts of the last one; 0 leaves it as it is."""
    writing: Writing = field(default_factory=Writing)
    """Writer that extracts and merges skills."""
    renewal: Sampling | None = None
    """Sampling of the writer when it updates the bank; None takes the sampling of the first bank. The released code:
    4096 tokens for the first bank, 2048 for a renewal."""
    extraction: Extraction = field(default_factory=Extraction)

    @property
    def needs_writer(self) -> bool:
        """Whether the run makes or renews the bank, which needs a writer."""
        return self.path is None or self.every > 0

    def texts(self) -> dict[str, Sampling]:
        """The sampling settings of each kind of text that the run's own weights write, by config key."""
        local = self.needs_writer and self.writing.writer.weights is not None
        kinds = {"attempt": self.attempt if self.path is None else None}
        kinds |= {"writing.sampling": self.writing.sampling, "renewal": self.renewal} if local else {}
        return {key: sampling for key, sampling in kinds.items() if sampling is not None}

    def check(self, problems: Sequence[Problem]) -> None:
        """Refuse a `problem` that shows nothing of a problem, or asks for what one of them does not have.

        Raises:
            InputError: naming the key and the problem.
        """
        if self.problem is None:
            return
        for problem in (
            problems[:1] if isinstance(problems, Generated) else problems
        ):  # generated problems all have the same fields
            key = f"method.skill_bank.problem (for {problem.id})"
            first, second = (render(self.problem, dict.fromkeys(problem.fields, mark), key) for mark in "12")
            if first == second:
                raise InputError("method.skill_bank.problem is one text for all problems; give it a field in braces")

    def text(self, task: Task, problem: Problem) -> str:
        """The text of a problem as the query of the bank."""
        if self.problem is None:
            return task.messages(problem)[-1]["content"]
        return render(self.problem, problem.fields, "method.skill_bank.problem")

    def pairs(self, bank: Bank, query: str, key: int) -> tuple[SkillPair, ...]:
        """The pairs of the bank for a problem, best first."""
        return retrieve(bank, query, self.count, key, self.retriever)


@dataclass(frozen=True, kw_only=True)
class Skills(Prompt):
    """One of the pairs of a skill and a mistake that the run's bank has for the problem; each pair makes one
    teacher."""

    rank: Natural = 0
    """Rank of the pair; 0 is the best."""
    template: str = SKILLS
    """Template of the teacher's prompt; `{question}` is the student's prompt, `{hint}` the hint."""
    pair: str = PAIR
    """Template of the hint: `{title}`, `{principle}`, `{when_to_apply}` of the skill, `{description}`,
    `{how_to_avoid}` and `{why_it_happens}` of the mistake."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template)
        check_pair(self.pair)

    @property
    def skill_rank(self) -> int:
        """`rank`."""
        return self.rank

    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt | None:
        """None where the bank holds fewer pairs; the pair's weight is the weight of this teacher."""
        pairs = inputs.pairs(inputs.rollout.problem, make_key(inputs.key, "skills"))
        if self.rank >= len(pairs):
            return None
        pair = pairs[self.rank]
        return TeacherPrompt(inputs.messages, self.template, format_pair(pair, self.pair), weight=pair.weight)
