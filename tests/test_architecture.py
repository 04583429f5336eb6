"""The house rules that a machine can check: imports point down, files and functions stay short, nothing is unsafe."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dllm_sd
from tests.sources import FILES, modules, nodes

GUARD = 'if __name__ == "__main__":'
LAYERS = [
    "errors",
    "parts",
    "ranges",
    "randomness",
    "limits",
    "files",
    "plugins",
    "keys",
    "overrides",
    "config_files",
    "http_client",
    "hub",
    "losses",
    "trajectory",
    "trajectory_json",
    "canvases",
    "texts",
    "tasks",
    "skills",
    "writers",
    "pretrained",
    "network",
    "engines",
    "decoding",
    "policies",
    "rollouts",
    "teachers",
    "methods",
    "objective",
    "settings",
    "config",
    "schema",
    "pairing",
    "parallel",
    "evaluation",
    "experience",
    "probing",
    "training",
    "reports",
    "export",
    "serving",
    "api",
    "",
    "arguments",
    "cli",
    "__main__",
]
"""From the lowest to the highest; the empty name is ``dllm_sd/__init__.py``, the public API."""


def imported(tree: ast.Module) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in it, without ``dllm_sd``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name.removeprefix("dllm_sd.") in modules() else str(node.module) for name in whole]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("dllm_sd").removeprefix(".") for name in found if name.split(".")[0] == "dllm_sd")


def layer(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_its_place_in_the_order():
    assert {layer(name) for name in modules()} == set(LAYERS)


def test_imports_point_down():
    wrong = []
    for name, tree in modules().items():
        for other in imported(tree):
            inside = layer(other) == layer(name) != ""
            if other not in modules() or not (inside or LAYERS.index(layer(other)) < LAYERS.index(layer(name))):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_no_imports_go_in_a_circle():
    graph = {name: set(imported(tree)) - {name} for name, tree in modules().items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_the_trainer_and_the_objective_know_no_method_by_name():
    names = set(dllm_sd.METHODS)
    for name in ("objective.equation", "objective.plan", "training.trainer", "rollouts.rules", "evaluation.evaluate"):
        words = {node.value for node in ast.walk(modules()[name]) if isinstance(node, ast.Constant)}
        assert not names & {word for word in words if isinstance(word, str)}


def test_a_file_is_named_after_its_concept_and_stays_short():
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert [str(file) for file in FILES if file.stem in vague] == []
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_no_two_modules_give_one_name_to_different_things():
    """Functions, classes and type aliases; each module of a command has `add` or `run`, each program `main`."""
    where: dict[str, list[str]] = {}
    for name, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                where.setdefault(node.name, []).append(name)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                alias = node.targets[0].id
                if re.fullmatch(r"[A-Z]\w*[a-z]\w*", alias):
                    where.setdefault(alias, []).append(name)
    shared = {name: where for name, where in where.items() if len(where) > 1 and not name.startswith("_")}
    assert shared.keys() <= {"add", "run", "main"}, shared


def test_functions_stay_short():
    functions = [(name, node) for name, node in nodes() if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno for name, node in functions}
    assert {name: length for name, length in lengths.items() if length >= 100} == {}


def test_what_is_public_is_documented():
    bare = [name for name, tree in modules().items() if tree.body and not ast.get_docstring(tree)]
    for name, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                bare += [] if ast.get_docstring(node) else [f"{name}.{node.name}"]
    assert bare == []


def unsafe(node: ast.AST) -> bool:
    """Whether a piece of code evaluates text, unpickles, or lets a checkpoint bring code along."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in {"eval", "exec", "compile", "__import__"}
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr in {"load", "save"}
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
        return bool(names & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"})
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
        return not (isinstance(node.value, ast.Constant) and node.value.value is False)
    return False


def test_nothing_is_evaluated_and_nothing_is_unpickled():
    assert [f"{name}, line {getattr(node, 'lineno', '?')}" for name, node in nodes() if unsafe(node)] == []


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        *(("eval('1')", True), ("exec(text)", True), ("torch.load(path)", True), ("import pickle", True)),
        *(("from marshal import loads", True), ("f(trust_remote_code=True)", True), ("f(trust_remote_code=x)", True)),
        *(("f(trust_remote_code=False)", False), ("model.eval()", False), ("import json", False)),
    ],
)
def test_code_that_is_not_safe_is_seen(code: str, seen: bool):
    assert any(map(unsafe, ast.walk(ast.parse(code)))) == seen


WRITERS = {"write_text", "write_bytes", "copy", "copy2", "copyfile", "copytree", "move", "save_file", "save_pretrained"}
MAY_WRITE = {
    "files.writing": {"os.open"},
    "files.locking": {"os.open"},
    "training.log_files": {"open a"},
    "evaluation.recording": {"open ab"},
    "training.checkpoint": {"save_file"},
    "export.exporting": {"save_file", "save_pretrained"},
    "policies.saving": {"save_file", "save_pretrained"},
    "rollouts.journal": {"open ab"},
    "cli.main": {"os.open"},
}
"""Who writes in another way than by `files`: logs that only grow, tensors in folders that appear whole, devices."""


def writes(node: ast.Call) -> str | None:
    """In which way a call may write a file, if it does."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
    if name == "open":
        if owner == "os":
            flags = {
                part.attr for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Attribute)
            }
            return "os.open" if flags & {"O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC"} else None
        words = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        modes = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        if mode := next((mode for mode in modes if len(mode) < 4 and set(mode) & set("wax+")), None):
            return f"open {mode}"
    copies = name not in ("copy", "move") or owner == "shutil"
    return name if name in WRITERS and copies else None


def test_files_are_written_in_one_way_only():
    calls = [(name, node) for name, node in nodes() if isinstance(node, ast.Call)]
    found = {(name, way, node.lineno) for name, node in calls if (way := writes(node)) is not None}
    assert not [(name, way, line) for name, way, line in found if way not in MAY_WRITE.get(name, ())]
    assert {(name, way) for name, way, _ in found} >= {("training.log_files", "open a"), ("files.writing", "os.open")}


@pytest.mark.parametrize(
    ("call", "way"),
    [
        ("path.open('w')", "open w"),
        ("open(path, mode='r+b')", "open r+b"),
        ("path.write_text('')", "write_text"),
        ("shutil.copy(a, b)", "copy"),
        ("os.open(path, os.O_CREAT | os.O_RDWR)", "os.open"),
        ("os.open(path, os.O_RDONLY)", None),
        ("path.open('rb')", None),
        ("open(path)", None),
        ("tree.copy()", None),
    ],
)
def test_a_call_that_writes_is_seen(call: str, way: str | None):
    (node,) = (node for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Call))
    assert writes(node) == way


def test_the_module_can_be_run():
    done = subprocess.run([sys.executable, "-m", "dllm_sd", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for command in ("train", "probe", "eval", "grade", "sample", "serve", "show", "export"):
        assert command in done.stdout


def test_scripts_of_several_processes_close_the_process_group():
    """A process that exits with the group's threads running is sometimes aborted."""
    root = Path(__file__).parent
    scripts = [
        text
        for file in root.rglob("*.py")
        if "accelerate.commands.launch" in (text := file.read_text()) and GUARD in text
    ]
    assert len(scripts) >= 3
    assert [text.splitlines()[0] for text in scripts if "close_process_group()" not in text] == []


def test_no_two_files_of_tests_have_one_name():
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert [name for name in set(names) if names.count(name) > 1] == []  # pytest imports them by it
