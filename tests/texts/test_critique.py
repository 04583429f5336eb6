"""Solutions in steps, their corrected copies, and what is made of the two."""

import re
from itertools import pairwise

import pytest

from dllm_sd.tasks.datafile import render
from dllm_sd.texts import critique as critiques
from dllm_sd.texts.critique import (
    FORMS,
    Steps,
    accept_critique,
    first_change,
    full_quote,
    no_trace,
    parse_steps,
    regions,
    verbatim_prefix,
)
from tests.texts.hostile import hostile_texts, random_texts, seconds


def written(*steps: str, answer: str | None = None) -> str:
    tagged = [f"<step_{number}> {text} </step_{number}>" for number, text in enumerate(steps, 1)]
    return "\n".join([*tagged, *([] if answer is None else [f"<answer> {answer} </answer>"])])


def read(text: str) -> Steps:
    found = parse_steps(text)
    assert isinstance(found, Steps), found
    return found


WRONG = written("We have 3 bags.", "3 * 4 = 13", "13 + 1 = 14", answer="14")
RIGHT = written("We have 3 bags.", "3 * 4 = 12", "12 + 1 = 13", answer="13")


def test_a_solution_is_read_into_steps_and_answer_with_their_places():
    text = "Well. <step_1> a </step_1> then <STEP_2>\n b c\n</STEP_2>\n<answer> 7 </answer> Done."
    found = read(text)
    assert [one.text for one in found.steps] == ["a", "b c"]
    assert [text[one.start : one.end] for one in found.steps] == ["<step_1> a </step_1>", "<STEP_2>\n b c\n</STEP_2>"]
    assert found.answer is not None
    assert text[found.answer.start : found.answer.end] == "<answer> 7 </answer>"
    for one in (*found.steps, found.answer):
        assert text[slice(*one.inside)] == one.text
        assert one.closed


@pytest.mark.parametrize(
    ("text", "steps", "answer"),
    [
        ("<step_1>a</step_1><step_2>b", ["a", "b"], None),  # breaks off in a step
        ("<step_1>a</step_1><step_2>", ["a", ""], None),
        ("<step_1>a</step_1><answer>4", ["a"], None),  # breaks off in the answer
        ("<step_1>a</step_1><ans", ["a"], None),
        ("<step_1>a<step_2>b<answer>4</answer>", ["a", "b"], "4"),  # no closing tags
        ("<step_1>a<answer>4</answer></step_1>", ["a"], "4"),  # the answer stands in the last step
        ("<step_1>a</step_1></step_1><answer>4</answer>", ["a"], "4"),
        ("<answer>3</answer><step_1>a</step_1><answer>4</answer>", ["a"], "4"),
        ("<step_1>a</step_1><answer>3</answer> or <answer>4</answer>", ["a"], "4"),
        ("<step_1>a</step_1><answer>3</answer> or <answer>4", ["a"], "3"),
        ("<step_1>a</answer>b</step_1>", ["a</answer>b"], None),
        ("<step_01>a</step_1>", ["a"], None),
        ("<think><step_9>x</think><step_1>a</step_1>", ["a"], None),
        ("<step_1>x<y & <b>z</b></step_1>", ["x<y & <b>z</b>"], None),
    ],
)
def test_small_faults_of_form_do_no_harm(text: str, steps: list[str], answer: str | None):
    found = read(text)
    assert [one.text for one in found.steps] == steps
    assert (found.answer.text if found.answer else None) == answer
    for one in found.steps:
        assert text[slice(*one.inside)] == one.text


def test_a_step_that_breaks_off_reaches_to_the_end_and_one_without_a_closing_tag_to_the_next():
    text = "<step_1>a <step_2> b"
    assert [(one.start, one.end, one.closed) for one in read(text).steps] == [(0, 10, False), (10, 20, False)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_steps"),
        ("The answer is 4.", "no_steps"),
        ("<answer>4</answer>", "no_steps"),
        ("<step_x>a</step_x>", "no_steps"),
        ("<step_12345>a", "no_steps"),
        ("<think><step_1>a</step_1>", "no_steps"),
        ("<step_2>a</step_2>", "bad_order"),
        ("<step_0>a</step_0>", "bad_order"),
        ("<step_1>a</step_1><step_3>b</step_3>", "bad_order"),
        ("<step_1>a</step_1><step_1>b</step_1>", "bad_order"),
        ("<step_1>a</step_2>", "bad_order"),
        ("</step_1><step_1>a</step_1>", "bad_order"),
        ("<step_1>a</step_1></step_3>", "bad_order"),
        ("<step_1>a</step_1><answer>4</answer><step_2>b</step_2>", "bad_order"),
        ("<step_1>a</step_1><answer>4<step_2>b</step_2>", "bad_order"),
        ("<step_1>a</step_1><answer>4</step_1>", "bad_order"),
    ],
)
def test_a_text_that_is_no_solution_in_steps_has_a_reason(text: str, reason: str):
    assert parse_steps(text) == reason


