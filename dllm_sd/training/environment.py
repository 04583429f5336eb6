"""What a run is made with: versions, commit, hardware, date; a line of environment.jsonl for each start."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("dllm-sd", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")
_SOURCE = Path(__file__).resolve().parent


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """The environment of this process, as JSON.

    Args:
        device: the device of the model.
        processes: the number of processes of the run.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **_program(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


@cache
def _program() -> dict[str, Any]:
    """Versions and commit of what this process runs, as they are when its first run starts."""
    installed = {dist.metadata["Name"]: dist.version for dist in map(_distribution, PACKAGES) if dist is not None}
    versions = {"python": platform.python_version(), **installed, "cuda": torch.version.cuda}
    return {"versions": versions, "commit": commit(_SOURCE)}


def commit(source: Path) -> str | None:
    """The commit of the checkout that holds the folder ``source``, with ``-dirty`` if files differ from it.

    None without git, and where the folder's files are not those of a repository, such as in an environment that
    happens to be inside one.
    """
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "--no-optional-locks", "-C", str(source)]
    tracked = subprocess.run([*command, "ls-files", "--error-unmatch", "--", "."], capture_output=True)
    if tracked.returncode:
        return None
    described = subprocess.run(
        [*command, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True
    )
    return described.stdout.strip() or None


def _distribution(name: str) -> metadata.Distribution | None:
    return next(iter(metadata.distributions(name=name)), None)


def _processor() -> str:
    """The name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
