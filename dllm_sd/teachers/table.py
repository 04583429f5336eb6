"""The hints by name."""

from dllm_sd.teachers.hints import NoQuestion, Reference, Sibling
from dllm_sd.teachers.skills import Skills
from dllm_sd.teachers.written import Critique, Feedback, Rubric

HINTS: dict[str, type] = {
    "reference": Reference,
    "sibling": Sibling,
    "no_question": NoQuestion,
    "rubric": Rubric,
    "critique": Critique,
    "feedback": Feedback,
    "skills": Skills,
}
