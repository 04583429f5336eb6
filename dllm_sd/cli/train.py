"""``dllm-sd train``: starts a run from a config, or resumes a stopped one."""

import argparse

from accelerate import PartialState

from dllm_sd.cli.run_or_model import quiet_libraries, warn
from dllm_sd.config import load_config
from dllm_sd.reports.tables import print_training
from dllm_sd.training.peers import train


def run(options: argparse.Namespace) -> int:
    """Train, and print the results of the run, or of both runs of peers."""
    quiet_libraries()
    config = load_config(options.config, options.overrides, warn)
    for folder, report in train(config).items():
        if PartialState().is_main_process:
            print_training(report, folder)
            for warning in report.get("warnings", []):  # reports of earlier versions have none
                warn(warning)
    return 0
