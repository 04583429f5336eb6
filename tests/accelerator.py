"""An accelerator that computes on the CPU, but refuses what a real one refuses.

Tensors that a program puts on ``cuda`` are plain CPU tensors whose storage is noted. `Tensor.device` says ``cuda`` of
them, an operation that reads one of them together with a CPU tensor of more than zero dimensions raises `Misplaced`,
and so does whatever makes the host wait for the device inside `Accelerator.without_waits`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = torch.device("cpu")
DEVICE = torch.device("cuda", 0)
CROSSES = ("copy_", "_foreach_copy_")
"""Operations that may read one device and write to the other."""
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "is_nonzero", "equal")
"""Operations whose result the host needs, or whose size depends on values."""
MOVES = {"cpu": HOST, "cuda": DEVICE}
"""Methods of a tensor that move it."""
READS = ("tolist", "numpy", "__array__")
"""Methods of a tensor that read its memory."""


class Misplaced(AssertionError):
    """A tensor is on the wrong device, or the host waits for the device."""


def is_on_device(device: Any) -> bool:
    """Whether a device, its name or its index is the accelerator."""
    return device is not None and torch.device(device).type == DEVICE.type


class Accelerator:
    """The storages that are on the device; a context in which PyTorch knows of them."""

    def __init__(self) -> None:
        self.storages: set[int] = set()
        self.operations = 0
        """Operations that read a tensor on the device, so that a test can tell that there were any."""
        self.waiting = True

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is on the device."""
        with torch._C.DisableTorchFunction():
            return storage_of(tensor) in self.storages

    def put(self, tensor: Tensor, device: Any) -> None:
        """Note that a tensor, and whatever shares its memory, is on ``device`` from now on."""
        with torch._C.DisableTorchFunction():
            (self.storages.add if is_on_device(device) else self.storages.discard)(storage_of(tensor))

    def wait(self, name: str) -> None:
        """Refuse a wait of the host where none is allowed."""
        if not self.waiting:
            raise Misplaced(f"{name} waits for the device")

    @contextmanager
    def without_waits(self) -> Iterator[None]:
        """Inside, the host may not wait for the device."""
        before, self.waiting = self.waiting, False
        try:
            yield
        finally:
            self.waiting = before

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside, ``cuda`` is this accelerator."""
        with pytest.MonkeyPatch.context() as patch, ExitStack() as modes:
            modes.callback(AcceleratorState._reset_state, reset_partial_state=True)
            AcceleratorState._reset_state(reset_partial_state=True)
            patch.setenv("ACCELERATE_TORCH_DEVICE", DEVICE.type)
            patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # modes are known to this thread only
            patch.setattr(transformers.modeling_utils, "caching_allocator_warmup", lambda *args: None)
            patch.setattr(torch.cuda, "get_device_name", lambda device=None: "an accelerator on the CPU")
            fork = torch.random.fork_rng
            patch.setattr(torch.random, "fork_rng", lambda devices=(): fork(devices=()))  # one stream of numbers
            parts: tuple[AbstractContextManager[Any], ...] = (Operations(self), Names(self))
            for mode in parts:
                modes.enter_context(mode)
            yield


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage."""
    return tensor.untyped_storage()._cdata


class Names(TorchFunctionMode):
    """What Python says of devices: `Tensor.device`, the argument ``device``, methods that move or read a tensor."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args)
        if name in READS and self.accelerator.holds(args[0]):
            if name != "tolist":
                raise Misplaced("NumPy cannot read a tensor on the device; move it to the CPU first")
            self.accelerator.wait(name)
        if name in MOVES:
            return self._moved(args[0], MOVES[name], args[0])
        if name == "to":
            return self._to(func, *args, **kwargs)
        if (device := kwargs.pop("device", None)) is None:
            out = func(*args, **kwargs)
            if name == "new_tensor":
                self.accelerator.put(out, self._device(args[0]))
            elif name in ("from_numpy", "frombuffer"):
                self.accelerator.put(out, HOST)
            return out
        if torch.device(device).type not in MOVES:  # the meta device has no memory
            return func(*args, **kwargs, device=device)
        out = func(*args, **kwargs, device=HOST)
        return self._moved(out, device, *args) if isinstance(out, Tensor) else out

    def _property(self, func: Any, args: Any) -> Any:
        found = func(*args)
        if isinstance(found, torch.device):
            return self._device(args[0])
        owner = getattr(func, "__self__", None)
        if owner is Tensor.is_cuda or owner is Tensor.is_cpu:
            return self.accelerator.holds(args[0]) == (owner is Tensor.is_cuda)
        return found

    def _device(self, tensor: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            real = tensor.device
        return DEVICE if real.type == "cpu" and self.accelerator.holds(tensor) else real

    def _to(self, func: Any, tensor: Tensor, *places: Any, **options: Any) -> Tensor:
        """`Tensor.to` with a device, a type, both, or another tensor that has both."""
        places = (*places, *(options.pop(key, None) for key in ("device", "dtype", "other")))
        device, types = None, []
        for place in places:
            if isinstance(place, Tensor):
                device, types = self._device(place), [place.dtype]
            elif isinstance(place, torch.dtype):
                types = [place]
            elif place is not None and not isinstance(place, bool):
                device = place
        converted = func(tensor, *types, **options) if types or options else tensor
        return converted if device is None else self._moved(converted, device, tensor)

    def _moved(self, tensor: Tensor, device: Any, *sources: Any) -> Tensor:
        """The tensor on ``device``, without touching the memory of its ``sources``."""
        held = self.accelerator.holds(tensor)
        sources = tuple(x for x in tree_leaves(sources) if isinstance(x, Tensor))
        if held and not is_on_device(device) and any(map(self.accelerator.holds, sources)):
            self.accelerator.wait("a copy to the CPU")
        if held == is_on_device(device):
            return tensor
        with torch._C.DisableTorchFunction():
            shared = any(storage_of(tensor) == storage_of(x) for x in sources)
        tensor = tensor.clone() if shared else tensor
        self.accelerator.put(tensor, device)
        return tensor


class Operations(TorchDispatchMode):
    """What operations do: results are where their inputs are, and no operation mixes devices."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        with torch._C.DisableTorchFunction():
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device.type == "cpu"]
            before = {storage_of(x) for x in tensors}
            on_device = bool(before & self.accelerator.storages)
            if on_device:
                self._check(name, args, tensors)
            out = func(*args, **kwargs)
            for result in tree_leaves(out):
                if not isinstance(result, Tensor) or result.device.type != "cpu":
                    continue
                if name == "lift_fresh":  # made of Python numbers
                    self.accelerator.put(result, HOST)
                elif storage_of(result) not in before:
                    self.accelerator.put(result, DEVICE if on_device else HOST)
        return out

    def _check(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        self.accelerator.operations += 1
        host = [tuple(x.shape) for x in tensors if x.dim() and storage_of(x) not in self.accelerator.storages]
        if host and name not in CROSSES and name != "lift_fresh":
            raise Misplaced(f"{name} mixes tensors on the device with one of shape {host[0]} on the CPU")
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in WAITS:
            self.accelerator.wait(name)
