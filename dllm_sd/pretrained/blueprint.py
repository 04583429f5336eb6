"""A model before its weights are read: what the checkpoint's small files and the keys of `model` tell about it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers import PreTrainedTokenizerBase as Tokenizer

from dllm_sd.errors import InputError, Unavailable, shortened, shown
from dllm_sd.hub import why_offline
from dllm_sd.pretrained.chat import Chat
from dllm_sd.pretrained.families import CAUSAL, MARK, Family, recognise
from dllm_sd.pretrained.model import Model, Shape
from dllm_sd.pretrained.shapes import SHAPES
from dllm_sd.pretrained.small_files import (
    GENERATION,
    brief,
    check_tokenizer_files,
    find_file,
    is_whole,
    model_folder,
    read_model_config,
    read_small_file,
)

LONGEST_BLOCK = 4096
"""Most positions of an attention block."""


@dataclass(frozen=True)
class Blueprint:
    """A model without its weights: cheap to read, and enough to refuse unusable settings."""

    model: Model
    family: Family
    config: PreTrainedConfig
    """The native config."""
    chat: Chat | None
    """None without a tokenizer; such a model works on token ids only."""
    mask_id: int | None
    """None for an autoregressive model, which has no mask token."""
    end_ids: tuple[int, ...]
    """Stop ids; the first one ends a turn."""
    pad_id: int
    block_length: int | None
    """Positions of an attention block; None where every position attends to all others."""

    @property
    def causal(self) -> bool:
        """Whether the model is autoregressive."""
        return self.mask_id is None

    @property
    def folder(self) -> str:
        """Folder or hub name of the checkpoint."""
        assert self.model.path is not None
        return model_folder(self.model.path)


def _unless_offline(source: str, otherwise: str) -> str:
    """The end of the refusal of a missing file: of a hub name without a hub why only its cache was searched."""
    is_path = source.count("/") > 1 or source[:1] in (".", "~", "/") or Path(model_folder(source)).is_dir()
    why = None if is_path else why_offline()
    return f"; {otherwise}" if why is None else f" in the local cache of the hub, and {why}, or name a folder"


def read_blueprint(model: Model, text: bool = True) -> Blueprint:
    """Read config, generation config and tokenizer of a checkpoint, and nothing else.

    Args:
        model: the keys of `model`.
        text: whether a tokenizer is needed.

    Raises:
        InputError: if the files are unusable, contradict each other, or lack required values.
    """
    if model.path is None and not model.random_init:
        raise InputError("model.path is missing; name a checkpoint, or set model.random_init to true")
    needs = {"model.quantization": ("bitsandbytes", model.quantization == "4bit")}
    needs["model.attention"] = ("flash_attn", model.attention == "flash_attention_2")
    for key, (package, used) in needs.items():
        if used and find_spec(package) is None:
            raise Unavailable(
                f"{key} needs the package {package}, which is not installed; install it, or leave {key} out"
            )
    where = repr(model.path) if model.path else "model.shape"
    written = _read_config(model.path) if model.path else {}
    family = recognise(written, where) if model.path else CAUSAL
    causal = _is_causal(model, family, written, where)
    tokenizer = _read_tokenizer(model, family, text)
    if tokenizer is not None and model.as_ == "diffusion" and tokenizer.mask_token is None and model.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": str(CAUSAL.mask_token)})
    config = _native_config(model, family, written, where, tokenizer)
    if not causal:
        config.is_causal = False
        setattr(config, MARK, {"family": family.name, "block_length": _block_length(model, family, written)})
    if causal and isinstance(model.mask_token, str):
        _known_id(model.mask_token, tokenizer, "model.mask_token", where)
    mask_id = None if causal else _mask_id(model, family, written, tokenizer, where)
    generation = _read_generation(model.path) if model.path else {}
    end_ids = _end_ids(model, family, [generation, written], tokenizer, where)
    pad_ids = [generation.get("pad_token_id"), written.get("pad_token_id")]
    pad_ids = [tokenizer.pad_token_id if tokenizer else None, *pad_ids, end_ids[-1]]
    rows = getattr(config, "vocab_size", None)
    if not is_whole(rows, 1):
        raise InputError(f"config.json of {where} does not say its vocab_size; restore the checkpoint's file")
    _check_rows(rows, mask_id, tokenizer, where, grows=model.as_ == "diffusion")
    if outside := [end_id for end_id in end_ids if not 0 <= end_id < max(rows, len(tokenizer or ()))]:
        raise InputError(
            f"{where} has {rows} embedding rows, but calls {outside[0]} an end token; fix eos_token_id in its "
            "config.json and generation_config.json"
        )
    chat = None
    if tokenizer is not None:
        marks = end_ids if mask_id is None else (*end_ids, mask_id)
        chat = Chat(tokenizer, end_ids[0], model.chat_template or family.template, model.thinking, marks)
        if model.thinking is None and family.thinking is not None and chat.has_switch:
            chat = replace(chat, thinking=family.thinking)
        chat.check_template()
    return Blueprint(
        model=model,
        family=family,
        config=config,
        chat=chat,
        mask_id=mask_id,
        end_ids=end_ids,
        pad_id=next((pad_id for pad_id in pad_ids if isinstance(pad_id, int) and 0 <= pad_id < rows), end_ids[-1]),
        block_length=_block_length(model, family, written),
    )


def known_blueprint(model: Model) -> Blueprint | None:
    """Describe a model of known shape without its files and without a tokenizer, to count its weights.

    None if the shape is not known.
    """
    where = repr(model.path) if model.path else "model.shape"
    written = SHAPES.get(str(model.path), {})
    if not written and (model.path is not None or model.shape.vocab_size is None):
        return None
    family = recognise(written, where) if model.path else CAUSAL
    causal, length = _is_causal(model, family, written, where), _block_length(model, family, written)
    if model.path is None:
        config = _shaped(model.shape, None)
    elif family.config is not None:
        config = family.native_config(written, where)
    else:
        config = AutoConfig.for_model(**written)
    if not causal:
        config.is_causal = False
        setattr(config, MARK, {"family": family.name, "block_length": length})
    return Blueprint(
        model=model,
        family=family,
        config=config,
        chat=None,
        mask_id=None if causal else 0,
        end_ids=(0,),
        pad_id=0,
        block_length=length,
    )


def _read_config(path: str) -> dict[str, Any]:
    file = find_file(path, "config.json")
    if file is None:
        remedy = _unless_offline(path, "give a checkpoint folder or a hub name")
        raise Unavailable(f"there is no config.json at {path!r} (model.path){remedy}")
    if find_file(path, "adapter_config.json") is not None:  # transformers would load the model named in it
        raise InputError(
            f"{path!r} (model.path) holds an adapter_config.json; name the model itself, and give the adapter with "
            "--adapter or as model.lora.start"
        )
    written = read_model_config(file)
    if written.get("model_type") is None:
        raise InputError(f"{file} names no model_type; restore the checkpoint's config.json")
    return written


def _read_generation(path: str) -> dict[str, Any]:
    file = find_file(path, "generation_config.json")
    return {} if file is None else read_small_file(file, GENERATION)


def _read_tokenizer(model: Model, family: Family, needed: bool) -> Tokenizer | None:
    source = model.tokenizer or model.path
    if source is None:
        raise Unavailable("model.tokenizer is missing; name the folder or hub name of a tokenizer")
    if not _has_tokenizer(source):
        if not needed:
            return None
        remedy = _unless_offline(source, "make it, or name another")
        raise Unavailable(f"no usable tokenizer at {source!r} (model.tokenizer): there is none{remedy}")
    load: Any = family.tokenizer or AutoTokenizer
    check_tokenizer_files(source)
    try:
        tokenizer = load.from_pretrained(model_folder(source), trust_remote_code=False)
        tokenizer.decode(tokenizer("?", add_special_tokens=False)["input_ids"], skip_special_tokens=True)
        return tokenizer
    except Exception as error:  # damaged JSON can raise any exception in transformers
        raise InputError(f"no usable tokenizer at {source!r} (model.tokenizer): {brief(error)}") from error


def _has_tokenizer(source: str) -> bool:
    """Whether a folder, or a repository on the hub or in its cache, holds a tokenizer file."""
    only_a_path = source.count("/") > 1 or source[:1] in (".", "~", "/")  # not a hub name
    if only_a_path and not Path(source).is_dir():
        return False
    names = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
    return any(find_file(source, name) for name in names)


def _native_config(
    model: Model, family: Family, written: Mapping[str, Any], where: str, tokenizer: Tokenizer | None
) -> PreTrainedConfig:
    if model.path is None:
        assert tokenizer is not None
        config: PreTrainedConfig = _shaped(model.shape, tokenizer)
    elif family.config is not None:
        config = family.native_config(written, where)
    else:
        try:
            config = AutoConfig.from_pretrained(model_folder(model.path), trust_remote_code=False)
        except Exception as error:  # a damaged value can raise any exception in transformers
            raise InputError(f"no usable config.json at {where} (model.path): {brief(error)}") from error
    return config


def _is_causal(model: Model, family: Family, written: Mapping[str, Any], where: str) -> bool:
    """Whether the model is to be used as an autoregressive one.

    Raises:
        InputError: if it cannot be.
    """
    made_causal = family is CAUSAL and written.get("is_causal", True)
    if model.as_ is None:
        return made_causal and not model.random_init
    if model.as_ == "autoregressive" and not made_causal:
        raise InputError(f"{where} is a masked-diffusion model and cannot write from left to right; leave out model.as")
    if model.as_ == "autoregressive" and model.block_length is not None:
        raise InputError("model.block_length is of block-causal models; leave it out, or leave out model.as")
    return model.as_ == "autoregressive"


def _shaped(shape: Shape, tokenizer: Tokenizer | None) -> PreTrainedConfig:
    build: Any = {"llama": LlamaConfig, "qwen3": Qwen3Config}[shape.architecture]
    size = shape.hidden_size // shape.num_attention_heads
    return build(
        **({"head_dim": size, "num_key_value_heads": shape.num_attention_heads} if build is Qwen3Config else {}),
        vocab_size=shape.vocab_size or len(tokenizer or ()),
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


def _block_length(model: Model, family: Family, written: Mapping[str, Any]) -> int | None:
    """Positions of an attention block; a family that is not block-causal has blocks only if the user sets them."""
    length = model.block_length
    if length is None and family.block_causal:
        length = written.get("block_size", family.block_length)
    if length is not None and (not isinstance(length, int) or length < 1):
        raise InputError(f"the attention block length must be at least 1, not {length!r}; set model.block_length")
    if length is not None and length > LONGEST_BLOCK:
        raise InputError(f"the attention block length must be at most {LONGEST_BLOCK}, not {length}")
    if length is not None and model.attention == "flash_attention_2":
        raise InputError("flash_attention_2 has no block-causal mask; set model.attention to sdpa")
    return length


def _mask_id(model: Model, family: Family, written: Mapping[str, Any], tokenizer: Tokenizer | None, where: str) -> int:
    known: dict[Any, int] = tokenizer.get_vocab() if tokenizer else {}
    named = model.mask_token
    if isinstance(named, int):
        return named
    if named is not None:
        return _known_id(named, tokenizer, "model.mask_token", where)
    tokenizer_mask = tokenizer.mask_token if tokenizer else None
    candidates = (written.get("mask_token_id"), known.get(family.mask_token), known.get(tokenizer_mask), family.mask_id)
    chosen = next((mask_id for mask_id in candidates if isinstance(mask_id, int)), None)
    if chosen is None:
        raise InputError(f"the tokenizer of {where} has no mask token; name it in model.mask_token")
    return chosen


def _end_ids(
    model: Model, family: Family, written: Iterable[Mapping[str, Any]], tokenizer: Tokenizer | None, where: str
) -> tuple[int, ...]:
    """Return the stop ids: the end of a turn first, then all end tokens of the checkpoint's files."""
    known: dict[Any, int] = tokenizer.get_vocab() if tokenizer else {}
    if model.end_tokens is not None:
        candidates: list[Any] = [_known_id(token, tokenizer, "model.end_tokens", where) for token in model.end_tokens]
    elif marks := [mark for source in written if isinstance(mark := source.get(MARK), Mapping) and mark.get("end_ids")]:
        candidates = list(marks[0]["end_ids"])
    else:
        candidates = [known.get(family.turn_end)]
        for source in written:
            ids = source.get("eos_token_id")
            candidates += ids if isinstance(ids, list) else [ids]
        candidates.append(tokenizer.eos_token_id if tokenizer else None)
        if not any(isinstance(i, int) for i in candidates):
            candidates = [source.get("pad_token_id") for source in written]
    ids = tuple(dict.fromkeys(i for i in candidates if isinstance(i, int)))
    if not ids:
        raise InputError(
            f"the tokenizer of {where} has no end token; set eos_token in its tokenizer_config.json, "
            "or name it in model.end_tokens"
        )
    return ids


