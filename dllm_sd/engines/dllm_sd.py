"""Servers of ``dllm-sd serve`` as the engine: the same sampler on another machine, for both backbones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dllm_sd.engines.engine import CompletionRequest, RemoteEngine
from dllm_sd.trajectory import NEVER, Trajectory
from dllm_sd.trajectory_json import generate_body, trajectory_from_json


@dataclass(frozen=True)
class DllmSd(RemoteEngine):
    """Servers of ``dllm-sd serve``: with equal keys a rollout equals a local one bit for bit."""

    denoises: ClassVar[bool] = True
    takes_all_weights: ClassVar[bool] = True
    loading: ClassVar[str] = "with --allow-loading"

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
        trajectory = trajectory_from_json(answer, request.prompt, request.decode["length"], request.vocabulary)
        _refuse_other_model(trajectory, request)
        _refuse_other_decoding(trajectory, request)
        return trajectory

    def load(self, name: str, folder: str, adapter: bool) -> tuple[str, dict[str, Any]]:
        """Replace the weights that requests of ``name`` decode with."""
        if adapter:
            return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder, "load_inplace": True}
        return "/v1/load_weights", {"name": name, "path": folder}

    def unload(self, name: str, adapter: bool) -> tuple[str, dict[str, Any]] | None:
        """Forget an adapter; weights of a whole model are replaced by the next ones."""
        return ("/v1/unload_lora_adapter", {"lora_name": name}) if adapter else None


def _refuse_other_model(trajectory: Trajectory, request: CompletionRequest) -> None:
    """Refuse the completion of a model that is not the trainer's, or that blocks are counted differently for."""
    for name in ("causal", "block_length", "blocks_of_prompt", "mask_id", "pad_id", "end_ids"):
        theirs, ours = getattr(trajectory, name), getattr(request, name)
        if (sorted(theirs) != sorted(ours)) if name == "end_ids" else theirs != ours:
            raise ValueError(f"its {name} is {theirs!r:.60} where the trainer has {ours!r:.60}; serve the same model")


def _refuse_other_decoding(trajectory: Trajectory, request: CompletionRequest) -> None:
    """Refuse a completion without log-probabilities, with tokens that are banned, or that breaks off."""
    if trajectory.logp is None:
        raise ValueError("its logp is null, and rollouts are learnt from with the log-probability of each token")
    revealed = trajectory.reveal_step[0] != NEVER
    if wrong := sorted({*trajectory.tokens[0][revealed].tolist()} & {*request.banned}):
        raise ValueError(f"it holds token {wrong[0]}, which the model lacks or decode.suppress bans")
    wanted = len(revealed) if request.stop_after is None else 1
    if request.causal:
        wanted = min(request.steps, len(revealed))
    if (written := int(revealed.sum())) < wanted and not bool(trajectory.ended):
        raise ValueError(f"it ends after {written} of {wanted} tokens without an end token")
