"""Numbers of a config: each declares its range, which holds wherever an object is built, under the key as written."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import pytest

from dllm_sd.cli.main import main
from dllm_sd.config import Config, build_config
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError, shown
from dllm_sd.methods.method import Method
from dllm_sd.ranges import LIMIT, Count, Range, Ranged, check, hints_of
from dllm_sd.tasks import TASKS
from tests.tiers import spread

HUGE = 10**5000
KINDS = ("a number", "a whole number", "text")
ODD = [math.nan, math.inf, -math.inf, 0, -1, 1, 2**53, 2**53 + 1, 1e308, -1e308, HUGE, -HUGE, True, 0.5, "1e400", "x"]


class Place(NamedTuple):
    """A number somewhere in a config."""

    key: str
    owner: type
    number: type
    declared: Range | None
    tree: Callable[[Any], dict[str, Any]]
    """The config that holds a value here."""


def numbers(hint: Any) -> Iterator[tuple[str, type, Range | None, Callable[[Any], Any]]]:
    """The numbers of a field: what follows its key, type, range, and how a value is put into it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated and arguments[0] in (int, float):
        yield (
            "",
            arguments[0],
            next((one for one in arguments[1:] if isinstance(one, Range)), None),
            lambda value: value,
        )
    elif hint in (int, float):
        yield "", hint, None, lambda value: value
    elif origin in (Union, UnionType):
        for option in arguments:
            yield from numbers(option)
    elif origin is tuple:
        count = 1 if arguments[-1] is ... else len(arguments)
        for end, number, declared, put in numbers(arguments[0]):
            yield f".0{end}", number, declared, lambda value, put=put: [put(value), *[0] * (count - 1)]


def places(cls: type, key: str, tree: Callable[[Any], dict[str, Any]]) -> Iterator[Place]:
    """All numbers below a class of a config, whatever its parts are."""
    for f in fields(cls):
        name, hint = f.metadata.get("key", f.name), hints_of(cls)[f.name]
        here = f"{key}.{name}".lstrip(".")

        def inside(value: Any, name: str = name) -> dict[str, Any]:
            return tree({name: value})

        for end, number, declared, put in numbers(hint):
            yield Place(here + end, cls, number, declared, lambda value, put=put, inside=inside: inside(put(value)))
        several = get_origin(hint) is tuple
        below = f"{here}.0" if several else here
        for part, table in f.metadata.get("parts", {}).items():
            yield from places(
                table,
                below,
                lambda value, part=part, several=several, inside=inside: inside(
                    [{"name": part, **value}] if several else {"name": part, **value}
                ),
            )
        for option in {hint, *get_args(hint)}:
            if isinstance(option, type) and is_dataclass(option) and "parts" not in f.metadata:
                yield from places(
                    option,  # pyright: ignore[reportArgumentType]
                    below,
                    lambda value, several=several, inside=inside: inside([value] if several else value),
                )


def whole(tree: dict[str, Any]) -> dict[str, Any]:
    return {"task": "sudoku", **tree}


PLACES = [
    *places(Config, "", whole),
    *places(Decoding, "eval.schedules.odd", lambda tree: whole({"eval": {"schedules": {"odd": tree}}})),
]


def refusal(tree: dict[str, Any]) -> str:
    try:
        build_config(tree)
    except InputError as error:
        return str(error)
    return ""


def borders(declared: Range, number: type) -> list[Any]:
    """The ends of a range and their neighbours."""
    every = (declared.least, declared.most, declared.above, declared.below, declared.also)
    ends = [end for end in every if end is not None and math.isfinite(end)]
    if number is int:
        return [int(end) + step for end in ends for step in (-1, 0, 1)]
    return [
        near for end in ends for near in (float(end), math.nextafter(end, -math.inf), math.nextafter(end, math.inf))
    ]


def test_the_walk_finds_the_numbers_of_every_kind_of_part():
    keys = {place.key for place in PLACES}
    assert {"seed", "optim.lr", "optim.betas.0", "model.lora.rank", "model.shape.hidden_size"} <= keys
    assert {"decode.suppress.0", "method.rollout.horizon.ratio", "method.rollout.policy.layers.0"} <= keys
    assert {"method.contexts.0.ratio", "method.contexts.0.prompt.writing.writer.timeout"} <= keys
    assert {"method.skill_bank.extraction.steps", "method.skill_bank.retriever.letters", "peers.rounds"} <= keys
    assert {"method.teacher.0.decay", "task.size_train", "task.numbers_max", "eval.schedules.odd.steps"} <= keys
    assert len({(place.key, place.owner) for place in PLACES}) > 150


def test_every_number_of_the_package_declares_its_range():
    own = [place for place in PLACES if place.owner.__module__.split(".")[0] == "dllm_sd"]
    assert [f"{place.owner.__name__}: {place.key}" for place in own if place.declared is None] == []
    assert [place.owner.__name__ for place in own if not issubclass(place.owner, Ranged)] == []


OWNERS: list[type] = sorted({place.owner for place in PLACES}, key=lambda owner: owner.__name__)


@pytest.mark.parametrize("owner", spread(OWNERS, 3))
def test_numbers_outside_their_range_are_refused_under_their_full_key(owner: type):
    for place in {place.key: place for place in PLACES if place.owner is owner}.values():
        declared = place.declared or Range()
        for value in [*ODD, *borders(declared, place.number)]:
            said, number = refusal(place.tree(value)), value
            if place.number is float and value == "1e400":
                number = math.inf
            kinds = int if place.number is int else int | float
            allowed = isinstance(number, kinds) and not isinstance(number, bool) and declared.holds(number)
            allowed |= isinstance(value, str) and "mask_token" in place.key
            about = said.startswith((f"{place.key} is ", *(f"{place.key} must be {kind}" for kind in KINDS)))
            assert about != allowed, (place.key, shown(value), said)
            assert len(said) <= 400 or not about
            assert "\n" not in said


