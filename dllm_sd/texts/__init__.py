"""Texts for hints: rubrics, corrected solutions in steps, and peer feedback. Pure functions on text."""

from dllm_sd.texts.critique import (
    FORMS,
    Form,
    Region,
    SolutionPart,
    Steps,
    accept_critique,
    first_change,
    full_quote,
    no_trace,
    parse_steps,
    regions,
    verbatim_prefix,
)
from dllm_sd.texts.feedback import sanitise
from dllm_sd.texts.rubric import (
    Category,
    Criteria,
    Criterion,
    generic,
    is_unfinished,
    noisy,
    parse_rubric,
    reduced,
    render_rubric,
)
from dllm_sd.texts.rubric_score import rubric_score

__all__ = [
    "FORMS",
    "Category",
    "Criteria",
    "Criterion",
    "Form",
    "Region",
    "SolutionPart",
    "Steps",
    "accept_critique",
    "first_change",
    "full_quote",
    "generic",
    "is_unfinished",
    "no_trace",
    "noisy",
    "parse_rubric",
    "parse_steps",
    "reduced",
    "regions",
    "render_rubric",
    "rubric_score",
    "sanitise",
    "verbatim_prefix",
]
