"""The command line: ``dllm-sd train | eval | grade | sample | show | export``.

Exit status: 0 done; 2 the input was wrong (one sentence on stderr); 130 interrupted after saving; 1 anything else.
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, get_args

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dllm_sd.errors import InputError, Stopped, cut, in_short, on_one_line, shown
from dllm_sd.files.writing import at_home, names_file
from dllm_sd.ranges import Size, check


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {cut(' '.join(unknown))}")
    options.overrides += rest  # key=value pairs that stand behind an option
    disable_progress_bar()
    set_verbosity_error()  # what is wrong with a checkpoint is said once, by an InputError
    _warn_of_lone_process()
    try:
        with _threads_that_fail_quietly():
            return options.command(options)
    except InputError as error:
        return _end(str(error), 2)
    except KeyboardInterrupt:
        return _end("interrupted; the same command goes on from the last saved update", 130)
    except (FloatingPointError, Stopped) as error:
        return _end(str(error), 1)
    except BrokenPipeError:  # whoever read what is printed has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = "" if error.filename is None else f" {str(error.filename)!r:.200}"
        reason = error.strerror or on_one_line(error)[:200] or type(error).__name__
        return _end(
            f"cannot read or write{where}: {reason}; what was saved before is as it was, and the same command goes on "
            "from there once that is put right",
            1,
        )


def _end(sentence: str, status: int) -> int:
    """Say the last sentence, to a terminal that may be gone, and return the exit status."""
    with suppress(OSError):
        print(f"dllm-sd: {sentence}", file=sys.stderr)
    return status


def _warn(sentence: str) -> None:
    """Say on stderr what the figures do not."""
    print(f"dllm-sd: {sentence}", file=sys.stderr)


@contextmanager
def _threads_that_fail_quietly() -> Iterator[None]:
    """Inside, a thread that cannot write prints no traceback: TensorBoard's tells the main thread, which says it."""
    former = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            former(failure)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = former


def leave_together() -> None:
    """End what joined the processes; a process that exits with its threads running is aborted, now and then."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _warn_of_lone_process() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing; so this does."""
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        print(
            "dllm-sd: accelerate launch --cpu started a single process; for several on the CPU use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N",
            file=sys.stderr,
        )