def test_a_refusal_says_what_may_be_given():
    for tree, message in [
        (
            {"method": {"name": "opsd", "rollout": {"top_p": 0}}},
            "method.rollout.top_p is 0; give a number above 0 and at most 1",
        ),
        ({"decode": {"temperature": math.nan}}, "decode.temperature is nan; give a number from 0.001 to 1000, or 0"),
        ({"decode": {"suppress": [3, -5]}}, "decode.suppress.1 is -5; give a whole number of at least 0"),
        ({"optim": {"betas": [0.9, 1]}}, "optim.betas.1 is 1; give a number of at least 0 and below 1"),
        ({"optim": {"lr": math.inf}}, "optim.lr is inf; give a number above 0 and at most 1000"),
        (
            {"updates": HUGE},
            "updates is a whole number of about 5000 digits; give a whole number from 1 to 9007199254740992",
        ),
        ({"optim": {"max_grad_norm": 0}}, "optim.max_grad_norm is 0; give a number above 0, or null"),
        ({"optim": {"betas": [0.9, 0.99, 0.1]}}, "optim.betas lists 3 values; give 2"),
        ({"peers": {"rounds": 2}}, "peers.students is missing; set it"),
    ]:
        assert refusal(whole(tree)) == message


def test_a_part_that_is_built_in_python_is_checked_too():
    for build, message in [
        (lambda: Decoding(top_p=0), "decode.top_p is 0; give a number above 0 and at most 1"),
        (lambda: Decoding(length=8.5), "decode.length must be a whole number, not 8.5"),  # pyright: ignore
        (lambda: Decoding(steps=True), "decode.steps must be a whole number or null, not True"),
        (lambda: Method(temperature=math.nan), "method.temperature is nan; give a number from 0.001 to 1000"),
        (lambda: Method(temperature="x"), "method.temperature must be a number, not 'x'"),  # pyright: ignore
    ]:
        with pytest.raises(InputError) as caught:
            build()
        assert str(caught.value) == message


@dataclass(frozen=True)
class Theirs:
    """A task of somebody else, who declares nothing."""

    count: int = 4
    heat: float | None = None

    def problems(self, split: str) -> list[Any]:
        """None."""
        return []


def test_numbers_of_other_peoples_parts_are_finite_and_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TASKS, "theirs", Theirs)
    for count in (4, -7, 0, LIMIT, -LIMIT):
        assert build_config({"task": {"name": "theirs", "count": count, "heat": count}}).task == Theirs(count, count)
    for wrong, words in [(LIMIT + 1, "of at most"), (-HUGE, "of at least"), (HUGE, "of at most")]:
        said = refusal({"task": {"name": "theirs", "count": wrong}})
        assert said.startswith("task.count is ")
        assert f"; give a whole number {words} " in said
    assert refusal({"task": {"name": "theirs", "heat": math.nan}}) == (
        "task.heat is nan; give a number that is finite, or null"
    )


def test_a_range_holds_what_its_words_say():
    assert Range(least=1, most=2).description(0) == "from 1 to 2"
    assert Range(above=0).description(math.inf) == "above 0 and at most 9007199254740992"
    check(Count | None, None, "it")
    with pytest.raises(InputError, match=r"^it is 0; give a whole number of at least 1, or null$"):
        check(Count | None, 0, "it")


COMMANDS = {
    "eval --attempts": ["eval", "tiny", "--attempts"],
    "show --processes": ["show", "quickstart", "--processes"],
}


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "", "9" * 5000, str(2**20 + 1)])
@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_of_a_command_have_a_range(capsys: pytest.CaptureFixture[str], command: str, value: str):
    with pytest.raises(SystemExit) as caught:
        main([*COMMANDS[command], value])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "give a whole number from 1 to 1048576, not " in said
    assert said.count("\n") == 1
    assert len(said) < 400


@pytest.mark.parametrize(
    "words",
    [[], ["x" * 5000], ["show"], ["show", "quickstart", "--x" + "y" * 5000], ["export", "a", "--to", "z" * 999, "b"]],
)
def test_a_wrong_command_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str], words: list[str]):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("dllm-sd: ")
    assert said.count("\n") == 1
    assert len(said) < 600


@pytest.mark.parametrize("command", ["show", "train", "eval", "sample", "grade", "export"])
def test_a_name_that_no_file_can_have_is_refused(capsys: pytest.CaptureFixture[str], command: str):
    more = {"sample": ["x"], "grade": ["--task", "gsm8k"], "export": ["--to", "peft", "out"]}.get(command, [])
    for name in ("x" * 5000, "a\0b", "\ud800", "", ".", "a\nb"):
        try:
            status = main([command, name, *more])
        except SystemExit as stopped:
            status = stopped.code
        assert status == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert len(said) < 1000
        assert "x" * 201 not in said


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/somewhere")
    tree = {"run": "~/x", "model": {"path": "~/m", "lora": {"start": "~"}}, "task": {"name": "gsm8k", "data": "~/d"}}
    config = build_config(tree)
    assert config.model.lora is not None
    assert (config.run, config.model.path, config.model.lora.start) == ("/somewhere/x", "/somewhere/m", "/somewhere")
    assert getattr(config.task, "data", None) == "/somewhere/d"
    assert build_config(whole({"run": "./~x"})).run == "./~x"
    assert refusal(whole({"run": "~nobody-of-this-name/x"})) == (
        "run is '~nobody-of-this-name/x', which no file can be named; give another path"
    )
