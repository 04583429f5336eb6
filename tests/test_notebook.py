"""The notebook of the documentation runs on a CPU, and is stored without outputs."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.config import load_config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "own_data.ipynb"


def cells() -> list[dict[str, Any]]:
    """The cells with code."""
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())


def test_the_commands_of_the_notebook_have_configs_and_keys_that_exist() -> None:
    lines = [line for cell in cells() for line in "".join(cell["source"]).splitlines()]
    names: dict[str, Any] = {"dllm_sd": lambda *arguments: arguments}
    found = []
    for line in lines:
        if re.match(r"\w+ = \[\"", line):
            exec(line, names)
        elif line.startswith("dllm_sd("):
            found.append(eval(line, names))
    assert [command for command, *_ in found] == ["train", "show", "train"]
    for _, config, *overrides in found:
        load_config(config, overrides)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the extra notebook is not installed")
    nbformat = pytest.importorskip("nbformat", reason="the extra notebook is not installed")
    pytest.importorskip("ipykernel", reason="the extra notebook is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = " ".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "test accuracy of the best weights" in outputs
    assert re.search(r"loss of the first updates [0-9.]+, of the last [0-9.]+", outputs)
