"""``dllm-sd sample``: shows the decoding of a prompt step by step."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm_sd.cli.run_or_model import load, quiet_libraries, warn_unknown_text
from dllm_sd.randomness import make_key


def run(options: argparse.Namespace) -> int:
    """Decode one prompt and show the canvas after each step."""
    quiet_libraries()
    config, policy, _ = load(options.model, options.overrides, options.task)
    console = Console()
    frames: list[list[int]] = []
    settings = replace(config.held_out(), temperature=config.eval.temperature)
    messages = [{"role": "user", "content": options.prompt}]
    prompt = policy.encode(messages, config.eval.thinking)
    warn_unknown_text(policy, [messages], "the prompt")
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


def _frame(policy: Any, frames: Sequence[Sequence[int]]) -> Any:
    """Render the last canvas: masks as dots, tokens committed since the previous canvas in colour."""
    current, previous = frames[-1], frames[-2] if len(frames) > 1 else frames[-1]
    text = Text()
    for token, previous_token in zip(current, previous, strict=True):
        if token == policy.mask_id:
            text.append("\u00b7", style="dim")
        else:
            text.append(policy.text([token]) or "\u25a1", style="bold green" if token != previous_token else "")
    return text
