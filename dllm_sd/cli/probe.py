"""``dllm-sd probe``: measures what a method has to teach its student, and says so in words."""

import argparse
import json
from pathlib import Path

from dllm_sd.cli.run_or_model import quiet_libraries, warn
from dllm_sd.cli.used_keys import refuse_unused
from dllm_sd.config import load_config, to_tree
from dllm_sd.errors import InputError, shown
from dllm_sd.files.writing import writable, write_file
from dllm_sd.probing.opening import opened
from dllm_sd.reports.probe_page import print_probe
from dllm_sd.training.peers import first_student


def run(options: argparse.Namespace) -> int:
    """Probe a config on held-out problems."""
    quiet_libraries()
    number = [] if options.problems is None else [f"eval.probe_problems={options.problems}"]
    config = load_config(options.config, [*options.overrides, *number])
    refuse_unused("probe", options.overrides)
    if config.eval.thinking not in (None, config.model.thinking):
        warn(
            f"eval.thinking is {config.eval.thinking}, but a probe reads the prompts of training, in which "
            f"model.thinking is {config.model.thinking}; its accuracies may differ from those of an evaluation"
        )
    if config.peers is not None:
        warn(f"of two peers the first, {config.peers.students[0].name}, is probed, without the other's feedback")
        config = first_student(config)
    if config.decode.engine.remote:
        warn("decode.engine is for rollouts and evaluations in training; this probe decodes on this machine")
    out = None if options.out is None else Path(options.out)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out {shown(str(out))} is a folder, or in none; name a file in a folder that exists")
    with opened(config) as (probe, problems):
        tree = {"config": options.config, **probe(problems).tree(), "settings": to_tree(config)}
    if out is not None:
        with writable(repr(str(out)), "give another --out"):
            write_file(out, json.dumps(tree, indent=1))
    if options.json:
        print(json.dumps(tree, indent=1))
    else:
        print_probe(options.config, tree)
    return 0
