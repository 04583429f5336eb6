"""The keys of `model`: which checkpoint, how it is read, and what of it is trained."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dllm_sd.errors import InputError
from dllm_sd.files.writing import Place
from dllm_sd.pretrained.chat_templates import read_template
from dllm_sd.ranges import Count, Natural, Range, Ranged, Seed, ShareBelowOne, Size


@dataclass(frozen=True)
class Lora(Ranged, key="model.lora"):
    """Low-rank adapters (PEFT)."""

    rank: Annotated[int, Range(least=1, most=2**16)] = 128
    """Rank of the adapters."""
    alpha: Count = 64
    """Scale of the adapters: their output is multiplied by `alpha / rank`."""
    dropout: ShareBelowOne = 0.0
    """Dropout of the adapters' input in training."""
    targets: tuple[str, ...] | None = None
    """Kinds of linear layers; None takes the family's, all seven."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapters, such as ``embed_tokens`` for a new mask token."""
    start: Place | None = None
    """Folder of a run's checkpoint, or of a PEFT adapter, to begin with; None begins with a new adapter."""
    merge_rollouts: bool = False
    """Fold the adapters into the weights while decoding, and put the weights back bit for bit. Faster where the
    adapters cost much; needs a second copy of the adapted weights, and in bfloat16 rounds the sum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets == ():
            raise InputError("model.lora.targets is []; name kinds of linear layers, or give null for the family's")


@dataclass(frozen=True)
class Shape(Ranged, key="model.shape"):
    """The shape of a randomly initialised model: Llama (LLaDA's, if bidirectional) or Qwen3, untied."""

    architecture: Literal["llama", "qwen3"] = "llama"
    """Which of transformers' architectures it is."""
    hidden_size: Annotated[int, Range(least=1, most=2**16)] = 64
    """Width of the hidden states."""
    num_hidden_layers: Annotated[int, Range(least=1, most=512)] = 4
    """Number of layers."""
    num_attention_heads: Annotated[int, Range(least=1, most=1024)] = 2
    """Attention heads of a layer."""
    intermediate_size: Size = 192
    """Width of the feed-forward layers."""
    vocab_size: Annotated[int, Range(least=1, most=2**22)] | None = None
    """Rows of embedding and head; None takes what the tokenizer needs."""
    max_position_embeddings: Annotated[int, Range(least=1, most=2**24)] = 4096
    """Longest sequence in tokens."""
    rope_theta: Annotated[float, Range(least=1, most=1e12)] = 10000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: Annotated[float, Range(above=0, most=1)] = 1e-5
    """Term that RMS normalisation adds to the mean square."""
    initializer_range: Annotated[float, Range(least=0, most=100)] = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InputError("model.shape.hidden_size must be a multiple of twice model.shape.num_attention_heads")


@dataclass(frozen=True)
class Model(Ranged, key="model"):
    """The model that is trained (the keys of `model`)."""

    path: Place | None = None
    """A folder, a hub name, or `tiny` for the shipped model. None with `random_init` builds `shape`."""
    as_: Literal["diffusion", "autoregressive"] | None = field(default=None, metadata={"key": "as"})
    """None detects the kind of a checkpoint; random weights make a masked diffusion model. `autoregressive` makes
    random weights causal. `diffusion` turns any causal language model of transformers bidirectional and gives it a mask
    token; it then has to learn denoising (method `sft`)."""
    tokenizer: Place | None = None
    """Folder or hub name of the tokenizer where it is not beside the model."""
    mask_token: str | Natural | None = None
    """The mask token, or its id, where neither the checkpoint nor its tokenizer names it."""
    end_tokens: tuple[str, ...] | None = None
    """Tokens that end a completion, the one that ends a turn first; None takes the checkpoint's."""
    block_length: Size | None = None
    """Positions of an attention block (block-causal checkpoints); None takes the checkpoint's."""
    chat_template: str | None = None
    """A chat template instead of the checkpoint's: Jinja text, a file that holds it (`.jinja`, `.txt`, or `.json` with
    the key `chat_template`; its text is what the run remembers), or the name of one of the tokenizer's templates."""
    thinking: bool | None = None
    """The thinking switch of templates that have one (`enable_thinking`, `thinking`, ...); None takes the family's."""
    random_init: bool = False
    """Random weights (seeded by `seed`) in the architecture of `path`, or of `shape` without a path."""
    shape: Shape = Shape()
    seed: Seed = 0
    """Seed of random weights, also of a new adapter."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Number format of the weights in memory."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in transformers."""
    quantization: Literal["4bit"] | None = None
    """`4bit` stores the linear layers in NF4 (extra `quant`) under LoRA."""
    lora: Lora | None = None
    """None trains all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_template is not None:
            object.__setattr__(self, "chat_template", read_template(self.chat_template))
        if self.quantization and not self.lora:
            raise InputError("model.quantization cannot be trained itself; set model.lora as well")
        if self.quantization and self.random_init:
            raise InputError("model.quantization needs a checkpoint; set model.random_init to false")
        if self.quantization and self.lora and self.lora.merge_rollouts:
            raise InputError("model.lora.merge_rollouts cannot fold adapters into 4-bit weights; set it to false")
