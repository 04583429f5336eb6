"""What is installed from a wheel is what the source tree holds."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [file for file in (ROOT / "configs").rglob("*") if file.is_file()]
"""Configs and their schema, which are installed as `dllm_sd/configs`."""


def tree() -> set[str]:
    """The files that an installation must hold, by their names in a wheel."""
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dllm_sd").rglob("*") if path.is_file()}
    configs = {f"dllm_sd/{file.relative_to(ROOT).as_posix()}" for file in FILES}
    return {name for name in package | configs if "__pycache__" not in name}


def test_every_folder_of_the_package_is_listed_for_installation() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "dllm_sd").rglob("__init__.py")}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted([*(folder.replace("/", ".") for folder in folders), "dllm_sd.configs"])


@pytest.mark.slow
def test_a_wheel_holds_the_whole_tree_and_nothing_else(tmp_path: Path) -> None:
    """Built in a copy, since setuptools leaves folders behind."""
    copy = tmp_path / "source"
    copy.mkdir()
    for folder in ("dllm_sd", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, str(tmp_path / "dist"), str(copy)], check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "dist").glob("dllm_sd-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == tree()
    assert [name for name in names if name.endswith("/licenses/LICENSE")]
