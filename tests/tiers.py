"""How the cases of a test are split between the two tiers."""

from typing import Any

import pytest


def later(*cases: Any) -> list[Any]:
    """Cases of the second tier, as parameters; of several values where a case is a tuple."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
