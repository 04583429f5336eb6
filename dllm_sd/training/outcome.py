"""What a finished run has to say about itself that its figures do not: in the report, and on stderr at the end."""

from collections.abc import Mapping
from pathlib import Path
from string import Formatter

from dllm_sd.config import Config, build_config, to_tree
from dllm_sd.files.checkpoint_files import CHECKPOINTS
from dllm_sd.training.checkpoint import State, latest_checkpoint, state_of
from dllm_sd.training.folder import CONFIG, read_run_config
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
    sentences: list[str] = []
    for place, context in enumerate(config.method.contexts):
        writing = context.hint.writing if context.hint is not None else None
        prompt = context.hint.writer_prompt if context.hint is not None else None
        source = writing.writer.weights.source if writing is not None and writing.writer.weights is not None else None
        if writing is None or prompt is None or source is None:
            continue
        run = Path(source).parent.parent
        if Path(source).parent.name != CHECKPOINTS or not (run / CONFIG).is_file():
            continue
        learnt = build_config(read_run_config(run))
        if learnt.task.rubric_prompt is not None:
            thinking = writing.sampling.thinking
            thinking = config.model.thinking if thinking is None else thinking
            sentences += _differences(run, learnt, prompt, thinking, f"method.contexts.{place}")
    return sentences


def _differences(run: Path, learnt: Config, prompt: str, thinking: bool | None, key: str) -> list[str]:
    """How a writer is asked, by ``prompt`` and with or without thinking, that its run did not train it on."""
    system = to_tree(learnt)["task"].get("system")
    differs = {
        ("task.prompt", f"{key}.prompt", "prompt"): _words(learnt.task.rubric_prompt or "") != _words(prompt),
        ("task.system", f"{key}, whose writer gets none", "system text"): system is not None,
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
    paths = [start, *(one.source for one in config.method.models() if one.of_another_run)]
    return [sentence for path in dict.fromkeys(filter(None, paths)) if (sentence := initial_of(Path(path)))]
