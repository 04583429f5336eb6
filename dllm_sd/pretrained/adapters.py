"""The rank and alpha of a stored adapter, which its tensors alone do not tell."""

from pathlib import Path
from typing import Any

from peft import LoraConfig

from dllm_sd.errors import InputError
from dllm_sd.files.plain_yaml import read_yaml
from dllm_sd.pretrained.small_files import ADAPTER, read_small_file


def check_scale(path: str, student: LoraConfig) -> None:
    """Refuse an adapter of another rank or alpha than the student's, whose scale ``alpha / rank`` would apply to it.

    They are read from its ``adapter_config.json``, or from the ``config.yaml`` of the run that wrote the checkpoint. If
    there is neither, nothing is checked.

    Raises:
        InputError: naming the key and its value.
    """
    exported = Path(path) / "adapter_config.json"
    made = _exported(exported) if exported.is_file() else _trained(Path(path).parent.parent / "config.yaml")
    for name, value in {"rank": student.r, "alpha": student.lora_alpha}.items():
        if name in made and made[name] != value:
            raise InputError(
                f"the adapter at {path!r} was made with {name} {made[name]}, but model.lora.{name} is {value}; set it "
                f"to {made[name]}"
            )


def _exported(file: Path) -> dict[str, Any]:
    tree = read_small_file(file, ADAPTER)
    made = {"rank": tree.get("r"), "alpha": tree.get("lora_alpha")}
    if None in made.values():
        raise InputError(f"{file} does not say an adapter's r and lora_alpha; give a PEFT adapter of LoRA")
    if odd := [name for name in ("use_rslora", "alpha_pattern", "rank_pattern") if tree.get(name)]:
        raise InputError(f"{file} sets {odd[0]}, under which adapters count otherwise; give one of plain LoRA")
    return made


def _trained(file: Path) -> dict[str, Any]:
    try:
        lora = read_yaml(file, str(file))["model"]["lora"]
        return {"rank": lora["rank"], "alpha": lora["alpha"]}
    except (OSError, ValueError, TypeError, KeyError):  # not a run, or a run that trained all weights
        return {}
