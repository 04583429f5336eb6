"""Training from Python, with configs as the command line has them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState

from dllm_sd.config import Config, build_config
from dllm_sd.config_files import read_config
from dllm_sd.errors import InputError, shown
from dllm_sd.overrides import apply_overrides
from dllm_sd.parts import to_tree
from dllm_sd.reports.report_page import REPORT_PAGE, write_report
from dllm_sd.training import peers


def train(
    config: Config | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any] | None = None, **keys: Any
) -> dict[str, Any]:
    """Train as ``dllm-sd train`` does, and return the report of the run, which is also in its folder.

    As in ``train("quickstart", updates=12, optim__lr=1e-4, run="runs/mine")``, or with a mapping of dotted keys,
    ``train("quickstart", {"method": "rft", "method.rollout.problems": 64})``.

    Args:
        config: the name of a shipped config, the path of one, the folder of a run, which is continued, a mapping as in
            YAML, or a `Config`.
        overrides: values by dotted key, applied in this order.
        **keys: further values; ``__`` in a name is a dot, so that ``optim__lr`` is the key ``optim.lr``.

    Returns:
        The report. Of a run with `peers`, the reports of the students by their names.

    Raises:
        InputError: one sentence on what is wrong with the input, before anything is written.
        Stopped: if the run cannot go on; the last update is saved.
        FloatingPointError: at a non-finite loss or gradient; the last update is saved.
        KeyboardInterrupt: after the update is finished and saved.
    """
    given = {**(overrides or {}), **{name.replace("__", "."): value for name, value in keys.items()}}
    texts = [f"{key}={_text(key, value)}" for key, value in given.items()]
    if isinstance(config, str | Path):
        resolved = build_config(read_config(str(config), texts))
    elif isinstance(config, Config):
        resolved = build_config(apply_overrides(to_tree(config), texts)) if texts else config
    else:
        resolved = build_config(apply_overrides(config, texts))
    if PartialState().num_processes == 1:
        AcceleratorState._reset_state()  # a former run of this process may have had another precision
    reports = peers.train_config(resolved)
    if PartialState().is_main_process:
        for folder in dict.fromkeys([*reports, Path(resolved.run)]):
            write_report([folder], folder / REPORT_PAGE)
    if resolved.peers is not None:
        return {folder.name: report for folder, report in reports.items()}
    return reports[Path(resolved.run)]


def _text(key: str, value: Any) -> str:
    """A value as YAML."""
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{key} is {shown(value)}, which a config cannot hold; give text, numbers, lists or mappings"
        ) from error


def _plain(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError
