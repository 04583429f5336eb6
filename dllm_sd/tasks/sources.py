"""Base classes of tasks: prompts from a template, and problems from files, from the hub, or from a generator."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from dllm_sd.errors import EmptySplit, InputError, shown
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Natural, Ranged
from dllm_sd.tasks.datafile import (
    Entry,
    Generated,
    Row,
    Splits,
    chat,
    chosen_split,
    divide,
    fields_of,
    hub_rows,
    read_rows,
    render,
)
from dllm_sd.tasks.task import NoChanceLevel, Problem, Split, Task


class TemplateTask(Ranged, NoChanceLevel, key="task"):
    """Renders prompts with the template ``prompt`` and references with the template ``answer``.

    A reference needs the field ``answered_by``; the field ``final`` of a problem holds the answer alone.
    """

    system: str | None
    """System message before the prompt; None sends none."""
    prompt: str
    """Template of the prompt; `{field}` is replaced by that field of the problem."""
    answer: str
    """Template of the reference completion, which supervised training imitates and teachers may see."""
    answered_by: ClassVar[str]
    final: ClassVar[str] = "answer"

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        """Return the system message, if there is one, and the prompt; without ``question``, with empty fields."""
        if question:
            return chat(self.system, render(self.prompt_template(), problem.fields, "task.prompt"))
        without_question = render(self.prompt_template(), dict.fromkeys(problem.fields, ""), "task.prompt")
        return chat(self.system, without_question.strip())

    def reference(self, problem: Problem) -> str | None:
        """Return the filled answer template, or None if the problem has no answer."""
        if problem.fields.get(self.answered_by) is None:
            return None
        return render(self.answer, self.answer_fields(problem), "task.answer")

    def final_answer(self, problem: Problem) -> str | None:
        """Return the field ``final`` as text, or None if the problem does not have it."""
        value = problem.fields.get(self.final)
        return None if value is None else str(value)

    def prompt_template(self) -> str:
        """Return the template of the prompt."""
        return self.prompt

    def answer_fields(self, problem: Problem) -> Mapping[str, Any]:
        """Return the fields that the answer template may use: those of the problem."""
        return problem.fields

    def check_templates(
        self, prompt_fields: Sequence[str], answer_only: Iterable[str], optional: Collection[str] = ()
    ) -> None:
        """Refuse templates that use fields that the problems do not have, and prompts without the question.

        Args:
            prompt_fields: fields that the prompt may use; it must use all but the ``optional`` ones.
            answer_only: further fields that the answer may use.
            optional: fields whose content the remaining fields contain as well.
        """
        render(self.prompt, dict.fromkeys(prompt_fields, ""), "task.prompt")
        if missing := [name for name in prompt_fields if name not in {*fields_of(self.prompt), *optional}]:
            raise InputError(
                f"task.prompt does not use {{{missing[0]}}}, without which the problem is incomplete; add it"
            )
        render(self.answer, dict.fromkeys((*prompt_fields, *answer_only), ""), "task.answer")


class GeneratedTask(TemplateTask):
    """Problems from a generator, or from ``data`` and ``data_test``; the three sizes limit the splits."""

    size_train: Natural
    """Most problems of the train split."""
    size_dev: Natural
    """Problems of the dev split; with `data`, the last rows of that file."""
    size_test: Natural
    """Most problems of the test split."""
    data: str | None
    """File of train and dev problems; None generates them, or has none if `data_test` is set."""
    data_test: str | None
    """File of test problems; None generates them, or has none if `data` is set."""
    title: ClassVar[str]  # the name of the task, part of the ids of its problems

    @abstractmethod
    def generate(self, split: Split, index: int) -> Problem:
        """Return problem ``index`` of ``split``."""

    @abstractmethod
    def entry(self, row: Row) -> Entry:
        """Check a row of a file and convert it into fields."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the first problems of a split, up to its size; raise an InputError if the size is 0."""
        size = {"train": self.size_train, "dev": self.size_dev, "test": self.size_test}[split]
        if not size:
            raise EmptySplit(f"task.size_{split} is 0, so the {split} split holds no problems; raise it.")
        if self.data is not None or self.data_test is not None:
            return chosen_split(self._files, split)[:size]
        return Generated(range(size), partial(self.generate, split))

    def splits(self) -> Splits | None:
        """Return the splits of the files, or None if problems are generated."""
        return self._files if self.data is not None or self.data_test is not None else None

    @cached_property
    def _files(self) -> Splits:
        train = read_rows(self.data, "task.data") if self.data is not None else []
        test = read_rows(self.data_test, "task.data_test") if self.data_test is not None else []
        return divide(self.title, map(self.entry, train), map(self.entry, test), self.size_dev, key=None)


