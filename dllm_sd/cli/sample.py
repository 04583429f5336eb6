"""``dllm-sd sample``: watch a prompt being decoded."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm_sd.cli.run_or_model import load, quiet_libraries, say_lost
from dllm_sd.randomness import make_key


def run(options: argparse.Namespace) -> int:
    """Decode one prompt, and show every canvas of it."""
    quiet_libraries()
    config, policy, _ = load(options.model, options.overrides, options.task)
    console = Console()
    frames: list[list[int]] = []
    settings = replace(config.held_out(), temperature=config.eval.temperature)
    asked = [{"role": "user", "content": options.prompt}]
    prompt = policy.encode(asked, config.eval.thinking)
    say_lost(policy, [asked], "the prompt")
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
    """The last canvas: masks as dots, tokens committed since the one before it in colour."""
    last, before = frames[-1], frames[-2] if len(frames) > 1 else frames[-1]
    text = Text()
    for now, then in zip(last, before, strict=True):
        if now == policy.mask_id:
            text.append("\u00b7", style="dim")
        else:
            text.append(policy.text([now]) or "\u25a1", style="bold green" if now != then else "")
    return text
