"""What of an attempt is shown to whoever looks for skills and mistakes in it."""

from dllm_sd.skills.extraction import excerpt_of, steps_of


def test_steps_are_paragraphs_list_entries_and_numbered_steps():
    text = (
        "First\n goes on.\n\nSecond.\n1. Third\n  more\n2) Fourth\n- fifth\n* sixth\nStep 7: seventh\n\n \n10. eighth"
    )
    assert steps_of(text, 99, 99) == [
        *("First goes on.", "Second.", "1. Third more", "2) Fourth", "- fifth", "* sixth", "Step 7: seventh"),
        "10. eighth",
    ]
    assert steps_of(text, 2, 5) == ["First", "Secon"]
    assert steps_of("-3 is\n1.5 is", 9, 99) == ["-3 is 1.5 is"]
    assert steps_of("<think>a\n\nb</think>\n\nc", 9, 99) == ["c"]
    for nothing in ("", " \n\n ", "<think>cut off\n\nhere"):
        assert steps_of(nothing, 9, 99) == []


def test_an_excerpt_is_the_start_and_the_end_in_no_more_characters_than_allowed():
    assert excerpt_of("a\n b\t c ", 40) == "a b c"
    text = "x" * 100 + "y" * 100
    assert excerpt_of(text, 200) == text
    cut = excerpt_of(text, 199)
    assert cut == "x" * 99 + " [...] " + "y" * 93
    assert len(cut) == 199
    words = " ".join(f"w{n}" for n in range(1000))
    for length in range(40, 120):
        head, _, tail = excerpt_of(words, length).partition(" [...] ")
        assert words.startswith(head)
        assert words.endswith(tail)
        assert length - 2 <= len(head + tail) + 7 <= length
