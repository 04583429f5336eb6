"""What several processes do together, so that what one of them refuses is refused by all and none is left waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor, distributed

from dllm_sd.errors import sendable

T = TypeVar("T")


def processes() -> PartialState:
    """The processes as `accelerate launch` laid them out, those on CPUs too, whoever asks first."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


_closed: list[distributed.ProcessGroup] = []
"""Groups that were closed, kept until the process ends (`close_process_group`)."""


def close_process_group() -> None:
    """Close the process group at the end of a script, all processes together.

    A process that exits while the group's threads run is sometimes aborted ("terminate called without an active
    exception") although its work is done. The group itself is kept: were the reducer of a model under
    DistributedDataParallel its last owner, that would join these threads while it holds Python's lock, and one of them
    may need the lock to let go of the last tensors, so that the process would never end.
    """
    if distributed.is_available() and distributed.is_initialized():
        if (group := distributed.group.WORLD) is not None:
            _closed.append(group)
        distributed.barrier()
        distributed.destroy_process_group()


def on_main(action: Callable[[], T]) -> T:
    """The main process acts while the others wait; what it returns, or raises, all of them return or raise.

    To be called by all processes together; ``action`` must not communicate, and its result is pickled.
    """
    state = processes()
    if state.num_processes == 1:
        return action()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    error: Exception | None = None
    if state.is_main_process:
        try:
            outcome = [(action(), None)]
        except Exception as caught:
            error, outcome = caught, [(None, sendable(caught))]
    broadcast_object_list(outcome)
    value, told = outcome[0]
    if told is not None:
        raise error or told
    return value  # pyright: ignore[reportReturnType]


@contextmanager
def together() -> Iterator[None]:
    """Every process does its own part inside; if one of them raises, the others do so too when they leave.

    To be entered and left by all processes together, and not to be used around anything in which they communicate.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    told = None
    if processes().num_processes > 1:
        told = next((one for one in gather_object([error and sendable(error)]) if one is not None), None)
    if error is not None:
        raise error
    if told is not None:
        raise told


def sum_over_processes(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, on every process."""
    total = accelerator.reduce(value, "sum")
    assert isinstance(total, Tensor)
    return total


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is set on any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(sum_over_processes(accelerator, torch.tensor(int(flag), device=accelerator.device)) > 0)
