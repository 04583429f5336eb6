"""``python -m dllm_sd``, also under ``accelerate launch``."""

import sys

from dllm_sd.cli.main import close_process_group, main

if __name__ == "__main__":
    status = main()
    if status == 0:
        close_process_group()
    sys.exit(status)
