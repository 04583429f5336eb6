"""Compares wordings of the teachers' prompts: how often is a model right that reads a hint in each of them?

    python -m tools.lab.templates smollm2 [--hints reference,answer] [--problems 64]

The teacher decodes greedily, as `dllm-sd probe` lets it. Problems are the first of the dev split of `word_problems`. No
writer takes part: what one would write is made of the problem, in fixed words. The data are written after each wording,
and what they already hold is not measured again; the table of docs/smollm2.md is printed at the end.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sd.decoding.settings import Decoding
from dllm_sd.evaluation.estimates import wilson_interval
from dllm_sd.files.writing import write_file
from dllm_sd.policies.loading import load_policy
from dllm_sd.policies.policy import Policy
from dllm_sd.probing.accuracy import Exam
from dllm_sd.skills import Mistake, Skill, SkillPair, format_pair
from dllm_sd.tasks import Problem, WordProblems
from dllm_sd.teachers import Reference
from dllm_sd.teachers.context import TeacherPrompt
from dllm_sd.teachers.hints import AFRESH, OWN_WORDS
from dllm_sd.teachers.prompts import encode_teacher_prompt
from dllm_sd.teachers.skills import SKILLS
from dllm_sd.teachers.written import COMMENT, TUTORED

DATA = Path(__file__).resolve().parents[2] / "docs" / "results" / "templates.json"
BEFORE = "{intro}\n{{hint}}\n\n{{question}}"
AFTER = "{{question}}\n\n{intro}\n{{hint}}\n\n{order}"
FIRST_CRITIQUE = """\
{question}

A solution to this problem that has been gone through step by step. What was right in it stands as it was; what was \
wrong or missing has been put right:
---
{hint}
---

Now give the solution, in the same steps."""
FIRST_FEEDBACK = """\
{question}


What a reviewer said about your last attempt:
---
{hint}
---

Solve the problem afresh and answer it correctly."""
FIRST_RUBRIC = """\
{question}

What a marker will look for, as a JSON list. Only you can see it, and a point may be mistaken:
{hint}

