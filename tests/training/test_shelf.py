"""The run's bank of skills: read, made or restored, and renewed when its time has come."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_sd.errors import InputError
from dllm_sd.rollouts import Rollout
from dllm_sd.skills import Bank, Mistake, Skill, read_bank, write_bank
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import Library
from dllm_sd.training.shelf import Shelf
from dllm_sd.writers import Request, Written

BANK = Bank(
    tuple(Skill(f"gen_00{i}", f"title {i}", f"principle {i}", f"when {i}") for i in (1, 2)),
    tuple(Mistake(f"err_00{i}", f"mistake {i}", f"why {i}", f"how {i}") for i in (1, 2)),
)


class Questions:
    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"question {problem.id}"}]

    def final_answer(self, problem: Problem) -> str:
        return "7"


TASK: Any = Questions()


def attempts(*right: bool) -> list[Rollout]:
    nothing: Any = torch.tensor(0)
    return [
        Rollout(Problem(str(i), {}), 0, f"text {i}", Grade(good, float(good), "7"), nothing)
        for i, good in enumerate(right)
    ]


class Author:
    """Finds a skill in what is right and a mistake in what is wrong; merges nothing."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, writing: Any, requests: Sequence[Request]) -> list[Written]:
        texts = [request.messages[-1]["content"] for request in requests]
        self.asked += texts
        return [Written(self.answer(text, len(self.asked)), None) for text in texts]

    def answer(self, text: str, number: int) -> str:
        if "Somebody solved" in text:
            entry = {"title": f"t{number}", "principle": "p", "when_to_apply": "w"}
        elif "went wrong" in text:
            entry = {"description": f"d{number}", "why_it_happens": "y", "how_to_avoid": "h"}
        else:
            return "nothing shorter"
        return json.dumps([{key: f"{value} {hash(text) % 1000}" for key, value in entry.items()}])


def nobody(*_: Any) -> Any:
    raise AssertionError("nobody was to be asked")


def test_a_bank_is_read_from_its_file_and_found_by_words(tmp_path: Path):
    write_bank(BANK, tmp_path / "bank.json")
    shelf = Shelf(Library(path=str(tmp_path / "bank.json"), count=2), TASK, nobody, 0)
    shelf.open(None, nobody)
    assert shelf.bank == BANK
    assert [pair.skill.id for pair in shelf.pairs("principle 2 when 2", 5)] == ["gen_002", "gen_001"]
    assert sum(pair.weight for pair in shelf.pairs("principle 2", 5)) == pytest.approx(1)
    shelf.write_down(tmp_path)
    assert read_bank(tmp_path / "bank.json") == BANK


def test_a_bank_with_too_few_pairs_is_refused(tmp_path: Path):
    write_bank(BANK, tmp_path / "bank.json")
    shelf = Shelf(Library(path=str(tmp_path / "bank.json"), count=3), TASK, nobody, 0)
    with pytest.raises(InputError, match="holds 2 skills and 2 mistakes, too few for 3 pairs") as refusal:
        shelf.open(None, nobody)
    assert "\n" not in str(refusal.value)


def test_without_a_file_the_bank_is_made_of_attempts(tmp_path: Path):
    author, counts = Author(), []

    def attempt(count: int) -> list[Rollout]:
        counts.append(count)
        return attempts(True, False, True, False)

    shelf = Shelf(Library(count=2, memories=4), TASK, author, 0)
    shelf.open(None, attempt)
    assert counts == [4]
    assert (len(shelf.bank.skills), len(shelf.bank.mistakes)) == (2, 2)
    assert all("question" in text for text in author.asked[:4])


def test_a_bank_is_renewed_every_few_updates_and_goes_on_from_a_checkpoint(tmp_path: Path):
    write_bank(BANK, tmp_path / "bank.json")
    library = Library(path=str(tmp_path / "bank.json"), count=2, every=3)
    shelf = Shelf(library, TASK, Author(), 0)
    shelf.open(None, nobody)
    assert shelf.after_update(2, attempts(False, True)) == {}
    counts = shelf.after_update(3, attempts(False, True))
    assert counts["bank/updated"] == 1
    assert [item.id for item in shelf.bank.skills] == ["gen_001", "gen_002", "dyn_001"]
    assert [item.id for item in shelf.bank.mistakes] == ["err_001", "err_002", "dyn_001"]
    again = Shelf(library, TASK, nobody, 0)
    again.open(json.loads(json.dumps(shelf.tree)), nobody)
    assert again.bank == shelf.bank
    assert shelf.after_update(6, attempts(True, True, True, True, True)) == {"bank/updated": 0}


def test_a_run_without_a_library_has_no_bank(tmp_path: Path):
    shelf = Shelf(None, TASK, nobody, 0)
    shelf.open(None, nobody)
    assert shelf.tree is None
    assert shelf.pairs("question", 1) == ()
    assert shelf.after_update(25, attempts(False)) == {}
    shelf.write_down(tmp_path)
    assert not list(tmp_path.iterdir())