def _known_id(token: str, tokenizer: Tokenizer | None, key: str, where: str) -> int:
    """The id of a token that the user named.

    Raises:
        InputError: if the tokenizer does not have it, with the special tokens of the most similar spelling.
    """
    known: dict[Any, int] = tokenizer.get_vocab() if tokenizer else {}
    if token in known:
        return known[token]
    special = [] if tokenizer is None else [str(added) for added in tokenizer.added_tokens_decoder.values()]
    close = get_close_matches(shortened(token), special, 4, 0.5) or special[:8]
    if key == "model.mask_token":
        there = f" with the special tokens {', '.join(close)}" if close else ""
        raise InputError(f"the tokenizer of {where}{there} has no mask token {shown(token)}; name it in {key}")
    there = f"; did you mean {', '.join(close)}?" if close else ""
    raise InputError(f"the tokenizer of {where} has no token {shown(token)}; fix {key}{there}")


def _check_rows(rows: int, mask_id: int | None, tokenizer: Tokenizer | None, where: str, grows: bool) -> None:
    """Check that every token has an embedding row; the row of an added mask token may be appended later."""
    last = max(mask_id or 0, len(tokenizer) - 1) if tokenizer else mask_id or 0
    if tokenizer and grows and last == len(tokenizer) - 1 == rows:
        return
    if last >= rows or (mask_id is not None and mask_id < 0):
        known = f"the tokenizer knows {len(tokenizer)} tokens" if tokenizer else "there is no tokenizer"
        mask = "" if mask_id is None else f" and the mask id is {mask_id}"
        fix = "" if mask_id is None else ", or fix model.mask_token"
        raise InputError(
            f"{where} has {rows} embedding rows, but {known}{mask}; use the tokenizer that belongs to the model{fix}"
        )
