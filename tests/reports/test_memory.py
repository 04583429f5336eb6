from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dllm_sd.config import build_config
from dllm_sd.policies.weights import CheckpointWeights
from dllm_sd.reports.memory import MemoryEstimate, estimate
from dllm_sd.reports.tables import memory_table
from tools.check_memory import rows_of

LLADA = {
    **{"vocab_size": 126_464, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False},
}
PARAMETERS, ADAPTERS = 8_015_581_184, 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 12_288))
LORA = {"rank": 128, "alpha": 64}
BFLOAT16 = {"dtype": "bfloat16"}


@pytest.fixture(scope="module")
def llada() -> nn.Module:
    """The shape of LLaDA-8B, without memory."""
    with torch.device("meta"):
        config = LlamaConfig(**LLADA)
        config.is_causal = False  # pyright: ignore[reportAttributeAccessIssue]
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def needed(llada: nn.Module) -> Callable[..., MemoryEstimate]:
    """The estimate for LLaDA-8B: keys of the config's `model`, other keys, and the processes."""

    def run(
        model: Mapping[str, Any], keys: Mapping[str, Any] | None = None, processes: int = 1, sharded: bool = False
    ) -> MemoryEstimate:
        tree = {"task": {"name": "gsm8k"}, "model": {"path": "llada", **model}, **(keys or {})}
        return estimate(llada, build_config(tree), processes=processes, sharded=sharded)

    return run


def test_the_weights_of_llada_by_hand(needed):
    assert PARAMETERS == 2 * 126_464 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 12_288 + 2 * 4096) + 4096
    full = needed(BFLOAT16)
    assert full.parameters == full.trainable == PARAMETERS
    assert full.weights == full.gradients == full.copies == 2 * PARAMETERS  # the teacher is the base
    assert full.optimizer == 4 * PARAMETERS
    adapted = needed({**BFLOAT16, "lora": LORA})
    assert ADAPTERS == 335_544_320
    assert adapted.parameters == PARAMETERS + ADAPTERS
    assert adapted.trainable == ADAPTERS
    assert adapted.weights == 2 * PARAMETERS + 4 * ADAPTERS  # adapters are in float32
    assert (adapted.gradients, adapted.optimizer, adapted.copies) == (4 * ADAPTERS, 8 * ADAPTERS, 0)


def test_an_average_is_kept_in_float32(needed):
    method = {"name": "d_opsd", "teacher": ["ema"]}
    assert needed(BFLOAT16, {"method": method}).copies == 4 * PARAMETERS
    assert needed({**BFLOAT16, "lora": LORA}, {"method": method}).copies == 4 * ADAPTERS


def test_the_start_of_an_adapter_that_goes_on_is_a_copy_and_the_checkpoint_is_not(needed):
    begun = {**BFLOAT16, "lora": {**LORA, "start": "somewhere"}}
    for at, copies in (("start", 4 * ADAPTERS), ("checkpoint", 0)):
        method = {"name": "d_opsd", "teacher": [{"name": "base", "at": at}]}
        assert needed(begun, {"method": method}).copies == copies
        assert needed({**BFLOAT16, "lora": LORA}, {"method": method}).copies == 0


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_another_checkpoint_that_teaches_is_held_whole_by_every_process(llada, dtype, size):
    method = {"name": "opd", "teacher": [{"name": "checkpoint", "path": "t", "dtype": dtype}]}
    tree = {"task": {"name": "gsm8k"}, "model": {"path": "llada", **BFLOAT16, "lora": LORA}, "method": method}
    config = build_config(tree)
    (weights,) = config.method.models()
    assert isinstance(weights, CheckpointWeights)
    options: list[dict[str, Any]] = [{}, {"processes": 8}, {"processes": 8, "sharded": True}]
    for more in options:
        alone, beside = estimate(llada, config, **more), estimate(llada, config, **more, others={weights: llada})
        assert beside.copies - alone.copies == size * PARAMETERS
        assert beside.weights == alone.weights
        assert beside.optimizer == alone.optimizer


