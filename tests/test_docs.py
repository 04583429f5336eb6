"""The documents say what the program does: trees, tables, keys, commands and examples are compared with the code."""

import ast
import doctest
import importlib
import json
import pkgutil
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import dllm_sd
from dllm_sd import METHODS, TASKS
from dllm_sd.arguments import COMMANDS
from dllm_sd.cli.main import main, parser
from dllm_sd.config import build_config, load_config, shipped_configs
from dllm_sd.keys import all_keys
from dllm_sd.losses import DIVERGENCES
from dllm_sd.methods.method import Average, Method
from dllm_sd.teachers import CONTEXTS
from dllm_sd.training.metric_table import described
from dllm_sd.training.trainer import Trainer
from tests import sources
from tools.make_config_page import PAGE as CONFIG_PAGE
from tools.make_config_page import config_page
from tools.make_schema import SCHEMA, schema_text
from tools.site_hooks import ROOT_PAGES, relinked

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dllm_sd"
README, CONCEPTS, ADDING = ROOT / "README.md", ROOT / "docs" / "concepts.md", ROOT / "docs" / "adding_a_part.md"
TREE = ROOT / "docs" / "package.md"
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
DOCUMENTS = [
    README,
    *sorted((ROOT / "docs").glob("*.md")),
    *METHOD_PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
]
SECTIONS = ["How to run it", "What was measured here", "What the paper claims", "Differences from paper and code"]
"""Of a page about methods, below what they do."""
SETTING = "The paper's setting"
"""A last section that a page may have: a table, where each element of the paper's setting stands here."""


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def code(document: Path) -> list[str]:
    """Lines of shell blocks without their comments, those that go on joined, and inline code on one line."""
    text = document.read_text()
    shell = [block.replace("\\\n", " ") for block in blocks(document, "bash")]
    lines = [re.sub(r"\s+#.*", "", line) for block in shell for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + re.findall(r"`([^`\n]+)`", prose)


def commands(document: Path) -> list[list[str]]:
    """What a document tells the reader to run: the words behind ``dllm-sd`` or ``-m dllm_sd``."""
    found = [part for line in code(document) for part in re.split(r"&&", line)]
    found = [re.sub(r"^.*?(?:\bdllm-sd|-m dllm_sd) ", "", part) for part in found if re.search("dllm[-_]sd ", part)]
    return [words for words in map(shlex.split, found) if words and words[0].isalpha()]


def section(document: Path, title: str) -> str:
    """The text under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", document.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{document.name} has no section {title!r}"
    return found.group(1)


def table(text: str) -> dict[str, list[str]]:
    """The rows of a table whose first cell is one name in code, by that name; the other cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): row[1:] for row in rows if re.fullmatch(r"`[^`]+`", row[0])}


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def tree_of(folder: Path, depth: int = 1) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name in ("__init__.py", "__main__.py", "__pycache__"):
            continue
        yield "  " * depth + path.name + "/" * path.is_dir()
        if path.is_dir() and path.name != "assets":
            yield from (f"{path.name}:{line}" for line in tree_of(path, depth + 1))


def test_the_tree_in_the_documents_is_the_package() -> None:
    (tree,) = [block for block in blocks(TREE, "") if block.startswith("dllm_sd/")]
    shown, folder = [], ""
    for line in tree.splitlines()[1:]:
        name, _, comment = line.partition("#")
        assert comment.strip(), f"{line!r} says nothing about the file"
        inside = name.startswith("    ")
        shown.append(f"{folder}:{name.rstrip()}" if inside else name.rstrip())
        folder = folder if inside else name.strip(" /")
    assert sorted(shown) == sorted(tree_of(PACKAGE))


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 170


def test_the_slots_table_is_that_of_the_code() -> None:
    rows = table(section(CONCEPTS, "Slots and parts"))
    tables = {name: list(f.metadata["parts"]) for name, f in Method.__dataclass_fields__.items() if f.metadata}
    assert {slot: names(cells[1]) for slot, cells in rows.items()} == {**tables, "average": list(get_args(Average))}


def test_the_methods_and_tasks_are_those_of_the_code() -> None:
    text = section(CONCEPTS, "Methods")
    assert list(table(text)) == list(METHODS)
    assert set(names(text.rpartition("|\n")[2])) - {"task.name"} == set(TASKS)


