"""The package's source, parsed once for all tests that look at it."""

import ast
from functools import cache
from pathlib import Path

import dllm_sd

PACKAGE = Path(dllm_sd.__file__).resolve().parent
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    """The dotted name without ``dllm_sd``; a package's own file has the name of the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    """The parsed modules of the package."""
    return {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Every piece of code with the name of its module."""
    return [(name, node) for name, tree in modules().items() for node in ast.walk(tree)]
