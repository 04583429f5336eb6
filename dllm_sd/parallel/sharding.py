"""Parameters in pieces over the processes (FSDP2, ZeRO): start, gather for decoding, whole tensors for checkpoints.

Without them everything here leaves its argument as it is.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from dllm_sd.config import Config
from dllm_sd.errors import InputError
from dllm_sd.parallel.zero import ZeroAccelerator, ZeroOptimizer, assembled, decoding, in_pieces, read_stage
from dllm_sd.policies.weights import placed_like


class InPieces(Accelerator):
    """FSDP2 whose gradients are summed over processes, and cut, after every micro-batch.

    To wait for the last one, as accelerate does, holds the gradient of all weights whole on every process.
    """

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Nothing to put off."""
        yield


def start_accelerator(config: Config) -> Accelerator:
    """The processes as `accelerate launch` laid them out.

    Raises:
        InputError: if its configuration asks for what the trainer or the run cannot do.
    """
    precision = "bf16" if config.optim.autocast else "no"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", precision):  # fp16 would need its loss scaled
        raise InputError(
            f"accelerate was launched with mixed precision {launched:.20}, but optim.autocast says what computes in "
            "bfloat16; set mixed_precision to no in the accelerate config, and optim.autocast to bfloat16 or null"
        )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return ZeroAccelerator(read_stage(config), precision)
    asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
    accelerator = (InPieces if asked else Accelerator)(mixed_precision=precision)
    state = accelerator.state
    plugin: FullyShardedDataParallelPlugin | None = getattr(state, "fsdp_plugin", None)
    if plugin is None and asked and state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()  # accelerate itself takes no notice of FSDP on CPUs
        state.fsdp_plugin = plugin
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if plugin is None:
        return accelerator
    if plugin.fsdp_version != 2:
        raise InputError("FSDP 1 is not supported; set fsdp_version to 2 in the accelerate config")
    if plugin.cpu_ram_efficient_loading:
        raise InputError("every process loads the model; set fsdp_cpu_ram_efficient_loading to false")
    if precision == "bf16":  # gradients are summed over processes in float32, as without FSDP2
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return accelerator


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer | ZeroOptimizer]:
    """The module that learns on all processes, and the optimizer that steps; FSDP2 and ZeRO cut both in place."""
    if isinstance(accelerator, ZeroAccelerator):
        return accelerator.start(module, optimizer)
    return accelerator.prepare(module, optimizer)[0], optimizer


@contextmanager
def gathered(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Whole parameters inside, so that each process may run the module as often as its data asks for.

    The run's compute type holds inside too, for networks that `generate` without the module around them. All
    processes must enter and leave together; teachers under full fine-tuning must not be called inside.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    plugin: FullyShardedDataParallelPlugin | None = getattr(accelerator.state, "fsdp_plugin", None)
    again = plugin is not None and bool(plugin.reshard_after_forward)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with decoding(module), accelerator.autocast():
            yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(again and part is not module, recurse=False)


def whole(value: Tensor) -> Tensor:
    """A tensor that may lie in pieces, as one on every process: to be called by all of them."""
    if in_pieces(value):
        with assembled([value]):
            return value.detach().clone()
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def fill(value: Tensor, other: Tensor) -> None:
    """Put a whole tensor, which every process has, into one that may lie in pieces."""
    with assembled([value], changed=True):
        value.copy_(placed_like(other, value))


def stepped_tensors(
    optimizer: torch.optim.Optimizer | ZeroOptimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """What a step changes, by name, as far as it lies on this process: the weights and the optimizer's state."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.pieces
    entries = {name: optimizer.state.get(value, {}) for name, value in parameters.items()}
    states = {f"{key} of {name}": value for name, state in entries.items() for key, value in state.items()}
    return {**parameters, **{name: value for name, value in states.items() if isinstance(value, Tensor)}}


def gather_tensors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors for a checkpoint, to be called by all processes.

    Those in pieces are gathered one at a time and kept by the first process only, on the CPU.
    """
    kept: dict[str, Tensor] = {}
    for name, value in values.items():
        if not isinstance(value, DTensor) and not in_pieces(value):
            kept[name] = value
            continue
        full = whole(value if in_pieces(value) else value.detach())
        if distributed.get_rank() == 0:
            kept[name] = full.cpu()
    return kept
