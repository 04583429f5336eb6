"""The small files of a checkpoint: found in its folder or on the hub, read as JSON, and checked key by key."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeGuard

from transformers.utils.hub import cached_file

from dllm_sd.errors import InputError, os_reason, shown
from dllm_sd.files.reading import LARGEST_FILE, parse_json, read_whole
from dllm_sd.hub import why_offline

LARGEST_TOKENIZER = 2**28
"""Bytes of a tokenizer's file."""
MOST_LAYERS = 1024
MOST_EXPERTS = 2**16
MARK = "dllm_sd"
"""Key of a native config.json for what its other keys cannot tell: `family`, `block_length`, `thinking`, `end_ids`."""


def model_folder(name_or_path: str) -> str:
    """The folder of a shipped asset (``tiny``), else the argument itself (a folder or hub name)."""
    if "://" in name_or_path:
        raise InputError(
            f"model.path {shown(name_or_path)} is a web address; give the name on the hub, as in Qwen/Qwen3-0.6B, or a "
            "folder with the checkpoint"
        )
    asset = Path(str(files("dllm_sd") / "assets" / name_or_path))
    if asset.is_dir() and not Path(name_or_path).exists():
        return str(asset)
    if ("/" in name_or_path or "." in name_or_path) and name_or_path[0] in "./~" and not Path(name_or_path).is_dir():
        raise InputError(f"model.path {name_or_path!r} is not a folder; give a checkpoint folder or a hub name")
    return name_or_path


def find_file(path: str, name: str) -> Path | None:
    """Return a file of a checkpoint, downloaded from the hub if needed; None if the checkpoint does not have it."""
    folder = Path(model_folder(path))
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    why_offline()  # so that a hub that does not answer is not asked again and again
    try:
        cached = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise InputError(f"no model at {path!r} (model.path): {brief(error)}") from error
    return Path(cached) if cached else None


def brief(error: BaseException) -> str:
    """An exception on one short line."""
    return shorten(str(error) or type(error).__name__, 240, placeholder=" ...")


@dataclass(frozen=True)
class ValueKind:
    """The values that a key may have, as a description and as a test; null counts as an absent key."""

    words: str
    fits: Callable[[Any], bool]


