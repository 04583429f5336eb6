"""What teachers see beyond the student."""

from dllm_sd.teachers.context import Context, Nothing, Reading, Reasoning, Scene
from dllm_sd.teachers.hints import HINTS, NoQuestion, Reference, Sibling
from dllm_sd.teachers.suffix import LaterStep, Suffix

CONTEXTS: dict[str, type] = {"nothing": Nothing, "suffix": Suffix, "later_step": LaterStep, **HINTS}
AnyContext = Nothing | Suffix | LaterStep | Reference | Sibling | NoQuestion

__all__ = [
    "CONTEXTS",
    "AnyContext",
    "Context",
    "LaterStep",
    "NoQuestion",
    "Nothing",
    "Reading",
    "Reasoning",
    "Reference",
    "Scene",
    "Sibling",
    "Suffix",
]
