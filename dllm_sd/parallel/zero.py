"""DeepSpeed's ZeRO-2 and ZeRO-3 behind the interface of accelerate: the one file that knows DeepSpeed.

accelerate starts the processes; DeepSpeed gets the optimizer, the sums of gradients and, in stage 3, the weights. The
trainer decides when a step is taken: accelerate's own wrapper would take it inside the last backward, before anybody
can refuse a gradient that is not finite.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.nn import Parameter

from dllm_sd.config import Config
from dllm_sd.errors import InputError

PREFIX = "ACCELERATE_DEEPSPEED_"


def read_stage(config: Config) -> int:
    """The stage that `accelerate launch` was asked for.

    Raises:
        InputError: if the launch or the run asks for what was never seen to work under DeepSpeed.
    """
    stage = os.environ.get(f"{PREFIX}ZERO_STAGE", "2")
    offloads = [os.environ.get(f"{PREFIX}OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")]
    if f"{PREFIX}CONFIG_FILE" in os.environ:
        raise InputError("a DeepSpeed config file is not read; set zero_stage in the accelerate config instead")
    if stage not in ("2", "3"):
        raise InputError(f"zero_stage {stage} is not supported; set 2 or 3 in the accelerate config")
    if offloads != ["none", "none"]:
        raise InputError("DeepSpeed's offloading is not supported; set its offload devices to none, or use more GPUs")
    if config.model.dtype != "float32" or config.model.quantization is not None:
        raise InputError(
            "DeepSpeed trains weights of model.dtype=float32 only (optim.autocast=bfloat16 computes faster); set it, "
            "or launch with configs/accelerate/ddp.yaml or fsdp2.yaml"
        )
    if config.optim.name != "adamw":
        raise InputError(f"optim.name={config.optim.name} does not work with DeepSpeed; use adamw, or ddp.yaml")
    if config.peers is not None:
        raise InputError("peers do not train under DeepSpeed; launch with configs/accelerate/ddp.yaml")
    if stage == "3":
        _check_whole(config)
    return int(stage)


def _check_whole(config: Config) -> None:
    """Refuse what reads or copies weights that ZeRO-3 keeps in pieces."""
    lora = config.model.lora
    if any(
        weights.stored and not (lora and weights.is_without_adapter(lora.start is not None))
        for weights in config.method.models()
    ):
        raise InputError("ZeRO-3 keeps no copies of weights for method.teacher; launch with fsdp2.yaml or zero_stage 2")
    if config.method.rollout.lag and config.decode.engine.remote:
        raise InputError(
            "ZeRO-3 keeps no copy of weights for method.rollout.lag; launch with fsdp2.yaml or zero_stage 2"
        )
    policy = config.method.rollout.policy
    if policy is not None and policy.subspace is not None:
        raise InputError("method.rollout.policy subspace needs whole weights on every process; use zero_stage 2")
    if config.decode.continuous:
        raise InputError("decode.continuous needs whole weights on every process; set it to false or use zero_stage 2")


class ZeroAccelerator(Accelerator):
    """What the trainer asks of accelerate, done by a DeepSpeed engine."""

    def __init__(self, stage: int, mixed_precision: str) -> None:
        """Start the processes as for DDP: accelerate itself would hide the optimizer's step."""
        if find_spec("deepspeed") is None:
            raise InputError("DeepSpeed is not installed; pip install 'dllm-sd[deepspeed]', or use fsdp2.yaml")
        asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        try:
            super().__init__(mixed_precision=mixed_precision)
        finally:
            if asked is not None:
                os.environ["ACCELERATE_USE_DEEPSPEED"] = asked
        self.stage = stage
        self.engine: Any = None

    def start(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, "ZeroOptimizer"]:
        """Give both to DeepSpeed."""
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        deepspeed = import_module("deepspeed")
        deepspeed.logger.setLevel("WARNING")
        module = super().prepare_model(module, evaluation_mode=True)  # the run's compute type; no engine
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # losses are divided by the count of the whole update already
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.stage},
        }
        params = [value for value in module.parameters() if value.requires_grad]
        self.engine, optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=params, dist_init_required=False, config=settings
        )
        if self.stage == 3:  # losses read the head's weights outside it, and give them their gradient
            outer: Any = module
            for value in outer.network.get_output_embeddings().parameters():
                deepspeed.zero.register_external_parameter(module, value)
        return self.engine, ZeroOptimizer(self.engine, optimizer, self.stage)

    @contextmanager
    def no_sync(self, model: nn.Module | None = None) -> Iterator[None]:
        """Not the last micro-batch of an update; ZeRO sums gradients over processes anyway."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Add to the gradients; no step."""
        self.engine.backward(loss)

    @torch.no_grad()
    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: int = 2) -> Tensor:
        """The norm of the whole gradient, of which every process holds some pieces; then shorten it to the limit."""
        pieces: list[Tensor] = [piece for some in self.engine.optimizer.averaged_gradients.values() for piece in some]
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        square = torch.stack([zero, *(piece.double().square().sum() for piece in pieces)]).sum()
        distributed.all_reduce(square)
        norm = square.sqrt().float()
        if math.isfinite(max_norm):
            for piece in pieces:
                piece.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(piece.dtype))
        return norm


