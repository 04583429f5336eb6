"""The subspace of keys and values that right answers depend on, and their projection onto it during decoding.

Self-policy distillation (SPD, arXiv 2605.22675). Gradients of the loss on a few right answers, taken at the outputs of
the key and value layers, span the subspace (Eq. 6); during decoding, keys and values are projected onto it (Eq. 12).
What the paper leaves open (which rows, centring, the place before the rotary embedding) follows the authors' code,
gh540-svg/hahaha commit e249fec.

Axes here: ``m`` rows, one for each position of each example; ``d`` dimensions, those of all key (value) heads together;
``s`` positions of one example.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dllm_sd.errors import InputError
from dllm_sd.losses.numerics import at_least_float32
from dllm_sd.network.site_head import SiteHead, evaluating
from dllm_sd.ranges import Count, Natural, PositiveShare, Ranged, Size, check

POLICY_KEY = "method.rollout.policy"
"""Where the fields of `Subspace` stand in a config."""

Projectors = Mapping[int, tuple[Tensor | None, Tensor | None]]
"""By layer, counted from zero: the projectors ``[d d]`` of keys and of values; None leaves them as they are."""


@dataclass(frozen=True)
class Supervised:
    """A training example: input ids, the supervised sites, and the target tokens there."""

    ids: Tensor
    """int64 ``[s]``; for a model that denoises, with masks on the sites."""
    sites: Tensor
    """bool ``[s]``, true at the tokens of the loss."""
    targets: Tensor
    """int64 ``[s]``, the right tokens; read at the sites only."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the loss at the outputs of the key and value layers."""

    layers: Mapping[int, tuple[Tensor, Tensor]]
    """By layer, for keys and for values: float32 or float64 ``[m d]`` on the CPU."""
    used: int
    """Examples with a supervised token."""
    skipped: int
    """Examples without one among the positions that are read."""
    cut: int = 0
    """Examples, used or skipped, that were truncated."""


