"""``python -m dllm_sd``, also under ``accelerate launch``."""

import sys

from dllm_sd.cli.main import leave_together, main

if __name__ == "__main__":
    status = main()
    if status == 0:
        leave_together()
    sys.exit(status)
