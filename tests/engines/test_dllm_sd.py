"""Training through ``dllm-sd serve``: the run is the one that decodes by itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.config import build_config
from dllm_sd.errors import InputError
from dllm_sd.experience.rollout_engine import check_servers
from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.model import Model
from dllm_sd.training.trainer import Trainer
from tests.serving.conftest import service_of
from tests.tiers import later

served = pytest.importorskip("tests.serving.served", exc_type=ImportError)

DIFFUSION = {
    "model": {"path": "tiny"},
    "decode": {"length": 12, "block_length": 6, "tokens_per_step": 2},
    "method": {"name": "d_opsd", "rollout": {"problems": 3, "attempts": 2}, "gate": "all"},
}
CAUSAL = {
    "model": {"path": "tiny_ar", "lora": {"rank": 4}},
    "decode": {"length": 12, "batch_size": 1},
    "method": {
        "name": "opsd",
        "rollout": {"problems": 4},
        "contexts": [{"name": "reference", "template": "({hint}){question}"}],
    },
}


def tree(run: Path, case: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": str(run),
        "seed": 1,
        "updates": 2,
        "task": {"name": "sudoku", "prompt": "{puzzle}:", "answer": "{steps}\n{solution}", "size_train": 64},
        "optim": {"lr": 0.01, "warmup": 0, "schedule": "constant"},
        "eval": {"every": 2, "problems": 2, "final_problems": 0},
        "checkpoint": {"every": 1},
        "log": {"progress": False, "trackers": []},
        **case,
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if not key.startswith(("time/", "engine/"))} for line in lines]


def test_guidance_is_refused_since_the_check_of_rollouts_knows_none(tmp_path: Path):
    decode = {**DIFFUSION["decode"], "engine": {"name": "dllm_sd", "url": ["http://127.0.0.1:1"], "model": "served"}}
    config = tree(tmp_path / "run", {**DIFFUSION, "decode": {**decode, "guidance": 0.5}})
    with pytest.raises(InputError, match=r"^decode\.guidance is not among the log-probabilities"):
        Trainer(build_config(config))


@pytest.mark.parametrize(
    ("changes", "allows", "words"),
    [
        ({}, False, r"takes no weights \(http_403: .*start it with --allow-loading"),
        ({"max_prompt": 570}, True, r"reads 576 tokens, but max_prompt and decode\.length are 582 together"),
        ({"max_prompt": 9, "decode": {"length": 516}}, True, r"reads completions of 512 tokens, but .* is 516; .* 516"),
        ({"max_prompt": 65}, True, None),
        ({}, True, None),
    ],
)
def test_a_server_that_cannot_serve_the_run_is_refused_at_the_start(
    diffusion_service: Any, tmp_path: Path, changes: dict[str, Any], allows: bool, words: str | None
):
    with served.serving(diffusion_service(), allow_loading=allows) as server:
        engine = {"name": "dllm_sd", "url": [f"http://127.0.0.1:{server.port}"], "model": "served"}
        settings: Any = {**tree(tmp_path / "run", DIFFUSION), "max_prompt": 64, **changes}
        settings["decode"] = {**DIFFUSION["decode"], **changes.get("decode", {}), "engine": engine}
        if words is None:
            notes = check_servers(build_config(settings))
            assert len(notes) == (settings["max_prompt"] == 65)
            return
        with pytest.raises(InputError, match=words):
            check_servers(build_config(settings))


@pytest.fixture(scope="module")
def diffusion_service() -> Any:
    """Makes services of one policy."""
    model = Model(path="tiny")
    policy = build_policy(model)
    return lambda: service_of(policy, model, name="served")


@pytest.mark.parametrize("case", [DIFFUSION, *later(CAUSAL)], ids=["diffusion, all weights", "autoregressive, LoRA"])
def test_a_run_through_a_server_is_the_local_run(tmp_path: Path, case: dict[str, Any]):
    Trainer(build_config(tree(tmp_path / "local", case))).train()
    model = Model(path=case["model"]["path"])
    service = service_of(build_policy(model), model, name="served")
    with served.serving(service, allow_loading=True) as server:
        engine = {"name": "dllm_sd", "url": [f"http://127.0.0.1:{server.port}"], "model": "served", "concurrency": 1}
        remote = {**case, "decode": {**case["decode"], "engine": engine}}
        Trainer(build_config(tree(tmp_path / "remote", remote))).train()
        (name,) = server.service.weights.names  # an adapter is forgotten when the run ends
        assert name == "served" if "lora" in case["model"] else name.endswith("-2")
    assert metrics(tmp_path / "remote") == metrics(tmp_path / "local")
    lines = [json.loads(line) for line in (tmp_path / "remote" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["engine/logp_gap_max"] for line in lines[1:]) < 1e-4
