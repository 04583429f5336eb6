"""Retrieval: which skills and mistakes of a bank fit a problem, how they are paired, and how they are rendered.

Source: SGSD (arXiv 2605.28791), section on the teacher pool; released code walawalagoose/SGSD, commit f296a91,
`skill/skill_memory.py` (texts, embeddings, ranks) and `skill/training.py`, `build_sgsd_teacher_specs` (pairs, weights).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from dllm_sd.errors import InputError, on_one_line
from dllm_sd.parts import Part
from dllm_sd.randomness import make_key, permutation
from dllm_sd.ranges import Count, Ranged
from dllm_sd.skills.bank import Bank, Mistake, Skill, texts
from dllm_sd.tasks.datafile import render

PAIR = """\
{title}: {principle}
Where it helps: {when_to_apply}

A mistake others made here: {description}
How to stay clear of it: {how_to_avoid}"""

PAIR_KEY = "pair of a context skills (method.contexts)"

Rank = Callable[[str, int], Sequence[tuple[int, float | None]]]
"""``rank(query, key)`` returns the indices of all entries, best first, each with its score (None without scores)."""

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class SkillPair:
    """The privileged context of one teacher: a skill and a mistake of the same rank."""

    skill: Skill
    mistake: Mistake
    score: float | None
    """Mean of the two scores; None without scores."""
    weight: float
    """Weight of the teacher; the weights of the pairs of a problem add up to 1."""


class Retriever(Part, Protocol):
    """Indexes the texts of a bank's skills, or of its mistakes, once, and then ranks them for any problem."""

    def __call__(self, texts: Sequence[str]) -> Rank:
        """Return the ranking of these texts; ties keep the order of the texts."""
        ...


@dataclass(frozen=True)
class Lexical(Ranged, key="retriever"):
    """Cosine of tf-idf vectors, from 0 (no common word) to 1; it needs no model and is deterministic.

    A word has the weight ``(1 + ln n) ln(1 + (N - d + 1/2) / (d + 1/2))``, with ``n`` its count in the text and ``d``
    the number of the ``N`` texts that contain it (Salton and Buckley 1988; the idf is that of BM25). Words of the
    problem that occur in no text count in the length of its vector.

    Fields:
        letters: length to which words are cut, in lower case, so that ``triangles`` matches ``triangle``.
    """

    letters: Count = 6

    def __call__(self, texts: Sequence[str]) -> Rank:
        word_counts = [self._words(text) for text in texts]
        document_counts = Counter(word for words in word_counts for word in words)
        postings: dict[str, list[tuple[int, float]]] = {word: [] for word in document_counts}
        for number, words in enumerate(word_counts):
            for word, weight in _unit(words, document_counts, len(texts)).items():
                postings[word].append((number, weight))

        def rank(query: str, key: int) -> Sequence[tuple[int, float]]:
            scores = [0.0] * len(texts)
            for word, weight in _unit(self._words(query), document_counts, len(texts)).items():
                for number, entry_weight in postings.get(word, ()):
                    scores[number] += weight * entry_weight
            return _best_first([min(score, 1.0) for score in scores])

        return rank

    def _words(self, text: str) -> Counter[str]:
        return Counter(word[: self.letters] for word in _WORD.findall(text.lower()))


@dataclass(frozen=True)
class Embedding:
    """Cosine of sentence embeddings, as in SGSD: unit vectors, no instruction before problem or entry.

    Fields:
        model: name or folder of a sentence-transformers model.
        device: such as ``cuda`` or ``cpu``; None takes the available one.
    """

    model: str = "Qwen/Qwen3-Embedding-0.6B"
    device: str | None = None

    def __call__(self, texts: Sequence[str]) -> Rank:
        vectors = _vectors(self.model, self.device, texts)

        def rank(query: str, key: int) -> Sequence[tuple[int, float]]:
            return _best_first((vectors @ _query_vector(self.model, self.device, query)).tolist())

        return rank


@dataclass(frozen=True)
class Random:
    """Entries in random order, a function of the key alone, with equal weights for all pairs (SGSD's ablation)."""

    def __call__(self, texts: Sequence[str]) -> Rank:
        return lambda query, key: [(number, None) for number in permutation(key, len(texts))]


RETRIEVERS: dict[str, type] = {"lexical": Lexical, "embedding": Embedding, "random": Random}


