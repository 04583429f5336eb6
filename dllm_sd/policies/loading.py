"""Load a policy: native transformers classes, safetensors only, no remote code."""

import json
import warnings
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from dllm_sd.errors import InputError
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.policies.policy import View

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on all seven kinds of linear layers (PEFT)."""

    rank: int = 128
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS

    def __post_init__(self) -> None:
        if min(self.rank, self.alpha) < 1 or not 0 <= self.dropout < 1 or not self.targets:
            raise InputError("model.lora needs rank and alpha of 1 or more, dropout from 0 to below 1, and targets")


@dataclass(frozen=True)
class Shape:
    """The shape of a randomly initialised model in LLaDA's architecture (bidirectional Llama, untied)."""

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
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer where it is not beside the model."""
    mask_token: str | None = None
    """The mask token where the tokenizer does not name it."""
    random_init: bool = False
    """Random weights (seeded by `seed`) in the architecture of `path`, or of `shape` without a path."""
    shape: Shape = Shape()
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    lora: Lora | None = None
    """None trains all weights."""
    gradient_checkpointing: bool = False


def load_policy(name_or_path: str | None, *, device: str | torch.device = "cpu", **options: Any) -> MaskedDiffusion:
    """Load a masked-diffusion model and its tokenizer.

    Args:
        name_or_path: a folder in a native transformers format, a hub name, or ``"tiny"``.
        device: where the weights go.
        **options: fields of `Model`, such as ``dtype="bfloat16"`` or ``lora=Lora(rank=8)``.

    Raises:
        InputError: if the checkpoint or tokenizer is unusable, or an option is unknown.
    """
    known = {f.name for f in fields(Model)} - {"path"}
    if unknown := set(options) - known:
        raise InputError(f"unknown model option {sorted(unknown)[0]!r}; choose from {', '.join(sorted(known))}")
    return build_policy(Model(path=name_or_path, **options), device)


def build_policy(model: Model, device: str | torch.device = "cpu") -> MaskedDiffusion:
    """The policy that `model` describes, on ``device``."""
    tokenizer = load_tokenizer(model)
    mask_id = find_mask(model, tokenizer)
    network: Any = _network(model, tokenizer)
    width = network.get_input_embeddings().weight.shape[0]
    if max(mask_id, len(tokenizer) - 1) >= width:
        raise InputError(
            f"the tokenizer of model.path knows {len(tokenizer)} tokens (mask id {mask_id}) but the embedding has "
            f"{width} rows; use the tokenizer that belongs to the model"
        )
    network.to(device)
    if model.gradient_checkpointing:
        network.activation_checkpointing_enable()
    adapted = _with_lora(network, model.lora, model.seed) if model.lora else network
    end_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(end_id, int)
    pad_id = pad_id if isinstance(pad_id, int) else end_id
    policy = MaskedDiffusion(
        adapted,
        tokenizer,
        mask_id=mask_id,
        end_ids=(end_id,),
        pad_id=pad_id,
        suppress=tuple(range(len(tokenizer), width)),
    )
    _check(policy)
    return policy


def model_folder(name_or_path: str) -> str:
    """The folder of a shipped asset (``tiny``), else the argument itself (a folder or hub name)."""
    asset = Path(str(files("dllm_sd") / "assets" / name_or_path))
    if asset.is_dir() and not Path(name_or_path).exists():
        return str(asset)
    if ("/" in name_or_path or "." in name_or_path) and name_or_path[0] in "./~" and not Path(name_or_path).is_dir():
        raise InputError(f"model.path {name_or_path!r} is not a folder; give a checkpoint folder or a hub name")
    return name_or_path


def load_tokenizer(model: Model) -> Tokenizer:
    """The tokenizer of a model, without remote code."""
    source = model.tokenizer or model.path
    if source is None:
        raise InputError("model.tokenizer is missing; name the folder or hub name of a tokenizer")
    folder = model_folder(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged JSON can make transformers stumble over anything
        raise InputError(f"no usable tokenizer at {source!r} (model.tokenizer): {_brief(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer at {source!r} has no end token; set eos_token in its tokenizer_config.json")
    return tokenizer


def find_mask(model: Model, tokenizer: Tokenizer) -> int:
    """Id of the mask token, from `model.mask_token` or from the tokenizer."""
    token = model.mask_token or tokenizer.mask_token
    known = tokenizer.get_vocab()
    if token is None or token not in known:
        raise InputError(
            f"the tokenizer at {model.tokenizer or model.path!r} has no mask token"
            f"{f' {token!r}' if token else ''}; name it in model.mask_token"
        )
    return known[token]


def _network(model: Model, tokenizer: Tokenizer) -> PreTrainedModel:
    if model.path is None and not model.random_init:
        raise InputError("model.path is missing; name a checkpoint, or set model.random_init to true")
    config = _read_config(model.path) if model.path else _llada_shape(model.shape, tokenizer)
    config.is_causal = False
    options = {"dtype": DTYPES[model.dtype], "attn_implementation": model.attention}
    try:
        if model.random_init:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(model.seed)
                return AutoModelForCausalLM.from_config(config, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_folder(str(model.path)),
            **options,
            config=config,
            ignore_mismatched_sizes=True,  # so that the report names them
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(f"no usable model at {model.path or model.shape!r} (model.path): {_brief(error)}") from error
    network, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            name = sorted(map(str, report[kind]))[0]
            raise InputError(f"the checkpoint at {model.path!r} has {kind.replace('_', ' ')}, first {name}")
    return network


def _read_config(path: str) -> Any:
    folder = Path(model_folder(path))
    file = folder / "config.json"
    if file.is_file():
        try:
            written = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is not JSON ({error}); restore the checkpoint's config.json") from error
        if not isinstance(written, dict) or "model_type" not in written:
            raise InputError(f"{file} names no model_type; restore the checkpoint's config.json")
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else path, trust_remote_code=False)
    except Exception as error:  # a damaged value can make transformers stumble over anything
        raise InputError(f"no usable config.json at {path!r} (model.path): {_brief(error)}") from error


def _llada_shape(shape: Shape, tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab_size or len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=shape.rms_norm_eps,
        initializer_range=shape.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _with_lora(network: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    names = [name.rsplit(".", 1)[-1] for name, _ in network.named_modules()]
    if absent := [target for target in lora.targets if target not in names]:
        raise InputError(f"model.lora.targets names {absent[0]!r}, which this model does not have")
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own use
        torch.manual_seed(seed)
        adapted = get_peft_model(network, settings)
    assert isinstance(adapted, PeftModel)
    return adapted


def _check(policy: MaskedDiffusion) -> None:
    """What can silently go wrong: a causal mask left on, non-finite buffers or weights."""
    ids = torch.full((2, 4), policy.mask_id)
    ids[1, -1] = policy.end_ids[0]
    sites = torch.zeros_like(ids, dtype=torch.bool)
    sites[:, 0] = True
    with torch.no_grad():
        first, second = policy.site_logits(View(ids, torch.ones_like(sites), sites))
    if not bool(torch.isfinite(first).all()):
        raise InputError("the model's logits are not finite after loading; the checkpoint is damaged")
    if bool((first == second).all()):
        raise InputError("the model ignores later positions; it still attends causally and cannot denoise")


def _brief(error: BaseException) -> str:
    return shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