@pytest.mark.parametrize("text", ["<step_1>a", "<step_1>a</step_1><answer>4", "<step_1>a</step_1><answer> </answer>"])
def test_a_missing_answer_is_a_reason_only_where_one_is_needed(text: str):
    assert isinstance(parse_steps(text), Steps)
    assert parse_steps(text, needs_answer=True) == "no_answer"


@pytest.mark.parametrize(
    ("trace", "critique", "change"),
    [
        (["a", "b"], ["a", "b"], None),
        (["a  b\nc"], [" a b c"], None),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "b"], ["x", "b"], 0),
        (["a", "b"], ["a", "B"], 1),
        (["a", "b"], ["a"], 1),
        (["a", "b"], ["a", "new", "b"], 1),
    ],
)
def test_the_first_change_is_a_step_that_is_written_otherwise_or_left_out(
    trace: list[str], critique: list[str], change: int | None
):
    assert first_change(read(written(*trace)), read(written(*critique))) == change


def pieces(trace: str, critique: str) -> list[tuple[str, str]]:
    found = regions(trace, critique)
    assert all(start < end for start, end, _ in found)
    assert all(one[1] == two[0] for one, two in pairwise(found))
    return [(trace[start:end], kind) for start, end, kind in found]


def test_a_trace_falls_into_the_steps_before_the_error_the_error_and_the_rest():
    assert pieces("So: " + WRONG, RIGHT) == [
        ("<step_1> We have 3 bags. </step_1>\n", "prefix"),
        ("<step_2> 3 * 4 = 13 </step_2>", "error"),
        ("\n<step_3> 13 + 1 = 14 </step_3>\n<answer> 14 </answer>", "after"),
    ]


@pytest.mark.parametrize(
    ("trace", "critique", "kinds"),
    [
        (WRONG, WRONG, ["prefix"]),
        (WRONG, written("no", answer="13"), ["error", "after"]),
        (written("a", "b"), written("a", "c", answer="1"), ["prefix", "error"]),
        (written("a", "b"), written("a", "b", "c", answer="1"), ["prefix"]),  # merely finished
        (written("a", answer="1"), written("a", answer=" 1 "), ["prefix"]),
        ("nothing", RIGHT, []),
        (WRONG, "nothing", []),
        ("", "", []),
    ],
)
def test_regions_that_are_empty_are_left_out(trace: str, critique: str, kinds: list[str]):
    assert [kind for _, kind in pieces(trace, critique)] == kinds


def test_an_answer_that_alone_is_changed_is_the_error():
    trace = written("a", answer="14") + " bye"
    assert pieces(trace, written("a", answer="13")) == [
        ("<step_1> a </step_1>\n", "prefix"),
        ("<answer> 14 </answer>", "error"),
        (" bye", "after"),
    ]


def test_places_count_from_the_start_of_a_text_with_thinking():
    thought = "<think><step_1> x </step_1></think>"
    start, end, kind = regions(thought + WRONG, RIGHT)[1]
    assert ((thought + WRONG)[start:end], kind) == ("<step_2> 3 * 4 = 13 </step_2>", "error")


def test_the_critique_as_it_is_is_one_form():
    assert verbatim_prefix(WRONG, RIGHT) == RIGHT


def test_a_full_quote_puts_the_wrong_step_before_its_correction():
    assert full_quote(WRONG, RIGHT) == (
        "<step_1> We have 3 bags. </step_1>\n"
        "<step_2> 3 * 4 = 13\nThat was wrong. The right step:\n3 * 4 = 12 </step_2>\n"
        "<step_3> 12 + 1 = 13 </step_3>\n<answer> 13 </answer>"
    )


