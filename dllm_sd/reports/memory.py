"""Estimates the memory that a run will need from the model's shape and the config, before anything is loaded.

The estimate is in bytes and covers what PyTorch allocates on the device of one process, without the CUDA context (about
0.5 GB), fragmentation and data. The formulas describe what autograd keeps for transformers' decoder layers (RMSNorm in
float32, rotary embedding, sdpa or flash attention, SwiGLU) and PEFT's adapters; `tools/check_memory.py` compares them
with measurements. They assume the worst case of an update: prompts of up to `max_prompt` tokens and unequal lengths, so
that attention has a mask and repeats grouped keys and values, and at least two full micro-batches, so that gradients
exist during a forward pass.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_sd.config import Config
from dllm_sd.decoding.denoising import DECODE_CHUNK_LOGITS, DECODE_CHUNK_LOGITS_ELSEWHERE
from dllm_sd.decoding.sampling import ENTRIES_PER_RUN
from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.slots import POSITIONS_PER_FORWARD, POSITIONS_PER_FORWARD_ELSEWHERE
from dllm_sd.network.lazy_logits import sites_per_chunk
from dllm_sd.policies.loading import DTYPES
from dllm_sd.policies.teacher_weights import Weights
from dllm_sd.pretrained.families import CAUSAL, FAMILIES, MARK
from dllm_sd.training.optim import FUSED

SECOND_READERS = ("k_proj", "v_proj", "up_proj")
"""Linear layers whose input is also that of another layer; autograd keeps it once."""
EIGHT_BIT_STATES = 2 * (1 + 4 / 256)
"""Bytes of both 8-bit optimizer states of a weight, with a float32 scale for each block of 256."""
NF4_BITS = 4.127
"""NF4 and its doubly quantised constants (QLoRA, arXiv 2305.14314, Sec. 3)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one process in bytes, and some counts."""

    parameters: int
    """Number of parameters, adapters included."""
    trainable: int
    """Number of trained parameters."""
    tokens: int
    """Tokens of a micro-batch."""
    sites: int
    """Graded sites of a micro-batch, at most."""
    weights: int
    """Bytes of all weights, adapters included; held permanently."""
    optimizer: int
    """Bytes of the optimizer's two states; held permanently."""
    copies: int
    """Bytes of the teachers' own weights; held permanently."""
    gradients: int
    """Bytes of gradients while learning, with DDP's buckets."""
    gathered: int
    """Bytes of weights that FSDP has gathered while learning."""
    teacher: int
    """Bytes that a teacher's forward pass adds: its activations, then its logits at the candidates (its hidden states
    there if the sites take several chunks of the loss)."""
    activations: int
    """Bytes that autograd keeps of the student's forward pass."""
    losses: int
    """Bytes of logits and losses, added to the activations: copies of chunk x vocabulary in float32, the gradients of
    hidden states and of a trained head."""
    backward: int
    """Bytes that the backward pass adds to the activations after the losses: the gradients of a layer, or that of the
    head; under gradient checkpointing also the activations of one layer."""
    step: int
    """Bytes that the optimizer's step adds to the gradients."""
    held: int
    """Bytes held during decoding: gathered weights (FSDP2), unmerged weights (`merge_rollouts`), KV cache."""
    rollouts: int
    """Bytes of the activations of a decoding batch."""
    rollout_logits: int
    """Bytes of the logits of the active positions of a decoding batch, and of the copies that sampling makes."""

    @property
    def resident(self) -> int:
        """Bytes that are held permanently."""
        return self.weights + self.optimizer + self.copies

    @property
    def learning(self) -> int:
        """Peak bytes of a micro-batch or optimizer step, without `resident`."""
        student = self.activations + max(self.losses, self.backward)
        return self.gradients + self.gathered + max(self.teacher, student, self.step)

    @property
    def decoding(self) -> int:
        """Peak bytes of rollouts and evaluation, without `resident`."""
        return self.held + max(self.rollouts, self.rollout_logits)

    @property
    def peak(self) -> int:
        """Peak bytes of the run."""
        return self.resident + max(self.learning, self.decoding)


