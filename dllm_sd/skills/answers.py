"""What a model wrote when it was asked for skills or mistakes: read as JSON in bounded time, never evaluated.

Source: SGSD (arXiv 2605.28791), released code walawalagoose/SGSD, commit f296a91, `skill/generate_math_skills.py`,
`parse_response_to_json` and `normalize_general_skill`, which read from the first brace to the last.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from dllm_sd.skills.bank import Item, Mistake, Skill, text_names
from dllm_sd.texts.thinking import without_thinking

MAX_TEXT = 100_000  # characters of an answer that are looked at
MAX_STARTS = 32  # places of an answer at which JSON may begin

_START = re.compile(r"\[(?=\s{0,32}\{)|\{(?=\s{0,32}\")")
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|["\\/n]|[rt](?![a-z]))?')


def parse_items(
    answer: str | None, kind: type[Item], longest: int, counts: Counter[str], alone: bool = True
) -> tuple[tuple[Item, ...], str | None]:
    """The usable entries of an answer, without ids; or none, and the reason in a word.

    They are those of the first list of objects, or of the first object that holds such a list, that decodes as JSON
    behind the thinking; with ``alone`` an object may be an entry itself, so that of a list that breaks off the first
    entry is found. An entry that lacks one of its three texts, or has one longer than ``longest``, is left out and
    counted.
    """
    if answer is None:
        return (), "no_answer"
    items: list[Item] = []
    reason = "no_json"
    for value in _decoded(without_thinking(answer)[:MAX_TEXT]):
        rows, reason = _rows(value, kind, alone), "no_entry"
        for row in rows:
            words = [_squeezed(row.get(name)) for name in text_names(kind)]
            if not all(words):
                counts["left_out/incomplete"] += 1
            elif max(map(len, words)) > longest:
                counts["left_out/long"] += 1
            else:
                items.append(kind("", *words))
        if rows:
            break
    return tuple(items), None if items else reason


def _decoded(text: str) -> Iterator[Any]:
    """What decodes as JSON in a text, from the left, starting where a list of objects or an object may begin."""
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
    """A backslash that JSON does not know, or that begins a formula as in ``\\frac``, ``\\theta``: itself, escaped."""
    return match.group() if match.group(1) else r"\\"


def _rows(value: Any, kind: type[Skill] | type[Mistake], alone: bool) -> list[Mapping[str, Any]]:
    """The objects of a list, of the lists in an object, or an object that is an entry itself."""
    if isinstance(value, Mapping):
        inside = [row for held in value.values() if isinstance(held, list) for row in held if isinstance(row, Mapping)]
        entry = alone and any(name in value for name in text_names(kind))
        return inside or ([value] if entry else [])
    return [row for row in value if isinstance(row, Mapping)]


def _squeezed(value: Any) -> str:
    """A text on one line; empty for anything else. Half of a surrogate pair, which no file can hold, becomes ``?``."""
    return " ".join(value.encode("utf-8", "replace").decode().split()) if isinstance(value, str) else ""
