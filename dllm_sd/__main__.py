"""``python -m dllm_sd``, also under ``accelerate launch``."""

import sys

from dllm_sd.cli.main import main

if __name__ == "__main__":
    status = main()
    finished = status in (0, 3)  # done, or nothing learnt, in all processes alike; after an error others may still wait
    if finished and "torch" in sys.modules:  # a command that needed no model has loaded no torch
        from dllm_sd.parallel.processes import close_process_group

        close_process_group()
    sys.exit(status)
