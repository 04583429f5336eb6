"""The model card of an exported policy: base model, usage, training and results."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub import ModelCard, try_to_load_from_cache

from dllm_sd.config import build_config, path_keys, to_tree
from dllm_sd.errors import InputError
from dllm_sd.files.reading import damaged_file, read_own
from dllm_sd.files.typed_json import read_json
from dllm_sd.methods.differences import named_differences
from dllm_sd.methods.method import Method
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.pretrained.blueprint import Blueprint, model_folder
from dllm_sd.pretrained.model import Model
from dllm_sd.training.checkpoint import state_of
from dllm_sd.training.folder import read_run_config

ExportFormat = Literal["peft", "merged", "original"]


@dataclass(frozen=True)
class Trained:
    """The run and the checkpoint that the weights come from."""

    run: Path
    checkpoint: Path


CARD = """---
{front}
---

# {name}

{what} of {base}, {kind} language model (family `{family}`), written by `dllm-sd export`.
{notes}

## Use

{use}
{warning}
## Training

{training}

## Results

{results}
"""


WARNING = """
Do not call `generate()`: it writes from left to right, and this model fills in masks, so the text would be nonsense.
"""


def model_card(
    policy: AnyPolicy,
    blueprint: Blueprint,
    to: ExportFormat,
    name: str,
    trained: Trained | None = None,
    stored: str | None = None,
    grown: int | None = None,
) -> str:
    """README.md of an exported policy, with front matter for the hub.

    Args:
        policy: the policy.
        blueprint: the description of the model that the policy was built from.
        to: the format of the export.
        name: the name of the model in the examples: its name on the hub, or a folder.
        trained: the run; None for weights that dllm-sd has not trained.
        stored: dtypes of the files, if the run computed in another one.
        grown: number of rows of the embedding, if the base model has fewer.
    """
    model, path = blueprint.model, blueprint.model.path
    on_hub = path is not None and not Path(model_folder(path)).is_dir()
    front = {"library_name": "peft" if to == "peft" else "transformers", "pipeline_tag": "text-generation"}
    front |= {"base_model": path} if on_hub else {}  # a local folder means nothing, or another model, elsewhere
    front |= {"license": name_of_license} if (name_of_license := _license(path)) else {}
    kind = [] if policy.causal else ["diffusion-language-model"]
    tags = ["dllm-sd", *kind, "self-distillation", *(["lora"] if to == "peft" else [])]
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()] + [f"tags: [{', '.join(tags)}]"]
    notes = []
    if stored:
        notes.append(f"Tensors are stored in the types of the original ({stored}); the run computed in {model.dtype}.")
    if to == "original":
        notes.append("Tensor names and config.json are those of the original; its `*.py` files are not copied.")
    if to == "peft" and grown:
        notes.append(f"The base needs `resize_token_embeddings({grown})` first.")
    what = {"peft": "A LoRA adapter", "merged": "Trained weights (native transformers format)"}
    return CARD.format(
        front="\n".join(lines),
        name=name,
        what=what.get(to, "Trained weights (original format)"),
        base=f"`{path}`" if path else "a randomly initialised model",
        kind="an autoregressive" if policy.causal else "a masked diffusion",
        warning="" if policy.causal else WARNING,
        family=blueprint.family.name,
        notes=" ".join(notes),
        use=_use(policy, model, to, name, trained),
        training=_training(trained),
        results=_results(trained),
    )


def settings_of(run: Path) -> str:
    """The resolved config of a run as YAML, without its folder, and of files on this machine only their names."""
    read_run_config(run)  # raises if the file is not a config
    text = read_own(run / "config.yaml", "give another folder").decode("utf-8")
    text = re.sub(r"^run: .*\n", "", text, flags=re.MULTILINE)
    return re.sub(rf"^( *(?:-|(?:{'|'.join(path_keys())}):) ['\"]?)/.*/", r"\1", text, flags=re.MULTILINE)


def _license(path: str | None) -> str | None:
    """The license in the model card of the base model, if the card is on this machine."""
    if path is None:
        return None
    folder = Path(model_folder(path))
    card = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(path, "README.md")
    try:
        return ModelCard.load(card).data.get("license") if isinstance(card, str | Path) else None
    except (OSError, ValueError):
        return None


def _use(policy: AnyPolicy, model: Model, to: ExportFormat, name: str, trained: Trained | None) -> str:
    options: dict[str, Any] = {}
    if to != "merged":  # settings that are not in the files of the base model
        for key in ("as_", "mask_token", "end_tokens", "chat_template", "thinking", "tokenizer"):
            if getattr(model, key) is not None and (to, key) != ("original", "tokenizer"):
                options[key] = getattr(model, key)
        options |= {"block_length": policy.block_length} if policy.block_length else {}
    path = model.path if to == "peft" else name
    python = f"load_policy({', '.join([json.dumps(path), *(f'{key}={value!r}' for key, value in options.items())])})"
    if to == "peft":
        return (
            "```python\nfrom dllm_sd import load_policy\nfrom peft import PeftModel\n\n"
            f"policy = {python}\n"
            f"policy.module.model = PeftModel.from_pretrained(policy.module.model, {json.dumps(name)})\n```"
        )
    tree = _settings(trained) if trained else {}
    arguments = [f"--task {tree['task']['name']}" if tree else "--task NAME"]
    arguments += [f"decode.{key}={tree['decode'][key]}" for key in ("length", "block_length") if tree]
    arguments += [f"model.{key}={value}" for key, value in options.items() if isinstance(value, int)]
    return (
        f'```bash\ndllm-sd sample {name} "your prompt" {" ".join(arguments)}\n```\n\n'
        f"```python\nfrom dllm_sd import load_policy\n\npolicy = {python}\n```"
    )


def _training(trained: Trained | None) -> str:
    if trained is None:
        return "These weights were not trained by dllm-sd; only their format was changed."
    tree, method = _settings(trained), build_config({**read_run_config(trained.run), "plugins": []}).method
    update = state_of(trained.checkpoint).update
    kind = "the best on the dev split" if trained.checkpoint.name.lstrip(".").startswith("best") else "the last"
    kind += ", the initial ones, which no training has changed" if update == 0 else ""
    return (
        f"Method: {_method_name(method)}({_parts(method)}). Task: `{tree['task']['name']}`. "
        f"Weights: {kind}, after update {update} of {tree['updates']}.\n\n"
        "To train it again, save these settings as `config.yaml` and run `dllm-sd train config.yaml`.\n\n"
        f"<details><summary>Settings</summary>\n\n```yaml\n{settings_of(trained.run)}```\n\n</details>"
    )


def _settings(trained: Trained) -> dict[str, Any]:
    """The settings of a run with defaults for the keys that its file lacks."""
    return to_tree(build_config({**read_run_config(trained.run), "plugins": []}))


def _parts(method: Method) -> str:
    """The names of the parts of a method by slot; slots without names are omitted."""
    slots = {slot: part if isinstance(part, list) else [part] for slot, part in to_tree(method).items()}
    names = {
        slot: "+".join(part["name"] for part in group if isinstance(part, dict) and "name" in part)
        for slot, group in slots.items()
    }
    return ", ".join(f"{slot} {name}" for slot, name in names.items() if name)


def _method_name(method: Method) -> str:
    named = named_differences(method)
    return f"`{named.name}` with settings of its own " if named.changes else f"`{named.name}` "


@dataclass(frozen=True)
class _Measured:
    """The results of a decoding schedule that a model card shows."""

    partial: ClassVar[bool] = True
    n: int
    accuracy: float
    ci95: tuple[float, ...]


@dataclass(frozen=True)
class Results:
    """The entries of a report that a model card shows."""

    partial: ClassVar[bool] = True
    task: str
    before: Mapping[str, _Measured]
    after: Mapping[str, _Measured]
    best: Mapping[str, _Measured]
    best_dev_accuracy: float
    best_update: int
    settings: dict[str, Any]


def read_results(run: Path) -> Results | None:
    """Read the results of a finished run; None if it has no report yet.

    Raises:
        InputError: naming the report, if it is damaged.
    """
    file, remedy = run / "report.json", "run the same dllm-sd train again to write it again, or remove it"
    if not os.path.lexists(file):
        return None
    results: Results = read_json(file, Results, remedy)
    tests = [results.before, results.after, results.best]
    try:
        settings = to_tree(build_config({**results.settings, "plugins": []}))
    except InputError as error:
        raise damaged_file(file, error, remedy) from error
    if any(test.keys() != results.best.keys() for test in tests):
        raise damaged_file(file, "before, after and best are not of the same schedules", remedy)
    if any(len(schedule.ci95) != 2 for test in tests for schedule in test.values()):
        raise damaged_file(file, "ci95 must have two ends", remedy)
    return replace(results, settings=settings)


def _results(trained: Trained | None) -> str:
    results = read_results(trained.run) if trained else None
    if results is None or not results.best:
        if results is None or results.best_dev_accuracy < 0:
            return "No results were measured."
        best, n = f"{100 * results.best_dev_accuracy:.1f} %", results.settings["eval"]["problems"]
        update = f"after update {results.best_update}; no test problems were decoded."
        return f"Best accuracy on up to {n} dev problems: {best}, {update}"
    settings = results.settings
    rows = ["| decoding | weights | n | accuracy | 95 % interval |", "|---|---|---|---|---|"]
    for schedule in results.best:
        changed = settings["decode"] | settings["eval"]["decode"] | settings["eval"]["schedules"].get(schedule, {})
        keys = ("length", "block_length", "tokens_per_step", "steps", "threshold", "order")
        decoding = ", ".join(f"{key} {changed[key]}" for key in keys if changed.get(key) is not None)
        for weights in ("before", "after", "best"):
            measured: _Measured = getattr(results, weights)[schedule]
            low, high = (f"{100 * end:.1f}" for end in measured.ci95)
            cells = (f"{schedule} ({decoding})", weights, measured.n, f"{100 * measured.accuracy:.1f} %")
            rows.append(f"| {' | '.join(map(str, cells))} | {low} to {high} |")
    caption = f"Accuracy on test problems of `{results.task}` at temperature {settings['eval']['temperature']}."
    return f"{caption} Before: initial weights; after: last; best: best on the dev split.\n\n" + "\n".join(rows)