@dataclass(frozen=True, kw_only=True)
class Subspace(Ranged, key=POLICY_KEY):
    """The subspace that keys and values are projected onto during decoding; the defaults are those of SPD."""

    rank: Count | None = None
    """Dimensions that are kept; None keeps half of them."""
    energy: PositiveShare | None = None
    """Keep as many dimensions as hold this share of the squared gradients, instead of a fixed `rank`."""
    layers: tuple[Natural, ...] | None = None
    """Layers, counted from zero; None takes the last one and the middle one."""
    centre: bool = True
    """Whether the mean gradient is subtracted first. The authors' code does so, the paper does not mention it."""
    project: Literal["both", "keys", "values"] = "both"
    """What is projected."""
    calibration: Size = 50
    """Examples that the gradients are taken from."""
    longest: Size = 256
    """Tokens of an example that are read; what comes after them is cut off."""
    is_student = False
    moves = False
    weights = None
    """None: the initial weights decode, with keys and values projected."""

    @property
    def subspace(self) -> Self:
        """Return itself."""
        return self

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice(self.rank, self.energy)
        if self.layers == ():
            raise InputError(f"{POLICY_KEY}.layers is []; give layers counted from 0, such as [12, 23]")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise InputError(f"{POLICY_KEY}.layers names a layer twice; name each once")
        if self.project not in ("both", "keys", "values"):
            raise InputError(f"{POLICY_KEY}.project is {self.project!r}; choose both, keys or values")

    def chosen(self, count: int, dimension: int) -> tuple[int, ...]:
        """The layers of a network with ``count`` layers, whose keys and values have ``dimension`` dimensions.

        Raises:
            InputError: if the network has fewer layers, or fewer dimensions than `rank`.
        """
        check_rank(self.rank, dimension)
        if self.layers is None:
            return tuple(dict.fromkeys((count - 1, count // 2)))
        if max(self.layers) >= count:
            raise InputError(
                f"{POLICY_KEY}.layers names {max(self.layers)}, but the last layer is {count - 1}; take that one"
            )
        return self.layers

    def __call__(self, gradients: Gradients) -> dict[int, tuple[Tensor | None, Tensor | None]]:
        """Return the projectors of each layer for which there are gradients."""
        return {
            layer: (
                self._projector(keys) if self.project != "values" else None,
                self._projector(values) if self.project != "keys" else None,
            )
            for layer, (keys, values) in gradients.layers.items()
        }

    def _projector(self, gradients: Tensor) -> Tensor:
        return projector(gradients, self.rank, self.energy, self.centre)


def check_rank(rank: int | None, dimension: int) -> None:
    """Refuse a rank above the dimension of a model's keys and values.

    Raises:
        InputError: naming the key and the largest rank.
    """
    if rank is not None and rank > dimension:
        raise InputError(
            f"{POLICY_KEY}.rank is {rank}, but keys and values of this model have {dimension} dimensions; give at most "
            f"{dimension}"
        )


def _check_choice(rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise InputError(
            f"{POLICY_KEY}.rank and {POLICY_KEY}.energy are two ways to say the same; set one of them to null"
        )
    check(Count | None, rank, f"{POLICY_KEY}.rank")
    check(PositiveShare | None, energy, f"{POLICY_KEY}.energy")


def projector(gradients: Tensor, rank: int | None = None, energy: float | None = None, centre: bool = True) -> Tensor:
    """The projector onto the first right singular vectors, ``[m d] -> [d d]``; float64 stays, all else is float32.

    ``G - mean = U S V^T`` and ``P = V_r V_r^T``, symmetric and idempotent with trace ``r``.
    Source: SPD's code (see the top of this file), `extract_subspace` and `compute_projection_matrix`. It takes the SVD
    in float32; here ``V`` are the eigenvectors of ``(G - mean)^T (G - mean)`` in float64, found many times faster.

    Args:
        gradients: ``[m d]``.
        rank: ``r``; None is ``d // 2``. It is at most ``min(m, d)`` in any case.
        energy: instead of a rank, ``r = 1 + #{j: (S_1^2 + ... + S_j^2) / (S_1^2 + ... + S_d^2) < energy}``.
        centre: whether the mean row is subtracted first.

    Raises:
        InputError: if rank or energy is invalid, or the gradients are zero or not finite.
    """
    _check_choice(rank, energy)
    gram = _gram(gradients, centre)
    if not bool(torch.isfinite(gram).all()):
        raise InputError("gradients of the calibration examples are not finite; set model.dtype to float32 or bfloat16")
    if not bool(gram.any()):
        raise InputError(
            "the calibration examples give no gradient to find a subspace by; take others whose answers lie within "
            f"{POLICY_KEY}.longest tokens, or raise it"
        )
    squares, vectors = torch.linalg.eigh(gram)
    if energy is not None:
        squares = squares.flip(0).clamp(min=0)
        rank = 1 + int((squares.cumsum(0) / squares.sum() < energy).sum())
    elif rank is None:
        rank = len(gram) // 2
    kept = vectors.flip(1)[:, : min(rank, *gradients.shape)]
    return (kept @ kept.T).to(at_least_float32(gradients[:0]).dtype)


def _gram(rows: Tensor, centre: bool) -> Tensor:
    """``G^T G`` of ``G [m d]`` or, centred, of ``G - mean``: float64 ``[d d]``, computed in chunks of rows."""
    gram = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    mean = rows.sum(0, dtype=torch.float64) / max(len(rows), 1)
    for chunk in rows.split(4096):
        wide = chunk.double() - mean if centre else chunk.double()
        gram.addmm_(wide.T, wide)
    return gram


def kv_layers(network: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the key and value projections of every layer, as the network holds them (with their adapters).

    Args:
        network: a decoder of transformers, or a PEFT model around one.

    Raises:
        InputError: if they are not separate modules, as with a fused query-key-value projection.
    """
    bare: Any = network.get_base_model() if isinstance(network, PeftModel) else network
    blocks = getattr(getattr(bare, "base_model", None), "layers", ())
    pairs = []
    for block in blocks:
        attention = getattr(block, "self_attn", None)
        pair = getattr(attention, "k_proj", None), getattr(attention, "v_proj", None)
        if not all(_linears(part) for part in pair):
            break
        pairs.append(pair)
    if not pairs or len(pairs) < len(blocks):
        raise InputError(
            f"{POLICY_KEY} projects the outputs of self_attn.k_proj and self_attn.v_proj, which not all layers of "
            f"{type(bare).__name__} have; choose a model that has them, such as Llama, Qwen or LLaDA"
        )
    return pairs


def _linears(part: Any) -> list[nn.Linear]:
    """Return the linear layers of ``part``: itself, or a base layer and the B matrices of its adapters."""
    if isinstance(part, nn.Linear):
        return [part]
    if isinstance(part, LoraLayer):
        base = _linears(part.base_layer)
        return base and [*base, *(linear for B in part.lora_B.values() for linear in _linears(B))]
    if isinstance(part, ModulesToSaveWrapper):
        copies = (part.original_module, *part.modules_to_save.values())
        return [linear for module in copies for linear in _linears(module)]
    return []


def collect(
    module: SiteHead, examples: Iterable[Supervised], layers: Sequence[int], longest: int | None = None
) -> Gradients:
    """Gradients of the loss at the outputs of the key and value layers, at all positions of all examples.

    An example's loss is its mean cross-entropy over its sites (SPD, Eq. 6). A module with a shift has no
    prediction for a first token, which is then not a site. The outputs include biases, and come before rotary embedding
    and key normalisation. The module runs in eval mode, one example at a time; gradients of parameters do not change.

    Args:
        module: the policy's.
        examples: the calibration examples.
        layers: layers counted from zero, as `Subspace.chosen` gives them.
        longest: positions after which an example is truncated; None truncates nothing.

    Raises:
        InputError: if no example has a site.
    """
    parts = kv_layers(module.network)
    device = next(module.parameters()).device
    rows: dict[int, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in layers}
    used = skipped = cut = 0
    with evaluating(module), torch.enable_grad():
        for example in examples:
            cut += longest is not None and len(example.ids) > longest
            ids, sites, targets = (x[:longest].to(device) for x in (example.ids, example.sites, example.targets))
            if module.shift:
                sites = sites & (torch.arange(len(sites), device=device) > 0)
            if not bool(sites.any()):
                skipped += 1
                continue
            with _recorded([part for layer in rows for part in parts[layer]]) as outputs:
                logits = module(ids[None], torch.ones_like(sites)[None], sites[None])
            loss = cross_entropy(at_least_float32(logits), targets[sites])
            gradients = iter(torch.autograd.grad(loss, outputs))
            for side in (side for sides in rows.values() for side in sides):
                side.append(at_least_float32(next(gradients)[0]).cpu())
            used += 1
    if not used:
        raise InputError(
            f"none of {skipped} calibration examples has a supervised token within {POLICY_KEY}.longest tokens; raise "
            "it, or take shorter examples"
        )
    stacked = {layer: (torch.cat(keys), torch.cat(values)) for layer, (keys, values) in rows.items()}
    return Gradients(stacked, used, skipped, cut)


@contextmanager
def _recorded(parts: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of ``parts`` in a forward pass; they require a gradient even if parameters are frozen."""
    seen: dict[nn.Module, Tensor] = {}
    outputs: list[Tensor] = []

    def record(part: nn.Module, _: Any, output: Tensor) -> None:
        seen[part] = output if output.requires_grad else output.requires_grad_()

    with ExitStack() as hooks:
        for part in parts:
            hooks.enter_context(part.register_forward_hook(record))
        yield outputs
    outputs.extend(seen[part] for part in parts)


@contextmanager
def projected(network: nn.Module, projectors: Projectors) -> Iterator[None]:
    """Project keys and values to ``K P_K`` and ``V P_V`` at every position inside (SPD, Eq. 12).

    The projectors are folded into the linear layers, ``W <- P W`` and ``b <- P b``, and of adapters into ``B``, since
    ``P (W + BA) x = (P W) x + (P B) A x``. So decoders need no change, and `merged` may be entered inside. The former
    values are copied back, also after an exception. Sharded weights (FSDP2) must have been gathered before.

    Args:
        network: a decoder of transformers, or a PEFT model around one.
        projectors: by layer, as `Subspace` makes them.

    Raises:
        InputError: if the weights are quantised, an adapter is not linear, or a projector does not fit.
    """
    folds = _folds(network, projectors)
    former = [weight.detach().clone() for weight, _ in folds]
    try:
        with torch.no_grad():
            for weight, fold in folds:
                wide = torch.promote_types(at_least_float32(weight).dtype, fold.dtype)
                weight.copy_(fold.to(weight.device, wide) @ weight.to(wide))
        yield
    finally:
        with torch.no_grad():
            for (weight, _), value in zip(folds, former, strict=True):
                weight.copy_(value)


def _folds(network: nn.Module, projectors: Projectors) -> list[tuple[Tensor, Tensor]]:
    """Return every weight and bias to change, with its projector, and check all of them beforehand."""
    parts = kv_layers(network)
    folds: list[tuple[Tensor, Tensor]] = []
    for layer, pair in projectors.items():
        if not 0 <= layer < len(parts):
            raise InputError(f"there is a projector for layer {layer}, but the last layer is {len(parts) - 1}")
        for part, fold in zip(parts[layer], pair, strict=True):
            if fold is None:
                continue
            if getattr(part, "lora_variant", None):
                raise InputError(
                    f"{POLICY_KEY} cannot project adapters such as DoRA, which are not linear; use plain LoRA"
                )
            for linear in _linears(part):
                if linear.weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                    raise InputError(f"{POLICY_KEY} cannot project quantised weights; set model.quantization to null")
                if fold.shape != (len(linear.weight), len(linear.weight)):
                    raise InputError(
                        f"the projector of layer {layer} has shape {list(fold.shape)}, but its keys or values have "
                        f"{len(linear.weight)} dimensions; collect the gradients on this model"
                    )
                folds += [(value, fold) for value in (linear.weight, linear.bias) if value is not None]
    return folds
