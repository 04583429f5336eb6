"""Which tests come first, and where the fixtures of all tests are."""

import gc
import os

import pytest

HEAVY = ("test_quickstart.py", "parallel", "training", "test_contract.py")


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures of `tests.random_policies`, but for the process that only deals the tests out to others."""
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        gc.disable()  # what is imported and collected stays
        os.fsync = lambda _: None  # no test cuts the power, and the disk is slow
        config.pluginmanager.import_plugin("tests.random_policies")
        config.pluginmanager.import_plugin("tests.learning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker waits for another one at the end."""
    items.sort(key=lambda item: not any(part in HEAVY for part in item.path.parts))


def pytest_collection_finish() -> None:
    """Full collections of garbage, which transformers asks for, pass over what the tests and libraries consist of."""
    gc.freeze()
    gc.enable()