def estimate(
    network: nn.Module,
    config: Config,
    *,
    processes: int = 1,
    sharded: bool = False,
    device: str = "cuda",
    others: Mapping[Weights, nn.Module] | None = None,
) -> MemoryEstimate:
    """Estimate the memory that a run of `config` will need on each process.

    Args:
        network: the native transformers model without adapters; only shapes are read (`loading.empty_network`).
        config: the config of the run.
        processes: number of processes; each has its own rollouts and micro-batches.
        sharded: FSDP2 (weights, gradients, optimizer and copies are sharded) instead of DDP. Not measured yet.
        device: ``cpu`` or ``cuda``, where the optimizer step is fused; on others it makes a temporary copy of all
            trained weights.
        others: the networks of other checkpoints that teach or write, which every process holds whole; one that is
            missing here is not counted.
    """
    shape, full_precision_states = _Shape(network, config), config.optim.name == "adamw"
    share = processes if sharded else 1
    canvas = config.max_prompt + config.decode.length
    canvases = max(1, config.optim.tokens_per_batch // canvas)
    schedules = [config.decode, config.held_out(), *map(config.held_out, config.eval.schedules)]
    tokens = canvases * canvas
    decoded = max(decode.batch_size * (config.max_prompt + decode.length) for decode in schedules)
    candidates, sites = _sites(config, canvases, shape.causal)
    saved, recomputed = shape.saved(tokens, canvas)
    transient = int(2.5 * tokens * max(shape.widest * shape.compute, shape.widest_adapter * shape.wide))
    copies, cast = _copies(config, shape, sharded)
    other_shapes = {weights: _Shape(other, _config_of(weights, config)) for weights, other in (others or {}).items()}
    teachers = [*(other for weights, other in other_shapes.items() if weights in config.method.weights()), shape]
    teacher_forward = max(each.forward(tokens, canvas) - each.casts * (each is not shape) for each in teachers)
    contexts, scores_candidates = len(config.method.contexts), config.method.sites.score is not None
    chunk = sites_per_chunk(shape.vocabulary, shape.hidden, device)
    per_candidate = shape.vocabulary * shape.logit if candidates <= chunk else shape.hidden * shape.residual
    teacher_outputs = candidates * per_candidate * contexts
    teacher_outputs += min(candidates, chunk) * shape.vocabulary * shape.logit * scores_candidates
    outside = shape.weights - sum(shape.of_layers)
    gathered, whole = outside + 2 * max(shape.of_layers), shape.weights
    if shape.autocast:  # FSDP2 gathers weights in the autocast dtype
        gathered, whole = (size * shape.compute // shape.residual for size in (gathered, whole))
    states = 2 * shape.bytes_trained if full_precision_states else int(shape.trainable * EIGHT_BIT_STATES)
    head_gradient, chunk_gradient = _head_gradient(shape, sites > chunk)
    rounds_gradient = head_gradient and shape.trained_bytes < shape.wide and sites > chunk
    rounded_gradient = shape.head * shape.trained_bytes if rounds_gradient else 0
    costs = [(config.max_prompt + decode.length, *_decoding(decode, config, shape, device)) for decode in schedules]
    return MemoryEstimate(
        parameters=shape.parameters,
        trainable=shape.trainable,
        tokens=tokens,
        sites=sites,
        weights=shape.weights // share,
        optimizer=states // share,
        copies=copies // share + sum(other.weights for other in other_shapes.values()),
        gradients=shape.bytes_trained // share * (2 if processes > 1 and not sharded else 1),
        gathered=gathered if sharded else 0,
        teacher=cast // share + max(teacher_forward, teacher_outputs) if contexts else 0,
        activations=saved,
        losses=_losses(config, shape, sites, chunk, head_gradient, chunk_gradient)
        + (teacher_outputs if candidates > chunk else 0),
        backward=max(recomputed + transient + shape.dequantised, head_gradient + rounded_gradient),
        step=0 if device in FUSED or not full_precision_states else shape.bytes_trained // share,
        held=(whole if sharded else 0) + shape.merged + decoded * shape.cache_bytes,
        rollouts=max(shape.forward(read, length, decoding=True) for length, read, _ in costs),
        rollout_logits=max(read * shape.hidden * shape.residual + logits for _, read, logits in costs),
    )


def _config_of(weights: Weights, config: Config) -> Config:
    """The config by which another checkpoint is counted: with its own dtype and without adapters."""
    model = weights.other_model(config.model)
    assert model is not None, "only other checkpoints have a shape of their own"
    return replace(config, model=replace(model, lora=None))


class _Shape:
    """Sizes of a network under the model and optimizer settings of a config."""

    def __init__(self, network: Any, config: Config) -> None:
        model, lora, self.config = config.model, config.model.lora, network.config
        itemsize, self.autocast = DTYPES[model.dtype].itemsize, config.optim.autocast is not None
        family = FAMILIES.get(str((getattr(self.config, MARK, None) or {}).get("family")), CAUSAL)
        self.rank, self.targets = (lora.rank, lora.targets or family.lora_targets) if lora else (0, ())
        self.dropout = lora is not None and lora.dropout > 0
        self.checkpointed, self.eager = model.gradient_checkpointing, model.attention == "eager"
        # Bytes of a number: inside the layers, in the residual stream, in adapters, losses and RMSNorm, in logits.
        self.compute, self.residual, self.wide = 2 if self.autocast else itemsize, itemsize, max(4, itemsize)
        self.trained_bytes, self.logit = self.wide if lora else itemsize, 4 if self.autocast else itemsize
        self.layers = list(network.base_model.layers)
        self.vocabulary, self.hidden = network.get_output_embeddings().weight.shape
        self.head = self.vocabulary * self.hidden
        self.heads, self.experts = self.config.num_attention_heads, getattr(self.config, "num_experts_per_tok", 0) or 0
        linears = [pair for layer in self.layers for pair in _linears(layer)]
        self.queries = max((x.out_features for name, x in linears if name == "q_proj"), default=self.hidden)
        stacked = [self.experts * x.gate_up_proj.shape[1] for layer in self.layers for x in _mixtures(layer)]
        self.widest = max([max(x.weight.shape) for _, x in linears] + stacked)
        self.widest_adapter = max((max(x.weight.shape) for name, x in linears if name in self.targets), default=0)

        names = set(lora.modules_to_save) if lora else set()
        every, in_layers = list(network.parameters()), [list(layer.parameters()) for layer in self.layers]
        saved = [x for n, part in network.named_modules() if n.rpartition(".")[2] in names for x in part.parameters()]
        pairs = [[x for name, x in _linears(layer) if name in self.targets] for layer in self.layers]
        adapters = [self.rank * sum(sum(x.weight.shape) for x in of_layer) for of_layer in pairs]
        self.parameters = _count(every) + sum(adapters) + _count(saved)
        self.trainable = sum(adapters) + _count(saved) if lora else self.parameters
        self.bytes_trained = sum(adapters) * self.wide + _count(saved) * itemsize if lora else _count(every) * itemsize
        self.of_layers = [_count(x) * itemsize + n * self.wide for x, n in zip(in_layers, adapters, strict=True)]
        self.dequantised = 0
        if model.quantization == "4bit":
            for i, layer in enumerate(self.layers):
                self.of_layers[i] -= int(_count(x.weight for _, x in _linears(layer)) * (itemsize - NF4_BITS / 8))
            self.dequantised = max(x.weight.numel() for _, x in linears) * self.compute
        outside = _count(every) - sum(map(_count, in_layers)) + _count(saved)
        self.weights = outside * itemsize + sum(self.of_layers)
        # Copies of the weights into which adapters are merged while decoding; bytes of the KV cache per token.
        self.merged = itemsize * sum(_count(x.weight for x in y) for y in pairs) if lora and lora.merge_rollouts else 0
        self.causal = getattr(self.config, "is_causal", True) is not False  # a denoiser's config says so
        block_causal = (getattr(self.config, MARK, None) or {}).get("block_length") and config.decode.prefix_cache
        self.cache_bytes = self.compute * sum(x.out_features for n, x in linears if n in ("k_proj", "v_proj"))
        self.cache_bytes *= bool(block_causal or self.causal)
        # Autocast keeps bfloat16 copies of trained weights during a forward pass, and autograd keeps those of all.
        used = _count(x.weight for _, x in linears) + self.head
        self.casts = 2 * (sum(adapters) if lora else used) * self.autocast
        self.casts_saved = 2 * (sum(adapters) + used) * self.autocast

    def saved(self, tokens: int, canvas: int) -> tuple[int, int]:
        """Bytes that autograd keeps of ``tokens``, and bytes that the backward pass recomputes of a layer (or 0)."""
        final = self._norm(self.hidden)
        layers = [self._layer(layer, canvas) for layer in self.layers]
        if self.checkpointed:
            return tokens * (final + len(layers) * self.hidden * self.residual), tokens * max(layers) + self.casts
        return tokens * (final + sum(layers)) + self.casts_saved, 0

    def _norm(self, width: int) -> int:
        """Bytes per token of an RMSNorm: input in float32, root mean square, input of a trained weight."""
        return width * (self.wide + (0 if self.rank else self.residual)) + 4

    def _layer(self, layer: nn.Module, canvas: int) -> int:
        """Bytes per token that autograd keeps of a layer; a tensor with several uses is counted once."""
        total = self.compute * 4 * self.queries + 4 * self.heads  # queries, keys, values, output; normaliser
        if self.eager:  # probabilities in float32, and in the dtype of the layers
            total += self.heads * canvas * (4 + self.compute * (self.compute != 4))
        for name, module in layer.named_modules():
            if "norm" in type(module).__name__.lower():
                of_heads = name.endswith(("q_norm", "k_norm"))
                total += self._norm(self.queries if of_heads else _count(module.parameters()))
        for name, linear in _linears(layer):
            total += self._input(name, linear)
            if name == "gate_proj":
                total += 3 * self.compute * linear.out_features  # gate, silu(gate), up
        for module in _mixtures(layer):  # also the outputs of the experts and, if they are trained, their inputs
            numbers = self.hidden + 3 * module.down_proj.shape[-1]
            numbers += 0 if self.rank else self.hidden + module.down_proj.shape[-1]
            total += self.experts * self.compute * numbers
        return total

    def _input(self, name: str, linear: nn.Linear) -> int:
        """Bytes per token that autograd keeps for a linear layer and its adapter, without tensors of other layers."""
        if self.rank and name not in self.targets:
            return 0
        width, own_input = linear.in_features, name not in (*SECOND_READERS, "o_proj")
        if not self.rank:
            return self.compute * width * ((self.autocast and name != "o_proj") or own_input)
        adapter_bytes = self.compute if self.autocast else self.wide  # of a number in the adapter
        if self.dropout:
            return adapter_bytes * (self.rank + width) + self.wide * width
        return adapter_bytes * (self.rank + width * (self.autocast or self.compute < self.wide or own_input))

    def forward(self, tokens: int, canvas: int, decoding: bool = False) -> int:
        """Peak bytes of a forward pass without gradient and without logits."""
        scores = self.heads * canvas * (2 * self.compute + 4) * self.eager
        inside = max(3 * self.widest * self.compute, 7 * self.queries * self.compute + scores)
        if self.rank and not (decoding and self.merged):
            adapter_bytes = self.compute if self.autocast else self.wide  # the adapter makes two or three tensors
            tensors = 2 if adapter_bytes == self.compute else 3
            branch = (2 * self.compute + tensors * adapter_bytes) * self.widest_adapter
            inside = max(inside, branch + self.hidden * self.wide * (self.compute < self.wide))
        stream = 3 * self.hidden * self.residual + self.hidden * 2 * self.autocast
        mask = canvas * (1 + self.compute) + 2 * self.residual * self.queries // self.heads
        return tokens * (stream + inside + mask) + self.casts + self.dequantised


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            yield name.rpartition(".")[2], module


def _mixtures(layer: nn.Module) -> Iterator[Any]:
    """Modules that hold the weights of many experts in one tensor; adapters do not target them."""
    return (x for x in layer.modules() if getattr(getattr(x, "gate_up_proj", None), "ndim", 0) == 3)


def _decoding(decode: Decoding, config: Config, shape: _Shape, device: str) -> tuple[int, int]:
    """Positions that one forward pass of a decoder reads, and bytes of its logits and their copies while sampling."""
    longest = config.max_prompt
    filters = decode.top_k > 0 or decode.top_p < 1 or config.method.rollout.filters
    padded = max(shape.vocabulary % ENTRIES_PER_RUN > 0, shape.logit / shape.wide * (shape.logit < shape.wide))
    copies = 2 + padded + 4 * filters
    if shape.causal:
        return decode.batch_size * longest, int(decode.batch_size * shape.vocabulary * shape.wide * (2 + copies))
    width = max(longest, decode.block_length) if shape.cache_bytes else longest + decode.length
    rows = decode.batch_size
    if not shape.cache_bytes and decode.compile is None:
        rows = max(1, min(rows, POSITIONS_PER_FORWARD.get(device, POSITIONS_PER_FORWARD_ELSEWHERE) // width))
    chunk = DECODE_CHUNK_LOGITS.get(device, DECODE_CHUNK_LOGITS_ELSEWHERE)
    logits = min(rows * decode.block_length * shape.vocabulary, chunk)
    copies += 2 * bool(decode.guidance) + 3 * (decode.order == "entropy")
    return rows * width, int(logits * shape.wide * copies)


def _sites(config: Config, canvases: int, causal: bool) -> tuple[int, int]:
    """The most candidates and graded sites of a micro-batch; an autoregressive canvas has a site at every token."""
    decode, method = config.decode, config.method
    if causal:
        masked = active = revealed = decode.length + (config.max_prompt - 1) * method.sites.prompt
    elif method.canvases.decoded:
        masked, active = decode.length, decode.block_length
        revealed = max(decode.schedule) if decode.threshold is None else decode.block_length
    else:
        masked = active = revealed = math.ceil(decode.length * method.canvases.masked_share(canvases))
    position = torch.arange(max(masked, active, revealed))
    candidates, quota = method.sites(*((position < count)[None] for count in (masked, active, revealed)))
    return canvases * int(candidates.sum()), canvases * int(quota.sum())


def _head_gradient(shape: _Shape, several: bool) -> tuple[int, int]:
    """Bytes of the gradient of a trained head, and of the gradient of a chunk that is added to it."""
    if shape.rank:
        return 0, 0
    if not several:  # the gradient of the only chunk is the gradient
        return shape.head * shape.trained_bytes, 0
    return shape.head * shape.wide, shape.head * shape.compute * (shape.compute < shape.wide)


def _losses(config: Config, shape: _Shape, sites: int, chunk: int, head: int, chunk_gradient: int) -> int:
    """Peak bytes of a chunk of sites: while its loss is computed, or when it is added to the gradient of the head."""
    method, contexts = config.method, len(config.method.contexts)
    logits, several = min(sites, chunk) * shape.vocabulary * shape.wide, sites > chunk
    teacher_logits = contexts * (shape.logit / shape.wide) * (not several)  # kept if there is one chunk
    copies = method.divergence.tensors_held(contexts) if method.support.full_vocabulary else 3 + contexts
    in_loss = (copies + teacher_logits) * logits + several * head
    in_gradient = (1 + teacher_logits) * logits + head + chunk_gradient
    return int(max(in_loss, in_gradient)) + sites * shape.hidden * shape.residual


def _copies(config: Config, shape: _Shape, sharded: bool) -> tuple[int, int]:
    """Bytes of all teachers' own weights, and of the temporary copy while one of them runs."""
    lora = config.model.lora
    own = [
        weights
        for weights in config.method.models()
        if weights.stored and not (lora and weights.is_without_adapter(lora.start is not None))
    ]
    averages = any(w.kept_in_float32 for w in own)
    cast = not shape.rank and (sharded or (averages and shape.trained_bytes < 4))
    total = sum(shape.trainable * shape.wide if w.kept_in_float32 else shape.bytes_trained for w in own)
    return total, shape.bytes_trained if own and cast else 0
