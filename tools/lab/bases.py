"""The models on which claims are tested; those that do not ship are trained once and kept in a folder."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import dllm_sd
from dllm_sd.config import load_config
from dllm_sd.errors import InputError
from dllm_sd.export.exporting import export_policy
from dllm_sd.files.writing import write_file
from dllm_sd.policies.loading import build_policy
from dllm_sd.training.checkpoint import latest_checkpoint, load_weights
from tools.lab.claims import Base
from tools.lab.data import MAKERS

QUIET = ["log.progress=false", "log.trackers=[]", "eval.schedules={}", "eval.final_problems=0", "checkpoint.every=50"]

RECIPE = "lab_recipe.txt"
"""The file of a base that says how it was made, and from which data."""
SOURCES = [Path(__file__).with_name(f"{name}.py") for name in ("data", "draws", "makers", "operators")]
"""The files that make data."""


def base_path(name: str, bases: Mapping[str, Base]) -> str:
    """What `model.path` is for a base; ``LAB`` stands for the laboratory's folder."""
    return bases[name].path or f"LAB/bases/{name}"


def digest(name: str, bases: Mapping[str, Base]) -> str:
    """A short digest of the recipe of a base and of those that it needs."""
    base = bases[name]
    recipes = [repr(base), *(digest(needed, bases) for needed in base.needs)]
    return hashlib.sha256("".join(recipes).encode()).hexdigest()[:12]


def make_base(name: str, bases: Mapping[str, Base], folder: Path) -> None:
    """Make a base that does not ship, and those that it needs, unless it is there.

    Raises:
        InputError: if there is no such base, or one of another recipe lies in its place.
    """
    if name not in bases:
        raise InputError(f"there is no base {name!r}; bases are {', '.join(bases)}")
    base, target = bases[name], folder / "bases" / name
    if base.path is not None:
        if base.path.startswith("LAB/") and not (made := folder / base.path.removeprefix("LAB/")).is_dir():
            raise InputError(f"the base {name} is not in {str(made)!r}; make it ({base.about})")
        return
    recipe = repr(base) if base.data is None else f"{base!r}\n{contents(make_data(base.data, folder))}"
    if target.is_dir():
        if (target / RECIPE).read_text(encoding="utf-8") != recipe:
            raise InputError(
                f"the base {name} in {str(target)!r} was made by another recipe or from other data; remove that folder"
            )
        return
    for needed in base.needs:
        make_base(needed, bases, folder)
    assert base.config is not None, f"the base {name} has neither a path nor a config"
    run = folder / "bases" / f".{name}_run"
    overrides = [text.replace("LAB/", f"{folder}/") for text in base.set]
    config = load_config(base.config, [*overrides, *QUIET, f"run={run}"])
    dllm_sd.train(config)
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None, f"{run} has no checkpoint"
    policy = build_policy(config.model)
    load_weights(policy, checkpoint)
    export_policy(policy, config.model, "merged", target)
    write_file(target / RECIPE, recipe)
    print(f"base {name} is made: {target}", flush=True)


def make_data(name: str, folder: Path) -> Path:
    """Make training data, unless it is there as today's code makes it; the folder that holds it."""
    data, done = folder / "data" / name, folder / "data" / name / ".done"
    made_by = hashlib.sha256(b"".join(file.read_bytes() for file in SOURCES)).hexdigest()
    if not done.is_file() or done.read_text(encoding="utf-8") != made_by:
        data.mkdir(parents=True, exist_ok=True)
        MAKERS[name](data)
        write_file(done, made_by)
    return data


def contents(data: Path) -> str:
    """A digest of the files of a folder of training data."""
    files = sorted(file for file in data.rglob("*") if file.is_file() and file.name != ".done")
    told = b"".join(str(file.relative_to(data)).encode() + file.read_bytes() for file in files)
    return hashlib.sha256(told).hexdigest()
