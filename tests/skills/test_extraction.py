"""The cold start and the update, with a writer whose answers are known: what is asked, merged, kept and counted."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import count

import pytest

from dllm_sd.errors import InputError
from dllm_sd.skills import Attempt, Bank, Extraction, Mistake, Skill, cold_start, read_bank, update, write_bank
from dllm_sd.skills.extraction import excerpt_of

SETTINGS = Extraction()
SKILL = ("title", "principle", "when_to_apply")
MISTAKE = ("description", "why_it_happens", "how_to_avoid")
Answer = Callable[[str], str | None]


def right(problem: str = "1+1", text: str = "It is 2.") -> Attempt:
    return Attempt(problem, text, True, "2", "2")


def wrong(problem: str = "1+1", text: str = "It is 3.") -> Attempt:
    return Attempt(problem, text, False, "3", "2")


def rows(names: Sequence[str], *words: str) -> list[dict[str, str]]:
    return [{name: f"{word} {name}" for name in names} for word in words]


def shown(prompt: str) -> list[dict[str, str]]:
    """The entries that a merge prompt shows."""
    return json.loads(prompt[prompt.index("[") : prompt.rindex("]") + 1])


class Script:
    """A writer: skills s<n> or mistakes m<n> for the n-th attempt, two each, and ``merge`` for groups."""

    def __init__(self, merge: Answer | None = None, extract: Answer | None = None) -> None:
        self.merge, self.extract = merge or (lambda prompt: json.dumps(shown(prompt))), extract
        self.calls: list[list[str]] = []
        self.groups: list[list[list[str]]] = []
        """The words of each group, for each call that merges."""

    def __call__(self, chats: list[list[dict[str, str]]]) -> list[str | None]:
        assert chats, "an empty call"
        for chat in chats:
            assert [message["role"] for message in chat] == ["user"]
        prompts = [chat[0]["content"] for chat in chats]
        self.calls.append(prompts)
        if prompts[0].startswith("Here is a list"):
            self.groups.append([[min(row.values()).split()[0] for row in shown(prompt)] for prompt in prompts])
            return [self.merge(prompt) for prompt in prompts]
        return [self.extract(prompt) if self.extract else self._extracted(prompt) for prompt in prompts]

    def _extracted(self, prompt: str) -> str:
        found = re.search(r"Problem: (\S+)", prompt)
        assert found
        name = found.group(1)
        kind = ("s", SKILL) if "the answer is right" in prompt else ("m", MISTAKE)
        return "Well.\n" + json.dumps(rows(kind[1], f"{kind[0]}{name}a", f"{kind[0]}{name}b"))


def first(share: float) -> Answer:
    """Merges a group to its first entries."""
    return lambda prompt: json.dumps(shown(prompt)[: int(len(shown(prompt)) * share)])


def test_a_cold_start_asks_once_for_all_attempts_merges_and_numbers():
    script = Script(merge=first(0.5))
    bank, counts = cold_start([right("0"), wrong("1"), right("2")], script, SETTINGS)
    assert [len(call) for call in script.calls] == [3, 1, 1]
    assert script.groups == [[["s0a", "s0b", "s2a", "s2b"]], [["m1a", "m1b"]]]
    assert bank.skills == (
        Skill("gen_001", "s0a title", "s0a principle", "s0a when_to_apply"),
        Skill("gen_002", "s0b title", "s0b principle", "s0b when_to_apply"),
    )
    assert bank.mistakes == (Mistake("err_001", "m1a description", "m1a why_it_happens", "m1a how_to_avoid"),)
    assert counts == {
        **{"successes": 2, "failures": 1, "candidates/skills": 4, "candidates/mistakes": 2},
        **{"layers/skills": 1, "layers/mistakes": 1, "skills": 2, "mistakes": 1},
    }
    assert bank.metadata == {"source": "cold start", "counts": counts}


def test_a_cold_start_makes_a_bank_that_can_be_written_and_read(tmp_path):
    bank, _ = cold_start([right("0"), wrong("1")], Script(), SETTINGS)
    write_bank(bank, tmp_path / "bank.json")
    assert read_bank(tmp_path / "bank.json") == bank


def test_at_most_three_entries_of_an_attempt_count_and_repetitions_count_once():
    def extract(prompt: str) -> str:
        return json.dumps(rows(SKILL, "a", "A ", "b", "c"))

    script = Script(extract=extract)
    bank, counts = cold_start([right("0"), right("1")], script, SETTINGS)
    assert counts["candidates/skills"] == 6
    assert [one.title for one in bank.skills] == ["a title", "b title"]
    assert script.groups == [[["a", "b"]]]


def test_repetitions_that_merging_makes_count_once():
    bank, _ = cold_start([right("0")], Script(merge=lambda prompt: json.dumps(rows(SKILL, "x", "X "))), SETTINGS)
    assert [(one.id, one.title) for one in bank.skills] == [("gen_001", "x title")]


def test_unusable_answers_are_counted_by_reason_and_an_empty_bank_is_the_answer_to_nothing():
    answers = iter([None, "no", '{"a": 1}', json.dumps([{"title": "t"}])])
    script = Script(extract=lambda prompt: next(answers))
    bank, counts = cold_start([right(), wrong(), right(), right()], script, SETTINGS)
    assert (bank.skills, bank.mistakes) == ((), ())
    assert {name: count for name, count in counts.items() if count} == {
        **{"successes": 3, "failures": 1, "skipped/no_answer": 1, "skipped/no_json": 1, "skipped/no_entry": 2},
        "left_out/incomplete": 1,
    }
    assert len(script.calls) == 1
    assert cold_start([], script, SETTINGS)[0].skills == ()
    assert len(script.calls) == 1


def many(count: int) -> Script:
    """A writer whose first answers hold ``count`` skills in all, one an attempt."""
    return Script(extract=lambda prompt: json.dumps(rows(SKILL, prompt.split("Problem: ")[1].split()[0])))


def grown(count: int, merge: Answer | None, group: int = 32) -> tuple[Script, Bank, dict[str, int]]:
    script = many(count)
    script.merge = merge or script.merge
    bank, counts = cold_start([right(f"{n:03d}") for n in range(count)], script, Extraction(group=group))
    return script, bank, counts


def test_merging_goes_in_layers_of_groups_until_one_group_is_left():
    script, bank, counts = grown(10, first(0.5), group=4)
    # 10 -> [4 4 2] -> 5 -> [4 1] -> 3 -> [3] -> 1: the last group of the second layer has one entry and is not asked.
    assert script.groups == [
        [["000", "001", "002", "003"], ["004", "005", "006", "007"], ["008", "009"]],
        [["000", "001", "004", "005"]],
        [["000", "001", "008"]],
    ]
    assert [one.title for one in bank.skills] == ["000 title"]
    assert counts["layers/skills"] == 3


def test_groups_hold_thirty_two_entries():
    script, bank, _ = grown(70, None)
    assert [[len(group) for group in layer] for layer in script.groups] == [[32, 32, 6]] * 3
    assert len(bank.skills) == 70


@pytest.mark.parametrize("patience", [1, 3])
def test_merging_stops_after_layers_in_a_row_that_shorten_nothing(patience: int):
    def merge(prompt: str) -> str:
        found = shown(prompt)
        return json.dumps(found[:-1] if len(script.groups) in (3, 4) else found)  # the layer, from 1

    script = many(12)
    script.merge = merge
    bank, counts = cold_start([right(f"{n:03d}") for n in range(12)], script, Extraction(group=4, patience=patience))
    sizes = [sum(map(len, layer)) for layer in script.groups]
    if patience == 1:
        assert sizes == [12]
        assert len(bank.skills) == 12
    else:  # 12, 12, 12 -> 9 -> [4 4 1], of which 8 are asked -> 7, 7, 7
        assert sizes == [12, 12, 12, 8, 7, 7, 7]
        assert len(bank.skills) == 7
    assert counts["layers/skills"] == len(sizes)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no_answer"),
        ("no", "no_json"),
        ('[{"title": ""}]', "no_entry"),
        ("broken", "no_entry"),
        ("more", "longer"),
    ],
)
def test_a_group_stays_as_it_is_where_the_answer_is_unusable_breaks_off_or_is_longer(answer: str | None, reason: str):
    def merge(prompt: str) -> str | None:
        found = shown(prompt)
        if answer == "more":
            return json.dumps([*found, *rows(SKILL, "new")])
        return json.dumps(found)[:-5] if answer == "broken" else answer

    script, bank, counts = grown(5, merge, group=4)
    assert [one.title for one in bank.skills] == [f"00{n} title" for n in range(5)]
    assert counts[f"unmerged/{reason}"] == counts["layers/skills"] == len(script.groups) == 3


def test_merging_ends_even_with_a_writer_that_grows_and_shrinks_by_turns():
    turns = [0]

    def merge(prompt: str) -> str:
        turns[0] += 1
        assert turns[0] < 100
        found = shown(prompt)
        return json.dumps(found[1:] if turns[0] % 2 else [*found, *rows(SKILL, f"n{turns[0]}")])

    grown(9, merge, group=4)


def test_single_skills_and_single_mistakes_are_not_merged():
    script = Script(extract=lambda prompt: json.dumps(rows(SKILL, "s") + rows(MISTAKE, "m")))
    bank, _ = cold_start([right(), wrong()], script, SETTINGS)
    assert len(script.calls) == 1
    assert [one.title for one in bank.skills] == ["s title"]
    assert [one.description for one in bank.mistakes] == ["m description"]


FIXED = Bank(
    (Skill("gen_001", "f", "f", "f"),),
    (Mistake("err_007", "f", "f", "f"), Mistake("err_001", "g", "g", "g")),
    {"source": "x"},
)


@pytest.mark.parametrize(("rate", "asks"), [(1.0, False), (0.8, False), (float("nan"), False), (0.79, True), (0, True)])
def test_the_bank_is_updated_only_while_few_attempts_succeed(rate: float, asks: bool):
    script = Script()
    bank, counts = update(FIXED, [right("0")], rate, script, SETTINGS)
    assert bool(script.calls) == asks
    assert counts["updated"] == asks
    assert (bank == FIXED) == (not asks)
    assert update(FIXED, [], 0, script, SETTINGS) == (FIXED, {"updated": 0})


def test_new_entries_stand_behind_the_fixed_ones_and_leave_them_as_they_are():
    bank, counts = update(FIXED, [right("0"), wrong("1")], 0.5, Script(), SETTINGS)
    assert bank.skills[:1] == FIXED.skills
    assert bank.mistakes[:2] == FIXED.mistakes
    assert [(one.id, one.title) for one in bank.skills[1:]] == [("dyn_001", "s0a title"), ("dyn_002", "s0b title")]
    assert [one.id for one in bank.mistakes] == ["err_007", "err_001", "dyn_001", "dyn_002"]
    assert bank.metadata == FIXED.metadata
    assert counts["updated"] == 1
    assert (counts["skills"], counts["mistakes"]) == (3, 4)


def test_new_entries_are_merged_among_themselves_and_then_with_earlier_additions_only():
    bank, _ = update(FIXED, [right("0")], 0.5, Script(), SETTINGS)
    script = Script(merge=first(0.75))
    bank, _ = update(bank, [right("1"), right("2")], 0.5, script, SETTINGS)
    assert script.groups == [[["s1a", "s1b", "s2a", "s2b"]], [["s0a", "s0b", "s1a", "s1b", "s2a"]]]
    assert [one.title for one in bank.skills] == ["f", "s0a title", "s0b title", "s1a title"]
    assert [one.id for one in bank.skills] == ["gen_001", "dyn_001", "dyn_002", "dyn_003"]
    assert bank.mistakes == FIXED.mistakes


def test_an_update_adds_at_most_five_and_holds_at_most_thirty_of_each_kind_in_the_order_of_the_list():
    bank, sizes = FIXED, []
    for turn in range(9):
        attempts = [one(f"{turn}{n}") for n in range(4) for one in (right, wrong)]
        bank, _ = update(bank, attempts, 0.5, Script(), SETTINGS)
        sizes.append((len(bank.skills) - 1, len(bank.mistakes) - 2))
        assert [one.id for one in bank.skills[1:]] == [f"dyn_{n:03d}" for n in range(1, sizes[-1][0] + 1)]
    assert sizes == [(5, 5), (10, 10), (15, 15), (20, 20), (25, 25), (30, 30), (30, 30), (30, 30), (30, 30)]
    assert [one.title for one in bank.skills[1:7]] == [f"s0{n}{x} title" for n, x in ("0a", "0b", "1a", "1b", "2a")] + [
        "s10a title"
    ]
    bank, _ = update(bank, [right("x")], 0.5, Script(merge=first(0.5)), Extraction(capacity=3, growth=0))
    assert len(bank.skills) == 1 + 3


def test_what_a_fixed_entry_says_already_is_not_added():
    script = Script(extract=lambda prompt: json.dumps([dict.fromkeys(SKILL, " F ")]))
    assert update(FIXED, [right()], 0.5, script, SETTINGS)[0] == FIXED


def test_an_update_that_finds_nothing_leaves_the_bank_and_its_additions():
    before, _ = update(FIXED, [right("0")], 0.5, Script(), SETTINGS)
    after, counts = update(before, [right("1"), wrong("2")], 0.5, Script(extract=lambda prompt: "no"), SETTINGS)
    assert after == before
    assert (counts["updated"], counts["skipped/no_json"]) == (0, 2)


def test_the_same_attempts_and_answers_give_the_same_bank():
    attempts = [one(f"{n}") for n in range(40) for one in (right, wrong)]
    assert cold_start(attempts, Script(first(0.9)), SETTINGS) == cold_start(attempts, Script(first(0.9)), SETTINGS)


def test_a_success_shows_its_steps_and_a_failure_the_right_answer():
    script = Script()
    long = "\n\n".join(f"Part {n} " + f"{n}" * 400 for n in range(9))
    memories = [
        Attempt("P{0}", f"<think>secret plan</think>{long}", True, "42", "42"),
        Attempt("P1", f"<think>secret plan</think>{long}", False, None, None),
        Attempt("P2", "short", False, "41", "42"),
    ]
    cold_start(memories, script, SETTINGS)
    success, failure, short = script.calls[0]
    for n in range(6):
        assert f"{n + 1}. Part {n} {str(n) * 273}\n" in success
    assert "7. Part" not in success
    assert "Problem: P{0}\n" in success
    assert "Answer: 42" in success
    assert "secret plan" in success  # the excerpt is of all that was written
    assert excerpt_of(memories[0].text, 1600) in success
    assert excerpt_of(memories[0].text, 2200) in failure
    assert "Answer given: none that could be read\nRight answer: not known" in failure
    assert "Answer given: 41\nRight answer: 42" in short
    assert "1. " not in short


def test_prompts_can_be_replaced_and_are_checked():
    settings = Extraction(success="S {answer}", failure="F {truth} {{}}", merge_skills="Here is a list {items}")
    script = Script(extract=lambda prompt: json.dumps(rows(SKILL, "a", "b")))
    cold_start([right(), wrong()], script, settings)
    assert script.calls[0] == ["S 2", "F 2 {}"]
    assert script.calls[1][0].startswith("Here is a list [")
    with pytest.raises(InputError, match=r"extraction\.success asks for {item}; use plain fields only.*{problem}"):
        Extraction(success="{item}")
    with pytest.raises(InputError, match=r"extraction\.merge_mistakes uses no placeholder; give it some of {items}\."):
        Extraction(merge_mistakes="merge them")
    with pytest.raises(InputError, match=r"extraction\.failure uses no placeholder; give it some of {problem}"):
        Extraction(failure="why?")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"group": 1}, "extraction.group is 1; give a whole number of at least 2"),
        ({"patience": 0}, "extraction.patience is 0; give a whole number of at least 1"),
        ({"most": 0}, "extraction.most is 0; give a whole number of at least 1"),
        ({"growth": -1}, "extraction.growth is -1; give a whole number of at least 0"),
        ({"failure_length": 39}, "extraction.failure_length is 39; give a whole number of at least 40"),
        ({"threshold": 1.5}, "extraction.threshold is 1.5; give a number from 0 to 1"),
    ],
    ids=count(),
)
def test_settings_without_a_meaning_are_refused(setting: dict, message: str):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        Extraction(**setting)


def test_a_writer_that_loses_answers_is_noticed():
    with pytest.raises(ValueError, match="the writer gave 1 answers to 2 chats"):
        cold_start([right(), right()], lambda chats: ["no"], SETTINGS)
