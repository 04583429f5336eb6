"""Peer feedback: what gives the answer away is deleted, and what does not speak of the problem is dropped."""

import pytest

from dllm_sd.tasks.datafile import render
from dllm_sd.texts.feedback import FEEDBACK, FUNCTION_WORDS, GENERIC, MAX_FEEDBACK_TEXT, sanitise, without_answer
from tests.texts.hostile import hostile_texts, random_texts, seconds

PROBLEM = "What is the Young modulus of the Steel wire, in GPa?\nA: 100\nB: 200\nC: 300\nD: 400"
TAG = "<concept>Young modulus</concept>"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (r"It is \boxed{B} here.", "It is  here."),
        (r"It is $\boxed{B}$.", "It is ."),
        (r"It is \boxed {(B)} here.", "It is  here."),
        (r"It is \fbox{b} here.", "It is  here."),
        (r"It is \boxed{\text{B}} here.", "It is  here."),
        (r"It is \boxed{\textbf{(B)}\ 200} here.", "It is  here."),
        (r"It is \boxed{B. 200 GPa} here.", "It is  here."),
        (r"It is \boxed{\text{Option B}} here.", "It is  here."),
        (r"It is \boxed{\boxed{B}} here.", "It is  here."),
        (r"It is \boxed{B", "It is "),
        ("It is **B** here.", "It is  here."),
        ("It is ** (b) ** here.", "It is  here."),
        ("It is **B.** here.", "It is  here."),
        ("It is **B) 200 GPa** here.", "It is  here."),
        ("It is **(B) 200 GPa** here.", "It is  here."),
        ("Good. Final answer: B", "Good. "),
        ("Good. **Final Answer:** B. Then step 2 fails.", "Good.  Then step 2 fails."),
        ("Good. **Final answer**: 200 GPa\nStep 2 fails.", "Good. \nStep 2 fails."),
        ("Good. final answer:\n\nB", "Good. "),
        ("Good. Final answer: B. 200.5 GPa. Step 2 fails.", "Good.  Step 2 fails."),
        ("So the correct option is B because of step 2.", "So  because of step 2."),
        ("The correct option is B.", ""),
        ("The correct answer is (b).", ""),
        ("The right choice is: **B**.", ""),
        ("the correct option should be option C, since", ", since"),
        ("Thus the answer is D.", "Thus "),
        ("Your final answer is B.", "Your "),
        ('The correct option was "c".', ""),
        ("Correct option: B. Step 2 fails.", " Step 2 fails."),
        ("Answer: B", ""),
        ("Note that option B is correct.", "Note that "),
        ("Note that (B) is the correct answer here.", "Note that  here."),
        ("THE CORRECT OPTION IS B", ""),
    ],
)
def test_what_gives_the_letter_away_is_deleted(text: str, left: str):
    assert without_answer(text) == left


@pytest.mark.parametrize(
    "text",
    [
        r"Step 2 has \boxed{200} and \boxed{\frac{1}{2}}.",
        r"Step 2 has \boxed{B + C} and \boxed{f(x)} and \boxed{Ba} and \boxed{C = 5}.",
        r"Step 2 has \boxed{} and {B} and \{B\}.",
        "Option B is too large, and option (C) has another unit.",
        "You rule out option A and B. Why?",
        "Option B is not correct, and A is the wrong option.",
        "Take **Option B** again.",
        "The **modulus** and **BC** and **2** matter.",
        "The correct answer is a matter of units.",
        "The correct answer is Ba, and the answer is I-beam.",
        "Your final answer lacks a unit.",
        "The final answers: see below.",
        "The answer is missing.",
        "A is the area, and B is the field.",
        "Vitamin-A is the best option.",
        "Look at point B. The answer follows.",
        "",
    ],
)
def test_numbers_and_mere_mentions_of_options_stay(text: str):
    assert without_answer(text) == text