def test_a_teacher_that_is_wider_than_the_student_needs_more_for_its_pass(llada):
    with torch.device("meta"):
        small = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLADA, "hidden_size": 512, "num_hidden_layers": 2}))
    method = {"name": "opd", "teacher": [{"name": "checkpoint", "path": "t"}]}
    config = build_config({"task": {"name": "gsm8k"}, "model": {"path": "llada"}, "method": method})
    (weights,) = config.method.models()
    assert isinstance(weights, CheckpointWeights)
    passes = [estimate(small, config, others={weights: other}).teacher for other in (small, llada)]
    assert passes[0] < passes[1]


def test_the_tokens_and_logits_of_a_micro_batch_by_hand(needed):
    keys = {"max_prompt": 256, "decode": {"length": 256, "tokens_per_step": 2}, "optim": {"tokens_per_batch": 8200}}
    memory = needed({**BFLOAT16, "lora": LORA}, keys)
    assert (memory.tokens, memory.sites) == (16 * 512, 16 * 2)
    logits = 4 * 32 * 126_464
    hidden = 32 * 4096 * 2
    assert memory.losses == 7.5 * logits + hidden  # 7 in float32, and the teacher's in bfloat16
    assert memory.rollout_logits == 2.5 * 2**27 * 4 + 64 * 512 * 4096 * 2  # a chunk, and the last hidden states
    grpo = needed({**BFLOAT16, "lora": LORA}, {**keys, "method": "diffu_grpo"})
    assert grpo.sites == 16 * 256


def test_four_bits_shrink_the_linear_layers_only(needed):
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 12_288)
    memory = needed({**BFLOAT16, "lora": LORA, "quantization": "4bit"})
    assert memory.weights == pytest.approx(linear * 4.127 / 8 + 2 * (PARAMETERS - linear) + 4 * ADAPTERS, abs=64)


def test_processes_share_what_is_sharded_and_gather_it_to_decode(needed):
    alone, many, sharded = needed(BFLOAT16), needed(BFLOAT16, None, 8), needed(BFLOAT16, None, 8, True)
    assert many.resident == alone.resident
    assert many.gradients == 2 * alone.gradients  # DDP's buckets
    for name in ("weights", "gradients", "optimizer", "copies"):
        assert getattr(sharded, name) == getattr(alone, name) // 8
    assert sharded.held == alone.held + 2 * PARAMETERS
    assert sharded.rollouts == alone.rollouts
    assert sharded.activations == alone.activations
    assert 0 < sharded.gathered < 2 * PARAMETERS


def test_what_saves_memory_does_so_in_the_estimate(needed):
    plain = needed({**BFLOAT16, "lora": LORA})
    assert needed({**BFLOAT16, "lora": LORA, "gradient_checkpointing": True}).learning < 0.3 * plain.learning
    assert needed({**BFLOAT16, "lora": LORA}, {"optim": {"tokens_per_batch": 8192}}).learning < 0.7 * plain.learning
    assert needed({**BFLOAT16, "lora": LORA}, {"decode": {"batch_size": 8}}).decoding < 0.2 * plain.decoding
    assert plain.peak == plain.resident + max(plain.learning, plain.decoding)


def test_the_table_names_everything(needed):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(memory_table(needed({**BFLOAT16, "lora": LORA})))
    text = capture.get()
    for words in ("8,351,125,504", "335,544,320", "teacher copies", "activations", "rollouts", "peak", " 17.37 GB"):
        assert words in text


SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 192}
MEASURED = {
    "full float32": {"shape": {**SHAPE, "vocab_size": 20_000}},
    "lora bfloat16, checkpointing": {
        "shape": {**SHAPE, "vocab_size": 500},
        "lora": {"rank": 4},
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_the_estimate_is_within_a_fifth_of_what_is_measured(name, tmp_path: Path):
    for _, what, guess, truth in rows_of(name, {"model": MEASURED[name]}, "cpu", tmp_path):
        assert guess == pytest.approx(truth, rel=0.2), what


def test_a_prompt_that_is_graded_has_sites(needed):
    keys = {"max_prompt": 256, "decode": {"length": 256}, "optim": {"tokens_per_batch": 8192}}
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLADA, "num_hidden_layers": 1}))
    tree = {"task": {"name": "gsm8k"}, "model": {"path": "llada"}, **keys}
    sites = [
        estimate(causal, build_config({**tree, "method": {"name": "spd", "sites": {"prompt": prompt}}})).sites
        for prompt in (False, True)
    ]
    assert sites == [16 * 256, 16 * 511]
