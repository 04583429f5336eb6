"""The arguments of each command: a file each, which imports nothing that takes time.

A file offers `HELP` (one line), `EXAMPLES` (lines that its ``--help`` ends with, before its `STATUS` if it has exit
statuses of its own) and ``add(parser)``. The command
itself is the module of the same name in `dllm_sd.cli`, imported when the command runs.
"""

COMMANDS = {
    "init": "init",
    "train": "train",
    "probe": "probe",
    "eval": "evaluate",
    "grade": "grade",
    "sample": "sample",
    "serve": "serve",
    "show": "show",
    "report": "report",
    "export": "export",
    "list": "listing",
    "explain": "explain",
    "schema": "schema",
}
"""The module of each command, in the order of ``dllm-sd --help``."""