class ZeroOptimizer:
    """DeepSpeed's optimizer: each process holds pieces of the weights and of AdamW's two states."""

    def __init__(self, engine: Any, optimizer: Any, stage: int) -> None:
        self.engine, self.zero, self.stage = engine, optimizer, stage
        self.param_groups: list[dict[str, Any]] = optimizer.optimizer.param_groups

    def step(self) -> None:
        """Take the step; the gradients are gone after it."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Done by `step`."""

    @property
    def _flat(self) -> list[Tensor]:
        """This process's pieces of the weights."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    @property
    def pieces(self) -> dict[str, Tensor]:
        """What a step changes, as far as it lies on this process."""
        found = {f"piece {i} of the weights": flat for i, flat in enumerate(self._flat)}
        for i, state in enumerate(self.zero.optimizer.state.values()):
            found |= {f"{key} of piece {i}": value for key, value in state.items() if isinstance(value, Tensor)}
        return found

    def tensors(self, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
        """Whole states ``{parameter}/{entry}``, on the CPU of the first process; to be called by all processes."""
        read = import_module("deepspeed.utils").safe_get_full_optimizer_state
        states, kept = self.zero.optimizer.state, dict[str, Tensor]()
        if not states:
            return kept
        step = torch.as_tensor(states[self._flat[0]]["step"])
        for name, value in parameters.items():
            for entry in ("exp_avg", "exp_avg_sq"):
                full = read(value, entry)
                if distributed.get_rank() == 0:
                    kept[f"{name}/{entry}"] = full.view(shape_of(value)).to("cpu", copy=True)
                    kept[f"{name}/step"] = step.to("cpu", copy=True)
        return kept

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Parameter], saved: Mapping[str, Tensor]) -> None:
        """Restore `tensors`, after the weights; every process has them whole."""
        write = import_module("deepspeed.utils")
        self.zero.refresh_fp32_params()
        if not saved:
            return
        for flat in self._flat:
            step = saved[f"{next(iter(parameters))}/step"].clone()
            state = {"step": step.to(flat.device if self.param_groups[0].get("fused") else "cpu")}
            self.zero.optimizer.state[flat] = state | {e: torch.zeros_like(flat) for e in ("exp_avg", "exp_avg_sq")}
        if self.stage == 2:
            self.zero._lazy_init_hp_params_optimizer_state()
        rank, world = distributed.get_rank(), distributed.get_world_size()
        for name, value in parameters.items():
            for entry in ("exp_avg", "exp_avg_sq"):
                full = saved[f"{name}/{entry}"].to(self._flat[0].device)
                if self.stage == 2:
                    write.safe_set_full_optimizer_state(value, full, entry)
                    continue
                size = -(-full.numel() // world)
                padded = nn.functional.pad(full.flatten(), (0, size * world - full.numel()))
                write.safe_set_local_optimizer_state(value, padded[rank * size : (rank + 1) * size], entry)


def shape_of(value: Tensor) -> torch.Size:
    """The shape of a whole parameter that may lie in pieces."""
    return getattr(value, "ds_shape", value.shape)


def in_pieces(value: Tensor) -> bool:
    """Whether this is a parameter under ZeRO-3."""
    return hasattr(value, "ds_id")


@contextmanager
def assembled(parameters: Iterable[Tensor], changed: bool = False) -> Iterator[None]:
    """Parameters under ZeRO-3, whole inside; what all processes write there alike stays if it is ``changed``."""
    pieces = [value for value in parameters if in_pieces(value)]
    if not pieces:
        yield
        return
    with import_module("deepspeed").zero.GatheredParameters(pieces, modifier_rank=0 if changed else None):
        yield


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Without the hooks by which ZeRO-3 gathers and drops each layer's weights."""
    held = [(part, part._forward_pre_hooks, part._forward_hooks) for part in module.modules()]
    try:
        for part, before, after in held:
            part._forward_pre_hooks, part._forward_hooks = _foreign(before), _foreign(after)
        yield
    finally:
        for part, before, after in held:
            part._forward_pre_hooks, part._forward_hooks = before, after


def _foreign(hooks: Any) -> Any:
    return type(hooks)((key, hook) for key, hook in hooks.items() if "deepspeed" not in str(hook.__module__))


def decoding(module: nn.Module) -> Any:
    """Weights under ZeRO-3 whole and without hooks inside; nothing for other modules."""
    return _decoding(module) if any(map(in_pieces, module.parameters())) else nullcontext()


@contextmanager
def _decoding(module: nn.Module) -> Iterator[None]:
    with assembled(module.parameters()), undisturbed(module):
        yield


def parameters_in_words(module: nn.Module) -> str:
    """How many parameters a model has, whole, and how many of them are trained."""
    sizes = [(shape_of(value).numel(), value.requires_grad) for value in module.parameters()]
    total, ours = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    return f"{total:,} parameters, {ours:,} of them trained ({ours / total:.1%})"
