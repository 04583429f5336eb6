"""Warnings about a run: that it learnt nothing, or that weights or writers which it uses may not be the wanted ones."""

from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Literal

from dllm_sd.config import Config, build_config, to_tree
from dllm_sd.evaluation.estimates import in_percent
from dllm_sd.files.checkpoint_files import CHECKPOINTS
from dllm_sd.training.checkpoint import State, latest_checkpoint, state_of
from dllm_sd.training.folder import CONFIG, read_run_config
from dllm_sd.training.left_out import in_words
from dllm_sd.training.log_files import WATCHED, LogSums
from dllm_sd.training.selection import COLLAPSED

Outcome = Literal["learnt", "nothing learnt", "collapsed"]
DISPERSED = (1.5, 0.2)
"""How many times its former value, and how many nats above it, the student's entropy must rise while the loss falls
before that is a warning."""
MUCH = 0.1
"""How far below the best dev accuracy the last one may be before that is a warning."""


def outcome_of(state: State, unchanged: bool) -> Outcome:
    """How a run ended; all but the first make ``dllm-sd train`` exit with a status of its own.

    Args:
        state: the state of the run at its end.
        unchanged: whether no optimizer step changed any weight.
    """
    if state.update and (unchanged or state.skipped == state.update):
        return "nothing learnt"
    return "collapsed" if (state.stopped or "").startswith(COLLAPSED) else "learnt"


def warnings_of(state: State, sums: LogSums) -> list[str]:
    """Warn about a run that learnt nothing or collapsed, or whose best weights are its initial ones.

    Args:
        state: the state of the run at its end.
        sums: what its metrics say.
    """
    outcome = outcome_of(state, sums.unchanged)
    if outcome == "nothing learnt" and state.skipped == state.update:
        reasons = ", ".join(in_words(sums.left_out)) or "nothing was left out"
        return [f"nothing was learnt: all {state.update} updates were skipped ({reasons}){_remedy(sums.left_out)}"]
    if outcome == "nothing learnt":
        return [
            f"nothing was learnt: none of {state.update} updates changed a weight; the steps were lost in rounding, or "
            "the gradients were zero: raise optim.lr, or set model.dtype to float32 with optim.autocast bfloat16"
        ]
    found: list[str] = []
    fell = sums.last_accuracy is not None and sums.last_accuracy < state.best_accuracy - MUCH
    if outcome == "collapsed" or (fell and state.best_update > 0):
        found.append(_collapse(state, sums))
    if outcome != "nothing learnt" and (sentence := _parted(sums)) is not None:
        found.append(sentence)
    if state.update and state.best_accuracy >= 0 and state.best_update == 0:
        found.append(initial_are_best(state.update))
    if state.update and state.best_accuracy == 0 and sums.last_accuracy == 0:
        found.append(
            "no answer was right in any evaluation on the dev split, so accuracy cannot tell weights apart: read the "
            "generations of dllm-sd eval, check task.grader, task.prompt and decode.length, train longer, or take "
            "easier problems"
        )
    return found


def _remedy(left_out: Mapping[str, int]) -> str:
    """What to do if these rollouts were left out and none was kept; empty where the counts say it themselves."""
    if left_out.get("rollouts/grader_failed"):
        return ""
    easier = "take easier problems, raise method.rollout.attempts, or begin with method=sft"
    if left_out.get("rollouts/rejected"):
        return f": {easier}"
    if left_out.get("rollouts/no_hint"):
        return f": see what the hints of method.contexts need; if it is a successful attempt, {easier}"
    return ""


def _collapse(state: State, sums: LogSums) -> str:
    """The warning of a run whose last weights are much worse than its best ones."""
    best = f"eval, sample and export use the best weights, of update {state.best_update}"
    if state.stopped and state.stopped.startswith(COLLAPSED):
        return f"the run collapsed at update {state.update}: {state.stopped}; {best}"
    last, highest = in_percent(sums.last_accuracy or 0.0), in_percent(state.best_accuracy)
    return f"the last weights are much worse than the best ones on the dev split, {last} against {highest}; {best}"


