"""vLLM as the engine of an autoregressive model: token ids in, token ids and sampled log-probabilities out.

The server is started with ``--enable-lora`` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. At a temperature other than 0
and 1 it needs ``--logprobs-mode processed_logprobs`` too, since raw log-probabilities are those of temperature 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dllm_sd.engines.engine import CompletionRequest, RemoteEngine, integers, same_prompt
from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.trajectory import Trajectory, left_pad, left_to_right

UNLIKELY = -100.0
"""The smallest bias of a logit that the OpenAI API allows."""

UNCHANGED = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What else changes the distribution of tokens. It is sent, since the server takes what is missing from the model's
`generation_config.json`, and its log-probabilities are those before penalties."""


@dataclass(frozen=True)
class Vllm(RemoteEngine):
    """vLLM servers (in TRL: `use_vllm`, `vllm_mode="server"`, `vllm_server_base_url`).

    For autoregressive models with LoRA. The log-probabilities of the drawn tokens become `Trajectory.logp`, so that
    `trust: {name: importance_cap}` corrects what engine and trainer compute differently (in TRL:
    `vllm_importance_sampling_correction`).
    """

    loading: ClassVar[str] = "with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"

    def check(self, decode: Mapping[str, Any], key: str) -> None:
        """Refuse filters at a temperature for which the server returns log-probabilities behind the filters."""
        if decode["temperature"] not in (0.0, 1.0) and (decode["top_k"] or decode["top_p"] < 1):
            raise InputError(
                f"{key}.top_k and top_p need a temperature of 1 under decode.engine vllm, which returns the "
                "log-probabilities before the filters only then; leave them out, or set the temperature to 1"
            )

    def ask(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        """A completion of token ids."""
        decode = request.decode
        body: dict[str, Any] = {
            "model": request.model,
            "prompt": list(request.prompt),
            "max_tokens": request.steps,
            "temperature": decode["temperature"],
            "top_p": decode["top_p"],
            "top_k": decode["top_k"] or -1,
            **UNCHANGED,
            "seed": make_key("vllm", request.key) >> 1,
            "stop_token_ids": list(request.end_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        }
        if request.banned:
            body["logit_bias"] = {str(token): UNLIKELY for token in request.banned}
        return "/v1/completions", body

    def read(self, answer: Any, request: CompletionRequest) -> Trajectory:
        """The tokens up to the first stop id, with the log-probability of each."""
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list) or len(answer["choices"]) != 1:
            raise ValueError("the answer does not hold one choice")
        if answer.get("model") != request.model:
            raise ValueError(f"the answer is of {answer.get('model')!r:.80}, not of {request.model!r:.80}")
        choice = answer["choices"][0]
        if not isinstance(choice, dict) or choice.get("token_ids") is None:
            raise ValueError("the answer holds text without token ids (return_token_ids); use vLLM 0.10.2 or later")
        same_prompt(request.prompt, choice.get("prompt_token_ids"))
        tokens = integers(choice["token_ids"], "the completion")
        ends = [i for i, token in enumerate(tokens) if token in request.end_ids]
        if not tokens or len(tokens) > request.steps or ends[:1] not in ([], [len(tokens) - 1]):
            raise ValueError(
                f"the completion has {len(tokens)} tokens of at most {request.steps}, with the first stop id at "
                f"{ends[:1] or 'none'}"
            )
        if not ends and len(tokens) < request.steps:
            raise ValueError(f"the completion ended after {len(tokens)} of {request.steps} tokens without a stop id")
        if wrong := [token for token in tokens if token in request.banned or token >= request.vocabulary]:
            raise ValueError(f"the completion holds token {wrong[0]}, which the model lacks or decode.suppress bans")
        logp = choice["logprobs"].get("token_logprobs") if isinstance(choice.get("logprobs"), dict) else None
        if not isinstance(logp, list) or len(logp) != len(tokens):
            raise ValueError("the answer lacks the log-probability of each token (logprobs)")
        if not all(type(x) in (int, float) and math.isfinite(x) and x <= 1e-3 for x in logp):
            raise ValueError("the log-probabilities are not finite numbers of at most 0")
        return left_to_right(
            left_pad([request.prompt], request.pad_id),
            torch.tensor([tokens]),
            request.decode["length"],
            end_ids=request.end_ids,
            pad_id=request.pad_id,
            logp=torch.tensor([logp], dtype=torch.float32),
        )

    def load(self, name: str, folder: str, adapter: bool) -> tuple[str, dict[str, Any]]:
        """Load an adapter.

        Every version has a name of its own: vLLM keeps the KV cache of prompts by the name of the adapter, and would
        go on with that of the former weights where they are replaced under the same name.
        """
        return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}

    def unload(self, name: str, adapter: bool) -> tuple[str, dict[str, Any]]:
        """Forget an adapter."""
        return "/v1/unload_lora_adapter", {"lora_name": name}
