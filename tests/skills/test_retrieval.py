"""Retrieval is deterministic, pairs by rank, weighs by softmax, and shows what it should."""

import math
import sys
import types
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllm_sd.errors import InputError
from dllm_sd.skills import (
    RETRIEVERS,
    Bank,
    Embedding,
    Index,
    Lexical,
    Mistake,
    Random,
    Skill,
    format_pair,
    index,
    read_bank,
    retrieve,
)
from dllm_sd.skills.retrieval import pair_weights

FILE = Path(__file__).parents[1] / "fixtures" / "skills" / "sgsd_qwen3_1b_claude_style_skills.json"
BANK = read_bank(FILE)
QUERY = "Find the number of positive divisors of $12!$ whose prime factors are all odd."


def bank(skills: list[str], mistakes: list[str]) -> Bank:
    return Bank(
        tuple(Skill(f"gen_{n:03d}", text, "p", "w") for n, text in enumerate(skills, 1)),
        tuple(Mistake(f"err_{n:03d}", text, "y", "h") for n, text in enumerate(mistakes, 1)),
    )


@dataclass(init=False)
class Fixed:
    """A retriever with given scores, which counts how often it reads."""

    def __init__(self, *scores: list[float]) -> None:
        self.scores, self.reads = list(scores), 0

    def __call__(self, texts):
        scores, self.reads = self.scores[self.reads], self.reads + 1
        assert len(scores) == len(texts)
        order = sorted(range(len(texts)), key=lambda number: (-scores[number], number))
        return lambda query, key: [(number, scores[number]) for number in order]


def test_the_kth_skill_is_paired_with_the_kth_mistake_and_pairs_weigh_the_softmax_of_their_mean_score():
    skills, mistakes = [0.1, 0.7, 0.5, 0.4], [0.2, 0.9, 0.3]
    retriever = Fixed(skills, mistakes)
    pairs = Index(bank(["a", "b", "c", "d"], ["x", "y", "z"]), retriever).retrieve("q")
    assert [(pair.skill.title, pair.mistake.description) for pair in pairs] == [("b", "y"), ("c", "z"), ("d", "x")]
    means = [(0.7 + 0.9) / 2, (0.5 + 0.3) / 2, (0.4 + 0.2) / 2]
    assert [pair.score for pair in pairs] == pytest.approx(means)
    powers = np.exp(np.array(means))
    assert [pair.weight for pair in pairs] == pytest.approx((powers / powers.sum()).tolist())
    # By hand: exp(0.4), exp(0) and exp(-0.1) over their sum.
    assert [pair.weight for pair in pairs] == pytest.approx([0.43920, 0.29441, 0.26639], abs=1e-5)


@pytest.mark.parametrize("retriever", [Lexical(), Random()], ids=["lexical", "random"])
@pytest.mark.parametrize(("count", "expected"), [(1, 1), (3, 3), (5, 5), (8, 5), (100, 5)])
def test_there_are_as_many_pairs_as_the_smaller_side_or_the_count_allows(retriever, count: int, expected: int):
    pairs = retrieve(BANK, QUERY, count, 3, retriever)  # 6 skills, 5 mistakes
    assert len(pairs) == expected
    assert len({pair.skill for pair in pairs}) == len({pair.mistake for pair in pairs}) == expected
    assert sum(pair.weight for pair in pairs) == pytest.approx(1)


def test_fewer_pairs_are_the_first_of_more_with_their_weights_scaled():
    few, many = retrieve(BANK, QUERY, 2), retrieve(BANK, QUERY, 5)
    assert [(one.skill, one.mistake, one.score) for one in few] == [(o.skill, o.mistake, o.score) for o in many[:2]]
    assert few[0].weight / few[1].weight == pytest.approx(many[0].weight / many[1].weight)


def test_equal_scores_keep_the_order_of_the_bank():
    pairs = retrieve(bank(["b b", "a", "a"], ["x", "x", "x"]), "nothing in common")
    assert [pair.skill.id for pair in pairs] == ["gen_001", "gen_002", "gen_003"]
    assert [pair.mistake.id for pair in pairs] == ["err_001", "err_002", "err_003"]
    assert [pair.weight for pair in pairs] == [1 / 3] * 3
    pairs = retrieve(bank(["b", "a", "a"], ["x", "z", "z"]), "a z")
    assert [pair.skill.id for pair in pairs] == ["gen_002", "gen_003", "gen_001"]
    assert [pair.mistake.id for pair in pairs] == ["err_002", "err_003", "err_001"]


