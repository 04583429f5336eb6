"""Training through a double of vLLM: equal rollouts, every fault, and nothing trained on what is wrong."""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from dllm_sd.config import build_config
from dllm_sd.engines import CompletionRequest, Vllm
from dllm_sd.errors import InputError, Stopped
from dllm_sd.experience.rollout_engine import RolloutEngine, check_servers, tolerance, weights_prefix
from dllm_sd.training.trainer import Trainer
from tests.engines.double import MODEL, Double, Handler


@dataclass
class Plain:
    """A run that no fault disturbed, and what its server saw and kept."""

    run: Path
    seen: list[Any]
    adapters: dict[str, Any]


@pytest.fixture(scope="module")
def plain(shared: Double, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    shared.seen.clear()
    run = tmp_path_factory.mktemp("plain") / "run"
    train(run, shared.url)
    return Plain(run, list(shared.seen), dict(shared.adapters))


def tree(run: Path, *urls: str, **engine: Any) -> dict[str, Any]:
    return {
        "run": str(run),
        "seed": 1,
        "updates": 2,
        "model": {"path": "tiny_ar", "lora": {"rank": 4}},
        "task": {"name": "sudoku", "prompt": "{puzzle}:", "answer": "{steps}\n{solution}", "size_train": 64},
        "decode": {
            "length": 6,
            "engine": {
                **{"name": "vllm", "url": list(urls), "model": MODEL, "backoff": 0.01, "concurrency": 4},
                **engine,
            },
        },
        "method": {
            "name": "opsd",
            "rollout": {"problems": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            "contexts": [{"name": "reference", "template": "({hint}){question}"}],
            "divergence": {"name": "jsd", "beta": 0.5},
            "temperature": 1.0,
        },
        "optim": {"lr": 0.05, "warmup": 0, "schedule": "constant"},
        "eval": {"every": 2, "problems": 2, "final_problems": 0},
        "checkpoint": {"every": 1},
        "log": {"progress": False, "trackers": []},
    }


def train(run: Path, *urls: str, until: int | None = None, **engine: Any) -> list[dict[str, Any]]:
    Trainer(build_config(tree(run, *urls, **engine))).train(until)
    return metrics(run)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def learnt(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a run learnt and scored, without how often a server was asked and the last bits of its scores."""
    assert max(line.get("engine/logp_gap_max", 0.0) for line in lines) < 1e-4
    return [{key: value for key, value in line.items() if not key.startswith("engine/")} for line in lines]


def test_a_run_through_a_server_scores_its_rollouts_as_the_trainer_does(plain: Plain):
    lines = metrics(plain.run)
    gaps = [line["engine/logp_gap"] for line in lines[1:]]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4
    names = [body["lora_name"] for path, body in plain.seen if path == "/v1/load_lora_adapter"]
    assert [name.rsplit("-", 1)[1] for name in names] == ["0", "1", "2"]
    forgotten = [body["lora_name"] for path, body in plain.seen if path == "/v1/unload_lora_adapter"]
    assert [name for name in forgotten if name in names] == names  # former versions, and at the end the last one
    assert not plain.adapters
    adapter = load_file(plain.run / "engine" / names[-1] / "adapter_model.safetensors")
    assert max(float(value.abs().max()) for value in adapter.values()) > 0.01


def test_every_attempt_has_a_seed_of_its_own(plain: Plain):
    completions = [body for path, body in plain.seen if path == "/v1/completions"]
    rollouts = [body for body in completions if body["temperature"] == 1]
    assert len({body["seed"] for body in rollouts}) == len(rollouts) == 8
    assert all(body["prompt"] and body["max_tokens"] == 6 and body["return_token_ids"] for body in rollouts)


def test_nothing_that_changes_the_distribution_is_left_to_the_servers_defaults(plain: Plain):
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    completions = [body for path, body in plain.seen if path == "/v1/completions"]
    assert completions
    assert all(
        body.items() >= neutral.items() and {"temperature", "top_p", "top_k"} <= body.keys() for body in completions
    )


def drawn(batch: int, makers: list[str], checked: int = 4) -> list[tuple[str, Any]]:
    """What `RolloutEngine` scores again of a batch, whose rollouts are numbers."""
    version = f"run-{batch}"
    engine: Any = SimpleNamespace(
        engine=SimpleNamespace(checked=checked), config=SimpleNamespace(seed=1), version=version
    )
    rollouts: Any = [*range(len(makers))]
    return RolloutEngine._sample(engine, rollouts, makers)


def test_the_rollouts_that_are_checked_are_of_every_place_of_a_batch_sooner_or_later():
    seen = set()
    for batch in range(40):
        checked = drawn(batch, ["a"] * 16)
        assert len(set(checked)) == 4
        assert drawn(batch, ["a"] * 16) == checked  # on every process
        seen |= {number for _, number in checked}
    assert seen == {*range(16)}


@pytest.mark.parametrize(
    ("checked", "counts"),
    [(1, {"a": 1, "b": 1, "c": 1}), (4, {"a": 2, "b": 1, "c": 1}), (7, {"a": 4, "b": 2, "c": 1})],
)
def test_every_server_of_a_batch_is_checked_and_as_much_as_the_others(checked: int, counts: dict[str, int]):
    makers = ["a"] * 13 + ["b"] * 2 + ["c"]
    for batch in range(10):
        chosen = drawn(batch, makers, checked)
        assert all(makers[number] == server for server, number in chosen)
        found = Counter(server for server, _ in chosen)
        assert sorted(found.values()) == sorted(counts.values())
        assert found.keys() == counts.keys()


def test_one_server_of_two_that_lies_stops_the_run_at_once(double: Double, tmp_path: Path):
    """With one check a batch it would be the other server's turn in half of them."""
    liar = Double()
    liar.stale = True
    try:
        settings = tree(tmp_path / "run", double.url, liar.url, checked=1, concurrency=1)
        settings["eval"] = {"every": 0, "final_problems": 0}
        settings["method"]["rollout"] |= {"problems": 8}
        with pytest.raises(Stopped, match=f"server at {liar.url} .* does not decode with the student's weights"):
            Trainer(build_config({**settings, "updates": 4})).train()
        assert double.completions
    finally:
        liar.stop()
    assert [line["update"] for line in metrics(tmp_path / "run")] == [0, 1]  # the adapter of update 0 changes nothing


def refuse(status: int) -> Any:
    return lambda handler, body: handler.raw(b"{}", status) or True


def half(handler: Handler, body: Any) -> bool:
    handler.raw(b'{"choices": [', length=13)
    return True


def drop(handler: Handler, body: Any) -> bool:
    handler.raw(b"{", length=400)
    handler.close_connection = True
    return True


@pytest.mark.slow
@pytest.mark.parametrize("fault", [refuse(500), refuse(429), drop], ids=["500", "429", "dropped"])
def test_a_passing_fault_changes_nothing(plain: Plain, double: Double, tmp_path: Path, fault: Any):
    double.faults = [fault] * 3
    faulty = train(tmp_path / "faulty", double.url)
    assert sum(line.get("engine/retried", 0) for line in faulty) > 0
    assert learnt(faulty) == learnt(metrics(plain.run))


def choice(change: Any) -> Any:
    def edit(answer: dict[str, Any]) -> dict[str, Any]:
        change(answer["choices"][0])
        return answer

    return edit


WRONG = {
    "text only": (choice(lambda c: c.pop("token_ids")), "text without token ids"),
    "prompt": (choice(lambda c: c.update(prompt_token_ids=[1, *c["prompt_token_ids"]])), "prompt came back with other"),
    "no prompt": (choice(lambda c: c.pop("prompt_token_ids")), "returned prompt is not a list"),
    "ids": (choice(lambda c: c.update(token_ids=["a"] * len(c["token_ids"]))), "not a token id"),
    "banned": (choice(lambda c: c.update(token_ids=[3, *c["token_ids"][1:]])), "holds token 3"),
    "past the end": (choice(lambda c: c.update(token_ids=[9, *c["token_ids"][1:]])), "first stop id at"),
    "beyond": (choice(lambda c: c.update(token_ids=[10**6, *c["token_ids"][1:]])), "1000000"),
    "short": (choice(lambda c: c.update(token_ids=c["token_ids"][:-1])), "without a stop id|log-probability of each"),
    "version": (lambda answer: {**answer, "model": "another"}, "is of 'another'"),
    "no logprobs": (choice(lambda c: c.pop("logprobs")), "lacks the log-probability"),
    "nan": (choice(lambda c: c["logprobs"].update(token_logprobs=[float("nan")] * len(c["token_ids"]))), "not finite"),
    "no choice": (lambda answer: {**answer, "choices": []}, "one choice"),
}


REQUEST = CompletionRequest(
    prompt=(5, 6),
    key=1,
    model="m",
    version="0",
    decode={"length": 4},
    steps=4,
    stop_after=None,
    end_ids=(9,),
    pad_id=0,
    banned=(3,),
    vocabulary=20,
)


def answered(tokens: list[int]) -> dict[str, Any]:
    one = {"token_ids": tokens, "prompt_token_ids": [5, 6], "logprobs": {"token_logprobs": [-0.5] * len(tokens)}}
    return {"model": "m", "choices": [{"text": "", **one}]}


def test_an_answer_is_the_trajectory_of_its_tokens():
    engine = Vllm(url=("http://localhost",), model="m")
    done = engine.read(answered([4, 7, 9]), REQUEST)
    assert done.tokens.tolist() == [[4, 7, 9, 0]]
    assert done.reveal_step.tolist() == [[0, 1, 2, -1]]
    assert (done.prompt_ids.tolist(), done.length.tolist(), done.ended.tolist()) == ([[5, 6]], [3], [True])
    assert done.logp is not None
    assert done.logp[0, :3].tolist() == [-0.5] * 3
    assert engine.read(answered([4, 7, 4, 4]), REQUEST).ended.tolist() == [False]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_no_trajectory(name: str):
    edit, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        Vllm(url=("http://localhost",), model="m").read(edit(answered([4, 7, 9])), REQUEST)


def test_a_wrong_answer_stops_the_run_and_nothing_is_trained_on_it(double: Double, tmp_path: Path):
    double.edit, words = WRONG["prompt"]
    trainer = Trainer(build_config(tree(tmp_path / "run", double.url) | {"eval": {"every": 0, "final_problems": 0}}))
    with pytest.raises(Stopped, match=words):
        trainer.train()
    assert not [line for line in metrics(tmp_path / "run") if line.get("update", 0) > 0]


def test_half_an_answer_stops_the_run(double: Double, tmp_path: Path):
    double.faults = [half]
    with pytest.raises(Stopped, match="must not be trained on"):
        train(tmp_path / "run", double.url)


def test_an_adapter_that_is_not_active_stops_the_run_and_its_rollouts_are_made_again(double: Double, tmp_path: Path):
    double.stale = True
    words = r"does not decode with the student's weights .* nats a token .* than decode\.engine\.tolerance 0\.001"
    with pytest.raises(Stopped, match=words):
        train(tmp_path / "run", double.url)
    assert [line["update"] for line in metrics(tmp_path / "run")] == [0, 1]  # the adapter of update 0 changes nothing
    double.stale = False
    assert [line["update"] for line in train(tmp_path / "run", double.url)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ({}, 0.001),
        ({"model": {"path": "tiny_ar", "dtype": "float64", "lora": {"rank": 4}}}, 0.001),
        ({"model": {"path": "tiny_ar", "dtype": "bfloat16", "lora": {"rank": 4}}}, 0.05),
        ({"optim": {"autocast": "bfloat16"}}, 0.05),
    ],
)
def test_the_tolerance_is_that_of_the_type_in_which_the_trainer_computes(
    tmp_path: Path, change: dict[str, Any], most: float
):
    settings = tree(tmp_path, "http://127.0.0.1:1")
    assert tolerance(build_config({**settings, **change})) == most
    settings["decode"]["engine"]["tolerance"] = 0.5
    assert tolerance(build_config({**settings, **change})) == 0.5


def test_a_server_with_the_weights_of_another_run_is_refused(double: Double, tmp_path: Path):
    double.served = "dllm-sd-12345678-7"
    with pytest.raises(
        InputError, match=r"model 'small' is not served at .*dllm-sd-12345678-7; .* start the server again"
    ):
        train(tmp_path / "run", double.url)
    double.served = f"{weights_prefix(build_config(tree(tmp_path / 'run', double.url)))}7"
    check_servers(build_config(tree(tmp_path / "run", double.url)))


@pytest.mark.slow
def test_equal_attempts_at_a_temperature_stop_the_run(double: Double, tmp_path: Path):
    double.deaf = True
    settings = tree(tmp_path / "run", double.url)
    settings["method"]["rollout"] |= {"attempts": 4, "until_solved": False, "keep": "all", "temperature": 3.0}
    settings["decode"]["engine"]["tolerance"] = 100.0
    with pytest.raises(Stopped, match="attempts of a batch are equal"):
        Trainer(build_config(settings)).train()


@pytest.mark.slow
def test_one_of_two_servers_is_gone(double: Double, tmp_path: Path):
    gone = Double()
    url = gone.url
    gone.stop()
    with pytest.raises(InputError, match=r"decode\.engine\.url\.1 .* does not answer"):
        train(tmp_path / "refused", double.url, url)


@pytest.mark.slow
def test_a_server_that_goes_away_in_the_middle_loses_no_attempt(double: Double, tmp_path: Path):
    other = Double()
    urls = (double.url, other.url)
    count = 0

    def leave(answer: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 2:  # in the first batch, and the answer is not given any more
            other.stop()
            raise ConnectionAbortedError
        return answer

    other.edit = leave
    lines = train(tmp_path / "run", *urls, retries=6)
    assert [line["rollouts/attempts"] for line in lines[1:]] == [4, 4]
    assert lines[-1]["engine/retried"] > 0


def test_servers_gone_for_good_stop_the_run_and_nothing_is_made_twice(plain: Plain, double: Double, tmp_path: Path):
    whole = metrics(plain.run)
    made: list[Any] = []

    def note(answer: dict[str, Any]) -> dict[str, Any]:
        made.append((answer["model"], tuple(answer["choices"][0]["prompt_token_ids"])))
        if len(made) == 5:  # two of the first evaluation, three of the first batch
            double.faults = [refuse(500)] * 1000
        return answer

    double.edit = note
    with pytest.raises(Stopped, match="finished rollouts are kept"):
        train(tmp_path / "run", double.url, retries=1, concurrency=1)
    double.faults = []
    lines = train(tmp_path / "run", double.url, retries=1, concurrency=1)
    assert learnt(lines) == learnt(whole)
    assert lines[1]["engine/found"] == 3
    assert len(made) == len(set(made)) == 2 + 4 + 4 + 2  # two evaluations, two batches


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_completions_that_it_had(plain: Plain, double: Double, tmp_path: Path):
    whole = metrics(plain.run)
    made: list[Any] = []

    def note(answer: dict[str, Any]) -> dict[str, Any]:
        made.append((answer["model"], tuple(answer["choices"][0]["prompt_token_ids"])))
        return answer

    double.edit = note
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tree(tmp_path / "run", double.url, concurrency=1) | {"checkpoint": {"every": 2}}))
    command = [sys.executable, "-m", "dllm_sd", "train", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while len(made) < 2 + 4 + 2:  # the first evaluation, the first batch, half of the second
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
        process.kill()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "completions since the last checkpoint" in done.stderr
    assert learnt(metrics(tmp_path / "run")) == learnt(whole)
    assert len(made) - len(set(made)) <= 1  # the one in flight when the run was killed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"path": "tiny_ar"}}, r"decode\.engine vllm takes new weights as LoRA adapters only"),
        ({"model": {"path": "tiny", "lora": {"rank": 4}}}, r"decode\.engine vllm decodes autoregressive models only"),
        ({"method": {"name": "spd"}}, r"not those of method\.rollout\.policy"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(double: Double, tmp_path: Path, change: Any, words: str):
    with pytest.raises(InputError, match=words):
        Trainer(build_config({**tree(tmp_path / "run", double.url), **change}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"url": []}, r"decode\.engine\.url is empty"),
        ({"url": ["ftp://x"]}, r"decode\.engine\.url\.0 must be an http"),
        ({"model": ""}, r"decode\.engine\.model is empty"),
        ({"model": "other"}, r"decode\.engine\.model 'other' is not served"),
        ({"key_variable": "sk-1"}, r"decode\.engine\.key_variable is not the name"),
        ({"tolerance": -1.0}, r"decode\.engine\.tolerance"),
        ({"checked": 0}, r"decode\.engine\.checked is 0; give a whole number of at least 1"),
    ],
)
def test_wrong_keys_are_refused(double: Double, tmp_path: Path, engine: Any, words: str):
    with pytest.raises(InputError, match=words):
        Trainer(build_config(tree(tmp_path / "run", double.url, **engine)))


@pytest.mark.parametrize("key", ["decode", "schedules"])
def test_an_evaluation_has_the_engine_of_the_run(tmp_path: Path, key: str):
    settings = tree(tmp_path, "http://localhost:1")
    other = {"engine": "local"}
    settings["eval"][key] = other if key == "decode" else {"slow": other}
    with pytest.raises(InputError, match=rf"^eval\.{key}(\.slow)?\.engine would be another than decode\.engine"):
        build_config(settings)


def test_a_server_that_reads_too_few_tokens_is_refused(double: Double, tmp_path: Path):
    double.longest = 100
    with pytest.raises(InputError, match=r"reads 100 tokens, but max_prompt and decode\.length are 518 together"):
        Trainer(build_config(tree(tmp_path / "run", double.url)))
