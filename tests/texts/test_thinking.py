"""What of a text is thinking: all up to its last end, and what begins behind that and has none."""

from collections import Counter

import pytest

from dllm_sd.skills.answers import parse_items
from dllm_sd.skills.bank import Skill
from dllm_sd.texts.thinking import behind_thinking, breaks_off, without_thinking


@pytest.mark.parametrize(
    ("text", "rest", "broken"),
    [
        ("", "", False),
        (" a ", "a", False),
        ("<think>x</think> a", "a", False),
        ("x</think>a", "a", False),
        ("<think>x</think><think>y</think>a", "a", False),
        ("<think>x</think>a<think>y", "a", False),
        ("<think>x</think><think>y", "", False),
        ("a<think>y", "a", False),
        (" \n<think>y", "", True),
        ("<think>", "", True),
        ("</think>", "", False),
    ],
)
def test_thinking_ends_with_its_last_end_and_may_break_off(text: str, rest: str, broken: bool):
    assert without_thinking(text) == rest
    assert breaks_off(text) is broken
    start, end = behind_thinking(text)
    assert text[start:end].strip() == rest


def test_a_second_thought_that_breaks_off_is_no_entry_of_a_bank():
    entry = '[{"title": "t", "principle": "p", "when_to_apply": "w"}]'
    assert parse_items(f"<think>x</think>{entry}<think>y", Skill, 99, Counter())[0] == (Skill("", "t", "p", "w"),)
    assert parse_items(f"<think>x</think>No.<think>{entry}", Skill, 99, Counter()) == ((), "no_json")