def test_the_lexical_score_is_the_cosine_of_tf_idf_vectors():
    texts = ["Count the cases, count again", "prime factors", "the prime cases"]
    query = "Prime PRIME case counts of 7"
    ranked = dict(Lexical(letters=4)(texts)(query, 0))

    def bag(text: str) -> Counter[str]:
        return Counter("".join(c if c.isalnum() else " " for c in text.lower())[:99].split())

    vocabulary = sorted({word[:4] for text in [*texts, query] for word in bag(text)})
    counts = np.zeros((4, len(vocabulary)))
    for row, text in enumerate([*texts, query]):
        for word, count in bag(text).items():
            counts[row, vocabulary.index(word[:4])] += count
    having = (counts[:3] > 0).sum(0)
    idf = np.log(1 + (3 - having + 0.5) / (having + 0.5))
    weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    assert [ranked[number] for number in range(3)] == pytest.approx((weights[:3] @ weights[3]).tolist())


def test_lexical_scores_run_from_zero_to_one():
    texts = [". ".join((one.title, one.principle, one.when_to_apply)) for one in BANK.skills]
    rank = Lexical()(texts)
    for number, text in enumerate(texts):
        assert rank(text, 0)[0] == (number, pytest.approx(1))
        assert all(0 <= (score or 0) <= 1 for _, score in rank(text, 0))
    for query in ("", "$$", "\u4e2d\u6587", "zzz"):
        assert [number for number, _ in rank(query, 0)] == list(range(len(texts)))
        assert {score for _, score in rank(query, 0)} == {0}


def test_all_three_texts_of_an_entry_are_searched():
    entry = Skill("gen_002", "one", "two", "three")
    searched = Bank((Skill("gen_001", "x", "x", "x"), entry), (Mistake("err_001", "x", "x", "x"), BANK.mistakes[0]))
    for word in ("one", "two", "three"):
        assert retrieve(searched, word)[0].skill == entry
    reason = BANK.mistakes[0].why_it_happens  # not shown, but searched
    assert retrieve(searched, reason)[0].mistake == BANK.mistakes[0]


def test_the_same_key_gives_the_same_pairs_and_only_a_random_retriever_looks_at_it():
    same = retrieve(BANK, QUERY, key=5, retriever=Random())
    assert Index(BANK, Random()).retrieve(QUERY, key=5) == same
    assert retrieve(BANK, "another problem", key=5, retriever=Random()) == same
    drawn = {retrieve(BANK, QUERY, key=key, retriever=Random()) for key in range(20)}
    assert len(drawn) > 15
    same_size = bank(["a", "b", "c"], ["a", "b", "c"])  # skills and mistakes are not drawn alike
    assert any(pair.skill.title != pair.mistake.description for pair in retrieve(same_size, "", retriever=Random()))
    assert retrieve(BANK, QUERY, key=1) == retrieve(BANK, QUERY, key=2) == Index(BANK, Lexical()).retrieve(QUERY)


def test_random_pairs_weigh_the_same_and_every_entry_is_drawn_about_as_often():
    pairs = [retrieve(BANK, QUERY, 2, key, Random()) for key in range(600)]
    assert {pair.weight for two in pairs for pair in two} == {0.5}
    assert {pair.score for two in pairs for pair in two} == {None}
    often = Counter(pair.skill.id for two in pairs for pair in two)  # 200 each on average, sd 12
    assert set(often) == {one.id for one in BANK.skills}
    assert all(140 < count < 260 for count in often.values())


def test_weights_are_a_softmax_that_neither_overflows_nor_depends_on_a_shift():
    assert pair_weights([]) == []
    assert pair_weights([None, None]) == [0.5, 0.5]
    assert pair_weights([1e6, 1e6 - math.log(3)]) == pytest.approx([0.75, 0.25])
    assert pair_weights([-1e6, -1e6 - math.log(3)]) == pytest.approx([0.75, 0.25])


