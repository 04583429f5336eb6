"""Damages a file of a run folder, or a value in its JSON; then the run is continued, evaluated and exported.

Outcomes: ok, the result is as without the damage; sentence, the command ends with one sentence that names the file or
its folder, and nothing in the folder has changed. A traceback, a difference without a message, and a write through a
link are faults.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.attacks import child
from tools.attacks.cases import CASES, EVALUATE, EVERYTHING, TRAIN, Words
from tools.attacks.contents import contents, differences
from tools.attacks.findings import Finding, spread
from tools.attacks.kills import Course, done, follow

OUTSIDE = "outside"
"""A file beside the run folder that links point to."""
DEEP = b"[" * 100_000 + b"]" * 100_000


def _flipped(data: bytes, share: float) -> bytes:
    position = min(len(data) - 1, int(len(data) * share))
    return data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :] if data else b"\x41"


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half of it": lambda data: data[: len(data) // 2],
    "last byte cut off": lambda data: data[:-1],
    "first byte flipped": lambda data: _flipped(data, 0),
    "a byte flipped in the middle": lambda data: _flipped(data, 0.5),
    "last byte flipped": lambda data: _flipped(data, 1),
    "garbage": lambda data: b"\x00\xff\xfe{[" * 7,
    "garbage behind it": lambda data: data + b"\x00{[garbage",
}
TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "null": lambda data: b"null\n",
    "a number": lambda data: b"7\n",
    "a list": lambda data: b"[]\n",
    "an empty mapping": lambda data: b"{}\n",
    "a huge number": lambda data: b"1" * 5000 + b"\n",
    "deeply nested": lambda data: DEEP + b"\n",
    "its first line twice": lambda data: data[: data.find(b"\n") + 1] + data,
    "without its first line": lambda data: data[data.find(b"\n") + 1 :],
}
VALUES: dict[str, Any] = {
    **{"null": None, "-1": -1, "huge": 10**30, "NaN": float("nan"), "text": "x", "list": [], "mapping": {}},
    "true": True,
    "half": 0.5,
}


def damages(run: Path, others: list[Path]) -> Iterator[tuple[str, Path, Callable[[Path], None]]]:
    """Yield all damages of the files below a folder: name, file, and a function that gets the path of the file."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and "tb" not in path.parts)
    for file in (path for path in files if not path.name.endswith("lock")):
        changes = BYTES if file.suffix == ".safetensors" else BYTES | TEXTS
        for name, change in changes.items():
            if change(file.read_bytes()) != file.read_bytes():
                yield name, file, lambda path, change=change: _rewrite(path, change)
        yield "deleted", file, Path.unlink
        yield "a folder in its place", file, lambda path: (path.unlink(), path.mkdir())[1]
        yield "a link to nothing", file, lambda path: (path.unlink(), path.symlink_to("nothing"))[1]
        yield "a link to a copy outside", file, _linked
        if file.suffix == ".safetensors":
            for other in others:
                if other.name == file.name and other.read_bytes() != file.read_bytes():
                    yield f"that of {other.parent.name}", file, lambda path, other=other: _copied(path, other)
        if file.suffix == ".json":
            yield from _values(file)


def _values(file: Path) -> Iterator[tuple[str, Path, Callable[[Path], None]]]:
    tree = json.loads(file.read_bytes())
    for key in tree if isinstance(tree, dict) else ():
        yield f"without {key}", file, lambda path, key=key: _rewrite(path, lambda data: _without(data, key))
        for name, value in VALUES.items():
            if tree[key] != value or isinstance(value, bool):
                yield (
                    f"{key}: {name}",
                    file,
                    lambda path, key=key, value=value: _rewrite(path, lambda data: _changed(data, key, value)),
                )


def _without(data: bytes, key: str) -> bytes:
    return json.dumps({name: value for name, value in json.loads(data).items() if name != key}, indent=1).encode()


