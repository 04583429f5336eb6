"""A checkpoint folder on disk: safetensors files, and a `state.json` that holds the SHA-256 checksum of each file.

What is read is what was written, or it is refused: no pickle, no symbolic link, no name that leads out of the folder.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.files import reading
from dllm_sd.files.typed_json import build, own_json

CHECKPOINTS, CHECKPOINT_WEIGHTS, STATE = "checkpoints", "model.safetensors", "state.json"
FILES = "files"
"""Key of `state.json`: checksums in hexadecimal digits by file name; its own is of its bytes with `BLANK` there."""
BLANK = "0" * 64
FORMAT = "format"
"""Key of `state.json`: `VERSION`. Earlier checkpoints have neither this key nor checksums."""
VERSION = 2


def checksum(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def state_text(state: Mapping[str, Any], sums: Mapping[str, str]) -> bytes:
    """What `state.json` holds of ``state`` beside files with the checksums ``sums``."""
    text = json.dumps({FILES: {STATE: BLANK, **sums}, FORMAT: VERSION, **state}, indent=1).encode()
    return text.replace(BLANK.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def numbered_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run by their updates, the earliest first; an empty folder is none."""
    folders = (folder for folder in (run / CHECKPOINTS).glob("*") if folder.name.isascii() and folder.name.isdigit())
    return sorted((one for one in folders if one.is_dir() and any(one.iterdir())), key=lambda one: int(one.name))


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint as a tree, its checksum verified where it has one.

    Raises:
        InputError: if it is missing or damaged, with the remedy.
    """
    file = folder / STATE
    try:
        content = reading.read_whole(_plain(file))
        tree = own_json(content)
        if not isinstance(tree, dict):
            raise ValueError(f"it must be an object, not {tree!r:.60}")
        if FILES in tree or FORMAT in tree:
            _verify_state(content, tree, build(dict[str, str], tree.get(FILES), FILES))
    except (OSError, ValueError) as error:
        raise damaged_checkpoint(file, error) from error
    return tree


def _verify_state(content: bytes, tree: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    own = sums.get(STATE, "").encode()
    if len(own) != len(BLANK) or hashlib.sha256(content.replace(own, BLANK.encode(), 1)).hexdigest().encode() != own:
        raise ValueError("it does not agree with its checksum")
    if tree.get(FORMAT) != VERSION:
        raise ValueError(f"its format is {tree.get(FORMAT)!r:.60}, and this version of the program reads {VERSION}")
    if odd := [name for name in sums if not name or Path(name).name != name or name.startswith(".")]:
        raise ValueError(f"{odd[0]!r:.60} is not the name of a file in the folder")


def verify(folder: Path, sums: Mapping[str, str]) -> None:
    """Compare every file of a checkpoint with its checksum.

    Raises:
        InputError: naming the file that is missing or damaged, with the remedy.
    """
    for name in sums.keys() - {STATE}:
        try:
            if checksum(_plain(folder / name)) != sums[name]:
                raise ValueError(f"it does not agree with its checksum in {STATE}")
        except (OSError, ValueError) as error:
            raise damaged_checkpoint(folder / name, error) from error


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, verified where the checkpoint has checksums.

    A folder that is no checkpoint of a run, and has no `state.json`, is read as it is.

    Raises:
        InputError: if the file is missing or damaged, with the remedy.
    """
    bare = folder.parent.name != CHECKPOINTS and not (folder / STATE).exists()
    sums = {} if bare else read_state(folder).get(FILES)
    if sums:
        if name not in sums:
            raise damaged_checkpoint(folder / name, f"it is not listed in {STATE}")
        verify(folder, {name: sums[name]})
    return load_tensors(folder, name)


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint that was verified before.

    Raises:
        InputError: if it is missing or no safetensors file, with the remedy.
    """
    try:
        return load_file(_plain(folder / name))
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise damaged_checkpoint(folder / name, error) from error


def _plain(file: Path) -> Path:
    if file.is_symlink():
        raise ValueError("it is a symbolic link")
    if not file.is_file():
        raise ValueError("it is not a file" if file.exists() else "the file does not exist")
    return file


def damaged_checkpoint(file: Path, why: BaseException | str) -> InputError:
    """The refusal of a file of a checkpoint, which says what can be done."""
    return reading.damaged_file(f"checkpoint {file}", why, remedy(file.parent))


def remedy(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used: go on from the one before, or without the best weights."""
    if folder.parent.name != CHECKPOINTS:
        return "give another folder, or begin the run that it is of anew with resume=fresh"
    others = numbered_checkpoints(folder.parent.parent)
    if not (folder.name.isascii() and folder.name.isdigit()):
        last = f"; eval, sample and export take {CHECKPOINTS}/{others[-1].name} once it is removed" if others else ""
        return f"put back a copy of it, or train with resume=force to choose the best weights anew{last}"
    others = [one for one in others if int(one.name) < int(folder.name)]
    if not others:
        return "use resume=fresh to begin again"
    return f"remove {folder} to go on from update {int(others[-1].name)} ({CHECKPOINTS}/{others[-1].name})"