def test_a_bank_is_read_once_however_often_it_is_asked():
    retriever = Fixed([0.1], [0.2])
    read = Index(bank(["a"], ["b"]), retriever)
    assert read.retrieve("one") == read.retrieve("one") == read.retrieve("two")
    assert retriever.reads == 2  # skills and mistakes
    assert index(BANK, Lexical()) is index(read_bank(FILE), Lexical())
    assert index(BANK, Lexical()) is not index(BANK, Lexical(letters=5))


@pytest.mark.parametrize("half", [Bank(), bank(["a"], []), bank([], ["a"])], ids=["empty", "skills", "mistakes"])
def test_a_bank_without_skills_or_without_mistakes_gives_no_pair(half: Bank):
    assert retrieve(half, "a") == ()
    assert retrieve(half, "a", retriever=Random()) == ()


def test_a_count_and_a_length_of_words_below_one_are_refused():
    with pytest.raises(InputError, match="the number of skills to retrieve is 0; give at least 1"):
        retrieve(BANK, QUERY, 0)
    with pytest.raises(InputError, match=r"retriever\.letters is 0; give a whole number of at least 1"):
        Lexical(letters=0)


class Encoder:
    """In the place of a sentence-transformers model: a vector of letters."""

    calls: list[tuple[list[str], dict[str, Any]]]

    def __init__(self, model: str, device: str | None) -> None:
        if model == "none":
            raise OSError("no such\nmodel")
        self.calls = []
        MADE.append((model, device, self))

    def encode(self, texts: list[str], **settings: Any) -> Any:
        self.calls.append((texts, settings))
        vectors = np.array([[text.count(letter) + 1e-3 for letter in "abc"] for text in texts], dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


MADE: list[tuple[str, str | None, Encoder]] = []


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, Encoder]]:
    module = types.ModuleType("sentence_transformers")
    module.__dict__["SentenceTransformer"] = Encoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    MADE.clear()
    return MADE


def test_embeddings_are_unit_vectors_without_an_instruction_and_are_made_once(encoders):
    held = bank(["a", "b", "c"], ["c", "b", "a"])
    first, second, pairs = (retrieve(held, "bb a", retriever=Embedding("once", "cpu")) for _ in range(3))
    assert first == second == pairs
    assert [pair.skill.title for pair in pairs] == ["b", "a", "c"]
    assert [pair.mistake.description for pair in pairs] == ["b", "a", "c"]
    cosine = (2 + 1e-3) / math.sqrt(5)
    assert pairs[0].score == pytest.approx(cosine, abs=2e-3)
    ((model, device, encoder),) = encoders
    assert (model, device) == ("once", "cpu")
    assert [texts for texts, _ in encoder.calls] == [
        ["a. p. w", "b. p. w", "c. p. w"],
        ["c. y. h", "b. y. h", "a. y. h"],
        ["bb a"],
    ]
    for _, settings in encoder.calls:
        assert settings == {"normalize_embeddings": True, "show_progress_bar": False, "convert_to_numpy": True}


def test_a_model_that_cannot_be_loaded_and_a_missing_extra_are_named(encoders, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"model 'none' cannot be loaded \(no such model\); give another model or a"):
        retrieve(BANK, QUERY, retriever=Embedding("none"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"needs sentence-transformers; pip install 'dllm-sd\[embed\]', or choose"):
        retrieve(BANK, QUERY, retriever=Embedding("other"))


def test_the_parts_are_chosen_by_name():
    assert {name: part() for name, part in RETRIEVERS.items()} == {
        **{"lexical": Lexical(), "embedding": Embedding(), "random": Random()},
    }
    assert Embedding().model == "Qwen/Qwen3-Embedding-0.6B"


def test_a_pair_shows_what_to_do_and_what_to_avoid_and_not_why_it_happens():
    held = Bank((Skill("i1", "T{0}", "P", "W"),), (Mistake("i2", "D", "Because", "{title}"),))
    (pair,) = retrieve(held, "q")
    text = format_pair(pair)
    assert text.index("T{0}: P") < text.index("W") < text.index("D") < text.index("{title}")
    for hidden in ("Because", "i1", "i2"):
        assert hidden not in text
    assert format_pair(pair, "{title}|{why_it_happens}") == "T{0}|Because"
    with pytest.raises(
        InputError, match=r"pair of a context skills \(method\.contexts\) asks for {id}; use plain fields only"
    ):
        format_pair(pair, "{id}")
