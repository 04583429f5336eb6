"""Parameters in pieces over the processes (FSDP2): start, gather for decoding, and whole tensors for checkpoints.

Without FSDP2 everything here leaves its argument as it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from dllm_sd.errors import InputError


def start_accelerator(autocast: bool) -> Accelerator:
    """The processes as `accelerate launch` laid them out.

    Raises:
        InputError: if its configuration asks for what the trainer cannot do.
    """
    accelerator = Accelerator(mixed_precision="bf16" if autocast else "no")
    state = accelerator.state
    plugin: FullyShardedDataParallelPlugin | None = getattr(state, "fsdp_plugin", None)
    asked = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if plugin is None and asked and state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()  # accelerate itself takes no notice of FSDP on CPUs
        state.fsdp_plugin = plugin
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if state.distributed_type == DistributedType.DEEPSPEED:
        raise InputError("DeepSpeed is not supported; configs/accelerate/zero2.yaml does the same with FSDP2")
    if plugin is None:
        return accelerator
    if plugin.fsdp_version != 2:
        raise InputError("FSDP 1 is not supported; set fsdp_version to 2 in the accelerate config")
    if plugin.cpu_ram_efficient_loading:
        raise InputError("every process loads the model; set fsdp_cpu_ram_efficient_loading to false")
    if autocast:  # gradients are summed over processes in float32, as without FSDP2
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return accelerator


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
        with accelerator.autocast():
            yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(again and part is not module, recurse=False)


def whole(value: Tensor) -> Tensor:
    """A tensor that may lie in pieces, as one on every process: to be called by all of them."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_tensors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors for a checkpoint, to be called by all processes.

    Those in pieces are gathered one at a time and kept by the first process only, on the CPU.
    """
    kept: dict[str, Tensor] = {}
    for name, value in values.items():
        if not isinstance(value, DTensor):
            kept[name] = value
            continue
        full = whole(value.detach())
        if distributed.get_rank() == 0:
            kept[name] = full.cpu()
    return kept
