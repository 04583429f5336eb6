"""Parsing the skills or mistakes that a model wrote: JSON, read in bounded time and never evaluated as code.

Source: SGSD (arXiv 2605.28791), released code walawalagoose/SGSD, commit f296a91, `skill/generate_math_skills.py`,
`parse_response_to_json` and `normalize_general_skill`, which read from the first brace to the last.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dllm_sd.skills.bank import EntryT, Mistake, Skill, text_names
from dllm_sd.texts.thinking import without_thinking

MAX_ANSWER_TEXT = 100_000  # characters of an answer that are read
MAX_STARTS = 32  # most positions of an answer at which JSON is decoded

_START = re.compile(r"\[(?=\s{0,32}\{)|\{(?=\s{0,32}\")")
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|["\\/n]|[rt](?![a-z]))?')


def parse_items(
    answer: str | None, kind: type[EntryT], longest: int, counts: Counter[str], alone: bool = True
) -> tuple[tuple[EntryT, ...], str | None]:
    """Return the usable entries of an answer, without ids; or none, and the reason in one word.

    They come from the first list of objects, or the first object that contains such a list, that decodes as JSON after
    the thinking. With ``alone``, an object may be an entry itself, so that the first entry of a truncated list is read.
    An entry that lacks one of its three texts, or has a text longer than ``longest``, is left out and counted.
    """
    if answer is None:
        return (), "no_answer"
    items: list[EntryT] = []
    reason = "no_json"
    for value in _decoded(without_thinking(answer)[:MAX_ANSWER_TEXT]):
        rows, reason = _rows(value, kind, alone), "no_entry"
        for row in rows:
            texts = [_squeezed(row.get(name)) for name in text_names(kind)]
            if not all(texts):
                counts["left_out/incomplete"] += 1
            elif max(map(len, texts)) > longest:
                counts["left_out/long"] += 1
            else:
                items.append(kind("", *texts))
        if rows:
            break
    return tuple(items), None if items else reason


def _decoded(text: str) -> Iterator[Any]:
    """Yield the JSON values of a text, from the left, where an object or a list of objects may begin."""
    text = _ESCAPE.sub(_escaped, text)
    decoder = json.JSONDecoder()
    for number, start in enumerate(_START.finditer(text)):
        if number == MAX_STARTS:
            return
        try:
            yield decoder.raw_decode(text, start.start())[0]
        except (ValueError, RecursionError):
            continue


def _escaped(match: re.Match[str]) -> str:
    """Escape a backslash that is not a JSON escape, or that begins a formula such as ``\\frac`` or ``\\theta``."""
    return match.group() if match.group(1) else r"\\"


def _rows(value: Any, kind: type[Skill] | type[Mistake], alone: bool) -> list[Mapping[str, Any]]:
    """Return the objects of a list, of the lists in an object, or a single object that is an entry."""
    if isinstance(value, Mapping):
        objects = [
            row
            for entries in value.values()
            if isinstance(entries, list)
            for row in entries
            if isinstance(row, Mapping)
        ]
        is_entry = alone and any(name in value for name in text_names(kind))
        return objects or ([value] if is_entry else [])
    return [row for row in value if isinstance(row, Mapping)]


def _squeezed(value: Any) -> str:
    """Return a text on one line, with ``?`` for lone surrogates, which files cannot hold; empty for anything else."""
    return " ".join(value.encode("utf-8", "replace").decode().split()) if isinstance(value, str) else ""
