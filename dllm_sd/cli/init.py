"""``dllm-sd init``: writes a config for a model and data of the user's own."""

import argparse
import os
import sys
from pathlib import Path

from dllm_sd.cli.run_or_model import quiet_libraries, warn
from dllm_sd.cli.starter import Starter, fitting_method
from dllm_sd.config import build_config
from dllm_sd.errors import InputError, Unavailable, shown
from dllm_sd.files.plain_yaml import parse_yaml
from dllm_sd.files.writing import at_home, write_file
from dllm_sd.keys import hint
from dllm_sd.methods import METHODS
from dllm_sd.pairing import check_data, check_model_offline, check_references, check_tokenizer
from dllm_sd.policies.loading import empty_network
from dllm_sd.pretrained.blueprint import Blueprint, known_blueprint, read_blueprint
from dllm_sd.pretrained.model import Model
from dllm_sd.tasks.columns import find_columns
from dllm_sd.tasks.sources import rows_of


def run(options: argparse.Namespace) -> int:
    """Find out what fits, check it as `train` does, and write the config; a file that is there is never replaced."""
    if options.overrides:
        raise InputError(f"init takes no settings ({shown(options.overrides[0])}); change the config that it writes")
    if options.method is not None:
        _check_method(options.method)
    path = options.model or at_home(_asked("model", "a folder, a hub name, tiny or tiny_ar"), "--model")
    model = Model(path=path, as_=options.as_)
    data = options.data or at_home(_asked("data", "a JSON Lines, CSV or Parquet file, or a hub name"), "--data")
    stem = Path(data.partition(":")[0]).name.split(".")[0] or "own"
    default = f"{stem}.yaml"
    asks = sys.stdin.isatty() and not (options.model and options.data)
    out = Path(options.out or (at_home(_asked("out", "the config to write", default), "--out") if asks else default))
    _check_out(out)
    quiet_libraries()
    rows = rows_of(data, "train", "--data")
    given = {name: getattr(options, name) for name in ("question", "answer", "reference", "grader")}
    columns = find_columns(rows, given)
    blueprint = _blueprint(model)
    weights = sum(parameter.numel() for parameter in empty_network(blueprint).parameters())
    method = options.method or fitting_method(columns, blueprint.causal)
    if asks and options.method is None:
        method = _asked("method", "dllm-sd list methods prints all", method)
        _check_method(method)
    text = Starter(str(out), out.stem, model, data, rows, columns, blueprint, weights, method).text()
    check_trainable(text)
    write_file(out, text)
    print(f"{out} trains {method} on {columns.rows} rows, graded by {columns.grader}; begin with: dllm-sd train {out}")
    hints = [context.hint for context in METHODS[method].method.contexts if context.hint is not None]
    if METHODS[method].method.gate.needs_outcome or any(hint.needs_outcome for hint in hints):
        print(f"{method} needs correct rollouts; dllm-sd probe {out} shows how many the model makes")
    return 0


def _asked(name: str, what: str, default: str | None = None) -> str:
    """What the user types for a flag that is missing."""
    if not sys.stdin.isatty():
        raise InputError(f"--{name} is missing ({what}); give it, or run dllm-sd init at a terminal, where it asks")
    try:
        typed = input(f"{name} ({what}){f' [{default}]' if default else ''}: ").strip()
    except EOFError:
        raise InputError(f"--{name} is missing ({what}); give it") from None
    if not typed and default is None:
        raise InputError(f"--{name} is missing ({what}); give it")
    return typed or str(default)


def _check_method(name: str) -> None:
    """Refuse a name that no method has."""
    if name not in METHODS:
        raise InputError(f"--method {shown(name)} is no method; {hint(name, METHODS, 'there are')}")


def _check_out(out: Path) -> None:
    """Refuse a file that is there, or that cannot be a config."""
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {shown(str(out))} must end in .yaml; give the config another name")
    if not str(out).isprintable():
        raise InputError(f"--out {shown(str(out))} has characters that cannot be printed; give another name")
    if os.path.lexists(out):
        raise InputError(f"{shown(str(out))} is there already, and init replaces nothing; give another name by --out")
    if not out.parent.is_dir():
        raise InputError(f"--out {shown(str(out))} lies in a folder that does not exist; make it first")


def _blueprint(model: Model) -> Blueprint:
    """What the model is; its known shape if its files are not here."""
    try:
        return read_blueprint(model)
    except Unavailable:
        if (known := known_blueprint(model)) is None:
            raise
        return known


def check_trainable(text: str) -> None:
    """Refuse a config that `train` would refuse."""
    config = build_config(parse_yaml(text, "the config"))
    if any(weights.of_another_run or weights.other_model(config.model) for weights in config.method.models()):
        raise InputError(
            f"{config.method.name} needs more than init can write, such as the checkpoint that teaches; choose another "
            "method, or begin with a shipped config (dllm-sd list configs)"
        )
    blueprint, missing = check_model_offline(config)
    problems = config.task.problems("train")
    check_data(config, problems)
    said = [check_references(config, blueprint, problems), *check_tokenizer(config, blueprint, problems).values()]
    for sentence in [missing and f"not checked against the model's files: {missing}", *said]:
        if sentence:
            warn(sentence)