Keep these points in mind and solve the problem from the start, so that the solution stands on its own. Leave the list \
unmentioned."""
"""The defaults before this comparison."""
_VERBS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}


def _steps(problem: Problem) -> list[tuple[int, str, int]]:
    """The numbers and the operator of each calculation."""
    parts = [line.split() for line in problem.fields["equations"].splitlines()]
    return [(int(left), operator, int(right)) for left, operator, right, *_ in parts]


def solution(problem: Problem) -> str:
    """The worked reference."""
    return f"{problem.fields['solution']}\n#### {problem.fields['answer']}"


def attempt(problem: Problem) -> str:
    """A right attempt in other words than the reference."""
    return f"{problem.fields['equations']}\nSo the answer is {problem.fields['answer']}."


def critique(problem: Problem) -> str:
    """A corrected copy in tagged steps."""
    lines = enumerate(problem.fields["equations"].splitlines(), 1)
    copied = [f"<step_{n}>{line}</step_{n}>" for n, line in lines]
    return "\n".join([*copied, f"<answer>{problem.fields['answer']}</answer>"])


def feedback(problem: Problem) -> str:
    """What a reviewer may say who does not give the answer away."""
    first, *rest = _steps(problem)
    told = f"You went wrong at the start. First {_VERBS[first[1]]} with the numbers {first[0]} and {first[2]}."
    return " ".join([told, *(f"Then {_VERBS[operator]} with {right}." for _, operator, right in rest)])


def rubric(problem: Problem) -> str:
    """Criteria as a writer gives them, as JSON."""
    items = [f"Uses {left} and {right} to {_VERBS[operator]}." for left, operator, right in _steps(problem)]
    items.append("Ends with the answer as one number.")
    lines = [json.dumps({"description": item, "weight": 1.0 if item is items[-1] else 2.0}) for item in items]
    return "[" + ",\n".join(lines) + "]"


def skills(problem: Problem) -> str:
    """A pair of a bank, chosen by the first calculation of the problem."""
    operator = _steps(problem)[0][1]
    title, principle, when = {
        "+": ("Putting together", "When more come, add the numbers.", "Things are found, brought or made."),
        "-": ("Taking away", "When some go, subtract the smaller number.", "Things are given, lost or sold."),
        "*": ("Equal groups", "Multiply the number of groups by the size of one.", "Each group has as many."),
        "/": ("Equal shares", "Divide the whole by the number of shares.", "Things are shared or packed equally."),
    }[operator]
    mistake = Mistake("err_1", "Repeats a number of the question.", "Haste.", "Write the calculation first.")
    return format_pair(SkillPair(Skill("gen_1", title, principle, when), mistake, None, 1.0))


@dataclass(frozen=True)
class Compared:
    """A hint: its text for a problem, and the templates that are compared; the first was the default before."""

    text: Callable[[Problem], str]
    templates: Mapping[str, str]


def _wordings(default: str, noun: str, order: str) -> dict[str, str]:
    return {
        "first default": default,
        "after, short": AFTER.format(intro=f"{noun}:", order=order),
        "before": BEFORE.format(intro=f"{noun} of the next problem:"),
    }


HINTS: dict[str, Compared] = {
    "reference": Compared(
        solution,
        {
            **_wordings(OWN_WORDS, "The solution", "Now write this solution."),
            "after, own words": AFTER.format(intro="A right solution is:", order="Now solve it in your own words."),
        },
    ),
    "answer": Compared(
        lambda problem: problem.fields["answer"],
        {
            **_wordings(OWN_WORDS, "The answer", "Now write how to get this answer."),
            "after, one line": "{question}\n\nThe answer is {hint}. Show the calculation.",
        },
    ),
    "sibling": Compared(attempt, _wordings(AFRESH, "A right solution", "Now write your solution.")),
    "critique": Compared(critique, _wordings(FIRST_CRITIQUE, "The corrected solution", "Now write this solution.")),
    "feedback": Compared(
        feedback,
        {
            **_wordings(FIRST_FEEDBACK, "A reviewer's advice", "Now solve it with this advice."),
            "after, in parts": TUTORED.replace("{hint}", COMMENT),
        },
    ),
    "rubric": Compared(rubric, _wordings(FIRST_RUBRIC, "What a right solution does", "Now write such a solution.")),
    "skills": Compared(skills, _wordings(SKILLS, "Advice", "Now solve the problem.")),
}


class Comparison:
    """Measures wordings with one model on one set of problems, and keeps what was measured in a file of rows."""

    def __init__(self, policy: Policy, task: WordProblems, problems: Sequence[Problem], length: int, out: Path) -> None:
        """Go on with the rows of ``out``, if it is there."""
        self.policy, self.task, self.problems, self.out = policy, task, problems, out
        self.exam = Exam(task, Decoding(length=length, batch_size=32), seed=0)
        self.rows = read_rows(out)

    def measure(self, hint: str, wording: str, template: str, text: Callable[[Problem], str]) -> None:
        """Let the model answer behind a hint, and write down how often it is right."""
        key = {"hint": hint, "wording": wording, "template": template, "n": len(self.problems)}
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.rows):
            return
        start = time.process_time()
        prompts = [self._prompt(problem, template, text(problem)) for problem in self.problems]
        verdicts = self.exam(self.policy, self.problems, prompts)
        right = sum(verdicts.values())
        low, high = wilson_interval(right / len(verdicts), len(verdicts))
        spent = round(time.process_time() - start)
        setting = {"prompt": self.task.prompt, "steps": self.task.steps, "core_seconds": spent}
        self.rows.append({**key, "right": right, "ci95": [round(low, 3), round(high, 3)], **setting})
        print(f"{hint:10} {wording:18} {right:3} of {len(verdicts)}  ({low:.2f} to {high:.2f})", flush=True)
        write_file(self.out, json.dumps(self.rows, indent=1) + "\n")

    def _prompt(self, problem: Problem, template: str, text: str) -> Sequence[int]:
        prompt = TeacherPrompt(tuple(self.task.messages(problem)), template, text)
        tokens, _ = encode_teacher_prompt(prompt, Reference(), self.policy)
        assert tokens is not None
        return tokens


def read_rows(file: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown; templates stand as one line of Python's text."""
    lines = ["| hint | wording | right | 95 % | template |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = (round(100 * bound) for bound in row["ci95"])
        template = repr(row["template"])[1:-1].replace("|", "\\|")
        lines.append(
            f"| {row['hint']} | {row['wording']} | {row['right']} of {row['n']} | {low} to {high} | `{template}` |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare the wordings of some hints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--hints", default=",".join(HINTS))
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--prompt", default="{question}")
    parser.add_argument("--length", type=int, default=48)
    options = parser.parse_args()
    task = WordProblems(steps=options.steps, prompt=options.prompt)
    problems = task.problems("dev")[: options.problems]
    policy = load_policy(options.model)
    comparison = Comparison(policy, task, list(problems), options.length, options.out)
    if not any(row["hint"] == "none" for row in comparison.rows):
        comparison.measure("none", "the question alone", "{question}", lambda problem: "")
    for name in options.hints.split(","):
        for wording, template in HINTS[name].templates.items():
            comparison.measure(name, wording, template, HINTS[name].text)
    print(table(comparison.rows))


if __name__ == "__main__":
    main()