def test_every_method_is_in_the_title_of_one_page() -> None:
    found = [name for page in METHOD_PAGES for name in names(page.read_text().splitlines()[0])]
    assert sorted(found) == sorted(METHODS)


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda path: path.stem)
def test_a_page_about_methods_is_one_screen_in_four_sections(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert re.fullmatch(r"# [^`]+ \(`\w+`(, `\w+`)*\)", lines[0])
    titles = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert titles in (SECTIONS, [*SECTIONS, SETTING])
    if SETTING in titles:
        lines = lines[: lines.index(f"## {SETTING}")]
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120
    assert all(section(page, title).strip() for title in titles)


def test_every_table_that_a_part_may_join_is_where_the_document_says() -> None:
    rows = re.findall(r"^\|([^|]+)\|([^|]+)\|([^|]+)\|$", ADDING.read_text(), re.MULTILINE)[2:]
    for _, tables, place in rows:
        files = [ROOT / path for path in names(place)]
        sources = [file for path in files for file in (path.glob("*.py") if path.is_dir() else [path])]
        for name in names(tables):
            assert any(re.search(rf"^{name}\b.* = ", file.read_text(), re.MULTILINE) for file in sources), name
    slots = {name for name, f in Method.__dataclass_fields__.items() if f.metadata}
    assert slots == {name for cell, *_ in rows for name in names(cell)}


def one_update(run: Path, method: Mapping[str, Any], lr: float = 5e-6, **model: Any) -> set[str]:
    """The keys of the metrics of a run of one update."""
    config = build_config(
        {
            "run": str(run),
            "updates": 1,
            "model": model,
            "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}", "size_train": 64},
            "decode": {"length": 16, "block_length": 8, "tokens_per_step": 4},
            "method": method,
            "optim": {"lr": lr},
            "eval": {"every": 1, "problems": 2, "final_problems": 0},
            "log": {"progress": False},
        }
    )
    Trainer(config).train()
    return {key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}


@pytest.fixture
def metric_keys(tmp_path: Path) -> set[str]:
    """All that runs write: without a teacher (whose step is lost in rounding), with one, with several under a horizon,
    and with a capped trust, one batch ahead.
    """
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sft = {"name": "sft", "rollout": {"problems": 4}}
    d_opsd = {"name": "d_opsd", "rollout": {"problems": 4, "attempts": 2}, "gate": "all"}
    keys = one_update(tmp_path / "sft", sft, 1e-30, random_init=True, tokenizer="tiny", shape=shape)
    keys |= one_update(tmp_path / "d_opsd", d_opsd, path="tiny")
    lagging = {"problems": 4, "attempts": 1, "temperature": 1.0, "lag": 1}
    capped = {"rollout": lagging, "trust": "importance_cap", "gate": "all"}
    keys |= one_update(tmp_path / "capped", {"name": "later_step", **capped}, path="tiny")
    rollout = {"problems": 4, "attempts": 1, "horizon": {"name": "truncated", "ratio": 0.5}}
    for name in ("d_opsd_pmi", "d_demo_psd"):
        keys |= one_update(tmp_path / name, {"name": name, "rollout": rollout, "gate": "all"}, path="tiny")
    return keys


def test_the_metrics_that_are_written_are_in_the_table_of_metrics(metric_keys: set[str]) -> None:
    assert {key for key in metric_keys if described(key) is None} == {"update"}
    assert len(metric_keys) > 40


def test_the_files_of_a_run_are_documented(tmp_path: Path) -> None:
    one_update(tmp_path / "run", {"name": "sft", "rollout": {"problems": 4}}, path="tiny")
    documented = {name.split("/")[0] for name in table(section(CONCEPTS, "The run folder"))}
    assert {path.name for path in (tmp_path / "run").iterdir()} <= documented


@pytest.mark.slow
def test_the_method_in_the_readme_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shared in (METHODS, CONTEXTS):
        monkeypatch.setitem(shared, "tail", None)  # so that what the example adds is taken out again
    monkeypatch.chdir(tmp_path)
    (source,) = blocks(README, "python")
    Path("my_method.py").write_text(source)
    few = ["updates=1", "eval.every=0", "eval.final_problems=0", "log.progress=false"]
    (command,) = re.findall(r"`dllm-sd (train [^`]+plugins[^`]+)`", README.read_text())
    run = tmp_path / "run"
    assert main([*command.split(), *few, "method.rollout.problems=4", f"run={run}"]) == 0
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["teacher/entropy"] < last["student/entropy"]
    assert "count: 8" in (run / "config.yaml").read_text()


