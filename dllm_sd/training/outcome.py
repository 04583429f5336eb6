"""What a finished run has to say about itself that its figures do not: in the report, and on stderr at the end."""

from collections.abc import Mapping
from pathlib import Path
from string import Formatter

from dllm_sd.config import Config, build_config
from dllm_sd.files.checkpoint_files import CHECKPOINTS
from dllm_sd.policies.weights import Checkpoint, Peer
from dllm_sd.tasks import Jsonl
from dllm_sd.teachers import Rubric
from dllm_sd.training.checkpoint import State, latest_checkpoint, state_of
from dllm_sd.training.folder import CONFIG, read_tree
from dllm_sd.training.left_out import in_words


def warnings_of(state: State, left_out: Mapping[str, int], unchanged: bool) -> list[str]:
    """Sentences on a run that learnt nothing, or whose best weights are those that it began with.

    Args:
        state: of the run at its end.
        left_out: how much was left out, by name.
        unchanged: whether no step of the run changed any weight.
    """
    if state.update == 0:
        return []
    if state.skipped == state.update:
        reasons = ", ".join(in_words(left_out)) or "nothing was left out"
        return [f"nothing was learnt: all {state.update} updates were skipped ({reasons})"]
    if unchanged:
        return [
            f"nothing was learnt: none of {state.update} updates changed a weight; the steps were lost in rounding, or "
            "the gradients were zero: raise optim.lr, or set model.dtype to float32 with optim.autocast bfloat16"
        ]
    if state.best_accuracy >= 0 and state.best_update == 0:
        return [initial_are_best(state.update)]
    return []


def initial_are_best(update: int) -> str:
    """A sentence on best weights that are the initial ones, in a run of so many updates."""
    return (
        f"the best weights on the dev split are the initial ones: no evaluation up to update {update} was as good; "
        "eval, sample and export take these, and export --weights last takes the last"
    )


def initial_of(folder: Path) -> str | None:
    """The same sentence if a folder holds the best weights of a run, and these are the ones that it began with."""
    if folder.parent.name != CHECKPOINTS or not folder.name.lstrip(".").startswith("best"):
        return None
    latest = latest_checkpoint(folder.parent.parent)
    if latest is None or int(latest.name) == 0 or state_of(folder).update > 0:
        return None
    return f"{folder}: {initial_are_best(int(latest.name))}"


def about_sources(config: Config) -> list[str]:
    """Sentences on what a run takes from other runs: initial weights, and writers that learnt to answer otherwise."""
    return [*_initial_sources(config), *asked_otherwise(config)]


def asked_otherwise(config: Config) -> list[str]:
    """Sentences on rubric writers that a run trained on (Stage I of RCSD) and that are asked otherwise here."""
    found: list[str] = []
    hints = [context.hint for context in config.method.contexts]
    for place, hint in enumerate(hints):
        writer = hint.writing.writer if isinstance(hint, Rubric) and hint.writing else None
        if not isinstance(hint, Rubric) or not isinstance(writer, Peer | Checkpoint) or writer.path is None:
            continue
        run = Path(writer.path).parent.parent
        if Path(writer.path).parent.name != CHECKPOINTS or not (run / CONFIG).is_file():
            continue
        learnt = build_config(read_tree(run))
        if isinstance(learnt.task, Jsonl) and learnt.task.grader == "rubric":
            found += _asked_otherwise(run, learnt, learnt.task, config, hint, f"method.contexts.{place}")
    return found


def _asked_otherwise(run: Path, learnt: Config, task: Jsonl, config: Config, hint: Rubric, key: str) -> list[str]:
    thinking = hint.writing.sampling.thinking if hint.writing else None
    thinking = config.model.thinking if thinking is None else thinking
    differs = {
        ("task.prompt", f"{key}.prompt", "prompt"): _words(task.prompt_template()) != _words(hint.prompt),
        ("task.system", f"{key}, whose writer gets none", "system text"): task.system is not None,
        ("model.thinking", f"{key}.writing.sampling.thinking", "thinking"): learnt.model.thinking != thinking,
    }
    return [
        f"the writer of {run} learnt to answer with another {what} ({theirs} there) than it is asked with here "
        f"({ours}); set both to the same"
        for (theirs, ours, what), other in differs.items()
        if other
    ]


def _words(template: str) -> list[tuple[str, bool]]:
    """A template without the names of its slots, which are the data's in one stage and the context's in the other."""
    return [(literal, name is not None) for literal, name, *_ in Formatter().parse(template)]


def _initial_sources(config: Config) -> list[str]:
    """Sentences on initial weights that a run takes from another one: to start from, to teach or to write with."""
    start = config.model.lora.start if config.model.lora else None
    paths = [start, *(one.path for one in config.method.models() if isinstance(one, Peer))]
    return [sentence for path in dict.fromkeys(filter(None, paths)) if (sentence := initial_of(Path(path)))]