class _Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong with a command."""

    def error(self, message: str) -> NoReturn:
        print(f"dllm-sd: {in_short(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _size(text: str) -> int:
    """A count on the command line."""
    try:
        check(Size, int(text), "it")
    except ValueError as error:
        most = get_args(Size)[1].most
        raise argparse.ArgumentTypeError(f"give a whole number from 1 to {most}, not {shown(text)}") from error
    return int(text)


def _place(text: str) -> str:
    """A path on the command line."""
    try:
        if not text:
            raise InputError("a path is empty; name a file or a folder")
        return at_home(text, "the path")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dllm-sd", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a config (a path or a shipped name); continues a stopped run")
    train.add_argument("config", type=_place)
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("eval", help="accuracy of a run or a model on a task")
    evaluate.add_argument("model", nargs="?", type=_place, metavar="RUN_OR_MODEL")
    evaluate.add_argument(
        "--compare",
        nargs=2,
        type=_place,
        metavar=("A", "B"),
        help="instead: compare two evaluations",
    )
    evaluate.add_argument("--task", help="name of the task; default: the run's own")
    evaluate.add_argument("--adapter", type=_place, metavar="DIR", help="a PEFT adapter to put on the model")
    evaluate.add_argument("--attempts", type=_size, metavar="K", help="attempts at each problem, for pass@k and maj@k")
    evaluate.add_argument(
        "--out", type=_place, help="folder for report.json; default: eval/TASK, in the run folder if it is a run"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.set_defaults(command=_eval)

    grade = commands.add_parser("grade", help="grade generations made elsewhere")
    grade.add_argument(
        "file", type=_place, metavar="FILE", help=".jsonl or .jsonl.gz; a line: generation, the task's fields"
    )
    grade.add_argument("--task", required=True, help="name of the task")
    grade.add_argument("--mode", help="default, or compatible: the verdicts of the published parsers, quirks included")
    grade.add_argument(
        "--out", type=_place, metavar="DIR", help="for report.json and graded.jsonl; default: FILE_graded beside it"
    )
    grade.add_argument("overrides", nargs="*", metavar="task.key=value")
    grade.set_defaults(command=_grade)

    sample = commands.add_parser("sample", help="watch a prompt being denoised")
    sample.add_argument("model", type=_place, metavar="RUN_OR_MODEL")
    sample.add_argument("prompt")
    sample.add_argument("--task", help="name of the task, for a model without a recipe")
    sample.add_argument("overrides", nargs="*", metavar="key=value")
    sample.set_defaults(command=_sample)

    show = commands.add_parser("show", help="the resolved config, its method, the memory it needs, a prompt")
    show.add_argument("config", type=_place)
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.add_argument("--processes", type=_size, default=1, help="processes for the memory estimate")
    show.add_argument("--sharded", action="store_true", help="estimate for FSDP2 instead of DDP")
    show.set_defaults(command=_show)

    export = commands.add_parser(
        "export", help="a run's weights for other programs: adapter, native or original format"
    )
    export.add_argument("run", type=_place, metavar="RUN")
    export.add_argument("--to", required=True, choices=("peft", "merged", "original"))
    export.add_argument("folder", type=_place, metavar="DIR", help="must be empty or not exist")
    export.add_argument("--weights", choices=("best", "last"), default="best", help="default: best on the dev split")
    export.add_argument("--push", metavar="REPO", help="also upload DIR to this repository of the Hugging Face hub")
    export.add_argument("overrides", nargs="*", metavar="key=value")
    export.set_defaults(command=_export)
    return parser


def _train(options: argparse.Namespace) -> int:
    from dllm_sd.config import load_config

    config = load_config(options.config, options.overrides)
    from accelerate import PartialState

    from dllm_sd.reports.tables import print_training
    from dllm_sd.training.peers import train

    for run, report in train(config).items():
        if PartialState().is_main_process:
            print_training(report, run)
            for sentence in report.get("warnings", []):  # reports of former versions have none
                _warn(sentence)
    return 0


def _grade(options: argparse.Namespace) -> int:
    from dllm_sd.cli.offline import grade

    return grade(options)


def _eval(options: argparse.Namespace) -> int:
    if options.compare is not None:
        from dllm_sd.cli.offline import compare

        return compare(options)
    if options.model is None:
        raise InputError("eval needs a RUN_OR_MODEL, or --compare A B with two finished evaluations")
    from accelerate import Accelerator, PartialState

    from dllm_sd.config import to_tree
    from dllm_sd.evaluation.evaluate import evaluate_into, test_problems
    from dllm_sd.pairing import READ
    from dllm_sd.reports.tables import print_evaluation

    attempts = [f"eval.attempts={options.attempts}"] if options.attempts is not None else []
    overrides = [*options.overrides, *attempts]
    config, policy, weights = _load(options.model, overrides, options.task, options.adapter, refuse=test_problems)
    tree = to_tree(config)
    task = tree["task"]["name"]
    out = Path(options.out or Path(options.model if _is_run(options.model) else "") / "eval" / task)
    settings = {key: tree[key] for key in ("model", "task", "decode", "eval", "optim", "seed", "max_prompt")}
    if PartialState().is_main_process:
        _say_lost(policy, map(config.task.messages, test_problems(config)[:READ]), "the prompts")
    with Accelerator().autocast():
        report = evaluate_into(out, policy, config, {**settings, "evaluated": options.model, "weights": weights})
    if PartialState().is_main_process:
        print_evaluation(f"{options.model} on {task}", report)
        Console().print(f"written to {out}: report.json, generations.jsonl")
    return 0


def _load(
    name: str,
    overrides: Sequence[str],
    task: str | None = None,
    adapter: str | None = None,
    last: bool = False,
    refuse: Callable[[Any], object] = lambda config: None,
) -> tuple[Any, Any, str]:
    """Config and policy of a run (its best or last weights) or of a model, in the precision that the run trained in.

    Also says which weights these are. ``refuse`` looks at the config before any weights are read.
    """
    from accelerate import Accelerator

    from dllm_sd.config import apply_overrides, build_config
    from dllm_sd.pairing import check_decodings
    from dllm_sd.policies.loading import build_policy, put_on
    from dllm_sd.pretrained.blueprint import model_folder, read_blueprint
    from dllm_sd.training.checkpoint import chosen_checkpoint, load_weights, state_of
    from dllm_sd.training.folder import read_tree
    from dllm_sd.training.outcome import initial_of

    run, recipe = Path(name), Path(model_folder(name)) / "recipe.yaml"
    if _is_run(name):
        tree = read_tree(run)
    elif recipe.is_file():
        tree = {**read_tree(recipe.parent, recipe.name), "model": {"path": name}}
    elif task is not None:
        tree = {"task": {"name": task}, "model": {"path": name}}
    else:
        raise InputError(f"{name!r} is neither a run nor a model with a recipe; name a task with --task")
    own = tree.get("task")
    if task is not None and task != (own.get("name") if isinstance(own, dict) else own):
        tree["task"] = {"name": task}
    config = build_config(apply_overrides(tree, overrides))
    accelerator = Accelerator(mixed_precision="bf16" if config.optim.autocast else "no")
    blueprint = read_blueprint(config.model)
    check_decodings(config, blueprint)
    refuse(config)
    policy = build_policy(blueprint, accelerator.device)
    weights = name
    if adapter is not None:
        put_on(policy, adapter)
        weights = f"{name} with {adapter}"
    accelerator.prepare_model(policy.module, evaluation_mode=True)
    if _is_run(name):
        folder = chosen_checkpoint(run, last)
        load_weights(policy, folder)
        weights = f"{folder.name}, update {state_of(folder).update}"
        if (sentence := initial_of(folder)) and accelerator.is_main_process:
            _warn(sentence)
    return config, policy, weights


def _is_run(name: str) -> bool:
    return names_file(str(Path(name) / "config.yaml")) and (Path(name) / "checkpoints").is_dir()


def _sample(options: argparse.Namespace) -> int:
    from rich.live import Live
    from rich.text import Text

    from dllm_sd.randomness import make_key

    config, policy, _ = _load(options.model, options.overrides, options.task)
    console = Console()
    frames: list[list[int]] = []
    settings = replace(config.held_out(), temperature=config.eval.temperature)
    asked = [{"role": "user", "content": options.prompt}]
    prompt = policy.encode(asked, config.eval.thinking)
    _say_lost(policy, [asked], "the prompt")
    with Live(console=console, refresh_per_second=30, transient=True) as live:

        def watch(canvas: Any) -> None:
            frames.append(canvas[0].tolist())
            live.update(_frame(policy, frames), refresh=True)

        trajectory = policy.decode([prompt], settings, [make_key(config.seed, "sample")], watch)
    tokens = trajectory.tokens[0, : int(trajectory.length)].tolist()
    for step, frame in enumerate(frames):
        console.print(Text(f"{step:>4} ", style="dim") + _frame(policy, [*frames[max(0, step - 1) : step], frame]))
    console.print(Text(policy.text(tokens), style="bold"))
    return 0


def _say_lost(policy: Any, conversations: Iterable[Sequence[Mapping[str, str]]], what: str) -> None:
    """A line about what the tokenizer does not know of some prompts, if there is anything."""
    if policy.chat is not None and (words := policy.chat.warn_of_lost(map(policy.chat.render, conversations), what)):
        print(words, file=sys.stderr)


def _frame(policy: Any, frames: Sequence[Sequence[int]]) -> Any:
    """The last canvas: masks as dots, tokens committed since the one before it in colour."""
    from rich.text import Text

    last, before = frames[-1], frames[-2] if len(frames) > 1 else frames[-1]
    text = Text()
    for now, then in zip(last, before, strict=True):
        if now == policy.mask_id:
            text.append("\u00b7", style="dim")
        else:
            text.append(policy.text([now]) or "\u25a1", style="bold green" if now != then else "")
    return text


def _show(options: argparse.Namespace) -> int:
    import torch
    from rich.panel import Panel
    from rich.text import Text

    from dllm_sd.config import load_config, to_tree, to_yaml
    from dllm_sd.evaluation.evaluate import first
    from dllm_sd.pairing import check_outline, other_outlines
    from dllm_sd.policies.loading import skeleton
    from dllm_sd.reports.memory import estimate
    from dllm_sd.reports.tables import describe_part, memory_table

    config = load_config(options.config, options.overrides)
    console = Console()
    console.print(to_yaml(config), highlight=False, markup=False)
    method = Table(title="method")
    method.add_column("slot")
    method.add_column("part")
    for slot, part in to_tree(config)["method"].items():
        parts = part if isinstance(part, list) else [part]
        method.add_row(slot, "\n".join(describe_part(item) for item in parts) or "none")
    console.print(method)
    _say_source(console, config.method)
    blueprint, absent = check_outline(config)
    if absent is not None:
        console.print(f"not checked, and memory from the shape that is known: {absent}", highlight=False, markup=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = other_outlines(config)
    others = {weights: skeleton(other) for weights, other in known.items() if other is not None}
    counted: dict[str, Any] = {"processes": options.processes, "sharded": options.sharded, "device": device}
    console.print(memory_table(estimate(skeleton(blueprint), config, **counted, others=others)))
    if missing := [weights.path for weights in known if weights not in others]:
        console.print(f"not counted, since its shape is not known: the checkpoint {missing[0]}", highlight=False)
    try:
        problem = first(config.task.problems("train"), 1) or first(config.task.problems("test"), 1)
    except InputError as error:
        console.print(f"no prompt to show: {error}", highlight=False, markup=False)
        return 0
    if problem and blueprint.chat is not None:
        prompt = blueprint.chat.render(config.task.messages(problem[0]))
        tokens = len(blueprint.chat.encode(config.task.messages(problem[0])))
        console.print(Panel(Text(prompt), title=f"a prompt, {tokens} tokens"))
    return 0


def _say_source(console: Console, method: Any) -> None:
    """Where a method comes from, what to know of it, and what was measured here."""
    from dllm_sd.methods import METHODS
    from dllm_sd.reports.method_page import closest, measured, measured_line

    if (found := closest(method)) is None:
        console.print("these parts make no named method", highlight=False)
        return
    name, exact = found
    console.print(f"{name}{'' if exact else ', with settings of its own'}: {METHODS[name].source}", highlight=False)
    console.print(METHODS[name].note, highlight=False, markup=False)
    if records := measured(name):
        words = (
            "measured on 4x4 Sudoku with the shipped tiny models, at one rate for all methods; no forecast for others:"
        )
        console.print(words, highlight=False, markup=False)
    for record in records:
        console.print(f"- {measured_line(record)}", highlight=False, markup=False)


def _export(options: argparse.Namespace) -> int:
    from accelerate import PartialState
    from huggingface_hub.utils import validate_repo_id

    from dllm_sd.export.exporting import check_folder, export_policy, push_folder
    from dllm_sd.export.model_card import Trained, read_results
    from dllm_sd.training.checkpoint import chosen_checkpoint

    run, folder = Path(options.run), Path(options.folder)
    if not _is_run(options.run):
        raise InputError(f"{options.run!r} is not a run; give the folder that dllm-sd train wrote")
    if PartialState().num_processes > 1:
        raise InputError("export runs on one process; start it without accelerate launch")
    check_folder(folder)
    if options.push:
        try:
            validate_repo_id(options.push)
        except ValueError as error:
            raise InputError(f"--push {options.push!r} is no name of a repository: {error}") from error
    last = options.weights == "last"
    read_results(run)  # a damaged report is refused before the weights are read
    config, policy, _ = _load(options.run, options.overrides, last=last)
    trained = Trained(run, chosen_checkpoint(run, last))
    export_policy(policy, config.model, options.to, folder, trained, options.push)
    Console().print(f"written to {folder}", highlight=False, soft_wrap=True)
    if options.push:
        push_folder(folder, options.push)
        Console().print(f"uploaded to {options.push}", highlight=False, soft_wrap=True)
    return 0
