"""Whole runs whose hints come from a real server that fails: nothing is lost, asked twice, or different for it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dllm_sd.cli.main import main
from dllm_sd.config import build_config
from dllm_sd.errors import Stopped
from dllm_sd.randomness import make_key
from dllm_sd.training.trainer import Trainer
from tests.writers.service import FAULTS, Fault, Service, body, completion, running

UPDATES, ASKED = 3, 4
"""Updates, and texts that each asks for: fewer than make a server count as down."""
HINT = {"template": "{question}({hint})"}
METHODS: dict[str, dict[str, Any]] = {
    "rcsd": {"rollout": {"problems": 4}, "contexts": {"0": {**HINT, "lines": True, "prompt": "{question}"}}},
    "step_align": {"rollout": {"problems": 4}, "contexts": {"0": {**HINT, "prompt": "{question}{truth}{trace}"}}},
    "op_co_distill": {
        "rollout": {"problems": 2, "attempts": 2},
        "contexts": {"0": {**HINT, "solution": "{hint}", "comment": "{hint}", "anchored": False}},
        "support": {"k": 8},
    },
}
KINDS = ("diffusion", "autoregressive")
Pair = tuple[str, str]
QUICK = [*zip(METHODS, ("autoregressive", *KINDS), strict=True)]
"""Each method once and each backbone, for the first tier."""


def pairs(first: Sequence[Pair], every: Sequence[Pair] = (*product(METHODS, KINDS),)) -> pytest.MarkDecorator:
    """Pairs as the cases of a test, of which ``first`` are in the first tier."""
    cases = [pytest.param(pair, marks=() if pair in first else pytest.mark.slow) for pair in every]
    return pytest.mark.parametrize("pair", cases, ids=" on ".join)


USELESS = {"rcsd": "empty", "step_align": "no_steps", "op_co_distill": "empty"}
"""The reason for which an answer that is nothing but thought is dropped."""


class Script(Service):
    """Answers with a step, a function of the question; what goes wrong is a function of the request and of the try."""

    def __init__(self, plan: Callable[[int, int, int], str | None] = lambda key, place, tries: None) -> None:
        """``plan(key, place, tries)`` names the fault of a request that is the `place`-th one; all count from 0."""
        super().__init__()
        self.plan = plan
        self.tries: dict[tuple[str, int], int] = {}
        self.hit: Counter[str] = Counter()

    def fault(self, text: str, body: Any) -> Fault | None:
        request = (text, body["seed"])
        tries = self.tries[request] = self.tries.get(request, -1) + 1
        name = self.plan(make_key(*request), list(self.tries).index(request), tries)
        if name is None:
            return None
        self.hit[name] += 1
        return BREAKS[name]

    def reply(self, question: str) -> str:
        digits = make_key(question)
        return f"<step_1>{digits % 89}</step_1><answer>{digits % 7}</answer>"


REASONS = {name: FAULTS[name][0] for name in ("slow", "dropped", "500", "half_a_json", "invalid_utf8")}
BREAKS: dict[str, Fault] = {
    **{name: FAULTS[name][1] for name in REASONS},
    "thought": body(completion("<think>7</think> \n")),
}


def tree_of(
    pair: Pair, run: Path, folder: Path, server: Service, tolerance: float = 0.0, **writer: Any
) -> dict[str, Any]:
    """The config of a run with the data of a folder and a writer behind a server."""
    name, kind = pair
    method = json.loads(json.dumps({"name": name, **METHODS[name]}))
    asked = {"name": "server", "url": server.url, "model": "m", "backoff": 0.0, **writer}
    method["contexts"]["0"]["writing"] = {"tolerance": tolerance, "writer": asked}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = {"random_init": True, "as": kind, "tokenizer": "tiny", "dtype": "float64"}
    decode = {"diffusion": {"length": 8, "block_length": 4}, "autoregressive": {"length": 8}}
    return {
        "run": str(run),
        "seed": 5,
        "updates": UPDATES,
        "model": {**model, "shape": {**shape, "initializer_range": 0.3}},
        "task": {"name": "jsonl", "data": str(folder / "data.jsonl"), "size_dev": 1},
        "decode": decode[kind],
        "method": method,
        "optim": {"lr": 0.02, "weight_decay": 0.0},
        "eval": {"every": 0, "final_problems": 0},
        "checkpoint": {"every": 1, "keep": 9},
        "log": {"progress": False, "trackers": [], "samples_every": 1},
    }


def train(tree: dict[str, Any], **changes: Any) -> Path:
    Trainer(build_config({**tree, **changes})).train()
    return Path(tree["run"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Holds the data and the runs of a healthy server, each made once."""
    made = tmp_path_factory.mktemp("faulty")
    rows = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(1, 41)]
    (made / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        patch.delenv("OPENAI_API_KEY", raising=False)
        yield made


def healthy_run(pair: Pair, folder: Path) -> Path:
    """The run of a pair with a server that never fails."""
    run = folder / "-".join(pair)
    if not run.exists():
        with running(Script()) as server:
            train(tree_of(pair, run, folder, server))
            assert Counter(server.tries.values()) == {0: UPDATES * ASKED}
    return run


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def column(run: Path, key: str) -> list[Any]:
    return [line.get(key, 0) for line in lines_of(run)[1:]]


def assert_same(one: Path, other: Path) -> None:
    """Metrics without times and what stood on the disk, samples, weights, optimizer and teachers, to the last bit."""
    first, second = (
        [{k: v for k, v in line.items() if not k.startswith(("time/", "writers/cached"))} for line in lines_of(run)]
        for run in (one, other)
    )
    assert first == second
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    last = [run / "checkpoints" / f"{UPDATES:06d}" for run in (one, other)]
    names = sorted(file.name for file in last[0].glob("*.safetensors"))
    assert names == sorted(file.name for file in last[1].glob("*.safetensors"))
    assert "model.safetensors" in names
    for name in names:
        x, y = (load_file(path / name) for path in last)
        assert x.keys() == y.keys()
        assert all(torch.equal(value.nan_to_num(7.0), y[key].nan_to_num(7.0)) for key, value in x.items()), name


def passing(key: int, place: int, tries: int) -> str | None:
    """Every text fails at first, once or twice; every way comes, the slow one once."""
    if place == tries == 0:
        return "slow"
    return ["dropped", "500", "half_a_json", "invalid_utf8"][(place + tries) % 4] if tries <= key % 2 else None


@pairs(QUICK[1:2])
@pytest.mark.slow
def test_faults_that_pass_change_nothing_and_a_second_run_asks_for_nothing(
    pair: Pair, folder: Path, tmp_path: Path
) -> None:
    healthy, cache, options = healthy_run(pair, folder), str(tmp_path / "written"), {"timeout": 0.5, "retries": 6}
    with running(Script(passing)) as server:
        run = train(tree_of(pair, tmp_path / "first", folder, server, **options), cache=cache)
        assert_same(run, healthy)
        assert column(run, "update") == [1, 2, 3]
        assert column(run, "writers/written") == [ASKED] * UPDATES
        assert column(run, "writers/cached") == column(run, "rollouts/no_hint") == [0] * UPDATES
        assert column(run, "rollouts/kept") == [ASKED] * UPDATES
        assert not any("dropped" in key for line in lines_of(run) for key in line)
        assert server.hit.keys() == REASONS.keys()
        assert len(server.tries) == UPDATES * ASKED
        assert all(tries >= 1 + make_key(*request) % 2 for request, tries in server.tries.items())
        server.seen.clear()
        again = train(tree_of(pair, tmp_path / "second", folder, server, **options), cache=cache)
        assert server.seen == []
        assert_same(again, healthy)
        assert column(again, "writers/cached") == column(again, "writers/written") == [ASKED] * UPDATES


def lasting(key: int, place: int, tries: int) -> str | None:
    """Half of the texts fail for good, each way once."""
    return [*BREAKS][place // 2] if place % 2 else None


@pairs(QUICK[2:], QUICK)
def test_every_text_is_kept_or_dropped_and_counted_by_its_reason(pair: Pair, folder: Path, tmp_path: Path) -> None:
    with running(Script(lasting)) as server:
        run = train(tree_of(pair, tmp_path / "run", folder, server, tolerance=0.5, timeout=0.5, retries=1))
    reasons = [*REASONS.values(), USELESS[pair[0]]]
    keys = {key for line in lines_of(run) for key in line if key.startswith("writers/dropped/")}
    assert keys == {f"writers/dropped/{reason}" for reason in reasons}
    dropped = [column(run, f"writers/dropped/{reason}") for reason in reasons]
    assert [sum(counts) for counts in dropped] == [1] * 6
    assert [sum(counts) for counts in zip(*dropped, strict=True)] == [2] * UPDATES
    assert column(run, "writers/written") == [ASKED] * UPDATES
    assert column(run, "writers/cached") == [0] * UPDATES
    assert server.hit == {"thought": 1, **dict.fromkeys(REASONS, 2)}
    out = column(run, "rollouts/no_hint")
    if pair[0] == "op_co_distill":  # a sibling may stand in
        assert all(count <= 2 for count in out)
    else:
        assert out == [2] * UPDATES
    assert [a + b for a, b in zip(column(run, "rollouts/kept"), out, strict=True)] == [ASKED] * UPDATES
    assert column(run, "updates_skipped") == [0] * UPDATES


@pairs(QUICK[1:2])
def test_a_server_that_garbles_too_much_stops_the_run_which_goes_on_when_it_is_mended(
    pair: Pair, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = ["half_a_json", "invalid_utf8"]

    def garbling(key: int, place: int, tries: int) -> str | None:
        """All but one text of the second update."""
        return ways[place % 2] if place > ASKED else None

    healthy, run, config = healthy_run(pair, folder), tmp_path / "run", tmp_path / "config.yaml"
    with running(Script(garbling)) as server:
        tree = tree_of(pair, run, folder, server, tolerance=0.5, retries=1, concurrency=1)
        config.write_text(json.dumps({**tree, "checkpoint": {"every": 9}}))  # the stop alone saves
        assert main(["train", str(config)]) == 1
        said = capsys.readouterr().err
        assert said[said.index("dllm-sd: ") :] == (
            "dllm-sd: 3 of 4 written texts had to be dropped (bad_encoding 2, bad_json 1), more than the share of 0.5 "
            "that method.contexts tolerates; fix the writer, or raise writing.tolerance\n"
        )
        assert column(run, "update") == [1]
        state = json.loads((run / "checkpoints" / "000001" / "state.json").read_text())
        assert state["update"] == 1
        assert not (run / "report.json").exists()
        server.plan = lambda key, place, tries: None
        server.seen.clear()
        assert main(["train", str(config)]) == 0
        assert (run / "report.json").exists()
        assert len(server.seen) == 3 + ASKED  # what was written before the stop stands on the disk
        assert column(run, "writers/cached") == [0, 1, 0]
        assert_same(run, healthy)


def test_a_server_that_is_down_stops_the_run_without_being_asked_for_every_text(folder: Path, tmp_path: Path) -> None:
    with running(Script(lambda key, place, tries: "500")) as server:
        tree = tree_of(("rcsd", "autoregressive"), tmp_path / "run", folder, server, retries=2, concurrency=1)
        tree["method"]["rollout"] = {"problems": 32}
        with pytest.raises(
            Stopped, match=r"^32 of 32 written texts had to be dropped \(server_down 27, http_500 5\), "
        ):
            train(tree)
        assert len(server.seen) == 15
