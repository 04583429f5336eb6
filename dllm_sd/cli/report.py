"""``dllm-sd report``: writes the report of runs as one HTML file."""

import argparse
from pathlib import Path

from dllm_sd.errors import InputError, shown
from dllm_sd.reports.report_page import REPORT_PAGE, write_report


def run(options: argparse.Namespace) -> int:
    """Write the report, and print where it is."""
    if options.overrides:
        raise InputError(f"report takes no settings; leave out {shown(options.overrides[0])}")
    folders = [Path(name) for name in options.runs]
    out = Path(options.out) if options.out else folders[0] / REPORT_PAGE
    if out.is_dir():
        raise InputError(f"--out {shown(str(out))} is a folder; name a file in it, such as {REPORT_PAGE}")
    write_report(folders, out)
    print(f"report: {out} ({out.stat().st_size / 1024:.0f} KiB); open it in a browser")
    return 0
