"""Skills: banks of helpful skills and common mistakes, their retrieval for a problem, and their extraction."""

from dllm_sd.skills.bank import Bank, Mistake, Skill, build_bank, distinct, is_dynamic, numbered, read_bank, write_bank
from dllm_sd.skills.extraction import Attempt, Extraction, cold_start, update
from dllm_sd.skills.retrieval import (
    PAIR,
    RETRIEVERS,
    Embedding,
    Index,
    Lexical,
    Random,
    Retriever,
    SkillPair,
    check_pair,
    format_pair,
    index,
    retrieve,
)

__all__ = [
    "PAIR",
    "RETRIEVERS",
    "Attempt",
    "Bank",
    "Embedding",
    "Extraction",
    "Index",
    "Lexical",
    "Mistake",
    "Random",
    "Retriever",
    "Skill",
    "SkillPair",
    "build_bank",
    "check_pair",
    "cold_start",
    "distinct",
    "format_pair",
    "index",
    "is_dynamic",
    "numbered",
    "read_bank",
    "retrieve",
    "update",
    "write_bank",
]
