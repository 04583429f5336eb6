"""What teachers see beyond the student."""

from dllm_sd.teachers.context import Context, ContextInputs, Nothing, Reasoning, TeacherInputs
from dllm_sd.teachers.hints import NoQuestion, Reference, Sibling
from dllm_sd.teachers.skills import SkillBankConfig, Skills
from dllm_sd.teachers.suffix import LaterStep, Suffix
from dllm_sd.teachers.table import HINTS, AnyHint
from dllm_sd.teachers.written import Critique, Feedback, Rubric

CONTEXTS: dict[str, type] = {"nothing": Nothing, "suffix": Suffix, "later_step": LaterStep, **HINTS}
AnyContext = Nothing | Suffix | LaterStep | AnyHint

__all__ = [
    "CONTEXTS",
    "HINTS",
    "AnyContext",
    "AnyHint",
    "Context",
    "ContextInputs",
    "Critique",
    "Feedback",
    "LaterStep",
    "NoQuestion",
    "Nothing",
    "Reasoning",
    "Reference",
    "Rubric",
    "Sibling",
    "SkillBankConfig",
    "Skills",
    "Suffix",
    "TeacherInputs",
]
