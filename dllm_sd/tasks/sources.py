"""What tasks share: problems asked by one template that come from files, from the hub, or out of a generator."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Natural, Ranged
from dllm_sd.tasks.datafile import (
    Entry,
    Generated,
    Row,
    Splits,
    chat,
    choose,
    divide,
    fields_of,
    hub_rows,
    read_rows,
    render,
)
from dllm_sd.tasks.task import NoChanceLevel, Problem, Split, Task


class TemplateTask(Ranged, NoChanceLevel, key="task"):
    """Asks by the template ``prompt`` and answers by the template ``answer``, which needs the field ``answered_by``.

    The field ``final`` of a problem holds its answer alone.
    """

    system: str | None
    prompt: str
    answer: str
    answered_by: ClassVar[str]
    final: ClassVar[str] = "answer"

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        """The system text, where there is one, and the prompt; without the ``question`` its fields are left empty."""
        if question:
            return chat(self.system, render(self.prompt_template(), problem.fields, "task.prompt"))
        blank = render(self.prompt_template(), dict.fromkeys(problem.fields, ""), "task.prompt")
        return chat(self.system, blank.strip())

    def reference(self, problem: Problem) -> str | None:
        """The answer template filled, or None where the problem has no answer to fill it with."""
        if problem.fields.get(self.answered_by) is None:
            return None
        return render(self.answer, self.answer_fields(problem), "task.answer")

    def final_answer(self, problem: Problem) -> str | None:
        """The field ``final`` as text, or None where the problem does not have it."""
        value = problem.fields.get(self.final)
        return None if value is None else str(value)

    def prompt_template(self) -> str:
        """The template that problems are asked by: ``prompt``."""
        return self.prompt

    def answer_fields(self, problem: Problem) -> Mapping[str, Any]:
        """What the answer template may ask for: the fields of the problem."""
        return problem.fields

    def check_templates(self, asked: Sequence[str], answered: Iterable[str], optional: Collection[str] = ()) -> None:
        """Refuse templates that ask for fields that the problems will not have, and a prompt without the question.

        Args:
            asked: fields for the prompt; it may leave out those of ``optional``.
            answered: fields for the answer besides.
            optional: fields that say nothing that the others do not say.
        """
        render(self.prompt, dict.fromkeys(asked, ""), "task.prompt")
        if missing := [name for name in asked if name not in {*fields_of(self.prompt), *optional}]:
            raise InputError(f"task.prompt leaves out {{{missing[0]}}}, without which nothing is asked; put it in")
        render(self.answer, dict.fromkeys((*asked, *answered), ""), "task.answer")


class GeneratedTask(TemplateTask):
    """Generated without end, or read from ``data`` and ``data_test``; the three sizes say how many problems to use."""

    size_train: Natural
    size_dev: Natural
    size_test: Natural
    data: str | None
    data_test: str | None
    title: ClassVar[str]  # the name of the task, in the ids of its problems

    @abstractmethod
    def generate(self, split: Split, index: int) -> Problem:
        """Problem ``index`` of ``split``."""

    @abstractmethod
    def entry(self, row: Row) -> Entry:
        """A row of a file, checked and made into fields."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """The first problems of a split, as many as its size says; an InputError where it is 0."""
        size = {"train": self.size_train, "dev": self.size_dev, "test": self.size_test}[split]
        if not size:
            raise InputError(f"task.size_{split} is 0, so the {split} split holds no problems; raise it.")
        if self.data is not None or self.data_test is not None:
            return choose(self._files, split)[:size]
        return Generated(range(size), partial(self.generate, split))

    def splits(self) -> Splits | None:
        """What the files were divided into; None where problems are generated."""
        return self._files if self.data is not None or self.data_test is not None else None

    @cached_property
    def _files(self) -> Splits:
        train = read_rows(self.data, "task.data") if self.data is not None else []
        test = read_rows(self.data_test, "task.data_test") if self.data_test is not None else []
        return divide(self.title, map(self.entry, train), map(self.entry, test), self.size_dev, key=None)


class DatasetTask(TemplateTask):
    """Read from files or hub datasets; ``size_dev`` training rows are held out by a permutation that never changes."""

    size_dev: Natural
    data: str | None
    data_test: str | None
    title: ClassVar[str]  # the name of the task, in the ids of its problems

    @abstractmethod
    def entries(self, rows: list[Row]) -> Iterable[Entry]:
        """Rows checked and made into fields."""

    def load(self) -> tuple[list[Row], list[Row]]:
        """The rows to train on and those to test on."""
        return rows_of(self.data, "train", "task.data"), rows_of(self.data_test, "test", "task.data_test")

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split; the first call reads the data."""
        return choose(self._splits, split)

    def splits(self) -> Splits | None:
        """What the data was divided into."""
        return self._splits

    @cached_property
    def _splits(self) -> Splits:
        train, test = self.load()
        key = make_key(self.title, "dev")
        return divide(self.title, self.entries(train), self.entries(test), self.size_dev, key)


class Draws:
    """Integers drawn one after another, a function of ``key`` alone; many small ones are cut from one hash."""

    def __init__(self, key: int) -> None:
        self.key, self.count, self.pool, self.span = key, 0, 0, 0

    def below(self, bound: int) -> int:
        """An integer in ``[0, bound)``, uniform to one part in a million."""
        if self.span < bound << 20:
            self.pool, self.span, self.count = make_key(self.key, self.count), 1 << 63, self.count + 1
        self.pool, drawn = divmod(self.pool, bound)
        self.span //= bound
        return drawn

    def shuffled(self, count: int) -> list[int]:
        """The numbers below ``count`` in random order."""
        left = list(range(count))
        return [left.pop(self.below(len(left))) for _ in range(count)]


_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz")


def rows_of(source: str | None, split: str, key: str) -> list[Row]:
    """The rows of a file, or of one split of the hub dataset ``owner/name`` or ``owner/name:config``; none for None."""
    if source is None:
        return []
    is_file = Path(source).suffix.lower() in _FILES or source.count("/") != 1
    if is_file or Path(source).expanduser().exists():
        return read_rows(source, key)
    name, _, config = source.partition(":")
    return hub_rows(name, config or None, split, key)


def rows_left_out(task: Task) -> tuple[dict[str, int], str | None]:
    """Rows of ``task.data`` that are in no split since another split has the same; and a sentence, if there are any.

    Returns:
        The counts by metric, none of a task that reads no file of rows to train on.
    """
    splits = task.splits() if isinstance(task, GeneratedTask | DatasetTask) else None
    if splits is None or not splits.rows:
        return {}, None
    counts = {"data/in_test": splits.tested, "data/in_dev": splits.held}
    found = " and ".join(f"{count} occur in the {name[8:]} split too" for name, count in counts.items() if count)
    return counts, f"of the {splits.rows} rows of task.data, {found}; training leaves them out" if found else None