def _parted(sums: LogSums) -> str | None:
    """The warning that the loss fell while the student became less certain, and no better on the dev split."""
    loss, entropy, accuracy = (sums.courses.get(name) for name in WATCHED)
    if loss is None or entropy is None or loss.last >= loss.first:
        return None
    is_decided = entropy.last <= max(DISPERSED[0] * entropy.first, entropy.first + DISPERSED[1])
    if is_decided or (accuracy is not None and accuracy.last >= accuracy.first):
        return None
    fell = (
        ""
        if accuracy is None
        else f" and dev accuracy from {in_percent(accuracy.first)} to {in_percent(accuracy.last)}"
    )
    return (
        f"loss and entropy diverge: the loss fell from {loss.first:.3g} to {loss.last:.3g}{fell}, while the "
        f"student's entropy rose from {entropy.first:.2f} to {entropy.last:.2f} nats; it becomes less certain: "
        "lower optim.lr, use another method.divergence or no clip, or check by dllm-sd probe whether the teacher uses "
        "its hint"
    )


def initial_are_best(update: int) -> str:
    """The warning that the best weights of a run are the initial ones; ``update`` is its number of updates."""
    return (
        f"the best weights on the dev split are the initial ones: no evaluation up to update {update} was as good; "
        "eval, sample and export use these, and export --weights last uses the last"
    )


def initial_of(folder: Path) -> str | None:
    """The warning of `initial_are_best` if ``folder`` holds the best weights of a run and they are the initial ones."""
    if folder.parent.name != CHECKPOINTS or not folder.name.lstrip(".").startswith("best"):
        return None
    latest = latest_checkpoint(folder.parent.parent)
    if latest is None or int(latest.name) == 0 or state_of(folder).update > 0:
        return None
    return f"{folder}: {initial_are_best(int(latest.name))}"


def about_device(config: Config, device: str) -> list[str]:
    """Warn about choices that make a run slow on its ``device``, such as ``cpu``."""
    if device != "cpu":
        return []
    choices = {"optim.autocast": ("null", config.optim.autocast), "model.dtype": ("float32", config.model.dtype)}
    return [
        f"{key} {value} is several times as slow as float32 on most CPUs; set {key}={instead} to be faster"
        for key, (instead, value) in choices.items()
        if value in ("bfloat16", "float16")
    ]


def about_sources(config: Config) -> list[str]:
    """Warn about what a run takes from other runs: initial weights, and writers that were trained on another prompt."""
    return [*_initial_sources(config), *prompt_differences(config)]


def prompt_differences(config: Config) -> list[str]:
    """Warn about rubric writers that another run trained (Stage I of RCSD) with another prompt than is used here."""
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
        learnt = build_config({**read_run_config(run), "plugins": []})  # another run's code is not run
        if learnt.task.rubric_prompt is not None:
            thinking = writing.sampling.thinking
            thinking = config.model.thinking if thinking is None else thinking
            sentences += _differences(run, learnt, prompt, thinking, f"method.contexts.{place}")
    return sentences


def _differences(run: Path, learnt: Config, prompt: str, thinking: bool | None, key: str) -> list[str]:
    """How the prompt and the thinking mode of a writer differ from those that its run ``learnt`` trained it on."""
    system = to_tree(learnt)["task"].get("system")
    has_changed = {
        ("task.prompt", f"{key}.prompt", "prompt"): _pieces(learnt.task.rubric_prompt or "") != _pieces(prompt),
        ("task.system", f"{key}, whose writer gets none", "system text"): system is not None,
        ("model.thinking", f"{key}.writing.sampling.thinking", "thinking"): learnt.model.thinking != thinking,
    }
    return [
        f"the writer of {run} was trained with another {what} ({theirs} there) than this run gives it "
        f"({ours}); set both to the same value"
        for (theirs, ours, what), changed in has_changed.items()
        if changed
    ]


def _pieces(template: str) -> list[tuple[str, bool]]:
    """The text of a template without the names of its fields, which differ between the two stages."""
    return [(literal, name is not None) for literal, name, *_ in Formatter().parse(template)]


def _initial_sources(config: Config) -> list[str]:
    """Warn where a run starts from, or is taught by, best weights of another run that are its initial ones."""
    start = config.model.lora.start if config.model.lora else None
    paths = [start, *(weights.source for weights in config.method.models() if weights.of_another_run)]
    return [sentence for path in dict.fromkeys(filter(None, paths)) if (sentence := initial_of(Path(path)))]
