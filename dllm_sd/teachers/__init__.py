"""What teachers see beyond the student."""

from dllm_sd.teachers.context import Context, Nothing, Reading, Scene
from dllm_sd.teachers.suffix import LaterStep, Suffix

CONTEXTS: dict[str, type] = {"nothing": Nothing, "suffix": Suffix, "later_step": LaterStep}

__all__ = ["CONTEXTS", "Context", "LaterStep", "Nothing", "Reading", "Scene", "Suffix"]
