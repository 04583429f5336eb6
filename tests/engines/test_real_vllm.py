"""A real vLLM server, where one runs: DLLM_SD_VLLM_URL is its address, DLLM_SD_VLLM_MODEL the folder that it serves.

Start it as docs/engines.md says, with ``--dtype float32`` and ``--max-lora-rank 16``.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_sd.config import build_config
from dllm_sd.decoding.decoder import decode
from dllm_sd.decoding.remote import RemoteDecoder, TokenIds
from dllm_sd.decoding.settings import Decoding
from dllm_sd.engines.servers import Servers
from dllm_sd.engines.vllm import Vllm
from dllm_sd.errors import Stopped
from dllm_sd.experience.rollout_engine import RolloutEngine
from dllm_sd.policies.loading import load_policy
from dllm_sd.rollouts.journal import RolloutJournal
from dllm_sd.rollouts.rescoring import rescore
from dllm_sd.training.trainer import Trainer

URL, MODEL = os.environ.get("DLLM_SD_VLLM_URL", ""), os.environ.get("DLLM_SD_VLLM_MODEL", "")
NAME = os.environ.get("DLLM_SD_VLLM_NAME", MODEL)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (URL and MODEL), reason="no vLLM server is named")]

QUESTIONS = [f"Tom has {a} apples and gets {b} more. How many apples does Tom have?" for a in (3, 5, 8) for b in (2, 9)]


def rows(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    lines = [
        {"question": f"Ann has {a} pens and buys {b}. How many pens has Ann?", "solution": f"{a} + {b} = {a + b}"}
        | {"answer": str(a + b)}
        for a in range(2, 12)
        for b in range(2, 10)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def tree(folder: Path, updates: int, **engine: Any) -> dict[str, Any]:
    return {
        "run": str(folder / "run"),
        "seed": 1,
        "updates": updates,
        "model": {"path": MODEL, "lora": {"rank": 16, "alpha": 32}},
        "task": {
            **{"name": "jsonl", "data": str(rows(folder)), "prompt": "{question}", "grader": "number"},
            **{"reference_field": "solution", "size_dev": 8},
        },
        "max_prompt": 300,
        "decode": {
            "length": 32,
            "engine": {"name": "vllm", "url": [URL], "model": NAME, "concurrency": 8, **engine},
        },
        "method": {"name": "opsd", "rollout": {"problems": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0}},
        "optim": {"lr": 5e-4, "warmup": 0, "schedule": "constant"},
        "eval": {"every": 0, "final_problems": 0},
        "checkpoint": {"every": 5},
        "log": {"progress": False, "trackers": []},
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_greedy_tokens_and_their_probabilities_are_those_of_local_decoding(tmp_path: Path):
    policy = load_policy(MODEL)
    prompts = [policy.encode([{"role": "user", "content": question}]) for question in QUESTIONS]
    settings, keys = Decoding(length=32), list(range(len(prompts)))
    servers = Servers(Vllm(url=(URL,), model=NAME))
    ids = TokenIds(policy.end_ids, policy.pad_id, policy.suppress, policy.vocabulary)
    remote = RemoteDecoder(servers, ids, lambda: (NAME, "0"), RolloutJournal(tmp_path, 0))
    started = time.perf_counter()
    theirs = decode(remote, prompts, settings, keys)
    between = time.perf_counter()
    ours = policy.decode(prompts, settings, keys)
    print(f"server {between - started:.1f} s, local {time.perf_counter() - between:.1f} s")
    assert torch.equal(theirs.tokens, ours.tokens)
    assert theirs.logp is not None
    assert ours.logp is not None
    torch.testing.assert_close(theirs.logp, ours.logp, atol=1e-3, rtol=0, equal_nan=True)
    gap = (rescore(policy.module, theirs.select(torch.tensor([0])), 0.0) - theirs.logp[:1]).abs()
    assert float(gap[~gap.isnan()].max()) < 1e-3


@pytest.mark.parametrize("lag", [0, 1])
def test_the_gap_stays_small_while_the_adapter_moves(tmp_path: Path, lag: int):
    settings = tree(tmp_path, 10)
    settings["method"]["rollout"]["lag"] = lag
    Trainer(build_config(settings)).train()
    lines = metrics(tmp_path)[1:]
    gaps = [line["engine/logp_gap_max"] for line in lines]
    print("engine/logp_gap_max", [f"{gap:.1e}" for gap in gaps], "loss", [f"{line['loss']:.3f}" for line in lines])
    assert len(gaps) == 10
    assert max(gaps) < 1e-3


def test_a_run_whose_adapter_is_not_loaded_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = RolloutEngine._write

    def write_first(self: RolloutEngine, folder: Path) -> None:
        """Every version is the initial adapter."""
        live = {name: value for name, value in self.policy.module.named_parameters() if "lora_B" in name}
        kept = {name: value.detach().clone() for name, value in live.items()}
        with torch.no_grad():
            for value in live.values():
                value.zero_()
        write(self, folder)
        with torch.no_grad():
            for name, value in live.items():
                value.copy_(kept[name])

    monkeypatch.setattr(RolloutEngine, "_write", write_first)
    with pytest.raises(Stopped, match="does not decode with the student's weights"):
        Trainer(build_config(tree(tmp_path, 10))).train()
    print("stopped after", [line["update"] for line in metrics(tmp_path)])
    assert [line["update"] for line in metrics(tmp_path)] == [0, 1]