def test_the_part_in_the_guide_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIVERGENCES, "hellinger", None)
    (source,) = blocks(ADDING, "python")
    exec(compile(source, "hellinger.py", "exec"), {"__name__": "hellinger"})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_name_no_command_or_config_that_is_missing(document: Path) -> None:
    for command, *words in commands(document):
        assert command in COMMANDS, f"{document.name} names dllm-sd {command}"
        of_run = bool(words) and words[0].startswith("runs/")
        if command in ("train", "probe", "show") and words and not words[0].isupper() and not of_run:
            config, *overrides = [word for word in words if word.isascii() and word != "..."]
            name = str(ROOT / config) if config.endswith(".yaml") else config
            assert name in shipped_configs() or Path(name).is_file(), config
            if "key=value" not in overrides and not any(word.startswith("plugins=") for word in overrides):
                load_config(name, overrides)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_in_shell_blocks_are_understood(document: Path) -> None:
    """Those that neither read nor write a run are carried out; placeholders of usages, such as [--json], are not."""
    shell = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    for line in [part for text in shell for part in re.split("&&|;", re.sub(r"(^|\s+)#.*", "", text))]:
        if (found := re.search(r"(?:\bdllm-sd|-m dllm_sd) (\w.*)", line)) is None:
            continue
        words = [word for word in shlex.split(found[1]) if word not in ("...", "&")]
        if any(re.match(r"\[|key=value", word) for word in words):
            continue
        options, others = parser().parse_known_args(words)
        assert all("=" in word and not word.startswith("-") for word in others), (words, others)
        if words[0] in ("list", "explain", "schema"):
            assert import_module(f"dllm_sd.cli.{options.command}").run(options) == 0


def test_the_readme_holds_the_two_commands() -> None:
    text = README.read_text()
    assert "pip install -e . -c constraints.txt && dllm-sd train quickstart\n" in text
    assert "pip install -e '.[dev]' -c constraints.txt && pytest" in text
    assert text.index("<!-- quickstart:begin -->") < text.index("<!-- quickstart:end -->")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_the_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(need for extra in project["optional-dependencies"].values() for need in extra),
    ]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9.]*", line) for line in lines)
    missing = {re.split(r"[^A-Za-z0-9._-]", need)[0].lower() for need in wanted} - {
        line.split("==")[0] for line in lines
    }
    assert not missing


def test_the_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == dllm_sd.__version__
    assert f"version: {dllm_sd.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert dllm_sd.__version__ in (ROOT / "CHANGELOG.md").read_text()


def modules() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "dllm_sd.") if info.name != "dllm_sd.__main__"]
    files = {name: PACKAGE.joinpath(*name.split(".")[1:]) for name in found}
    sources = {name: path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for name, path in files.items()}
    return [name for name, source in sources.items() if ">>>" in source.read_text()]


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


def test_the_schema_of_configs_is_that_of_the_code() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), "run: python -m tools.make_schema"


def test_every_shipped_config_names_the_schema_beside_it() -> None:
    for name, path in shipped_configs().items():
        assert "# yaml-language-server: $schema=schema.json\n" in path.read_text(encoding="utf-8"), name
        assert path.with_name("schema.json").is_file()


def test_the_reference_of_keys_is_that_of_the_schema() -> None:
    page = config_page()
    assert CONFIG_PAGE.read_text(encoding="utf-8") == page, "run: python -m tools.make_config_page"
    for key in all_keys():
        assert re.search(rf"^\| `([a-z_.]+\.)?{key.name}` \|", page, re.MULTILINE) or key.name == "name", key.path


def messages(node: ast.AST) -> Iterator[str]:
    """The texts in a module's source; a letter stands for what an f-string fills in."""
    for child in ast.walk(node):
        if isinstance(child, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in child.values)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


def test_the_messages_that_are_explained_are_messages_of_the_program() -> None:
    said = [text for tree in sources.modules().values() for text in messages(tree)]
    explained = list(table((ROOT / "docs" / "troubleshooting.md").read_text()))
    assert len(explained) > 15
    for message in explained:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.DOTALL)
        assert any(map(pattern.search, said)), f"no message of the program reads {message!r}"


def pages(entries: list[Any]) -> Iterator[str]:
    """The pages in the navigation of the site."""
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages(value)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    found = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages(config["nav"])) == sorted([*found, *ROOT_PAGES.values()])


def test_links_of_the_site_stay_within_the_site() -> None:
    text = (
        "[a](docs/methods/d_opsd.md#x) [b](CONTRIBUTING.md) [`c`](dllm_sd/errors.py) ![d](docs/images/d.png) https://e"
    )
    assert relinked(text, "README.md") == (
        "[a](methods/d_opsd.md#x) [b](contributing.md) `c` ![d](images/d.png) https://e"
    )
    assert relinked("[a](../methods.md) [b](../../README.md)", "docs/methods/d_opsd.md") == (
        "[a](../methods.md) [b](../index.md)"
    )