class Index:
    """The index of a bank by a retriever, built once for all problems."""

    def __init__(self, bank: Bank, retriever: Retriever) -> None:
        self._bank = bank
        self._rank_skills = retriever([". ".join(texts(entry)) for entry in bank.skills]) if bank.skills else None
        self._rank_mistakes = retriever([". ".join(texts(entry)) for entry in bank.mistakes]) if bank.mistakes else None

    def retrieve(self, query: str, count: int = 8, key: int = 0) -> tuple[SkillPair, ...]:
        """Return at most ``count`` pairs for a problem, best first: the k-th skill with the k-th mistake.

        ``query`` is the text of the problem. The number of pairs is the minimum of the number of skills, the number of
        mistakes, and ``count``. Their weights are the softmax of their scores, or equal without scores.
        """
        if count < 1:
            raise InputError(f"the number of skills to retrieve is {count}; give at least 1, such as 8.")
        if self._rank_skills is None or self._rank_mistakes is None:
            return ()
        skills = self._rank_skills(query, make_key(key, "skills"))
        mistakes = self._rank_mistakes(query, make_key(key, "mistakes"))
        matched = list(zip(skills, mistakes, strict=False))[:count]
        scores = [
            None if skill_score is None or mistake_score is None else (skill_score + mistake_score) / 2
            for (_, skill_score), (_, mistake_score) in matched
        ]
        return tuple(
            SkillPair(self._bank.skills[skill], self._bank.mistakes[mistake], score, weight)
            for ((skill, _), (mistake, _)), score, weight in zip(matched, scores, pair_weights(scores), strict=True)
        )


def pair_weights(scores: Sequence[float | None]) -> list[float]:
    """Return the softmax of the scores at temperature 1, or equal weights without scores.

    Source: released code, `SkillRuntime._normalize_sgsd_candidate_weights`.
    """
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return [1 / len(scores)] * len(scores)
    powers = [math.exp(score - max(known)) for score in known]
    return [power / sum(powers) for power in powers]


def retrieve(
    bank: Bank,
    query: str,
    count: int = 8,
    key: int = 0,
    retriever: Retriever = Lexical(),
) -> tuple[SkillPair, ...]:
    """Call `Index.retrieve` on the cached index of a bank and retriever."""
    return index(bank, retriever).retrieve(query, count, key)


@lru_cache(maxsize=2)  # the bank before and after an update
def index(bank: Bank, retriever: Retriever) -> Index:
    """Return the cached index of a bank."""
    return Index(bank, retriever)


def format_pair(pair: SkillPair, template: str = PAIR) -> str:
    """Render a pair for the teacher's hint; a ``template`` may use any text of the two, by the name of its field.

    As in the released code (`format_for_prompt`), why the mistake happens serves retrieval and is not shown.
    """
    entries = {**vars(pair.skill), **vars(pair.mistake)}
    del entries["id"]
    return render(template, entries, PAIR_KEY)


def check_pair(template: str) -> None:
    """Refuse a template of pairs that names a text which they have not, or none at all."""
    pairs = [SkillPair(Skill("", *[text] * 3), Mistake("", *[text] * 3), None, 1.0) for text in "12"]
    first, second = (format_pair(pair, template) for pair in pairs)
    if first == second:
        raise InputError(f"{PAIR_KEY} shows no text of the skill or the mistake; add {{principle}}, or another of them")


def _unit(word_counts: Counter[str], document_counts: Counter[str], documents: int) -> dict[str, float]:
    """Return the weights of the words of one text, scaled to length 1."""
    weights = {
        word: (1 + math.log(count))
        * math.log1p((documents - document_counts[word] + 0.5) / (document_counts[word] + 0.5))
        for word, count in word_counts.items()
    }
    length = math.sqrt(sum(weight * weight for weight in weights.values()))
    return {word: weight / length for word, weight in weights.items()}


def _best_first(scores: Sequence[float]) -> list[tuple[int, float]]:
    return sorted(enumerate(scores), key=lambda pair: -pair[1])


def _vectors(model: str, device: str | None, texts: Sequence[str]) -> Any:
    encoder = _encoder(model, device)
    return encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)


@lru_cache(maxsize=1024)  # all rollouts of a problem use the same vector, for skills and for mistakes
def _query_vector(model: str, device: str | None, query: str) -> Any:
    return _vectors(model, device, [query])[0]


@lru_cache(maxsize=1)
def _encoder(model: str, device: str | None) -> Any:
    try:
        # Imported here, since it is an optional dependency.
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "the retriever 'embedding' needs sentence-transformers; pip install 'dllm-sd[embed]', or choose 'lexical'."
        ) from None
    try:
        return SentenceTransformer(model, device=device)
    except Exception as error:  # the remedy is the same for every error of the hub client
        reason = on_one_line(error)[:200] or type(error).__name__
        raise InputError(
            f"the retriever's model {model!r} cannot be loaded ({reason}); give another model or a local folder."
        ) from error