@pytest.mark.parametrize(
    ("text", "answer", "left"),
    [
        ("So the answer is 12.5.", "12.5", "So "),
        ("So the correct answer is 12.5 m/s. Check.", " 12.5 m/s ", "So  Check."),
        ("So the answer is: **12.5**", "12.5", "So "),
        (r"So the answer is $\boxed{12.5}$.", "12.5", "So "),
        (r"So answer = \frac{1}{2}, so", r"\frac{1}{2}", "So , so"),
        ("Answer: x+1 (see)", "x+1", " (see)"),
        ("the answer should be (12), not 13", "12", ", not 13"),
        (r"Step 2 has \boxed{12}.", "12", "Step 2 has ."),
        (r"Step 2 has \boxed{\sqrt{2}} and \boxed{3}.", r"\sqrt{2}", r"Step 2 has  and \boxed{3}."),
        ("the answer is the answer is 12", "12", "the answer is "),
        ("Final answer: 12", "12", ""),
        ("The correct option is B.", "12", ""),
    ],
)
def test_a_free_answer_is_deleted_where_the_text_says_that_it_is_the_answer(text: str, answer: str, left: str):
    assert without_answer(text, answer) == left


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 12.5.", "12"),
        ("So the answer is 125.", "12"),
        ("So the answer is 12/5.", "12"),
        ("So the answer is twelve.", "12"),
        ("So the answer is Sine.", "sin"),
        ("There are 12 bags, and 12 = 3 * 4.", "12"),
        (r"Step 2 has \boxed{12.0}.", "12"),
        ("The answers is 12 and an answering 12", "12"),
        ("So the answer is 12.", ""),
        ("So the answer is 12.", "  "),
        ("So the answer is 12.", None),
    ],
)
def test_other_values_and_mere_mentions_of_the_answer_stay(text: str, answer: str | None):
    assert without_answer(text, answer) == text


@pytest.mark.parametrize(
    ("text", "expected", "outcome"),
    [
        (f"{TAG} {'x' * 30_000}", "x" * (MAX_FEEDBACK_TEXT - len(TAG) - 1), "match:young"),
        (f"{TAG} Step 2 is wrong.", "Step 2 is wrong.", "match:young"),
        (f"<think>{TAG}B</think>{TAG}\nStep 2 is wrong.\n", "Step 2 is wrong.", "match:young"),
        ("<CONCEPT>the STEEL</Concept> Yes.", "Yes.", "match:steel"),
        ("<concept>elastic (modulus)</concept> Yes.", "Yes.", "match:modulus"),
        ("<concept>answer: wire</concept> Yes.", "Yes.", "match:wire"),
        (f"Term: {TAG} Yes. {TAG} No.", "Term:  Yes.  No.", "match:young"),
        (f"{TAG} Yes.</concept> No. <concept> Open.", "Yes. No.  Open.", "match:young"),
        ("<concept><concept>wire</concept> Yes.", "Yes.", "match:wire"),
        (f"{TAG} The correct option is B. Step 2 has \\boxed{{200}}.", r"Step 2 has \boxed{200}.", "match:young"),
        ("", None, "fb_none"),
        (" \n", None, "fb_none"),
        (f"<think>{TAG} Yes.", None, "fb_none"),
        (TAG, None, "fb_none"),
        (f"{TAG} **B**", None, "fb_none"),
        ("Step 2 is wrong.", None, "no_concept_tag"),
        ("<concept>wire Step 2 is wrong.", None, "no_concept_tag"),
        ("wire</concept> Step 2 is wrong.", None, "no_concept_tag"),
        ("<concept></concept> Yes.", None, "empty"),
        ("<concept> -- </concept> Yes.", None, "empty"),
        ("<concept>**B**</concept> Yes.", None, "empty"),
        ("<concept>The Answer</concept> Yes.", None, "all_generic"),
        ("<concept>is in the of</concept> Yes.", None, "all_generic"),
        ("<concept>B</concept> Yes.", None, "all_generic"),
        ("<concept>student's formulas</concept> Yes.", None, "all_generic"),
        ("<concept>entropy</concept> Yes.", None, "no_match"),
        ("<concept>mod</concept> Yes.", None, "no_match"),  # a whole word
        ("<concept>wires</concept> Yes.", None, "no_match"),
        (f"<concept>entropy</concept> {TAG} Yes.", None, "no_match"),  # the first tag counts
    ],
)
def test_feedback_is_kept_only_if_its_concept_is_in_the_problem(text: str, expected: str | None, outcome: str):
    assert sanitise(text, PROBLEM) == (expected, outcome)


