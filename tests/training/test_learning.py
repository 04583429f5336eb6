"""A test that trains without learning anything fails."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests import learning


@pytest.mark.parametrize(
    ("losses", "marker", "passes"),
    [
        *(([None, None], None, False), ([None, None], "learns_nothing", True)),
        *(([None, 0.0], None, True), ([0.5], "learns_nothing", True), ([], None, True)),
    ],
)
def test_a_test_whose_updates_are_all_skipped_fails_unless_it_says_so(losses: Any, marker: str | None, passes: bool):
    item: Any = SimpleNamespace(get_closest_marker=lambda name: marker)
    call = learning.pytest_runtest_call(item)
    next(call)
    learning.losses[:] = losses
    try:
        with pytest.raises(StopIteration if passes else AssertionError):
            call.send(None)
    finally:
        learning.losses.clear()
