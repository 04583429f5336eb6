"""``dllm-sd train``: starts a run from a config, or resumes a stopped one."""

import argparse
from pathlib import Path

from accelerate import PartialState

from dllm_sd.cli.run_or_model import quiet_libraries, warn
from dllm_sd.config import load_config
from dllm_sd.reports.report_page import REPORT_PAGE, write_report
from dllm_sd.reports.tables import print_training
from dllm_sd.training.peers import train_config

NOT_LEARNT = 3
"""Exit status of a run that finished, but learnt nothing or collapsed."""


def run(options: argparse.Namespace) -> int:
    """Train, and print the results of the run, or of both runs of peers; return the exit status.

    It is `NOT_LEARNT` if a run learnt nothing or collapsed.
    """
    quiet_libraries()
    config = load_config(options.config, options.overrides, warn)
    reports = train_config(config)
    if PartialState().is_main_process:
        for folder, report in reports.items():
            print_training(report, folder)
            for warning in report.get("warnings", []):  # reports of earlier versions have none
                warn(warning)
        for folder in dict.fromkeys([*reports, Path(config.run)]):  # of two students: one for each, and one of both
            write_report([folder], folder / REPORT_PAGE)
        print(f"report: {Path(config.run) / REPORT_PAGE}; open it in a browser")
    outcomes = {report.get("outcome", "learnt") for report in reports.values()}  # reports of earlier versions have none
    return 0 if outcomes == {"learnt"} else NOT_LEARNT
