"""Where the golden numbers of published reference implementations are, and how to read them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def fixture_folder() -> Path:
    """The folder named by ``DLLM_SD_FIXTURES``, by default ``tests/fixtures``."""
    return Path(os.environ.get("DLLM_SD_FIXTURES") or Path(__file__).parents[1] / "fixtures")


def fixture_path(name: str) -> Path:
    """The file ``name`` in ``<folder>/golden/`` or in ``<folder>/`` itself."""
    candidates = [fixture_folder() / "golden" / name, fixture_folder() / name]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no fixture {name}: looked at {', '.join(map(str, candidates))}")


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of the fixture ``name`` (without an ending)."""
    return load_file(fixture_path(f"{name}.safetensors")), json.loads(fixture_path(f"{name}.json").read_text())


def assert_same_loss(ours: Tensor | float, expected: Tensor | float, where: object) -> None:
    """The README's tolerance for values."""
    ours, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, expected))
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-9, msg=lambda text: f"{where}: {text}")


def assert_same_grad(ours: Tensor | None, expected: Tensor, where: object) -> None:
    """The README's tolerance for gradients."""
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-8, msg=lambda text: f"{where}: {text}")


def checkpoints() -> list[Path]:
    """Folders of the reference checkpoints, one per family, in ``<folder>/checkpoints/`` or in ``<folder>/`` itself."""
    for folder in (fixture_folder() / "checkpoints", fixture_folder()):
        if found := sorted(facts.parent for facts in folder.glob("*/fixture.json")):
            return found
    return []
