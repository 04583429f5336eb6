"""Skills as hints: a teacher for each pair of a bank, believed as far as the pair fits."""

import json
import math
from collections.abc import Sequence

import pytest

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.stored import load_rollouts, rollout_tensors
from dllm_sd.skills import Bank, Mistake, Random, Skill, retrieve
from dllm_sd.skills.retrieval import SkillPair
from dllm_sd.tasks.datafile import Generated
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import Nothing, Reference, SkillBankConfig, Skills
from tests.teachers.briefs import prompts_of, texts_of, weights_of
from tests.teachers.scripted import BATCH, TASK, informed, places, prompts, rolled

BANK = Bank(
    tuple(Skill(f"gen_{n}", title, f"p{n}", f"w{n}") for n, title in enumerate(["circle", "prime", "square root"])),
    tuple(Mistake(f"err_{n}", text, f"y{n}", f"h{n}") for n, text in enumerate(["prime of one", "circle area"])),
)
CIRCLE = Problem("c", {"question": "Draw a circle", "solution": "o"})
PRIME = Problem("p", {"question": "Is 7 prime?", "solution": "yes"})
ROLLOUTS = rolled((CIRCLE, [("1", 0.0), ("2", 1.0)]), (PRIME, [("3", 0.0)]))


def found(problem: Problem, key: int) -> Sequence[SkillPair]:
    return retrieve(BANK, problem.fields["question"], 8, key)


def skills(rank: int) -> Skills:
    return Skills(rank=rank, template="{question}({hint})")


def shown(skill: str, number: int, mistake: str, other: int) -> str:
    return (
        f"{skill}: p{number}\nWhere it helps: w{number}\n\n"
        f"A mistake others made here: {mistake}\nHow to stay clear of it: h{other}"
    )


def test_each_teacher_reads_the_pair_of_its_rank():
    rollouts = informed(ROLLOUTS, skills(0), skills(1), pairs=found)
    best = [shown("circle", 0, "circle area", 1), shown("prime", 1, "prime of one", 0)]
    # Behind the best skill all others score 0 and keep their order.
    second = [shown("prime", 1, "prime of one", 0), shown("circle", 0, "circle area", 1)]
    assert prompts(rollouts, 0) == [f"Draw a circle({best[0]})"] * 2 + [f"Is 7 prime?({best[1]})"]
    assert prompts(rollouts, 1) == [f"Draw a circle({second[0]})"] * 2 + [f"Is 7 prime?({second[1]})"]
    assert [texts_of(rollout) for rollout in rollouts.kept] == [
        (best[0], second[0]),
        (best[0], second[0]),
        (best[1], second[1]),
    ]


def test_teachers_weigh_the_softmax_of_their_pairs_scores():
    rollouts = informed(ROLLOUTS, skills(0), Nothing(), skills(1), pairs=found)
    for rollout in rollouts.kept:
        scores = [pair.score or 0.0 for pair in found(rollout.problem, 0)]
        assert scores[0] > scores[1]
        powers = [math.exp(score) for score in scores]
        first, second = (power / sum(powers) for power in powers)
        assert weights_of(rollout) == pytest.approx((first, 1.0, second), abs=1e-12)


def test_pairs_are_found_by_the_problem_and_a_key_of_its_own():
    asked: list[tuple[Problem, int]] = []

    def pairs(problem: Problem, key: int) -> Sequence[SkillPair]:
        asked.append((problem, key))
        return found(problem, key)

    informed(ROLLOUTS, skills(0), pairs=pairs)
    keys = [make_key(make_key(*BATCH, problem.id, "hint"), "skills") for problem in (CIRCLE, PRIME)]
    assert asked == [(CIRCLE, keys[0])] * 2 + [(PRIME, keys[1])]


def test_pairs_without_scores_weigh_the_same_and_are_the_same_for_all_rollouts_of_a_problem():
    drawn = set()
    for update in range(20):
        rollouts = informed(
            ROLLOUTS,
            *(skills(0), skills(1)),
            pairs=lambda problem, key: retrieve(BANK, problem.id, 8, key, Random()),
            batch=(3, update),
        )
        assert [weights_of(rollout) for rollout in rollouts.kept] == [(0.5, 0.5)] * 3
        assert texts_of(rollouts.kept[0]) == texts_of(rollouts.kept[1])
        drawn.add(texts_of(rollouts.kept[0]))
    assert len(drawn) > 4


def test_where_the_bank_holds_fewer_pairs_than_there_are_teachers_the_rollout_is_left_out():
    rollouts = informed(ROLLOUTS, skills(0), skills(2), pairs=found)
    assert (rollouts.size, rollouts.counts["no_hint"]) == (0, 3)
    none = informed(ROLLOUTS, skills(0))
    assert (none.size, none.counts["no_hint"], none.counts["kept"]) == (0, 3, 0)


