"""``dllm-sd show``: the resolved config, its method, the memory that it needs, a prompt."""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dllm_sd.cli.run_or_model import quiet_libraries
from dllm_sd.config import load_config, to_tree, to_yaml
from dllm_sd.errors import InputError
from dllm_sd.evaluation.evaluate import first
from dllm_sd.methods import METHODS
from dllm_sd.pairing import check_outline, other_outlines
from dllm_sd.policies.loading import empty_network
from dllm_sd.reports.memory import estimate
from dllm_sd.reports.method_page import closest, measured, measured_line
from dllm_sd.reports.tables import describe_part, memory_table


def run(options: argparse.Namespace) -> int:
    """Print what a run of the config would be."""
    quiet_libraries()
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
    others = {weights: empty_network(other) for weights, other in known.items() if other is not None}
    counted: dict[str, Any] = {"processes": options.processes, "sharded": options.sharded, "device": device}
    console.print(memory_table(estimate(empty_network(blueprint), config, **counted, others=others)))
    if missing := [weights.source for weights in known if weights not in others]:
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
