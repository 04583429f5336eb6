"""Rows in turns: a causal model through transformers' continuous batching, each token chosen by its row's key.

transformers runs the network in a thread of its own over a paged cache, and a waiting row begins as soon as another one
ends. It would draw tokens with the random numbers of the whole batch; a logits processor leaves it no choice instead.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.utils import WorkloadHints

from dllm_sd.decoding.sampling import banned_ids, force
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.randomness import fold, uniform

PAGE = 256
"""Tokens of a page of the cache."""
PASS = 8192
"""Most tokens of one pass of the network; a longer prompt is read in several."""
ROOM = 1.2
"""Pages for each one needed: transformers lets no row begin while less than 15 % are free."""


def check_continuous(module: nn.Module, network: Any, watched: bool) -> None:
    """Refuse what cannot be decoded in turns.

    Raises:
        InputError: naming the key, and the remedy.
    """
    if watched:
        raise InputError("decode.continuous has no common step to watch; set it to false")
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        raise InputError("decode.continuous needs whole weights and FSDP2 keeps them in pieces; set it to false")
    kind = network.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != network.dtype:
        raise InputError(
            "decode.continuous under optim.autocast needs weights of that type; set model.dtype to bfloat16, or "
            "decode.continuous to false"
        )


class TurnChoice(ContinuousBatchingLogitsProcessor):
    """Chooses the token of each slot by the key of the row that is in it, and leaves no other.

    A slot is told one number, its cell: row times ``steps`` plus step. Uniform numbers lie ready by cell on the device,
    and log-probabilities are written there, which a replayed CUDA graph does too. One cell more is for slots without
    a row; nobody reads it.
    """

    def __init__(
        self,
        settings: Decoding,
        keys: Tensor,
        suppress: Sequence[int],
        prompts: Sequence[Sequence[int]],
        steps: int,
        vocabulary: int | None = None,
    ) -> None:
        """For at most ``steps`` tokens of each of the ``prompts`` with ``keys [b]``, of a ``vocabulary`` if known."""
        self.supported_kwargs, self.ignored_kwargs = {}, ()
        self.settings, self.steps = settings, steps
        self.slots = min(settings.batch_size, len(prompts))
        """Rows that are decoded together."""
        self.banned = banned_ids(settings, suppress, keys.device, vocabulary)
        self.begin = {str(row): (row * steps, len(prompt)) for row, prompt in enumerate(prompts)}
        self.nobody = steps * len(prompts)
        drawn = uniform(fold(keys[:, None], torch.arange(steps, device=keys.device)), 1).flatten()
        self.u = torch.nn.functional.pad(drawn, (0, 1), value=0.5)
        self.logp = torch.full_like(self.u, torch.nan)
        self.passes = 0
        """Of the network so far."""

    def logp_of(self, row: int, count: int) -> Tensor:
        """`Trajectory.logp` ``[w]`` of the first ``count`` tokens of a row that has ended, on the CPU."""
        return self.logp[row * self.steps :][:count].cpu()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Slots without a row."""
        int32_tensor.fill_(self.nobody)

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Cells int32 ``[b]`` of all slots; transformers would leave old numbers in those that are free now."""
        cells = [self._cell(request.state) for request in requests_with_new_token]
        self.passes += all(request.state.request_id in self.begin for request in requests_with_new_token)  # no warm-up
        return torch.tensor(cells + [self.nobody] * (self.slots - len(cells)), dtype=torch.int32)

    def _cell(self, state: RequestState) -> int:
        """Where the next token of a request belongs.

        The step is told from the number of tokens that will have been read. What transformers keeps as generated lags
        behind if passes overlap, and begins anew after a row had to give its pages away.
        """
        if state.request_id not in self.begin:  # of the warm-up
            return self.nobody
        first, prompt = self.begin[state.request_id]
        step = state.position_offset - prompt
        if step < 0:
            raise RuntimeError("transformers counts positions in another way; set decode.continuous to false")
        return first + step if step < self.steps else self.nobody  # a pass that began before the row had ended

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """``[b v] -> [b v]``: 0 at the token that is chosen, -inf elsewhere."""
        cell = tensor_arg[: len(scores)].long()
        forced, logp = force(scores, self.settings, self.banned, self.u[cell])
        self.logp.index_copy_(0, cell, logp.to(self.logp.dtype))
        return forced


def generate_in_turns(
    network: Any,
    prompts: Sequence[Sequence[int]],
    choice: TurnChoice,
    wanted: GenerationConfig,
    ended: Callable[[int, list[int]], None],
) -> None:
    """Complete the prompts; ``ended`` gets each row and its tokens, in the order in which rows end.

    Raises:
        InputError: if transformers does not take the model.
        RuntimeError: if a row does not come back whole.
    """
    with _attention_kept(network), _autocast_in_threads(network):
        manager = _manager(network, prompts, choice, wanted)
        for row, prompt in enumerate(prompts):
            manager.add_request(list(prompt), request_id=str(row))
        _settle(network.device)  # it runs on a stream of its own
        manager.start()
        try:
            for _ in prompts:
                ended(*_next(manager, wanted))
        finally:
            manager.stop(hard_stop=True)
            _settle(network.device)


def _manager(network: Any, prompts: Sequence[Sequence[int]], choice: TurnChoice, wanted: GenerationConfig) -> Any:
    """transformers' manager with our processor and all memory taken."""
    lengths = [len(prompt) for prompt in prompts]
    pages = choice.slots * ceil((max(lengths) + choice.steps + 1) / PAGE)
    settings = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=ceil(ROOM * pages) + 1,
        max_batch_tokens=max(choice.slots, min(PASS, sum(lengths))),
        max_requests_per_batch=choice.slots,
        max_memory_percent=0.8,  # transformers' own where logits are processed
        auto_switch_to_flash=network.device.type == "cuda" and network.dtype in (torch.float16, torch.bfloat16),
        disable_nccl_graph_mixing=False,  # it would set an environment variable
        seed=0,
    )
    hints = WorkloadHints(max(lengths), choice.steps, len(prompts))
    processors: Any = [choice]
    try:
        manager = network.init_continuous_batching(wanted, settings, hints)
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(processors))
        manager.logit_processor.tensors_required = 1
        with torch.random.fork_rng([network.device] if network.device.type == "cuda" else []):  # it seeds torch
            try:
                manager.warmup()
            except MemoryError:  # then it takes what is free, and rows wait for pages
                manager.continuous_batching_config.num_blocks = None
                manager.warmup()
    except (ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"decode.continuous cannot run this model here ({reason}); set it to false") from error
    return manager


