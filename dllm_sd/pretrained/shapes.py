"""Shapes of published checkpoints, so that `dllm-sd show` knows their memory before anything is downloaded.

The sizes in their config.json, by hub name. They are never used to train or decode; the files of a checkpoint take
precedence.
"""

from collections.abc import Mapping
from typing import Any

_TRAITS = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936}


def _qwen(kind: str, hidden: int, inner: int, layers: int, heads: int, groups: int, tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups}
    return {"model_type": kind, **_TRAITS, **sizes, "tie_word_embeddings": tied}


def _qwen3(kind: str, hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {**_qwen(kind, hidden, inner, layers, heads, 8, tied), "head_dim": 128}


_LLADA_8B = {
    **{"model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32},
    **{"mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096},
    **{"rms_norm_eps": 1e-5, "rope_theta": 5e5, "weight_tying": False},
}
_SMOLLM2_135M = {
    **{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True},
}
_DREAM_7B = {**_qwen("Dream", 3584, 18944, 28, 28, 4, False), "vocab_size": 152064}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "GSAI-ML/LLaDA-8B-Base": _LLADA_8B,
    "GSAI-ML/LLaDA-8B-Instruct": _LLADA_8B,
    "GSAI-ML/LLaDA-1.5": _LLADA_8B,
    "Dream-org/Dream-v0-Base-7B": _DREAM_7B,
    "Dream-org/Dream-v0-Instruct-7B": _DREAM_7B,
    "JetLM/SDAR-4B-Chat": _qwen3("sdar", 2560, 9728, 36, 32, False),
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": _qwen3("a2d-qwen3", 1024, 3072, 28, 16, True),
    "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": _qwen3("a2d-qwen3", 1024, 3072, 28, 16, True),
    "Qwen/Qwen3-0.6B": _qwen3("qwen3", 1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3("qwen3", 2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": _qwen3("qwen3", 2560, 9728, 36, 32, True),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3("qwen3", 2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": _qwen3("qwen3", 4096, 12288, 36, 32, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen("qwen2", 896, 4864, 24, 14, 2, True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen("qwen2", 1536, 8960, 28, 12, 2, False),
}
