"""The safetensors files of a checkpoint: what their headers say, before a tensor is read."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dllm_sd.errors import InputError
from dllm_sd.policies.blueprint import brief, find_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file."""

    dtype: str
    """As safetensors calls it, such as ``BF16``."""
    shape: tuple[int, ...]
    file: Path


def stored_tensors(path: str) -> dict[str, Stored]:
    """All tensors of a checkpoint, a folder or a hub name, by name.

    Raises:
        InputError: naming the file that is missing or damaged; also if the weights are pickled.
    """
    found: dict[str, Stored] = {}
    for file in _files(path):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    part = tensors.get_slice(name)
                    found[name] = Stored(part.get_dtype(), tuple(part.get_shape()), file)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file.name} of the checkpoint at {path!r} is damaged ({brief(error)}); download it again"
            ) from error
    return found


def _files(path: str) -> list[Path]:
    single, index = find_file(path, WEIGHTS), find_file(path, INDEX)
    if single is not None:
        return [single]
    if index is None:
        pickled = any(find_file(path, name) for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"))
        kind = "holds pickled weights, which can run code" if pickled else f"holds no {WEIGHTS}"
        raise InputError(f"the checkpoint at {path!r} {kind}; convert or download it in the safetensors format")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{INDEX} of the checkpoint at {path!r} is damaged ({brief(error)}); restore it") from error
    files = {name: find_file(path, name) for name in names}
    if missing := [name for name, file in files.items() if file is None]:
        raise InputError(f"the checkpoint at {path!r} lacks {missing[0]}, which its index names; download it again")
    return [file for file in files.values() if file is not None]
