"""Where configs are found: files, those that come with the program, run folders; and their plain trees."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError, shown
from dllm_sd.files.plain_yaml import read_yaml
from dllm_sd.files.writing import names_file
from dllm_sd.keys import hint
from dllm_sd.overrides import apply_overrides
from dllm_sd.plugins import with_plugins

RUN_CONFIG = "config.yaml"
"""The resolved config in a run folder."""
RECIPE = "recipe.yaml"
"""The config beside a model."""


@cache
def shipped_configs() -> dict[str, Path]:
    """Configs that come with the program, by name."""
    package = Path(__file__).resolve().parent
    folders = [package / "configs", package.parent / "configs"]  # installed, or a source checkout
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def maker_of(path: str) -> str | None:
    """The command that makes an adapter in the run folder of a shipped config, ``runs/NAME``; None elsewhere."""
    parts = Path(path).parts
    if len(parts) < 2 or parts[0] != "runs" or parts[1] not in shipped_configs():
        return None
    return f"dllm-sd train {parts[1]}" if read_config(parts[1])["model"].get("lora") else None


def find_config(name: str) -> Path:
    """The path of a config: a file, the config of a run folder, or a shipped config.

    Raises:
        InputError: if there is none, with the configs that there are.
    """
    if names_file(name):
        return Path(name)
    if (shipped := shipped_configs().get(name)) is not None:
        return shipped
    if Path(name).is_dir():
        if names_file(str(Path(name) / RUN_CONFIG)):
            return Path(name) / RUN_CONFIG
        raise InputError(
            f"folder {shown(name)} holds no run ({RUN_CONFIG} is missing); give a config, or a run's folder"
        )
    if "/" in name or Path(name).suffix in (".yaml", ".yml", ".json"):
        raise InputError(
            f"there is no config file and no run {shown(name)}; correct the path, or give the name of a shipped config "
            "(dllm-sd list configs)"
        )
    raise InputError(f"there is no config file {shown(name)}; {hint(name, shipped_configs(), 'shipped configs:')}")


def stored_config(name: str) -> dict[str, Any]:
    """The plain config of a run, or of the recipe beside a model (also a shipped one); empty where there is neither.

    Raises:
        InputError: naming the file, if it cannot be read.
    """
    asset = Path(__file__).with_name("assets") / name
    files = (Path(name) / RUN_CONFIG, Path(name) / RECIPE, *(() if Path(name).exists() else (asset / RECIPE,)))
    file = next((file for file in files if names_file(str(file))), None)
    tree = None if file is None else read_yaml(file, shown(str(file)), "give another folder")
    return tree if isinstance(tree, dict) else {}


def read_config(
    name: str, overrides: Sequence[str] = (), say: Callable[[str], object] = lambda sentence: None
) -> dict[str, Any]:
    """The plain tree of a config with overrides applied. A run's folder stands for its config, and stays its `run`.

    The ``resume`` of a run's config was of its former start alone, so it is ``auto`` again. ``say`` is that of
    `apply_overrides`.

    Raises:
        InputError: naming the file or the override, and the remedy.
    """
    path = find_config(name)
    tree = read_yaml(path, f"config {shown(str(path))}")
    if not isinstance(tree, dict):
        raise InputError(f"config {shown(str(path))} must hold keys such as model, task and method")
    is_run = Path(name).is_dir()
    run = {"run": name, "resume": "auto"} if is_run else {}
    tree = {"run": f"runs/{path.stem}", **tree, **run}
    tree = with_plugins(tree, (Path(),), not_in=Path(name)) if is_run else with_plugins(tree, (path.parent, Path()))
    return apply_overrides(tree, overrides, say)
