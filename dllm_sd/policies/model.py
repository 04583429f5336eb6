"""The keys of `model`: which checkpoint, how it is read, and what of it is trained."""

from dataclasses import dataclass, field
from typing import Literal

from dllm_sd.errors import InputError


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (PEFT)."""

    rank: int = 128
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    """Kinds of linear layers; None takes the family's, all seven."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapters, such as ``embed_tokens`` for a new mask token."""
    start: str | None = None
    """Folder of a run's checkpoint, or of a PEFT adapter, to begin with; None begins with a new adapter."""
    merge_rollouts: bool = False
    """Fold the adapters into the weights while decoding, and put the weights back bit for bit. Faster where the
    adapters cost much; needs a second copy of the adapted weights, and in bfloat16 rounds the sum."""

    def __post_init__(self) -> None:
        if min(self.rank, self.alpha) < 1 or not 0 <= self.dropout < 1 or self.targets == ():
            raise InputError("model.lora needs rank and alpha of 1 or more, dropout from 0 to below 1, and targets")


@dataclass(frozen=True)
class Shape:
    """The shape of a randomly initialised model: Llama (LLaDA's, if bidirectional) or Qwen3, untied."""

    architecture: Literal["llama", "qwen3"] = "llama"
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    intermediate_size: int = 192
    vocab_size: int | None = None
    """Rows of embedding and head; None takes what the tokenizer needs."""
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.intermediate_size) < 1:
            raise InputError("model.shape needs sizes and numbers of 1 or more")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InputError("model.shape.hidden_size must be a multiple of twice model.shape.num_attention_heads")


@dataclass(frozen=True)
class Model:
    """Which model is trained (the keys of `model`)."""

    path: str | None = None
    """A folder, a hub name, or `tiny` for the shipped model. None with `random_init` builds `shape`."""
    as_: Literal["diffusion", "autoregressive"] | None = field(default=None, metadata={"key": "as"})
    """None takes a checkpoint for what it is, and denoises with random weights. `autoregressive` is for random weights
    that shall be causal. `diffusion` turns any causal language model of transformers bidirectional and gives it a mask
    token; it then has to learn denoising (method `sft`)."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer where it is not beside the model."""
    mask_token: str | int | None = None
    """The mask token, or its id, where neither the checkpoint nor its tokenizer names it."""
    end_tokens: tuple[str, ...] | None = None
    """Tokens that end a completion, the one that ends a turn first; None takes the checkpoint's."""
    block_length: int | None = None
    """Positions of an attention block (block-causal checkpoints); None takes the checkpoint's."""
    chat_template: str | None = None
    """Jinja text of a chat template instead of the checkpoint's."""
    thinking: bool | None = None
    """The thinking switch of templates that have one; None takes the family's."""
    random_init: bool = False
    """Random weights (seeded by `seed`) in the architecture of `path`, or of `shape` without a path."""
    shape: Shape = Shape()
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    quantization: Literal["4bit"] | None = None
    """`4bit` stores the linear layers in NF4 (extra `quant`) under LoRA."""
    lora: Lora | None = None
    """None trains all weights."""
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.quantization and not self.lora:
            raise InputError("model.quantization cannot be trained itself; set model.lora as well")
        if self.quantization and self.random_init:
            raise InputError("model.quantization needs a checkpoint; set model.random_init to false")
        if self.quantization and self.lora and self.lora.merge_rollouts:
            raise InputError("model.lora.merge_rollouts cannot fold adapters into 4-bit weights; set it to false")
