"""``dllm-sd eval``: the accuracy of a run or a model on a task."""

import argparse
import re
from pathlib import Path

from accelerate import Accelerator, PartialState
from rich.console import Console

from dllm_sd.cli import compare
from dllm_sd.cli.run_or_model import is_run, load, quiet_libraries, warn, warn_unknown_text
from dllm_sd.config import to_tree
from dllm_sd.errors import InputError, shown
from dllm_sd.evaluation.evaluate import about_counts, evaluate_into, test_problems
from dllm_sd.evaluation.recording import recorded_model
from dllm_sd.pairing import PROMPTS_CHECKED
from dllm_sd.reports.tables import print_evaluation
from dllm_sd.tasks.sources import about_tests


def evaluation_folder(model: str, adapter: str | None, task: str) -> Path:
    """The folder of an evaluation: in the run folder of a run, else one of the model's name in the current folder."""
    if is_run(model):
        return Path(model, "eval", task)
    names = [re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model" for name in (model, adapter) if name is not None]
    return Path("eval", "+".join(names), task)


def refuse_other_model(folder: Path, model: str) -> None:
    """Refuse a folder that holds the evaluation of another model than ``model``.

    Raises:
        InputError: naming both.
    """
    evaluated = recorded_model(folder)
    if evaluated is not None and evaluated != model and Path(evaluated).resolve() != Path(model).resolve():
        raise InputError(
            f"{str(folder)!r} holds the evaluation of {shown(evaluated)}; give {shown(model)} another --out"
        )


def run(options: argparse.Namespace) -> int:
    """Evaluate, or compare two evaluations."""
    if options.compare is not None:
        return compare.run(options)
    quiet_libraries()
    if options.model is None:
        raise InputError("eval needs a RUN_OR_MODEL, or --compare A B with two finished evaluations")
    given = {"eval.attempts": options.attempts, "eval.final_problems": options.problems}
    overrides = [*options.overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    config, policy, weights = load(
        "eval", options.model, overrides, options.task, options.adapter, refuse=test_problems
    )
    tree = to_tree(config)
    task = tree["task"]["name"]
    out = Path(options.out or evaluation_folder(options.model, options.adapter, task))
    if not is_run(options.model):
        refuse_other_model(out, options.model)
    settings = {key: tree[key] for key in ("model", "task", "decode", "eval", "optim", "seed", "max_prompt")}
    if PartialState().is_main_process:
        if sentence := about_tests(config.task):
            warn(sentence)
        for sentence in about_counts(config.eval, [], test_problems(config)):
            warn(sentence)
        if config.decode.engine.remote:
            warn("decode.engine is for rollouts and evaluations in training; this evaluation decodes on this machine")
        warn_unknown_text(policy, map(config.task.messages, test_problems(config)[:PROMPTS_CHECKED]), "the prompts")
    with Accelerator().autocast():
        report = evaluate_into(out, policy, config, {**settings, "evaluated": options.model, "weights": weights})
    if PartialState().is_main_process:
        print_evaluation(f"{options.model} on {task}", report)
        Console().print(f"written to {out}: report.json, generations.jsonl")
    return 0
