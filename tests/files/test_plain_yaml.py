"""Reading YAML: text comes back as it was written, and nothing that a file or an override holds hangs or crashes."""

import os
import random
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import yaml

from dllm_sd.cli.main import main
from dllm_sd.config import apply_overrides, build_config, load_config, to_yaml
from dllm_sd.errors import InputError
from dllm_sd.files.plain_yaml import MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_VALUES, parse_yaml, read_yaml, write_yaml
from dllm_sd.teachers import Suffix
from dllm_sd.training.folder import read_run_config
from tests.tiers import spread

TREE: dict[str, Any] = {"task": {"name": "sudoku"}, "decode": {"length": 16, "block_length": 4}, "method": "d_opsd"}
PIECES = [
    *("${x}", r"\${x}", "$", "$$", "${", "}", "{{", "}}", "%", "@", "`", "|", ">", "&a", "*a", "!!str ", "? ", "- "),
    *("---", "...", "\n", "\n\n", "\r", "\t", " ", "  ", "'", '"', "\\", "#", " #", ": ", ":", ",", "[", "]", "{", "}"),
    *("\x01", "\x07", "\x1b", "\x7f", "\x85", "\xa0", "\u2028", "\u2029", "\ufeff", "\u00e9", "\u6f22", "\U0001f600"),
    *(
        "null",
        "~",
        "true",
        "no",
        "on",
        "=",
        "<<",
        "1",
        "0x1f",
        "010",
        "1e5",
        "1.5",
        ".inf",
        ".nan",
        "12:30",
        "2026-01-01",
    ),
]


def texts() -> list[str]:
    """Every piece, alone and at either end of a word, and random strings of them."""
    chance = random.Random(0)
    mixed = ["".join(chance.choices(PIECES, k=chance.randint(2, 12))) for _ in range(300)]
    return [*PIECES, *[f"{piece}word" for piece in PIECES], *[f"word{piece}" for piece in PIECES], *mixed, "x " * 400]


def test_text_comes_back_as_it_was_written():
    tree = {"values": texts(), **{f"key{i}": {"inside": text} for i, text in enumerate(texts())}}
    assert parse_yaml(write_yaml(tree), "it") == tree


@pytest.mark.parametrize(
    "text", ["It costs ${question}.", "\\${x}\n---\n{{'$$'}}", "a\x85\u2028\x1b\r\n", "null", "2026-01-01"]
)
def test_a_config_comes_back_from_its_own_yaml_whatever_its_texts_hold(tmp_path: Path, text: str):
    system = {"name": "sudoku", "system": text}
    config = build_config({**TREE, "task": system, "run": text, "model": {"end_tokens": texts()}})
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert build_config(read_run_config(tmp_path)) == config
    assert build_config(apply_overrides(read_run_config(tmp_path), [])) == config


def test_text_in_an_override_is_text():
    for text in ("It costs ${question}.", r"pay \${x}", "$$", "2026-01-01", "12:30", "1e5", "=", "a=b"):
        assert build_config(apply_overrides(TREE, [f"run={text}"])).run == text


def test_what_is_no_text_is_read_as_before():
    shown = "{a: 1, b: -0x1f, c: 1.5, d: 1.0e-5, e: .inf, f: yes, g: off, h: null, i: ~, j: , k: 1_000, l: 010}"
    assert parse_yaml(shown, "it") == yaml.safe_load(shown)


def test_aliases_are_copies():
    tree = parse_yaml("a: &a {x: 1}\nb: *a", "it")
    tree["b"]["x"] = 2
    assert tree == {"a": {"x": 1}, "b": {"x": 2}}


def bomb(levels: int) -> str:
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(levels)]
    return "\n".join(lines)


HOSTILE = {
    "an anchor in itself": ("a: &a [*a]", "refers to itself"),
    "a mapping in itself": ("&a\nb: {c: *a}", "refers to itself"),
    "a bomb of aliases": (bomb(10), "refers to itself, or is too large"),
    "a bomb of text": (f"a: &a {'x' * 10**5}\nb: [{', '.join(['*a'] * 100)}]", "or is too large"),
    "many levels of lists": ("a: " + "[" * 300 + "]" * 300, f"more than {MAX_YAML_DEPTH} levels deep in line 1"),
    "many levels of blocks": ("\n".join(" " * i + "a:" for i in range(300)), f"more than {MAX_YAML_DEPTH} levels deep"),
    "an endless level": ("[" * 10**4, f"more than {MAX_YAML_DEPTH} levels deep"),
    "many values": ("a: [" + "1, " * (MAX_YAML_VALUES + 1) + "]", f"more than {MAX_YAML_VALUES} keys and values"),
    "a long number": ("seed: " + "9" * 5000, "a number has 5000 digits in line 1"),
    "a long hexadecimal number": ("seed: 0x" + "f" * 5000, "a number has 5002 digits"),
    "a tag of Python": ("a: !!python/object/apply:os.system [ls]", "leave out the tag"),
    "a tag of YAML": ("a: !!timestamp x", "leave out the tag"),
    "a tag without a name": ("a: ! x", "leave out the tag"),
    "a key twice": ("a: 1\nb: {c: 1, c: 2}", "the key 'c' is given twice in line 2"),
    "a number as a key": ("1.5: a", "a key is not text; put it in quotes in line 1"),
    "a truth as a key": ("on: a", "a key is not text"),
    "a list as a key": ("? [1, 2]\n: a", "a key is not text"),
    "two documents": ("a: 1\n---\nb: 1", "expected a single document"),
    "a character that is none": ("a: \x00", "unacceptable character"),
    "a missing anchor": ("a: *b", "found undefined alias 'b'"),
    "an open quote": ("a: 'x", "a quotation mark is not closed"),
    "a tab": ("a:\n\t- b", "a tab or a sign"),
    "a long tag": ("a: !" + "x" * 5000 + " 1", "leave out the tag"),
    "a long key twice": ("{0}: 1\n{0}: 2".format("x" * 500), "is given twice"),
    "a long alias": ("a: *" + "x" * 5000, "found undefined alias"),
}