def _changed(data: bytes, key: str, value: Any) -> bytes:
    return json.dumps({**json.loads(data), key: value}, indent=1).encode()


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _copied(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def _linked(path: Path) -> None:
    outside = _root(path) / OUTSIDE
    path.rename(outside)
    path.symlink_to(outside)


def _root(path: Path) -> Path:
    return next(folder for folder in path.parents if (folder / "skills.json").exists())


@dataclass(frozen=True)
class Victim:
    """A working folder to damage, the folder in it, and the commands that are run on it."""

    name: str
    root: Path
    target: str
    commands: tuple[Words, ...]


def victims(folder: Path, url: str) -> Iterator[Victim]:
    """Interrupted runs, a finished run, evaluations, two students, and cached texts."""
    exporting: Words = ("export", "run", "--to", "merged", "model", "--weights", "last")
    course = follow(EVERYTHING, folder / "everything", url)
    yield stopped(course, "000003", commands=(TRAIN, EVALUATE, exporting))
    yield stopped(follow(CASES["texts"], folder / "texts", url), "000002", "run/written")
    course = follow(CASES["plain"], folder / "plain", url)
    yield Victim("plain, finished", course.state(len(course.operations)), "run", (TRAIN,))
    course = follow(CASES["eval"], folder / "eval", url)
    writing = [i for i, line in enumerate(course.operations) if ".jsonl" in line]
    yield Victim("eval in its middle", course.state(writing[len(writing) // 2]), "scores", (EVALUATE,))
    yield Victim("eval, finished", course.state(len(course.operations)), "scores", (EVALUATE,))
    course = follow(CASES["peers"], folder / "peers", url)
    rounds = [i for i, line in enumerate(course.operations) if "rounds.json" in line]
    yield Victim("peers in the second round", course.state(rounds[-1] + 1), "run", (TRAIN,))


def stopped(course: Course, checkpoint: str, target: str = "run", commands: tuple[Words, ...] = (TRAIN,)) -> Victim:
    """A run as it is just before it writes a checkpoint."""
    number = next(i for i, line in enumerate(course.operations) if checkpoint in line)
    return Victim(f"{course.case.name} before {checkpoint}", course.state(number), target, commands)


def attack(victim: Victim, points: int | None = None) -> Iterator[Finding]:
    """Apply all damages, or ``points`` of them, and run every command on each."""
    work = victim.root.parent / "damaged"
    wanted: dict[Words, Mapping[str, Any]] = {}
    for words in victim.commands:
        ended, wanted[words] = _effect(victim, words, work, lambda path: None, Path())
        done(ended)
    tensor_files = [*victim.root.rglob("*.safetensors")]
    all_damages = [*damages(victim.root / victim.target, tensor_files)]
    for number in spread(len(all_damages), points):
        name, file, damage = all_damages[number]
        inside = file.relative_to(victim.root)
        for words in victim.commands:
            ended, actual = _effect(victim, words, work, damage, inside)
            yield _judge(victim, f"{words[0]} with {inside}: {name}", inside, ended, actual, wanted[words])


Effect = tuple[child.Ended, Mapping[str, Any]]


def _effect(victim: Victim, words: Words, work: Path, damage: Callable[[Path], None], inside: Path) -> Effect:
    """Damage a copy and run a command; return its end and the contents, with those before it under an empty name."""
    shutil.copytree(victim.root, work, symlinks=True)
    try:
        damage(work / inside)
        before = contents(work)
        ended = child.run(words, work)
        return ended, {**contents(work), "": before}
    finally:
        shutil.rmtree(work)


def _judge(
    victim: Victim, name: str, inside: Path, ended: child.Ended, actual: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Finding:
    def finding(outcome: Any, words: str) -> Finding:
        return Finding("damage", victim.name, name, outcome, words)

    before, after = actual[""], {key: value for key, value in actual.items() if key}
    if ended.status == 0:
        wrong = differences({key: value for key, value in wanted.items() if key}, after)
        if before.get(str(inside)) == after.get(str(inside)):  # a file that is not read may stay damaged
            wrong = [phrase for phrase in wrong if str(inside) not in phrase]
        wrong = [phrase for phrase in wrong if phrase != f"left over {OUTSIDE}"]
        if OUTSIDE in after and after[OUTSIDE] != before[OUTSIDE]:
            wrong.insert(0, "written through the link")
        return finding("FAULT" if wrong else "ok", f"said nothing: {'; '.join(wrong[:3])}" if wrong else "")
    if ended.sentence is None:
        return finding("FAULT", str(ended))
    if not any(part in ended.sentence for part in (inside.name, str(inside.parent))):
        return finding("FAULT", f"does not name the file: {ended.sentence}")
    later = {"written", "best"} & {*inside.parts}  # read in the middle of a run, or at its end
    refused_first = name.startswith("train") and not later
    if refused_first and (changed := differences(before, after)):
        return finding("FAULT", f"changed the folder ({changed[0]}): {ended.sentence}")
    return finding("sentence", ended.sentence)
