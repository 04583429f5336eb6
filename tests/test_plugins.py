"""A file of one's own is imported where it is named, known to all commands on the run, and never taken unasked."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dllm_sd.cli.main import main
from dllm_sd.config import build_config, load_config, path_keys
from dllm_sd.errors import InputError
from dllm_sd.export.model_card import settings_of
from dllm_sd.files.writing import Place
from dllm_sd.methods import METHODS
from dllm_sd.plugins import import_plugins
from dllm_sd.tasks import TASKS
from dllm_sd.teachers import CONTEXTS
from tests.test_docs import README, blocks

FEW = ["updates=1", "eval.every=0", "eval.final_problems=0", "log.progress=false", "log.trackers=[]"]
FEW += ["method.rollout.problems=2", "method.rollout.attempts=1", "method.gate=all"]
SMALL = ["eval.final_problems=2", "eval.schedules={}"]


@pytest.fixture(autouse=True)
def tables_as_they_were() -> Iterator[None]:
    tables: list[dict] = [METHODS, CONTEXTS, TASKS]
    before = [dict(table) for table in tables]
    yield
    for table, held in zip(tables, before, strict=True):
        table.clear()
        table.update(held)


@pytest.fixture
def method_file(tmp_path: Path) -> Path:
    """The method of the README in a file."""
    (source,) = blocks(README, "python")
    file = tmp_path / "code" / "my_method.py"
    file.parent.mkdir()
    file.write_text(source)
    return file


def refusal(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main([*command]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_method_in_a_file_is_known_to_every_command_on_its_run(
    method_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(method_file.parent)
    run = tmp_path / "run"
    changes = ["plugins=[my_method.py]", "method=tail", "method.contexts.0.count=8"]
    assert main(["train", "quickstart", *changes, *FEW, f"run={run}"]) == 0
    assert f"plugins:\n- {method_file}\n" in (run / "config.yaml").read_text()
    assert [*json.loads((run / "code.json").read_text())] == [str(method_file)]

    monkeypatch.chdir(tmp_path)  # the run is understood from another folder, by a process that has not seen the file
    del METHODS["tail"], CONTEXTS["tail"]
    import_plugins.__globals__["_imported"].clear()
    assert main(["eval", str(run), *SMALL, f"--out={tmp_path / 'e'}"]) == 0
    assert "has changed" not in capsys.readouterr().err
    assert METHODS["tail"].method.contexts != ()
    assert main(["export", str(run), "--to", "merged", "--weights", "last", str(tmp_path / "model")]) == 0

    method_file.write_text(method_file.read_text() + "# another word\n")
    assert main(["eval", str(run), *SMALL, f"--out={tmp_path / 'e'}"]) == 0
    said = f"dllm-sd: {method_file} has changed since the run in '{run}' began, so its parts may differ"
    assert said in capsys.readouterr().err.splitlines()
    assert main(["train", "quickstart", f"plugins={method_file}", *changes[1:], *FEW, f"run={run}"]) == 0
    assert "has changed since the run" in capsys.readouterr().err

    method_file.rename(tmp_path / "moved.py")
    for command in (["eval", str(run)], ["show", str(run / "config.yaml")], ["export", str(run), "--to", "peft", "x"]):
        said = f"dllm-sd: plugins.0 is '{method_file}', which is no file of Python; name one, as in plugins=[FILE.py]"
        assert refusal(capsys, *command) == said
    assert main(["eval", str(run), *SMALL, "plugins=[moved.py]", f"--out={tmp_path / 'e'}"]) == 0

    recipe = (tmp_path / "model" / "recipe.yaml").read_text()
    assert "\n- my_method.py\n" in recipe
    found = refusal(capsys, "eval", str(tmp_path / "model"))
    assert re.search(r"names code \(plugins \['my_method\.py'\]\), which is imported only where you name it", found)

    shutil.copy(tmp_path / "moved.py", run / "moved.py")
    found = refusal(capsys, "eval", str(run), f"plugins=[{run}/moved.py]")
    assert "code that comes along with a run is not imported" in found


def test_a_plugin_is_found_beside_its_config_and_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    beside, here = tmp_path / "configs", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "own.py").write_text(f"from dllm_sd.tasks import TASKS, Sudoku\nTASKS['{folder.name}'] = Sudoku\n")
    monkeypatch.chdir(here)
    config = beside / "own.yaml"
    config.write_text("plugins: own.py\ntask: configs\n")
    assert load_config(str(config)).plugins == (str(beside / "own.py"),)
    assert load_config(str(config), ["plugins=[own.py]", "task=here"]).plugins == (str(here / "own.py"),)
    (beside / "own.py").unlink()
    assert load_config(str(config), ["task=here"]).plugins == (str(here / "own.py"),)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\ny = missing\n", "NameError: name 'missing' is not defined in line 2"),
        ("def f(:\n", "SyntaxError: .* in line 1"),
        ("import no_such_module_here\n", "ModuleNotFoundError: No module named 'no_such_module_here' in line 1"),
        ("raise SystemExit(3)\n", "SystemExit: 3 in line 1"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_sentence(tmp_path: Path, source: str, words: str):
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(InputError, match=rf"^plugin '.*own\.py' cannot be imported \({words}\); correct it$"):
        build_config({"task": "sudoku", "plugins": [str(tmp_path / "own.py")]})


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        ("none.py", r"^plugins\.0 is 'none\.py', which is no file of Python; name one, as in plugins=\[FILE\.py\]$"),
        (["config.yaml"], r"^plugins\.0 is 'config\.yaml', which is no file of Python"),
        ({"a": 1}, r"^plugins must be a list of files, not \{'a': 1\}$"),
        ([1], r"^plugins must be a list of files, not \[1\]$"),
    ],
)
def test_what_is_no_plugin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: object, words: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match=words):
        build_config({"task": "sudoku", "plugins": plugins})


def test_a_file_is_imported_again_only_if_it_has_changed(tmp_path: Path):
    file = tmp_path / "own.py"
    file.write_text("from dllm_sd.tasks import TASKS, Sudoku\nclass Mine(Sudoku): pass\nTASKS['mine'] = Mine\n")
    tree = {"task": "mine", "plugins": str(file)}
    first = build_config(tree)
    assert build_config(tree) == first
    assert type(build_config(tree).task) is type(first.task)
    file.write_text(file.read_text() + "# changed\n")
    assert type(build_config(tree).task) is not type(first.task)


def test_an_export_keeps_only_the_names_of_files_whatever_key_holds_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Elsewhere:
        """A hint from a plugin, with a path of its own."""

        store: Place | None = None
        pattern: str = ""

    monkeypatch.setitem(CONTEXTS, "elsewhere", Elsewhere)
    assert path_keys() >= {
        "run",
        "plugins",
        "data",
        "data_test",
        "grader",
        "path",
        "tokenizer",
        "start",
        "cache",
        "store",
    }
    assert "pattern" not in path_keys()
    values = {
        "store": "/home/me/store.json",
        "data": "/home/me/my.jsonl",
        "pattern": "/kept/as/it/is",
        "path": "org/model",
    }
    (tmp_path / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    expected = {**values, "store": "store.json", "data": "my.jsonl"}
    assert yaml.safe_load(settings_of(tmp_path)) == expected
