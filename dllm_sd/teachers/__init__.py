"""Contexts: the privileged information of teachers."""

from dllm_sd.teachers.context import Context, ContextDefaults, ContextInputs, Hint, Nothing, Reasoning, TeacherInputs
from dllm_sd.teachers.hints import NoQuestion, Reference, Sibling
from dllm_sd.teachers.skills import SkillBankConfig, Skills
from dllm_sd.teachers.suffix import LaterStep, Suffix
from dllm_sd.teachers.table import HINTS
from dllm_sd.teachers.written import Critique, Feedback, Rubric

CONTEXTS: dict[str, type] = {"nothing": Nothing, "suffix": Suffix, "later_step": LaterStep, **HINTS}
AnyContext = Context

__all__ = [
    "CONTEXTS",
    "HINTS",
    "AnyContext",
    "Context",
    "ContextDefaults",
    "ContextInputs",
    "Critique",
    "Feedback",
    "Hint",
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
