"""The safetensors files of a checkpoint: names, types and shapes from their headers, before any tensor is read."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dllm_sd.errors import InputError
from dllm_sd.pretrained.small_files import brief, find_file, model_folder, read_small_file

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file."""

    dtype: str
    """Name in safetensors, such as ``BF16``."""
    shape: tuple[int, ...]
    file: Path


def stored_tensors(path: str) -> dict[str, Stored]:
    """All tensors of a checkpoint, a folder or a hub name, by name.

    Raises:
        InputError: naming the file that is missing or damaged; also if the weights are pickled.
    """
    stored: dict[str, Stored] = {}
    for file in _files(path):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                    part = tensors.get_slice(name)
                    stored[name] = Stored(part.get_dtype(), tuple(part.get_shape()), file)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file.name} of the checkpoint at {path!r} is damaged ({brief(error)}); download it again"
            ) from error
    return stored


def _files(path: str) -> list[Path]:
    single, index = find_file(path, SINGLE_FILE), find_file(path, INDEX_FILE)
    if single is not None:
        return [single]
    if index is None:
        pickled = any(find_file(path, name) for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"))
        kind = "holds pickled weights, which can run code" if pickled else f"holds no {SINGLE_FILE}"
        raise InputError(f"the checkpoint at {path!r} {kind}; convert or download it in the safetensors format")
    names = _shards(index, path)
    files = {name: find_file(path, name) for name in names}
    if missing := [name for name, file in files.items() if file is None]:
        raise InputError(f"the checkpoint at {path!r} lacks {missing[0]:.80}, which its index names; download it again")
    return [file for file in files.values() if file is not None]


def _shards(index: Path, path: str) -> list[str]:
    """The files that an index names, none of which may lie outside the checkpoint."""
    remedy = f"restore the {INDEX_FILE} of the checkpoint at {path!r}"
    names = read_small_file(index, {}).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: weight_map must name a file for each tensor; {remedy}")
    folder = Path(model_folder(path))
    allowed = [folder.resolve()]
    if allowed[0].parent.name == "snapshots":  # of the hub's cache, whose files are links to blobs beside it
        allowed.append(allowed[0].parents[1] / "blobs")
    for name in sorted(set(names.values())):
        plain = name.endswith(".safetensors") and not Path(name).is_absolute() and ".." not in Path(name).parts
        if not plain or "\0" in name:
            raise InputError(f"{index}: weight_map names {name!r:.80}, no safetensors file of this folder; {remedy}")
        if folder.is_dir() and not any((folder / name).resolve().is_relative_to(place) for place in allowed):
            raise InputError(f"{index}: weight_map names {name!r:.80}, which leads outside the folder; {remedy}")
    return sorted(set(names.values()))
