"""The run's bank of skills: read, made or restored, and renewed when its time has come."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dllm_sd.config import Config, build_config
from dllm_sd.errors import InputError
from dllm_sd.experience import skill_bank as shelf_module
from dllm_sd.experience.skill_bank import SkillBankState
from dllm_sd.experience.text_generator import TextGenerator
from dllm_sd.methods import METHODS
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.skills import Bank, Mistake, Skill, build_bank, read_bank, write_bank
from dllm_sd.tasks.jsonl import Jsonl
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import SkillBankConfig
from dllm_sd.teachers.writing import Writing
from dllm_sd.training.trainer import Trainer
from dllm_sd.writers import Request, Written
from tests.tiers import later

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
        Rollout(Problem(str(i), {"bare": f"bare {i}"}), 0, f"text {i}", Grade(good, float(good), "7"), nothing)
        for i, good in enumerate(right)
    ]


class Author:
    """Finds a skill in what is right and a mistake in what is wrong; merges nothing."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, writing: Any, requests: Sequence[Request]) -> list[Written]:
        texts = [request.messages[-1]["content"] for request in requests]
        first = len(self.asked)
        self.asked += texts
        return [Written(self.answer(text, number), None) for number, text in enumerate(texts, first)]

    def answer(self, text: str, number: int) -> str:
        if "Somebody solved" in text:
            entry = {"title": "t", "principle": "p", "when_to_apply": "w"}
        elif "went wrong" in text:
            entry = {"description": "d", "why_it_happens": "y", "how_to_avoid": "h"}
        else:
            return "nothing shorter"
        return json.dumps([{key: f"{value} {number}" for key, value in entry.items()}])


def nobody(*_: Any) -> Any:
    raise AssertionError("nobody was to be asked")


def test_a_renewal_is_written_at_its_own_length_and_by_the_same_writer():
    """4,096 tokens for the first bank and 2,048 for a renewal in the code of arXiv 2605.28791."""

    class Noting(Author):
        def __call__(self, writing: Any, requests: Sequence[Request]) -> list[Written]:
            asked.append(writing)
            return super().__call__(writing, requests)

    row = METHODS["sgsd"].method.skill_bank
    assert row is not None
    for library, renewed in ((row, 2048), (replace(row, renewal=None), 4096)):
        asked: list[Writing] = []
        shelf = SkillBankState(replace(library, count=1), TASK, Noting(), 0)
        shelf.open(None, lambda count: (attempts(True, False), 0))
        first = len(asked)
        assert first > 0
        shelf.after_update(library.every, attempts(True, False))
        assert [one.sampling.length for one in asked] == [4096] * first + [renewed] * (len(asked) - first)
        assert len(asked) > first
        assert {one.writer for one in asked} == {library.writing.writer}


def test_a_bank_is_read_from_its_file_and_found_by_words(tmp_path: Path):
    write_bank(BANK, tmp_path / "bank.json")
    shelf = SkillBankState(SkillBankConfig(path=str(tmp_path / "bank.json"), count=2), TASK, nobody, 0)
    shelf.open(None, nobody)
    assert shelf.bank == BANK
    problem = Problem("principle 2 when 2", {"text": "principle 1 when 1"})
    assert [pair.skill.id for pair in shelf.pairs(problem, 5)] == ["gen_002", "gen_001"]
    assert sum(pair.weight for pair in shelf.pairs(problem, 5)) == pytest.approx(1)
    bare = SkillBankState(SkillBankConfig(path=str(tmp_path / "bank.json"), count=2, problem="{text}"), TASK, nobody, 0)
    bare.open(None, nobody)
    assert [pair.skill.id for pair in bare.pairs(problem, 5)] == ["gen_001", "gen_002"]
    shelf.write_down(tmp_path)
    assert read_bank(tmp_path / "bank.json") == BANK


def test_a_bank_with_too_few_pairs_is_refused(tmp_path: Path):
    write_bank(BANK, tmp_path / "bank.json")
    shelf = SkillBankState(SkillBankConfig(path=str(tmp_path / "bank.json"), count=3), TASK, nobody, 0)
    with pytest.raises(InputError, match="holds 2 skills and 2 mistakes, too few for 3 pairs") as refusal:
        shelf.open(None, nobody)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("problem", "word"), [(None, "question"), ("{bare}", "bare")])