def test_the_answer_is_deleted_before_the_tag_is_checked():
    assert sanitise(f"{TAG} The answer is 200.", PROBLEM, "200") == (None, "fb_none")
    assert sanitise("Final answer: <concept>wire</concept> Yes.", PROBLEM) == (None, "no_concept_tag")


@pytest.mark.parametrize("word", ["problem", "question", "answer", "value", "calculation", "formula", "student"])
def test_generic_words_anchor_nothing_even_where_the_problem_has_them(word: str):
    assert sanitise(f"<concept>{word.title()}</concept> Yes.", f"A {word} here") == (None, "all_generic")
    assert sanitise(f"<concept>{word} {word}s wire</concept> Yes.", f"A {word}, a wire")[1] == "match:wire"


def test_the_nine_words_of_the_paper_are_generic():
    nine = {"problem", "question", "answer", "value", "calculation", "formula", "student", "peer", "specialist"}
    assert nine <= GENERIC
    assert not GENERIC & FUNCTION_WORDS


def test_words_are_compared_without_regard_to_case_in_any_script():
    assert sanitise("<concept>STRASSE</concept> Ja.", "Wie lang ist die Straße?") == ("Ja.", "match:strasse")
    assert sanitise("<concept>энергия</concept> Да.", "Чему равна ЭНЕРГИЯ?") == ("Да.", "match:энергия")


def test_the_prompt_has_exactly_its_slots():
    slots = {"tutor_domain": "physics", "student_domain": "chemistry", "question": "Q {x}?", "response": "R {y}"}
    text = render(FEEDBACK, slots, "prompt")
    assert all(value in text for value in slots.values())
    assert "<concept>" in text
    assert "{tutor_domain}" not in text


UNITS = [
    *("**", "**A", "**(A)", "\\boxed{", "\\boxed{(A) ", "}", "\\boxed{A}", "$\\boxed{$", "\\", "$"),
    *("final answer:", "Final answer: A. ", "the correct option is ", "the answer is ", "the ", "best ", "answer="),
    *("answer is 12", "option A ", "A is the ", "(A) is the correct", '"', "_", ".", "\n"),
    *("<concept>", "</concept>", "<concept></concept>", "<concept>wire", "<think>"),
]


@pytest.mark.parametrize("unit", UNITS)
def test_hostile_texts_take_little_time(unit: str):
    for text in hostile_texts(unit):
        assert seconds(lambda text=text: sanitise(TAG + text, PROBLEM, "12")) < 0.05


def test_a_hostile_problem_or_answer_takes_little_time():
    for text in hostile_texts("the answer is "):
        assert seconds(lambda text=text: sanitise(f"{TAG} Yes.", text)) < 0.05
        assert seconds(lambda text=text: sanitise(TAG + text, PROBLEM, text[14:50_000])) < 0.05


def test_random_texts_are_kept_or_there_is_a_reason():
    words = ["\\boxed{", "**", "final answer:", "the correct option is ", "<concept>", "</concept>", "wire", "12"]
    for text in random_texts("AB }(.\n$*", *words):
        kept, outcome = sanitise(text, PROBLEM, "12")
        if kept is None:
            assert outcome in {"fb_none", "no_concept_tag", "empty", "all_generic", "no_match"}
        else:
            assert outcome.startswith("match:")
            assert kept == kept.strip() != ""
            assert "concept>" not in kept