@pytest.mark.parametrize(
    ("trace", "critique", "expected"),
    [
        (WRONG, WRONG, WRONG),
        (
            written("a", answer="2"),
            "<step_1> a </step_1><answer>1</answer>",
            "<step_1> a </step_1>2\nThat was wrong. The right step:\n<answer>1</answer>",
        ),
        (
            written("a", "b"),
            "<step_1> a </step_1><answer>1</answer>",
            "<step_1> a </step_1>b\nThat was wrong. The right step:\n<answer>1</answer>",
        ),
        (written("a", "b"), "<step_1>a</step_1>", "<step_1>a</step_1>b\nThat was wrong. The right step:\n"),
        (written("a", "b"), written("a", "b", "c", answer="1"), written("a", "b", "c", answer="1")),
    ],
)
def test_a_full_quote_finds_a_place_for_whatever_is_wrong(trace: str, critique: str, expected: str):
    assert full_quote(trace, critique) == expected


def test_no_trace_says_of_right_steps_only_that_they_are_right():
    assert no_trace(WRONG, RIGHT) == (
        "<step_1> Step 1 is correct. </step_1>\n<step_2> 3 * 4 = 12 </step_2>\n"
        "<step_3> 12 + 1 = 13 </step_3>\n<answer> 13 </answer>"
    )


@pytest.mark.parametrize(
    ("trace", "critique", "expected"),
    [
        (
            written("a", "b", answer="1"),
            written("a", "b", answer="1"),
            written("Step 1 is correct.", "Step 2 is correct.", answer="1"),
        ),
        (written("a"), written("a", "b", answer="1"), written("Step 1 is correct.", "b", answer="1")),
        (written("a"), written("b", answer="1"), written("b", answer="1")),
        ("<step_1></step_1>", "<step_1></step_1>", "<step_1>Step 1 is correct.</step_1>"),
    ],
)
def test_no_trace_replaces_the_steps_before_the_first_change(trace: str, critique: str, expected: str):
    assert no_trace(trace, critique) == expected


def test_the_forms_leave_a_text_without_steps_alone():
    assert list(FORMS) == ["verbatim_prefix", "full_quote", "no_trace"]
    for form in FORMS.values():
        assert form("nothing", RIGHT) == RIGHT
        assert form(WRONG, "nothing") == "nothing"


def test_a_critique_is_used_from_its_first_step_to_its_answer():
    said = f"<think>Step 2: 3 * 4 = 13 is wrong.</think>Case D, 3 * 4 = 13 is wrong.\n{RIGHT}\nI changed 3 * 4 = 13."
    assert accept_critique(said, WRONG) == (RIGHT, "kept")
    assert accept_critique(WRONG, WRONG) == (WRONG, "kept")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_steps"),
        ("Case A.", "no_steps"),
        (f"<think>{RIGHT}", "no_steps"),
        (RIGHT.replace("step_2", "step_4"), "bad_order"),
        (RIGHT.replace("</answer>", ""), "no_answer"),
        (RIGHT.replace("<answer> 13 </answer>", ""), "no_answer"),
        (RIGHT.replace(" 13 </answer>", "</answer>"), "no_answer"),
        (RIGHT.replace("3 * 4 = 12", "3 * 4 = 13 is wrong: 3 * 4 = 12"), "quotes_error"),
        (RIGHT.replace("12 + 1", "not 3 *\n4 = 13; 12 + 1"), "quotes_error"),
        (RIGHT.replace("<step_2>", "The student wrote (3 * 4 = 13). <step_2>"), "quotes_error"),
    ],
)
def test_a_critique_that_is_not_used_has_a_reason(text: str, reason: str):
    assert accept_critique(text, WRONG) == (None, reason)


