"""Hostile configs, overrides and command lines.

Outcomes: sentence, the command ends with status 2 and one short sentence, within 30 s and 2 GB, and writes no file
outside; ok, the input may be accepted and is. Everything else is a fault.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.attacks import child
from tools.attacks.cases import CONFIG, SUMS, Case, Words, tree
from tools.attacks.findings import Finding, spread

MAX_SECONDS, MAX_MEMORY, MAX_MESSAGE, MAX_WORD = 30, 2 * 2**30, 1000, 250
"""Bounds of a refusal: seconds, bytes, and characters of its message and of each word in it."""
LONG = "x" * 5000
DIGITS = "9" * 5000
LOOP = "{% for a in range(10**9) %}x{% endfor %}"


@dataclass(frozen=True)
class Hostile:
    """One command with hostile input."""

    name: str
    command: Words
    files: dict[str, bytes] = field(default_factory=dict)
    may_work: bool = False
    """Whether the command may accept the input, if it then ends in time."""


REFUSED = r"""
optim.lr:  .inf | .nan | -1 | 0 | [1] | true | {a: 1} | fast
optim.betas:  [.9,.99,.1] | [.9,.nan] | [.9,1.0]
optim.eps:  .nan
optim.weight_decay:  .inf
optim.max_grad_norm:  .nan
optim.warmup:  -1
optim.final_lr:  .nan
optim.tokens_per_batch:  0
decode.temperature:  .nan | -1 | .inf
decode.guidance:  -3
decode.suppress:  [-5] | [99999999999]
decode.length:  0 | -4 | 1000000000 | 1e9 | DIGITS
decode.block_length:  0 | 512
decode.batch_size:  0
decode.top_p:  0 | .nan
decode.top_k:  -1
decode.tokens_per_step:  0 | -2
decode.steps:  1000000000 | -1
method.rollout.temperature:  -1 | .nan
method.rollout.top_p:  0
method.rollout.problems:  0 | -3 | 1000000000000
method.rollout.attempts:  0 | 1000000000000
method.rollout.passes:  0
method.rollout.top_k:  -1
method.contexts.ratio:  0.5
method.contexts:  5 | []
method.teacher:  {name: ema, decay: .nan} | {name: ema, decay: 2} | {name: snapshot, every: 0}
method.teacher:  {name: snapshot, every: -1}
method:  [] | null | LONG
method.name:  null | LONG
method.clip:  -1
method.divergence:  {name: jsd, beta: .nan}
method.rollout.horizon:  {name: truncated, ratio: .nan} | {name: truncated, ratio: 0}
seed:  -1 | DIGITS | .nan | 1.5 | {a: 1, a: 2} | [ | { | *a | &a [*a] | ' | !!python/name:os.system | !!binary x
seed:  OPEN | LONG
updates:  0 | -1 | .inf | 1.5 | 99999999999999999999
max_prompt:  0 | -1
eval.every:  -1
eval.problems:  0 | -1
eval.collapse:  .nan | 2
eval.temperature:  .nan
eval.attempts:  0 | -1
eval.patience:  -1
eval.schedules:  {a: {steps: -1}} | {a: 5} | {../x: {nope: 1}}
checkpoint.every:  0
checkpoint.keep:  0 | -1
log.samples:  -1
log.samples_every:  0
task.size_train:  -1 | 0
task.empties_min:  0 | .nan
task.empties_max:  99
task.seed:  DIGITS
task.size:  5
task.prompt:  {nope} | '{puzzle' | '{puzzle.__class__}' | '{puzzle!r}'
task:  [] | null | {name: jsonl, data: /dev/zero} | {name: jsonl, data: missing.jsonl} | {name: jsonl, data: .}
task:  {name: jsonl, data: "a\0b"} | {name: jsonl, data: LONG}
task:  {name: jsonl, data: deep.jsonl} | {name: jsonl, data: wide.jsonl} | {name: jsonl}
task:  {name: jsonl, data: half.jsonl} | {name: jsonl, data: binary.jsonl} | {name: jsonl, data: 5}
task:  {name: jsonl, data: sums.jsonl, size_dev: -1} | {name: jsonl, data: sums.jsonl, size_dev: 1e9}
task.name:  [1] | {} | LONG
model.shape.hidden_size:  -1 | 0 | 1000000000
model.shape.num_hidden_layers:  1000000000
model.shape.vocab_size:  -1
model.shape.num_attention_heads:  0 | 3
model.shape.initializer_range:  .nan
model.lora:  {rank: 0} | {rank: -1} | {rank: 2, alpha: .nan} | {rank: 1e9} | {rank: 2, targets: [nope]}
model.lora:  {rank: 2, dropout: .nan} | {rank: 2, dropout: 2}
model.dtype:  float8 | []
model.tokenizer:  '' | /dev/zero | LONG
model.seed:  -1
model.as:  nope
model.quantization:  4bit
run:   | file | file/under | /proc/nothing/here | /dev/null/x | LONG | foreign | "a\0b" | [1] | null
resume:  maybe | []
peers:  {students: []} | {students: [{name: a, domain: b}]} | 5
optim.nope:  1
"""
"""Values that must be refused."""

WORKING = r"""
cache:  "a\0b" | /proc/nothing
optim.lr:  1e30
optim.warmup:  1000000000
task.size_train:  1000000000
task.size_test:  1000000000000
decode.batch_size:  1000000000
optim.tokens_per_batch:  1000000000
log.samples:  1000000000
optim.eps:  0
eval.patience:  1000000000
checkpoint.every:  1000000000
checkpoint.keep:  1000000000
eval.problems:  1000000
run:  run/../other | ümläut
task.prompt:  'pay ${x} {puzzle}' | '{puzzle}\n---\n'
seed:  9007199254740992
decode.top_k:  1000000000
max_prompt:  1000000000
model.seed:  99999999999
"""
"""Values that may be accepted, if the command then ends normally."""

WORDS = ("=x", "x", "..=1", "a..b=1", ".seed=1", "seed.=1", "a[0]=1", "seed[0]=1", "nope=1", "--seed=4", "-x")
WORDS += ("method.contexts.5.ratio=0.1", f"{'a.' * 1000}b=1", f"{LONG}=1")
"""Arguments that are not overrides, or not of a key."""


def _text(**changes: object) -> str:
    return json.dumps(tree(**changes))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
CONFIGS: dict[str, bytes] = {
    "alias bomb": BOMB.encode(),
    "alias bomb in a key": (BOMB + "run: *j\ntask: coin\n").encode(),
    "anchor of itself": b"task: &a {name: *a}\n",
    "list of itself": b"task: coin\nmethod: &m [*m]\n",
    "nested 300 deep": b"task: " + b"[" * 300 + b"]" * 300,
    "nested 100000 deep": b"task: " + b"[" * 100_000 + b"]" * 100_000,
    "mappings 2000 deep": b"{a: " * 2000 + b"1" + b"}" * 2000,
    "5000 digits": f"task: coin\nseed: {DIGITS}\n".encode(),
    "python tag": b"task: !!python/object/apply:os.system ['touch owned']\n",
    "python module tag": b"task: !!python/module:os\n",
    "binary tag": b"task: !!binary aGVsbG8=\n",
    "set and pairs": b"task: !!set {a, b}\nmethod: !!omap [a: 1]\n",
    "dates": b"task: 2001-01-01\nseed: 2001-01-01\n",
    "keys that are no text": b"1: 2\n? [a, b]\n: c\nnull: 3\ntask: coin\n",
    "key null": b"task: {null: 1, name: coin}\n",
    "duplicate key": _text().replace('"seed": 3', '"seed": 3, "seed": 4').encode(),
    "duplicate key inside": _text().replace('"length": 8', '"length": 8, "length": 16').encode(),
    "binary": os.urandom(0) + bytes(range(256)) * 20,
    "UTF-16": _text().encode("utf-16"),
    "lone surrogate": _text().replace('"seed"', '"\\ud800": 1, "seed"').encode(),
    "empty": b"",
    "only a comment": b"# nothing\n",
    "two documents": b"task: coin\n---\ntask: coin\n",
    "a list": b"- task\n",
    "a number": b"5\n",
    "tabs": b"task:\n\tname: coin\n",
    "NUL in run": _text(run="a\0b").encode(),
    "NUL in the model's path": _text(model={"path": "a\0b"}).encode(),
    "long run": _text(run=LONG).encode(),
    "long model path": _text(model={"path": LONG}).encode(),
    "model path is a device": _text(model={"path": "/dev/zero"}).encode(),
    "model path is a fifo": _text(model={"path": "fifo"}).encode(),
    "template is a bomb": _text(
        model={"path": "tiny", "chat_template": "{% for a in range(10**9) %}x{% endfor %}"}
    ).encode(),
    "interpolation of itself": b"task: ${task}\n",
    "many megabytes": b"# " + b"x" * 30_000_000 + b"\ntask: nope\n",
    "a million keys": b"task: {" + b",".join(b"k%d: 1" % i for i in range(60_000)) + b"}\n",
}
"""Contents of a config that must be refused."""

SMALL = ("eval.final_problems=2", "decode.length=8")
ODD_SCHEDULE = "eval.schedules={a: {suppress: [9999999]}}"
COMMANDS: dict[str, Words] = {
    "config is a device": ("train", "/dev/zero"),
    "config is a fifo": ("train", "fifo"),
    "config is a folder": ("train", "."),
    "config is missing": ("train", "missing.yaml"),
    "config has a long name": ("train", LONG),
    "config has no name": ("train", ""),
    "eval of a device": ("eval", "/dev/zero", "--task", "coin"),
    "eval of nothing": ("eval", "missing", "--task", "coin"),
    "eval of a long name": ("eval", LONG, "--task", "coin"),
    "eval with no attempts": ("eval", "tiny", "--task", "coin", "--attempts", "0"),
    "eval with negative attempts": ("eval", "tiny", "--task", "coin", "--attempts", "-1"),
    "eval with huge attempts": ("eval", "tiny", "--task", "coin", "--attempts", DIGITS),
    "eval into a file": ("eval", "tiny", "--task", "coin", "--out", "file", *SMALL),
    "eval into a long name": ("eval", "tiny", "--task", "coin", "--out", LONG, *SMALL),
    "eval suppresses a token that no model has": (
        "eval",
        "tiny",
        "--task",
        "coin",
        "decode.suppress=[9999999]",
        *SMALL,
    ),
    "eval suppresses it in another schedule": ("eval", "tiny", "--task", "coin", ODD_SCHEDULE, *SMALL),
    "eval of a recipe in one word": ("eval", "recipe", "--task", "sudoku", "max_prompt=0"),
    "sample suppresses a token that no model has": (
        "sample",
        "tiny",
        "hello",
        "--task",
        "coin",
        f"decode.suppress=[{2**40}]",
    ),
    "eval compares devices": ("eval", "--compare", "/dev/zero", "/dev/zero"),
    "init from a device": ("init", "--model", "tiny", "--data", "/dev/zero"),
    "init of a device": ("init", "--model", "/dev/zero", "--data", "sums.jsonl"),
    "init into a long name": ("init", "--model", "tiny", "--data", "sums.jsonl", "--out", f"{LONG}.yaml"),
    "grade of a device": ("grade", "/dev/zero", "--task", "coin"),
    "grade of deep JSON": ("grade", "deep.jsonl", "--task", "coin"),
    "grade of garbage": ("grade", "binary.jsonl", "--task", "coin"),
    "grade into a file": ("grade", "sums.jsonl", "--task", "coin", "--out", "file"),
    "grade into a long name": ("grade", "sums.jsonl", "--task", "coin", "--out", LONG),
    "grade into a deep path": ("grade", "sums.jsonl", "--task", "coin", "--out", "a/" * 1900),
    "show for no processes": ("show", CONFIG, "--processes", "0"),
    "show for negative processes": ("show", CONFIG, "--processes", "-1"),
    "show for huge processes": ("show", CONFIG, "--processes", DIGITS),
    "export of nothing": ("export", "missing", "--to", "merged", "out"),
    "sample of nothing": ("sample", "missing", "hello"),
    "sample of a device": ("sample", "/dev/zero", "hello", "--task", "coin"),
}


def all_hostile() -> list[Hostile]:
    """Every hostile command: overrides for `train`, and for `show` where a number is large."""
    refused, working = [*_overrides(REFUSED), *WORDS], [*_overrides(WORKING), "optim[lr]=1"]
    hostile = []
    for text in (*refused, *working):
        may_work, large = text in working, "000000" in text or "1e9" in text
        hostile.append(Hostile(f"train {text:.50}", ("train", CONFIG, "run=run", text), may_work=may_work))
        if large:
            hostile.append(Hostile(f"show {text:.50}", ("show", CONFIG, text), may_work=True))
    for name, content in CONFIGS.items():
        run = () if " run" in name else ("run=run",)
        hostile += [
            Hostile(f"{word}: {name}", (word, "hostile.yaml", *run), {"hostile.yaml": content})
            for word in ("train", "show")
        ]
    return hostile + [Hostile(name, words) for name, words in COMMANDS.items()]


def _overrides(table: str) -> list[str]:
    lines = (line.partition(":  ") for line in table.strip().splitlines())
    overrides = [f"{key}={value}" for key, _, values in lines for value in values.split(" | ")]
    return [text.replace("LONG", LONG).replace("DIGITS", DIGITS).replace("OPEN", "[" * 3000) for text in overrides]


def prepare(folder: Path) -> None:
    """Write the files that the commands name."""
    Case("hostile", tree(eval={"problems": 2})).prepare(folder, "")
    (folder / "file").write_text("a file\n")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("not to be lost\n")
    (folder / "sums.jsonl").write_text(SUMS)
    (folder / "deep.jsonl").write_bytes(b"[" * 100_000 + b"]" * 100_000 + b"\n")
    (folder / "wide.jsonl").write_text('{"question": "' + "1" * 5_000_000 + '", "answer": ' + DIGITS + "}\n")
    (folder / "half.jsonl").write_text(SUMS[:-20])
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    (folder / "recipe").mkdir()
    (folder / "recipe" / "recipe.yaml").write_text("task: coin\n")
    os.mkfifo(folder / "fifo")


def attack(folder: Path, points: int | None = None) -> Iterator[Finding]:
    """Run every hostile command, or ``points`` of them, each in a new folder."""
    commands = all_hostile()
    for number in spread(len(commands), points):
        yield judge(commands[number], folder)


def judge(hostile: Hostile, folder: Path) -> Finding:
    """Run one hostile command in a new folder."""
    work = folder / "hostile"
    prepare(work)
    try:
        for name, content in hostile.files.items():
            (work / name).write_bytes(content)
        ended = child.run(hostile.command, work, seconds=MAX_SECONDS)
        left = {path.name for path in work.iterdir()}
    finally:
        shutil.rmtree(work)
    wrong = _wrong(hostile, ended, left)
    if wrong:
        return Finding("configs", "hostile", hostile.name, "FAULT", f"{wrong}: {ended}")
    return Finding("configs", "hostile", hostile.name, "ok" if ended.status == 0 else "sentence", ended.sentence or "")


def _wrong(hostile: Hostile, ended: child.Ended, left: set[str]) -> str | None:
    """What is wrong with the end of a hostile command; None if nothing is."""
    usage = ended.status == 2 and ended.err.startswith("usage: ")
    message = ended.err.splitlines()[-1] if usage else ended.sentence
    if ended.status is None:
        return f"not done in {MAX_SECONDS} s"
    if ended.memory > MAX_MEMORY:
        return f"took {ended.memory / 2**30:.1f} GB"
    if "owned" in left:
        return "it ran what was written"
    if hostile.may_work:
        return None if ended.status == 0 or message else "no sentence"
    if ended.status == 0:
        return "accepted"
    if message is None or ended.status != 2:
        return "no sentence, or not status 2"
    if len(message) > MAX_MESSAGE or max(map(len, message.split())) > MAX_WORD:
        return f"{len(message)} characters, which repeat the input"
    return None
