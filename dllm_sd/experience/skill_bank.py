"""The run's bank of skills: read or made at the start, renewed from rollouts, part of every checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.skills import Bank, Memory, Pair, build_bank, cold_start, read_bank, update, write_bank
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.teachers import SkillBankConfig
from dllm_sd.teachers.prompts import Write
from dllm_sd.writers import Request

FILE = "bank.json"


class SkillBankState:
    """Holds the bank that `SkillBankConfig` describes; to be used by all processes together."""

    def __init__(self, library: SkillBankConfig | None, task: Task, write: Write, seed: int) -> None:
        self.library, self.task, self.write, self.seed = library, task, write, seed
        self.bank = Bank()

    def open(
        self, saved: Mapping[str, Any] | None, attempt: Callable[[int], tuple[Sequence[Rollout], int]]
    ) -> dict[str, int]:
        """The bank of a checkpoint, else that of the library's file, else one that the model writes; its counts.

        Args:
            saved: what the checkpoint has.
            attempt: ``attempt(count)`` gives attempts at problems, and how many had prompts that were too long.

        Raises:
            InputError: if it holds fewer pairs than the library's count.
        """
        library, counts = self.library, dict[str, int]()
        if library is None:
            return {}
        where = f"the bank {library.path} (method.library.path)"
        if saved is not None:
            where = "the bank of the checkpoint"
            self.bank = build_bank(saved, where)
        elif library.path is not None:
            self.bank = read_bank(library.path)
        else:
            rollouts, too_long = attempt(library.memories)
            memories = [self._memory(rollout) for rollout in rollouts]
            self.bank, counts = cold_start(memories, lambda chats: self._answers(chats, 0), library.extraction)
            counts = {"too_long": too_long, **counts}
            where = "the bank that the model wrote"
        pairs = min(len(self.bank.skills), len(self.bank.mistakes))
        if pairs < library.count:
            raise InputError(
                f"{where} holds {len(self.bank.skills)} skills and {len(self.bank.mistakes)} mistakes, too few for "
                f"{library.count} pairs; name another in method.library.path, or lower method.library.count and list "
                f"as many contexts{_said(counts)}"
            )
        return {f"bank/{name}": count for name, count in counts.items()}

    def after_update(self, update_number: int, rollouts: Sequence[Rollout]) -> dict[str, int]:
        """Renew the bank when its time has come, from the rollouts of this update; what happened, for the log."""
        library = self.library
        if library is None or not library.every or update_number % library.every or not rollouts:
            return {}
        memories = [self._memory(rollout) for rollout in rollouts]
        rate = sum(rollout.grade.correct for rollout in rollouts) / len(rollouts)
        self.bank, counts = update(
            *(self.bank, memories, rate), lambda chats: self._answers(chats, update_number), library.extraction
        )
        return {f"bank/{name}": count for name, count in counts.items()}

    def pairs(self, problem: Problem, key: int) -> Sequence[Pair]:
        """What the bank holds for a problem, best first."""
        library = self.library
        return library.pairs(self.bank, library.text(self.task, problem), key) if library else ()

    def write_down(self, run: Path) -> None:
        """For people to read."""
        if self.library is not None:
            write_bank(self.bank, run / FILE)

    @property
    def tree(self) -> dict[str, Any] | None:
        """What a checkpoint holds of the bank."""
        return self.bank.tree() if self.library is not None else None

    def _memory(self, rollout: Rollout) -> Memory:
        problem = rollout.problem
        assert self.library is not None
        text = self.library.text(self.task, problem)
        truth = self.task.final_answer(problem)
        return Memory(text, rollout.text, rollout.grade.correct, rollout.grade.parsed, truth)

    def _answers(self, chats: Sequence[Sequence[Mapping[str, str]]], number: int) -> list[str | None]:
        assert self.library is not None
        requests = [Request(tuple(chat), make_key(self.seed, "skills", number, chat[-1]["content"])) for chat in chats]
        writing = self.library.writing
        if number and self.library.renewal is not None:
            writing = replace(writing, sampling=self.library.renewal)
        return [written.text for written in self.write(writing, requests)]


def _said(counts: Mapping[str, int]) -> str:
    """What was counted while a bank was made, in brackets; nothing where none was."""
    return f" ({', '.join(f'{name} {count}' for name, count in counts.items())})" if counts else ""