def is_whole(value: Any, least: int = -(2**53), most: int = 2**53) -> TypeGuard[int]:
    """Whether a value is a whole number in a range; true and false are not numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


_NAME = ValueKind("text of at most 200 characters", lambda value: isinstance(value, str) and len(value) <= 200)
_SWITCH = ValueKind("true or false", lambda value: isinstance(value, bool))
_SIZE = ValueKind("a whole number from 1 to 2^31", lambda value: is_whole(value, 1, 2**31))
_TOKEN = ValueKind("a token's number", is_whole)
_TOKENS = ValueKind("a token's number or a list of them", lambda value: is_whole(value) or _is_list(value, is_whole))
_POSITIVE = ValueKind(
    "a number above 0", lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value > 0
)
_SPECIAL = ValueKind("a token", lambda value: isinstance(value, str | dict))
_ENDS: dict[str, ValueKind] = {"bos_token_id": _TOKENS, "eos_token_id": _TOKENS, "pad_token_id": _TOKEN}
_LLADA_SIZES = ("embedding_size", "d_model", "n_heads", "n_kv_heads", "mlp_hidden_size", "max_sequence_length")
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "moe_intermediate_size"),
)

CONFIG: dict[str, ValueKind] = {
    "model_type": _NAME,
    **dict.fromkeys((*_LLADA_SIZES, *_SIZES), _SIZE),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "mlp_ratio", "partial_rotary_factor"), _POSITIVE),
    **dict.fromkeys(("is_causal", "tie_word_embeddings", "weight_tying", "multi_query_attention"), _SWITCH),
    **_ENDS,
    "mask_token_id": _TOKEN,
    "block_size": ValueKind("a whole number", is_whole),
    "transformers_weights": ValueKind("left out, since weights are read from model.safetensors", lambda value: False),
    f"{MARK}.block_length": _SIZE,
    f"{MARK}.thinking": _SWITCH,
    f"{MARK}.end_ids": ValueKind("a list of tokens' numbers", lambda value: _is_list(value, is_whole)),
}
"""Keys of config.json."""
GENERATION = _ENDS
"""Keys of generation_config.json."""
TOKENIZER: dict[str, ValueKind] = {
    **dict.fromkeys(("eos_token", "bos_token", "pad_token", "mask_token", "unk_token"), _SPECIAL),
    "chat_template": ValueKind("text, or a list of templates", lambda value: isinstance(value, str | list | dict)),
    "added_tokens_decoder": ValueKind("an object", lambda value: isinstance(value, dict)),
    "tokenizer_class": _NAME,
}
"""Keys of tokenizer_config.json."""
ADAPTER: dict[str, ValueKind] = {
    "r": ValueKind("a whole number from 1 to 65536", lambda value: is_whole(value, 1, 2**16))
}
ADAPTER["lora_alpha"] = _POSITIVE
"""Keys of adapter_config.json."""


def read_small_file(file: Path, kinds: Mapping[str, ValueKind], largest: int | None = 2**53) -> dict[str, Any]:
    """The object that a JSON file of a checkpoint holds.

    Args:
        file: the file.
        kinds: what its keys may hold, as far as they are known; a dotted key stands for one inside.
        largest: bound of the absolute value of every whole number, None for no bound.

    Raises:
        InputError: naming file and key.
    """
    remedy = f"restore the checkpoint's {file.name}"
    try:
        text = read_whole(file).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({os_reason(error)}); {remedy}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text; {remedy}") from None
    tree = parse_json(text, f"{file} is not JSON", remedy, explain=True)
    if not isinstance(tree, dict):
        raise InputError(f"{file} holds no JSON object; {remedy}")
    for key, value in _entries(tree):
        name = shorten(key, 80, placeholder=" ...")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{file}: {name} must be a finite number, not {value}; {remedy}")
        if largest is not None and isinstance(value, int) and abs(value) > largest:
            raise InputError(f"{file}: {name} is a number beyond all measure; {remedy}")
        if (kind := kinds.get(key)) is not None and value is not None and not kind.fits(value):
            raise InputError(f"{file}: {name} must be {kind.words}, not {value!r:.60}; {remedy}")
    return tree


def read_model_config(file: Path) -> dict[str, Any]:
    """The object that a checkpoint's config.json holds; see `read_small_file`.

    Raises:
        InputError: naming file and key; also where it asks for more layers or experts than any model has.
    """
    tree = read_small_file(file, CONFIG)
    for key, value in _entries(tree):
        most = MOST_LAYERS if key.endswith(("layer", "layers")) else MOST_EXPERTS if "expert" in key else None
        if most is not None and isinstance(value, int) and not 0 <= value <= most:
            raise InputError(f"{file}: {key:.80} must be from 0 to {most}, not {value}; restore the checkpoint's file")
    return tree


def check_tokenizer_files(source: str) -> None:
    """Refuse a tokenizer whose files are damaged in a way that its loader would not survive, or too large.

    Raises:
        InputError: naming the file, and the key.
    """
    if (file := find_file(source, "tokenizer_config.json")) is not None:
        read_small_file(file, TOKENIZER, largest=None)  # an unlimited model_max_length is 10^30
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (file := find_file(source, name)) is not None:
            read_small_file(file, TOKENIZER)
    for name, most in {"tokenizer.json": LARGEST_TOKENIZER, "chat_template.jinja": LARGEST_FILE}.items():
        file = find_file(source, name)
        if file is not None and file.stat().st_size > most:
            raise InputError(f"{file} is larger than {most >> 20} MiB; restore the tokenizer's file")


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield every value in a tree with its dotted key; the values of a list have the key of the list and a dot."""
    rest: list[tuple[str, Any]] = [("", tree)]
    while rest:
        key, value = rest.pop()
        if key:
            yield key, value
        if isinstance(value, dict):
            rest += [(f"{key}.{name}" if key else name, part) for name, part in value.items()]
        elif isinstance(value, list):
            rest += [(f"{key}.", part) for part in value]