def _next(manager: Any, wanted: GenerationConfig) -> tuple[int, list[int]]:
    """The next row that has ended, and its tokens."""
    while (found := manager.get_result(timeout=1.0)) is None:
        if not manager.is_running():
            raise RuntimeError("continuous batching stopped before all rows had ended; set decode.continuous to false")
    tokens, ends = found.generated_tokens, wanted.eos_token_id or []
    whole = bool(tokens) and (tokens[-1] in ends or len(tokens) == wanted.max_new_tokens)
    if found.error is not None or not whole:
        reason = f"failed ({found.error})" if found.error else "left a row unfinished"
        raise RuntimeError(f"continuous batching {reason}; set decode.continuous to false")
    return int(found.request_id), tokens


@contextmanager
def _attention_kept(network: Any) -> Iterator[None]:
    """Whatever attention transformers chooses inside, it is the former one afterwards."""
    own = network.config._attn_implementation
    try:
        yield
    finally:
        if network.config._attn_implementation != own:
            network.set_attn_implementation(own)


@contextmanager
def _autocast_in_threads(network: Any) -> Iterator[None]:
    """Autocast is a matter of each thread, so that inside the network itself brings it along."""
    kind = network.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    casting = torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)  # as CUDA graphs need it
    network.forward = casting(network.forward)
    try:
        yield
    finally:
        del network.forward


def _settle(device: torch.device) -> None:
    """Wait for what the device still has to do, on all streams."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
