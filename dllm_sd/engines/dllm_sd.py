"""Servers of ``dllm-sd serve`` as the engine: the same sampler on another machine, for both backbones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dllm_sd.engines.engine import CompletionRequest, RemoteEngine
from dllm_sd.trajectory import Trajectory
from dllm_sd.trajectory_json import generate_body, trajectory_from_json


@dataclass(frozen=True)
class DllmSd(RemoteEngine):
    """Servers of ``dllm-sd serve``: with equal keys a rollout equals a local one bit for bit."""

    denoises: ClassVar[bool] = True
    takes_all_weights: ClassVar[bool] = True

    def check(self, decode: Mapping[str, Any], key: str) -> None:
        """All settings are the server's too."""

    def ask(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        """A canvas."""
        settings = {**request.decode, "suppress": list(request.banned)}
        return "/generate", generate_body(request.prompt, request.key, settings, request.stop_after, request.model)

    def read(self, answer: Any, request: CompletionRequest) -> Trajectory:
        """The canvas, the step of each position and its log-probability."""
        if not isinstance(answer, dict):
            raise ValueError("the answer is not a JSON object")
        if answer.get("model") != request.model:
            raise ValueError(f"the answer is of {answer.get('model')!r:.80}, not of {request.model!r:.80}")
        return trajectory_from_json(answer, request.prompt, request.decode["length"], request.vocabulary)

    def load(self, name: str, folder: str, adapter: bool) -> tuple[str, dict[str, Any]]:
        """Replace the weights that requests of ``name`` decode with."""
        if adapter:
            return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder, "load_inplace": True}
        return "/v1/load_weights", {"name": name, "path": folder}

    def unload(self, name: str, adapter: bool) -> tuple[str, dict[str, Any]] | None:
        """Forget an adapter; weights of a whole model are replaced by the next ones."""
        return ("/v1/unload_lora_adapter", {"lora_name": name}) if adapter else None