def test_without_a_file_the_bank_is_made_of_attempts(problem: str | None, word: str):
    author, counts = Author(), []

    def attempt(count: int) -> tuple[list[Rollout], int]:
        counts.append(count)
        return attempts(True, False, True, False), 3

    shelf = SkillBankState(SkillBankConfig(count=2, memories=4, problem=problem), TASK, author, 0)
    found = shelf.open(None, attempt)
    assert (found["bank/too_long"], found["bank/successes"], found["bank/failures"]) == (3, 2, 2)
    assert (found["bank/skills"], found["bank/mistakes"]) == (2, 2)
    assert counts == [4]
    assert (len(shelf.bank.skills), len(shelf.bank.mistakes)) == (2, 2)
    asked = [next(line for line in text.splitlines() if line.startswith("Problem: ")) for text in author.asked[:4]]
    assert asked == [f"Problem: {word} {i}" for i in range(4)]


def test_a_bank_is_renewed_every_few_updates_and_goes_on_from_a_checkpoint(tmp_path: Path):
    write_bank(BANK, tmp_path / "bank.json")
    library = SkillBankConfig(path=str(tmp_path / "bank.json"), count=2, every=3)
    shelf = SkillBankState(library, TASK, Author(), 0)
    shelf.open(None, nobody)
    assert shelf.after_update(2, attempts(False, True)) == {}
    counts = shelf.after_update(3, attempts(False, True))
    assert counts["bank/updated"] == 1
    assert [item.id for item in shelf.bank.skills] == ["gen_001", "gen_002", "dyn_001"]
    assert [item.id for item in shelf.bank.mistakes] == ["err_001", "err_002", "dyn_001"]
    again = SkillBankState(library, TASK, nobody, 0)
    again.open(json.loads(json.dumps(shelf.tree)), nobody)
    assert again.bank == shelf.bank
    assert shelf.after_update(6, attempts(True, True, True, True, True)) == {"bank/updated": 0}


def test_a_run_without_a_library_has_no_bank(tmp_path: Path):
    shelf = SkillBankState(None, TASK, nobody, 0)
    shelf.open(None, nobody)
    assert shelf.tree is None
    assert shelf.pairs(Problem("question", {}), 1) == ()
    assert shelf.after_update(25, attempts(False)) == {}
    shelf.write_down(tmp_path)
    assert not list(tmp_path.iterdir())


# In a run.