@pytest.mark.parametrize("name", spread(HOSTILE, 3))
def test_hostile_yaml_is_refused_in_one_short_sentence(name: str):
    text, message = HOSTILE[name]
    begin = monotonic()
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "config 'mine.yaml'")
    assert str(caught.value).startswith("config 'mine.yaml' ")
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 400
    assert "\n" not in str(caught.value)
    assert monotonic() - begin < 10


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "a large file", "a binary file", "nothing"])
def test_what_is_no_config_file_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str):
    path, wanted = tmp_path / "config", "a device or a pipe"
    if kind == "a folder":
        path.mkdir()
        wanted = "Is a directory"
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path = Path("/dev/zero")
    elif kind == "a large file":
        path.write_bytes(b"#" * (MAX_YAML_BYTES + 1))
        wanted = "larger than 1 MiB"
    elif kind == "a binary file":
        path.write_bytes(bytes(range(256)))
        wanted = "cannot be read"
    else:
        wanted = "cannot be read"
    with pytest.raises(InputError, match=wanted):
        read_yaml(path, f"config {path}")
    assert main(["show", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


OVERRIDES = [
    *("=", "=x", "a", "", ".", ".=1", "a..b=1", "a.=1", "seed[0]=1", "method.contexts[0].ratio=1", "run.x.y=1"),
    *("method.contexts.ratio=0.5", "method.contexts.5.ratio=1", "method.contexts.-1.ratio=1", "seed=9" + "9" * 5000),
    *(
        "method.contexts.\u00b2.ratio=1",
        "method.contexts.99999999999999999999.name=suffix",
        "method.contexts.00.ratio=1",
    ),
    *("optim.betas.0=0.5", "decode=1", "decode=[1]", "method=null", "method.name=null", "method.gate.name={a: 1}"),
    *("method.contexts.00.ratio=1", "method.teacher=3", "decode.length=0x" + "f" * 300, "\x00=1"),
    *("task=[]", "task.name=null", "task.name=[[1]]", "model.lora=1", "model.lora=[]", "eval.schedules=x"),
    *("eval.schedules.a.b.c=1", "model.mask_token=1.5", "model.mask_token=[1]", "peers=1", "peers.students=x"),
    *("peers.students=[x]", "peers.students.0=1", "x=&a [*a]", "x={a: 1, a: 2}", "seed=!!int 1", "seed=\x00", "\x00=1"),
    *(
        "x" * 5000 + "=1",
        "seed=" + "x" * 5000,
        "run=[" + "[" * 300,
        "a." * 1000 + "b=1",
        "decode.length=0x" + "f" * 300,
    ),
    *(
        "method.contexts={}",
        "method.contexts={a: 1}",
        "method.contexts=[{}]",
        "method.contexts=[null]",
        "method.teacher=3",
    ),
    *("method=" + "x " * 3000, "task.name=" + "x" * 5000, "seed='\ud800'", "model.shape.vocab_size=1e400"),
]
LISTED = {**TREE, "method": {"name": "d_opsd", "contexts": [{"name": "suffix"}, "suffix"]}}


@pytest.mark.parametrize("tree", [TREE, LISTED], ids=["by default", "with a list"])
@pytest.mark.parametrize("number", range(len(OVERRIDES)))
def test_no_override_is_a_traceback(tree: dict[str, Any], number: int):
    said = ""
    try:
        build_config(apply_overrides(tree, [OVERRIDES[number]]))
    except InputError as error:
        said = str(error)
    assert len(said) <= 600
    assert "\n" not in said
    assert "x" * 200 not in said


def test_an_override_reaches_into_a_list_and_may_lengthen_it():
    contexts = build_config(
        apply_overrides(LISTED, ["method.contexts.1.ratio=0.5", "method.contexts.2=suffix", "method.target=each"])
    ).method.contexts
    assert contexts == (Suffix(), Suffix(ratio=0.5), Suffix())
    with pytest.raises(InputError, match=r"^method\.contexts\.5 does not exist in a list of 2 entries"):
        apply_overrides(LISTED, ["method.contexts.5.ratio=0.5"])
    with pytest.raises(InputError, match=r"^method\.contexts is a list; number its entries from 0, as in method"):
        apply_overrides(LISTED, ["method.contexts.ratio=0.5"])


def test_overrides_leave_the_tree_that_they_change_alone():
    tree = {"optim": {"lr": 1}}
    assert apply_overrides(tree, ["optim.lr=2"]) == {"optim": {"lr": 2}}
    assert tree == {"optim": {"lr": 1}}


@pytest.mark.parametrize("text", ['a: "1\\ud8002"', 'a: ["\\uDFFF"]', '"\\ud800": 1'])
def test_half_a_surrogate_pair_is_refused(text: str):
    with pytest.raises(InputError, match=r"^config x holds half a surrogate pair \(\\ud[8f][0f][0f]\), which"):
        parse_yaml(text, "config x")
