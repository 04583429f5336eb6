"""``dllm-sd show``: prints the resolved config, its method, the memory estimate and a prompt."""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dllm_sd.cli.run_or_model import quiet_libraries, warn
from dllm_sd.config import load_config, to_tree, to_yaml
from dllm_sd.errors import InputError
from dllm_sd.evaluation.evaluate import first
from dllm_sd.methods import METHODS
from dllm_sd.methods.differences import named_differences
from dllm_sd.pairing import check_model_offline, other_blueprints
from dllm_sd.policies.loading import empty_network
from dllm_sd.reports.memory import estimate
from dllm_sd.reports.method_page import measured, measured_line
from dllm_sd.reports.tables import describe_part, memory_table


def run(options: argparse.Namespace) -> int:
    """Print the config, the method, the memory estimate and a prompt of a run."""
    quiet_libraries()
    config = load_config(options.config, options.overrides, warn)
    console = Console()
    console.print(to_yaml(config), highlight=False, markup=False)
    method = Table(title="method")
    method.add_column("slot")
    method.add_column("part")
    for slot, part in to_tree(config.method).items():
        if slot == "name":
            continue
        parts = part if isinstance(part, list) else [part]
        method.add_row(slot, "\n".join(describe_part(item) for item in parts) or "none")
    console.print(method)
    _print_source(console, config.method)
    blueprint, absent = check_model_offline(config)
    if absent is not None:
        console.print(f"not checked; memory is estimated from the known shape: {absent}", highlight=False, markup=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blueprints = other_blueprints(config)
    others = {weights: empty_network(other) for weights, other in blueprints.items() if other is not None}
    launch: dict[str, Any] = {"processes": options.processes, "sharded": options.sharded, "device": device}
    console.print(memory_table(estimate(empty_network(blueprint), config, **launch, others=others)))
    if missing := [weights.source for weights in blueprints if weights not in others]:
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


def _print_source(console: Console, method: Any) -> None:
    """Print the named method that a method equals or is closest to: what differs, source, note and measurements."""
    named = named_differences(method)
    name = named.name
    console.print(named.sentence, style="bold", highlight=False, markup=False)
    console.print(f"{name}: {METHODS[name].source}", highlight=False, markup=False)
    console.print(METHODS[name].note, highlight=False, markup=False)
    if records := measured(name):
        console.print(
            "measured on 4x4 Sudoku with the shipped tiny models, at one learning rate for all methods; this predicts "
            "nothing about other models:",
            highlight=False,
            markup=False,
        )
    for record in records:
        console.print(f"- {measured_line(record)}", highlight=False, markup=False)