def test_skills_stand_before_the_question_unless_told_otherwise():
    (text, *_) = prompts(informed(ROLLOUTS, Skills(), pairs=found))
    assert text.startswith("Notes from work on other problems.")
    assert text.endswith(f"\n---\n{shown('circle', 0, 'circle area', 1)}\n---\n\nDraw a circle")


def test_the_wording_of_a_pair_is_that_of_the_config():
    (text, *_) = prompts(informed(ROLLOUTS, Skills(template="({hint}){question}", pair="{principle}!"), pairs=found))
    assert text == "(p0!)Draw a circle"
    for wording, problem in (("{id}", "asks for {id}"), ("the rule", "shows no text of the skill or the mistake")):
        with pytest.raises(InputError, match=problem):
            Skills(pair=wording)


def test_weights_and_notes_survive_a_checkpoint_exactly():
    contexts = (skills(0), Nothing(), Reference(template="{question}{hint}"), skills(1))
    rollouts = informed(ROLLOUTS, *contexts, pairs=found)
    tensors, tree = rollout_tensors(rollouts)
    again = load_rollouts(tensors, json.loads(json.dumps(tree)))
    assert places(again) == places(rollouts) == [("c", 0), ("c", 1), ("p", 0)]
    for one, other in zip(again.kept, rollouts.kept, strict=True):
        assert weights_of(one) == weights_of(other)
        assert texts_of(one) == texts_of(other)
        assert prompts_of(one) == prompts_of(other)
    best = shown("circle", 0, "circle area", 1)
    assert texts_of(again.kept[0]) == (best, None, "o", shown("prime", 1, "prime of one", 0))
    assert weights_of(again.kept[0])[1:3] == (1.0, 1.0)
    assert sum(weights_of(again.kept[0])[::3]) == pytest.approx(1.0, abs=1e-12)


def test_rollouts_that_nobody_was_told_anything_about_survive_a_checkpoint_too():
    tensors, tree = rollout_tensors(ROLLOUTS)
    again = load_rollouts(tensors, json.loads(json.dumps(tree)))
    assert [(weights_of(one), texts_of(one), prompts_of(one)) for one in again.kept] == [((), (), ())] * 3


def test_a_library_finds_as_many_pairs_as_it_is_to_and_knows_whether_anybody_has_to_write():
    library = SkillBankConfig(path="bank.json", count=1, every=0)
    (pair,) = library.pairs(BANK, "Draw a circle", 1)
    assert (pair.skill.id, pair.mistake.id, pair.weight) == ("gen_0", "err_1", 1.0)
    assert not library.needs_writer
    assert SkillBankConfig(path="bank.json", every=1).needs_writer
    assert SkillBankConfig(every=0).needs_writer


def test_a_library_reads_a_problem_as_its_prompt_or_as_a_template_says():
    assert SkillBankConfig().text(TASK, CIRCLE) == "Draw a circle"
    assert SkillBankConfig(problem="{solution}: {question}").text(TASK, CIRCLE) == "o: Draw a circle"
    assert SkillBankConfig(problem="{solution}: {question}").check([CIRCLE, PRIME]) is None


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{proof}", "method.skill_bank.problem (for c) asks for {proof}; use plain fields only, of which there"),
        ("{hint}", "method.skill_bank.problem (for p) asks for {hint}; use plain fields only, of which there"),
        ("question", "method.skill_bank.problem is one text for all problems; give it a field in braces"),
        ("{question", "method.skill_bank.problem (for c) is not a template"),
    ],
)
def test_a_template_that_fits_not_all_problems_is_refused_with_the_key(template: str, says: str):
    problems = [Problem("c", {**CIRCLE.fields, "hint": "h"}), PRIME]
    with pytest.raises(InputError) as refusal:
        SkillBankConfig(problem=template).check(problems)
    assert str(refusal.value).startswith(says)
    assert "\n" not in str(refusal.value)


def test_of_problems_that_are_made_one_is_looked_at():
    def make(number: int) -> Problem:
        assert number == 0
        return CIRCLE

    SkillBankConfig(problem="{question}").check(Generated(range(10**9), make))


@pytest.mark.parametrize(
    "options", [{"count": 0}, {"memories": 0}, {"every": -1}], ids=lambda options: next(iter(options))
)
def test_a_library_without_a_sane_size_is_refused(options: dict[str, int]):
    with pytest.raises(InputError, match=r"^method\.skill_bank\.\w+ is -?[01]; give a whole number"):
        SkillBankConfig(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": -1}, "Skills.rank is -1; give a whole number of at least 0"),
        ({"template": "{question}"}, "the context's template has no {hint}"),
        ({"template": "{hint}{title}"}, "asks for {title}"),
        ({"longest": 0}, ".longest is 0; give a whole number of at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_one_sentence(options: dict[str, object], says: str):
    with pytest.raises(InputError) as refusal:
        Skills(**options)  # pyright: ignore[reportArgumentType]
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