@pytest.mark.parametrize(
    ("trace", "critique"),
    [
        (written("So x = 60.", answer="60"), written("All sides are equal. So x = 60.", answer="60")),  # case B
        ("<step_1> So 3 + 4", written("So 3 + 4 = 7", answer="7")),  # case C: the step breaks off
        (written("12", answer="12"), written("12 + 1 = 13", answer="13")),  # a lone number is no quote
        (written("x = 1", answer="1"), written("x = 12", answer="12")),  # another number
        (written("x = 1", answer="1"), written("x = 1.5", answer="1.5")),
        (written("max = 1", answer="1"), written("climax = 1", answer="2")),
        (written("", answer="1"), written("a", answer="2")),
        (written("a b", "c d", answer="1"), written("a b", answer="2")),  # left out
        ("no steps at all", RIGHT),
    ],
)
def test_what_only_looks_like_a_quote_is_let_through(trace: str, critique: str):
    assert accept_critique(critique, trace) == (critique, "kept")


def test_a_wrong_step_that_copies_an_earlier_right_one_is_no_quote_of_the_prefix():
    trace = written("go on", "go on", answer="1")
    assert accept_critique(written("go on", "stop here", answer="2"), trace)[1] == "kept"
    assert accept_critique(written("go on", "do not go on", answer="2"), trace)[1] == "quotes_error"


SLOTS = {"question": "Q?", "truth": "T {y}", "trace": "S {x}", "hint": "H"}


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("CRITIC_ANSWER", ["question", "truth", "trace"]),
        ("CRITIC_REFERENCE", ["question", "truth", "trace"]),
        ("CRITIQUE_TEACHER", ["question", "hint"]),
        ("SOLVER_SUFFIX", []),
    ],
)
def test_a_prompt_has_exactly_its_slots(name: str, slots: list[str]):
    template = getattr(critiques, name)
    text = render(template, {slot: SLOTS[slot] for slot in slots}, name)
    for slot in slots:
        assert template.count(f"{{{slot}}}") == 1
        assert SLOTS[slot] in text
    assert slots or text == template


def test_both_critics_know_the_four_cases_and_differ_in_what_they_are_told():
    both = critiques.CRITIC_ANSWER, critiques.CRITIC_REFERENCE
    for prompt in both:
        assert re.findall(r"^([A-Z])\. ", prompt, re.MULTILINE) == ["A", "B", "C", "D"]
    one, other = (prompt.splitlines() for prompt in both)
    assert sum(a != b for a, b in zip(one, other, strict=True)) == 1


def test_the_teacher_is_not_told_to_use_other_words():
    assert not re.search(r"copy|own words|paraphrase|do not|don't|repeat", critiques.CRITIQUE_TEACHER, re.IGNORECASE)


@pytest.mark.parametrize(
    "unit", ["<step_1>", "</step_1>", "<answer>", "</answer>", "<step_", "<", "<step_1>a b</step_1>", "<think>", "x y"]
)
def test_hostile_texts_take_little_time(unit: str):
    for text in hostile_texts(unit):
        assert seconds(lambda text=text: accept_critique(text, WRONG)) < 0.05
        assert seconds(lambda text=text: accept_critique(RIGHT, text)) < 0.05
        assert seconds(lambda text=text: regions(text, text)) < 0.05


def test_long_solutions_take_little_time():
    long = written(*["a" * 90] * 900, answer="1")
    other = written(*["a" * 90] * 450, *["a" * 91] * 450, answer="2")
    wide, quoted = written("a " * 25_000 + "b", answer="1"), written("a " * 49_000, answer="2")
    for trace, text in ((long, other), (long, long), (wide, quoted), (quoted, wide)):
        for call in (accept_critique, regions, full_quote, no_trace):
            assert seconds(lambda call=call, trace=trace, text=text: call(text, trace)) < 0.05


def test_random_texts_are_read_or_there_is_a_reason():
    tags = ["<step_1>", "</step_1>", "<step_2>", "</step_2>", "<answer>", "</answer>", "</think>"]
    for text in random_texts("ab <>/\n", *tags * 3):
        found = parse_steps(text)
        if isinstance(found, str):
            assert found in {"no_steps", "bad_order"}
            continue
        parts = [*found.steps, *([found.answer] if found.answer else [])]
        assert all(one.start <= one.inside[0] <= one.inside[1] <= one.end for one in parts)
        assert all(one.end <= two.start for one, two in pairwise(parts))
        accepted, reason = accept_critique(text, WRONG)
        assert (reason == "kept") == (accepted is not None)
        if accepted is not None:
            assert accepted.startswith("<step_1>")
            assert accepted.endswith("</answer>")
            assert accept_critique(accepted, WRONG) == (accepted, "kept")
