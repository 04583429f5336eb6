"""JSON read strictly: one shape, in the words of the value that is wrong."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from dllm_sd.files.typed_json import all_finite, build, own_json


@dataclass(frozen=True)
class Inner:
    """A part."""

    flag: bool
    share: float


@dataclass(frozen=True)
class Outer:
    """The whole."""

    count: int
    names: tuple[str | None, ...]
    inner: Inner
    more: Mapping[str, float]
    free: Any = None
    either: int | str = 0


TREE: dict[str, Any] = {
    "count": 3,
    "names": ["a", None],
    "inner": {"flag": True, "share": 1},
    "more": {"x": 0.5},
    "free": [{"anything": math.inf}],
    "either": "word",
}


def test_a_tree_becomes_its_dataclass():
    expected = Outer(3, ("a", None), Inner(True, 1), {"x": 0.5}, [{"anything": math.inf}], "word")
    assert build(Outer, own_json(json.dumps(TREE).encode())) == expected
    assert build(Outer, {**TREE, "inner": expected.inner}).inner is expected.inner


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("count", True, "count must be a whole number of 64 bits, not True"),
        ("count", 2**63, "count must be a whole number"),
        ("count", 1.0, "count must be a whole number"),
        ("count", None, "count must be a whole number"),
        ("names", "ab", "names must be a list, not 'ab'"),
        ("names", ["a", 3], r"names\[1\] must be text, not 3"),
        ("inner", [], r"inner must be an object, not \[\]"),
        ("inner", {"flag": 1, "share": 1.0}, "inner.flag must be true or false, not 1"),
        ("inner", {"flag": True, "share": math.nan}, "inner.share must be a finite number, not nan"),
        ("inner", {"flag": True}, "inner lacks 'share'"),
        ("inner", {"flag": True, "share": 0.5, "odd": 1}, "inner holds 'odd', which is unknown"),
        ("more", {"x": "1"}, "more.x must be a finite number"),
        ("either", [1], r"either must be text, not \[1\]"),
        ("either", None, "either must be text, not None"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: Any, words: str):
    with pytest.raises(ValueError, match=f"^{words}"):
        build(Outer, {**TREE, key: value})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", "no UTF-8 text"),
        (b"[" * 10**5, "nested more than 200 levels deep"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' occurs twice"),
        (b"1" * 5000, "a number has 5000 digits"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_json_is_refused_in_words(content: bytes, words: str):
    with pytest.raises(ValueError, match=words):
        own_json(content)


def test_numbers_that_are_not_finite_are_seen_at_any_depth():
    assert all_finite({"a": [1, 0.5, {"b": None, "c": "NaN"}]})
    assert not all_finite({"a": [1, {"b": [math.nan]}]})
    assert not all_finite([-math.inf])
