"""Continuous batching of a causal model by transformers, with each token drawn by the key of its row.

transformers runs the network in its own thread over a paged KV cache, and a waiting row begins as soon as another row
ends. transformers would draw tokens with the random numbers of the whole batch, so a logits processor draws them first
and masks all others.
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

PAGE_TOKENS = 256
"""Tokens per page of the KV cache."""
MAX_FORWARD_TOKENS = 8192
"""Most tokens per forward pass; a longer prompt is prefilled in several passes."""
PAGE_SURPLUS = 1.2
"""Pages allocated per page that is needed: transformers starts no row while less than 15 % of them are free."""


def check_continuous(module: nn.Module, network: Any, watched: bool) -> None:
    """Refuse what continuous batching cannot decode.

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


class ContinuousSampler(ContinuousBatchingLogitsProcessor):
    """Logits processor that draws the token of each slot by the key of its row, and masks all other tokens.

    Each slot is given one number, its cell: row times ``steps`` plus step. Uniform numbers are stored by cell on the
    device before decoding begins, and log-probabilities are written by cell, so that a replayed CUDA graph can do both.
    One extra cell serves the slots without a row; its value is never used.
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
        """Decode at most ``steps`` tokens after each of ``prompts`` with ``keys [b]``; None: unknown vocabulary."""
        self.supported_kwargs, self.ignored_kwargs = {}, ()
        self.settings, self.steps = settings, steps
        self.slots = min(settings.batch_size, len(prompts))
        """Rows that are decoded together."""
        self.banned = banned_ids(settings, suppress, keys.device, vocabulary)
        self.begin = {str(row): (row * steps, len(prompt)) for row, prompt in enumerate(prompts)}
        self.nobody = steps * len(prompts)
        uniforms = uniform(fold(keys[:, None], torch.arange(steps, device=keys.device)), 1).flatten()
        self.u = torch.nn.functional.pad(uniforms, (0, 1), value=0.5)
        self.logp = torch.full_like(self.u, torch.nan)
        self.passes = 0
        """Forward passes of the network so far."""

    def logp_of(self, row: int, count: int) -> Tensor:
        """Return `Trajectory.logp` ``[w]`` of the first ``count`` tokens of a finished row, on the CPU."""
        return self.logp[row * self.steps :][:count].cpu()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Fill the argument of the warm-up with the cell of slots without a row."""
        int32_tensor.fill_(self.nobody)

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Return the cells of all slots, int32 ``[b]``; transformers would leave old cells in free slots."""
        cells = [self._cell(request.state) for request in requests_with_new_token]
        self.passes += all(request.state.request_id in self.begin for request in requests_with_new_token)  # no warm-up
        return torch.tensor(cells + [self.nobody] * (self.slots - len(cells)), dtype=torch.int32)

    def _cell(self, state: RequestState) -> int:
        """Return the cell of the next token of a request.

        The step is computed from the position in the KV cache. The generated tokens that transformers keeps lag behind
        where passes overlap, and start again from none after a row was preempted.
        """
        if state.request_id not in self.begin:  # a request of the warm-up
            return self.nobody
        first, prompt = self.begin[state.request_id]
        step = state.position_offset - prompt
        if step < 0:
            raise RuntimeError("transformers counts positions in another way; set decode.continuous to false")
        return first + step if step < self.steps else self.nobody  # a pass that began before the row had ended

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Map scores ``[b v]`` to ``[b v]``: 0 at the drawn token, -inf elsewhere."""
        cell = tensor_arg[: len(scores)].long()
        forced, logp = force(scores, self.settings, self.banned, self.u[cell])
        self.logp.index_copy_(0, cell, logp.to(self.logp.dtype))
        return forced


def generate_continuously(
    network: Any,
    prompts: Sequence[Sequence[int]],
    choice: ContinuousSampler,
    wanted: GenerationConfig,
    ended: Callable[[int, list[int]], None],
) -> None:
    """Complete the prompts; ``ended`` is called with each row and its tokens, in the order in which rows end.

    Raises:
        InputError: if transformers cannot run the model with continuous batching.
        RuntimeError: if a row comes back incomplete.
    """
    with _attention_kept(network), _autocast_in_threads(network):
        manager = _manager(network, prompts, choice, wanted)
        for row, prompt in enumerate(prompts):
            manager.add_request(list(prompt), request_id=str(row))
        _settle(network.device)  # the manager uses another stream
        manager.start()
        try:
            for _ in prompts:
                ended(*_next(manager, wanted))
        finally:
            manager.stop(hard_stop=True)
            _settle(network.device)


def _manager(
    network: Any, prompts: Sequence[Sequence[int]], choice: ContinuousSampler, wanted: GenerationConfig
) -> Any:
    """Return transformers' manager with our logits processor, warmed up and with its memory allocated."""
    lengths = [len(prompt) for prompt in prompts]
    pages = choice.slots * ceil((max(lengths) + choice.steps + 1) / PAGE_TOKENS)
    settings = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=ceil(PAGE_SURPLUS * pages) + 1,
        max_batch_tokens=max(choice.slots, min(MAX_FORWARD_TOKENS, sum(lengths))),
        max_requests_per_batch=choice.slots,
        max_memory_percent=0.8,  # the default of transformers with logits processors
        auto_switch_to_flash=network.device.type == "cuda" and network.dtype in (torch.float16, torch.bfloat16),
        disable_nccl_graph_mixing=False,  # true would set an environment variable
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
            except MemoryError:  # use the pages that fit, and let rows wait for them
                manager.continuous_batching_config.num_blocks = None
                manager.warmup()
    except (ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"decode.continuous cannot run this model here ({reason}); set it to false") from error
    return manager


def _next(manager: Any, wanted: GenerationConfig) -> tuple[int, list[int]]:
    """Wait for the next finished row; return its number and its tokens."""
    while (result := manager.get_result(timeout=1.0)) is None:
        if not manager.is_running():
            raise RuntimeError("continuous batching stopped before all rows had ended; set decode.continuous to false")
    tokens, ends = result.generated_tokens, wanted.eos_token_id or []
    whole = bool(tokens) and (tokens[-1] in ends or len(tokens) == wanted.max_new_tokens)
    if result.error is not None or not whole:
        reason = f"failed ({result.error})" if result.error else "left a row unfinished"
        raise RuntimeError(f"continuous batching {reason}; set decode.continuous to false")
    return int(result.request_id), tokens


@contextmanager
def _attention_kept(network: Any) -> Iterator[None]:
    """Restore the attention implementation at the end, whichever one transformers switches to inside."""
    implementation = network.config._attn_implementation
    try:
        yield
    finally:
        if network.config._attn_implementation != implementation:
            network.set_attn_implementation(implementation)


@contextmanager
def _autocast_in_threads(network: Any) -> Iterator[None]:
    """Let the network enter autocast itself inside, since autocast is set per thread."""
    kind = network.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)  # for CUDA graphs
    network.forward = autocast(network.forward)
    try:
        yield
    finally:
        del network.forward


def _settle(device: torch.device) -> None:
    """Wait until the device has finished its work on all streams."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
