"""The run's skill bank: read or made at the start, renewed from rollouts, part of every checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.skills import Attempt, Bank, SkillPair, build_bank, cold_start, read_bank, update, write_bank
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.teachers import SkillBankConfig
from dllm_sd.teachers.prompts import WriteTexts
from dllm_sd.writers import Request

BANK_FILE = "bank.json"


class SkillBankState:
    """Holds the bank that `SkillBankConfig` describes; to be used by all processes together."""

    def __init__(self, config: SkillBankConfig | None, task: Task, write: WriteTexts, seed: int) -> None:
        self.config, self.task, self.write, self.seed = config, task, write, seed
        self.bank = Bank()

    def open(
        self, saved: Mapping[str, Any] | None, attempt: Callable[[int], tuple[Sequence[Rollout], int]]
    ) -> dict[str, int]:
        """The bank of a checkpoint, else that of the config's file, else one that the model writes; returns counts.

        Args:
            saved: the bank in the checkpoint, or None.
            attempt: ``attempt(count)`` gives attempts at problems, and how many had prompts that were too long.

        Raises:
            InputError: if the bank holds fewer pairs than the config's count.
        """
        config, counts = self.config, dict[str, int]()
        if config is None:
            return {}
        where = f"the bank {config.path} (method.skill_bank.path)"
        if saved is not None:
            where = "the bank of the checkpoint"
            self.bank = build_bank(saved, where)
        elif config.path is not None:
            self.bank = read_bank(config.path)
        else:
            rollouts, too_long = attempt(config.memories)
            memories = [self._memory(rollout) for rollout in rollouts]
            self.bank, counts = cold_start(memories, lambda chats: self._answers(chats, 0), config.extraction)
            counts = {"too_long": too_long, **counts}
            where = "the bank that the model wrote"
        pairs = min(len(self.bank.skills), len(self.bank.mistakes))
        if pairs < config.count:
            raise InputError(
                f"{where} holds {len(self.bank.skills)} skills and {len(self.bank.mistakes)} mistakes, too few for "
                f"{config.count} pairs; name another in method.skill_bank.path, or lower method.skill_bank.count and "
                f"list as many contexts{_in_brackets(counts)}"
            )
        return {f"bank/{name}": count for name, count in counts.items()}

    def after_update(self, update_number: int, rollouts: Sequence[Rollout]) -> dict[str, int]:
        """Renew the bank from the rollouts of this update if it is due; returns counts for the log."""
        config = self.config
        if config is None or not config.every or update_number % config.every or not rollouts:
            return {}
        memories = [self._memory(rollout) for rollout in rollouts]
        rate = sum(rollout.grade.correct for rollout in rollouts) / len(rollouts)
        self.bank, counts = update(
            *(self.bank, memories, rate), lambda chats: self._answers(chats, update_number), config.extraction
        )
        return {f"bank/{name}": count for name, count in counts.items()}

    def pairs(self, problem: Problem, key: int) -> Sequence[SkillPair]:
        """The pairs of the bank for a problem, best first."""
        config = self.config
        return config.pairs(self.bank, config.text(self.task, problem), key) if config else ()

    def write_down(self, run: Path) -> None:
        """Write the bank into the run's folder, for people to read."""
        if self.config is not None:
            write_bank(self.bank, run / BANK_FILE)

    @property
    def tree(self) -> dict[str, Any] | None:
        """The bank as it is stored in a checkpoint."""
        return self.bank.tree() if self.config is not None else None

    def _memory(self, rollout: Rollout) -> Attempt:
        problem = rollout.problem
        assert self.config is not None
        text = self.config.text(self.task, problem)
        truth = self.task.final_answer(problem)
        return Attempt(text, rollout.text, rollout.grade.correct, rollout.grade.parsed, truth)

    def _answers(self, chats: Sequence[Sequence[Mapping[str, str]]], number: int) -> list[str | None]:
        assert self.config is not None
        requests = [Request(tuple(chat), make_key(self.seed, "skills", number, chat[-1]["content"])) for chat in chats]
        writing = self.config.writing
        if number and self.config.renewal is not None:
            writing = replace(writing, sampling=self.config.renewal)
        return [written.text for written in self.write(writing, requests)]


def _in_brackets(counts: Mapping[str, int]) -> str:
    """The counts of making a bank, in brackets; empty where none was made."""
    return f" ({', '.join(f'{name} {count}' for name, count in counts.items())})" if counts else ""
