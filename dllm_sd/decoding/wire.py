"""Requests for decodings as JSON, between a server that decodes and its clients."""

from collections.abc import Sequence
from typing import Any

from dllm_sd.decoding.settings import Decoding
from dllm_sd.files.typed_json import build
from dllm_sd.trajectory import StopAfter
from dllm_sd.trajectory_json import LATEST_STEP, generate_body

SETTINGS = (
    *("length", "block_length", "tokens_per_step", "steps", "temperature", "top_k", "top_p", "order", "threshold"),
    *("guidance", "early_end", "suppress"),
)
"""The keys of `decode` that decide what is decoded, and so are a client's to choose; the others are the server's."""


def settings_to_json(settings: Decoding) -> dict[str, Any]:
    """Return the keys of `decode` that decide what is decoded."""
    tree = {name: getattr(settings, name) for name in SETTINGS}
    return {**tree, "suppress": list(settings.suppress)}


def stop_after_to_json(stop_after: StopAfter | None) -> dict[str, Any] | None:
    """Return how far a completion is decoded, None for its end."""
    return None if stop_after is None else {"unit": stop_after.unit, "count": stop_after.count}


def stop_after_from_json(tree: Any) -> StopAfter | None:
    """Return what `stop_after_to_json` wrote.

    Raises:
        ValueError: saying what is wrong.
    """
    if tree is None:
        return None
    if not isinstance(tree, dict) or tree.keys() != {"unit", "count"}:
        raise ValueError(f"stop_after must be null or an object of unit and count, not {tree!r:.60}")
    if tree["unit"] not in ("blocks", "steps"):
        raise ValueError(f"stop_after.unit must be blocks or steps, not {tree['unit']!r:.60}")
    count = build(int, tree["count"], "stop_after.count")
    if not 1 <= count <= LATEST_STEP:
        raise ValueError(f"stop_after.count must be from 1 to {LATEST_STEP}, not {count}")
    return StopAfter(tree["unit"], count)


def request_to_json(
    prompt: Sequence[int], key: int, settings: Decoding, stop_after: StopAfter | None, model: str | None = None
) -> dict[str, Any]:
    """Return the body of ``POST /generate`` (`generate_body`)."""
    return generate_body(prompt, key, settings_to_json(settings), stop_after_to_json(stop_after), model)