TREE: dict[str, Any] = {
    "seed": 3,
    "updates": 5,
    "model": {"random_init": True, "as": "autoregressive", "tokenizer": "tiny", "dtype": "float64"},
    "task": {"name": "jsonl", "prompt": "{question}", "grader": "exact", "size_dev": 2},
    "decode": {"length": 8},
    "method": {
        "name": "sgsd",
        "rollout": {"problems": 3, "attempts": 1},
        "contexts": [{"name": "skills", "rank": rank, "template": "{question}({hint})"} for rank in range(2)],
    },
    "optim": {"lr": 0.01, "weight_decay": 0.0},
    "eval": {"every": 0, "final_problems": 0},
    "checkpoint": {"every": 2, "keep": 9},
    "log": {"progress": False, "trackers": []},
}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def run_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Runs over a few sums with a bank, whose writer answers with a function of what it is asked."""
    rows = ({"question": f"{i}+{i + 3}=", "answer": str(2 * i + 3)} for i in range(20))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_bank(BANK, tmp_path / "bank.json")

    def write(self: TextGenerator, writing: Any, requests: Sequence[Request]) -> list[Written]:
        found = []
        for text in (request.messages[-1]["content"] for request in requests):
            number = make_key(text) % 1000
            skill = {"title": f"{number}", "principle": "+", "when_to_apply": "="}
            mistake = {"description": f"{number}", "why_it_happens": "-", "how_to_avoid": "*"}
            merging = "shorter list" in text
            entry = skill if "Somebody solved" in text else mistake
            found.append(Written("nothing shorter" if merging else json.dumps([entry]), None))
        return found

    monkeypatch.setattr(TextGenerator, "write", write)

    def build(run: str, **library: Any) -> Config:
        tree = json.loads(json.dumps(TREE))
        tree["run"], tree["task"]["data"] = str(tmp_path / run), str(tmp_path / "data.jsonl")
        tree["model"]["shape"] = {**SHAPE, "initializer_range": 0.3}
        tree["method"]["skill_bank"] = {"path": str(tmp_path / "bank.json"), "count": 2, "every": 3, **library}
        return build_config(tree)

    return build


def banks_of(run: Path) -> dict[str, Bank]:
    """What each checkpoint of a run holds."""
    states = sorted(run.glob("checkpoints/[0-9]*/state.json"))
    return {file.parent.name: build_bank(json.loads(file.read_text())["bank"], "it") for file in states}


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def test_a_run_renews_its_bank_every_few_updates_and_writes_it_down_for_people(run_at):
    config = run_at("run", every=2)
    Trainer(config).train()
    run, banks = Path(config.run), banks_of(Path(config.run))
    assert [line["update"] for line in lines_of(run) if "bank/updated" in line] == [2, 4]
    sizes = [len(bank.mistakes) for bank in banks.values()]
    assert [*banks] == ["000002", "000004", "000005"]
    assert 2 < sizes[0] < sizes[1] == sizes[2]
    for line, size in zip((2, 4), sizes, strict=False):
        assert lines_of(run)[line]["bank/mistakes"] == size
    assert all(bank.skills[:2] == BANK.skills and bank.mistakes[:2] == BANK.mistakes for bank in banks.values())
    assert read_bank(run / "bank.json") == banks["000005"]
    (run / "bank.json").unlink()  # killed between the checkpoint and this file
    Trainer(config)
    assert read_bank(run / "bank.json") == banks["000005"]
    assert json.loads((run / "bank.json").read_text()).keys() == {"skills", "mistakes", "metadata"}


@pytest.mark.parametrize(
    "library", [{}, *later({"path": None, "memories": 6, "every": 0})], ids=["renewed", "made first"]
)
def test_a_run_stopped_in_the_middle_goes_on_with_the_bank_of_its_checkpoint(run_at, monkeypatch, library):
    if library:  # else the random model is never right, and a bank needs successes too

        def parity(self: Jsonl, problem: Problem, completion: str) -> Grade:
            correct = sum(map(ord, completion)) % 2 == 0
            return Grade(correct, float(correct), completion)

        monkeypatch.setattr(Jsonl, "grade", parity)
    whole, broken = run_at("whole", **library), run_at("broken", **library)
    Trainer(whole).train()
    update = Trainer._update

    def failing(self: Trainer, number: int) -> dict[str, Any]:
        if number == 5:
            raise RuntimeError("power cut")
        return update(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            Trainer(broken).train()

    def again(*_: Any) -> Any:
        raise AssertionError("a bank is made once")

    monkeypatch.setattr(shelf_module, "cold_start", again)
    monkeypatch.setattr(shelf_module, "read_bank", again)
    resumed = Trainer(broken)
    assert resumed.state.update == 4
    assert resumed.pipeline.skill_bank.bank == banks_of(Path(whole.run))["000004"]
    resumed.train()
    one, other = Path(whole.run), Path(broken.run)
    assert lines_of(one) == lines_of(other)
    assert banks_of(one) == banks_of(other)
    assert (banks_of(one)["000002"] == banks_of(one)["000005"]) == bool(library)
    assert (one / "bank.json").read_bytes() == (other / "bank.json").read_bytes()
    first, second = (load_file(run / "checkpoints" / "000005" / "model.safetensors") for run in (one, other))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_bank_that_the_model_could_not_write_is_refused_with_the_remedy(run_at):
    with pytest.raises(InputError, match=r"the bank that the model wrote holds 0 skills and [0-9] mistakes") as refusal:
        Trainer(run_at("run", path=None, memories=6))
    assert "\n" not in str(refusal.value)


def test_a_checkpoints_bank_that_is_too_small_is_named_as_such():
    shelf = SkillBankState(SkillBankConfig(count=3), TASK, nobody, 0)
    with pytest.raises(InputError, match=r"^the bank of the checkpoint holds 2 skills and 2 mistakes"):
        shelf.open(BANK.tree(), nobody)


def test_the_attempts_for_a_bank_are_decoded_as_the_library_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And the run's own rollouts as before."""
    asked: list[tuple[Any, ...]] = []
    decode = PassAtK.__call__

    def noting(self: PassAtK, policy: Any, task: Any, prompted: Any, settings: Any, *rest: Any) -> Any:
        asked.append((settings.length, self.temperature, self.top_p, self.top_k))
        return decode(self, policy, task, prompted, settings, *rest)

    monkeypatch.setattr(PassAtK, "__call__", noting)
    contexts = [{"name": "skills", "rank": 0}]
    attempt = {"length": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 3}
    for library, wanted in (({"attempt": attempt}, (5, 0.7, 0.9, 3)), ({}, (7, 1.0, 1.0, 0))):
        method = {"name": "sgsd", "rollout": {"problems": 2}, "contexts": contexts}
        config = build_config(
            {
                "run": str(tmp_path / str(len(asked))),
                "updates": 1,
                "model": {"path": "tiny_ar"},
                "task": {"name": "sudoku", "prompt": "{puzzle}:", "answer": "{solution}"},
                "decode": {"length": 7, "batch_size": 8},
                "method": {
                    **method,
                    "skill_bank": {"count": 1, "memories": 3, "writing": {"sampling": {"length": 8}}, **library},
                },
                "eval": {"every": 0, "final_problems": 0},
                "log": {"progress": False, "trackers": []},
            }
        )
        with pytest.raises(InputError, match="the bank that the model wrote holds 0 skills"):
            Trainer(config)
        assert asked[-1] == wanted