class DatasetTask(TemplateTask):
    """Problems from files or hub datasets; a fixed permutation chooses the ``size_dev`` rows of the dev split.

    Without a ``size_dev`` a tenth of the rows is held out, at least one and at most ``usual_dev``.
    """

    size_dev: Natural | None
    """Rows of `data` that are held out as the dev split; None holds out a tenth, up to a limit of the task."""
    data: str | None
    """File of train and dev problems (JSON Lines, CSV or Parquet, also packed with gzip), or a data set of the hub."""
    data_test: str | None
    """File of test problems, or a data set of the hub."""
    title: ClassVar[str]  # the name of the task, part of the ids of its problems
    usual_dev: ClassVar[int] = 500

    @abstractmethod
    def entries(self, rows: list[Row]) -> Iterable[Entry]:
        """Check rows and convert them into fields."""

    def load(self) -> tuple[list[Row], list[Row]]:
        """Return the training rows and the test rows."""
        return rows_of(self.data, "train", "task.data"), rows_of(self.data_test, "test", "task.data_test")

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split; the first call reads the data."""
        if split != "test":
            self._splits.check_size(self.size_dev)
        return chosen_split(self._splits, split)

    def splits(self) -> Splits:
        """Return the splits of the data."""
        return self._splits

    @cached_property
    def _splits(self) -> Splits:
        train, test = self.load()
        key = make_key(self.title, "dev")
        return divide(self.title, self.entries(train), self.entries(test), self.size_dev, key, self.usual_dev)


class Draws:
    """A stream of pseudo-random integers that depends on ``key`` alone; one hash yields several small integers."""

    def __init__(self, key: int) -> None:
        self.key, self.count, self.pool, self.span = key, 0, 0, 0

    def below(self, bound: int) -> int:
        """Return an integer in ``[0, bound)``, uniform to one part in a million."""
        if self.span < bound << 20:
            self.pool, self.span, self.count = make_key(self.key, self.count), 1 << 63, self.count + 1
        self.pool, drawn = divmod(self.pool, bound)
        self.span //= bound
        return drawn

    def shuffled(self, count: int) -> list[int]:
        """Return the integers below ``count`` in random order."""
        remaining = list(range(count))
        return [remaining.pop(self.below(len(remaining))) for _ in range(count)]


_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz")


def rows_of(source: str | None, split: str, key: str) -> list[Row]:
    """Read the rows of a file, or of a split of a dataset.

    A dataset is a folder that the library datasets can load, or ``owner/name`` on the hub. ``:config`` may follow, and
    then ``:split``, which is read instead of ``split``.
    """
    if source is None:
        return []
    if "://" in source:
        raise InputError(
            f"{key} {shown(source)} is a web address; download the file and give its path, or name a data set of the "
            "hub, as in owner/name"
        )
    name, config, other = (*source.split(":"), "", "")[:3]
    if Path(name).expanduser().is_dir():
        return hub_rows(str(Path(name).expanduser()), config or None, other or split, key)
    is_file = Path(source).suffix.lower() in _FILES or name.count("/") != 1
    if is_file or Path(source).expanduser().exists():
        return read_rows(source, key)
    return hub_rows(name, config or None, other or split, key)


def final_split(task: Task) -> Split:
    """Return the split on which trained models are tested: dev, if the task's own data has no test rows, else test."""
    own = isinstance(task, GeneratedTask | DatasetTask) and task.data is not None and task.data_test is None
    return "dev" if own else "test"


def about_dev(task: Task) -> str | None:
    """Say how many rows are held out, if the task chose that because the data has few; otherwise None."""
    if not isinstance(task, DatasetTask) or task.size_dev is not None:
        return None
    splits = task.splits()
    if not splits.rows or splits.size_dev >= task.usual_dev:
        return None
    return (
        f"task.size_dev is not set: {splits.size_dev} of the {splits.rows} rows of task.data are the dev split, "
        f"{len(splits['train'])} are left to train on"
    )


def about_tests(task: Task) -> str | None:
    """Say that models are tested on the dev split, if they are; otherwise None."""
    if final_split(task) == "test":
        return None
    return (
        "task.data_test is not set, so models are tested on the dev split, by which the best weights are chosen; set "
        "it for figures to report"
    )


def rows_left_out(task: Task) -> tuple[dict[str, int], str | None]:
    """Count the rows of ``task.data`` that were left out because another split holds the same problem.

    Returns:
        The counts by metric name, empty if the task reads no training file; and a sentence about them, None if there is
        nothing to report.
    """
    splits = task.splits() if isinstance(task, GeneratedTask | DatasetTask) else None
    if splits is None or not splits.rows:
        return {}, None
    counts = {"data/in_test": splits.in_test, "data/in_dev": splits.in_dev}
    reasons = " and ".join(f"{count} occur in the {name[8:]} split too" for name, count in counts.items() if count)
    return counts, f"of the {splits.rows} rows of task.data, {reasons}; training leaves them out" if reasons else None
