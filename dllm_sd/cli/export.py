"""``dllm-sd export``: writes the weights of a run in a format of other programs."""

import argparse
from pathlib import Path

from accelerate import PartialState
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from dllm_sd.cli.run_or_model import is_run, load, load_plugins, quiet_libraries
from dllm_sd.errors import InputError
from dllm_sd.export.exporting import check_folder, export_policy, push_folder
from dllm_sd.export.model_card import Trained, read_results
from dllm_sd.training.checkpoint import chosen_checkpoint


def run(options: argparse.Namespace) -> int:
    """Write the weights of a run in the chosen format."""
    quiet_libraries()
    run, folder = Path(options.run), Path(options.folder)
    if not is_run(options.run):
        there = "is not a run" if run.exists() else "does not exist"
        raise InputError(f"{options.run!r} {there}; give the folder that dllm-sd train wrote")
    if PartialState().num_processes > 1:
        raise InputError("export runs on one process; start it without accelerate launch")
    check_folder(folder)
    if options.push:
        try:
            validate_repo_id(options.push)
        except ValueError as error:
            raise InputError(f"--push {options.push!r} is not the name of a repository: {error}") from error
    last = options.weights == "last"
    load_plugins(run, options.overrides)
    read_results(run)  # refuse a damaged report before the weights are read
    config, policy, _ = load("export", options.run, options.overrides, last=last)
    trained = Trained(run, chosen_checkpoint(run, last))
    export_policy(policy, config.model, options.to, folder, trained, options.push)
    Console().print(f"written to {folder}", highlight=False, soft_wrap=True)
    if options.push:
        push_folder(folder, options.push)
        Console().print(f"uploaded to {options.push}", highlight=False, soft_wrap=True)
    return 0
