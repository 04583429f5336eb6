"""``python -m dllm_sd``, also under ``accelerate launch``."""

import sys

from dllm_sd.cli.main import main

if __name__ == "__main__":
    status = main()
    finished = status in (0, 3)  # in all processes alike; after an error the others may still wait for one another
    if finished and "torch" in sys.modules:  # a command that needed no model has loaded no torch
        from dllm_sd.parallel.processes import close_process_group

        close_process_group()
    sys.exit(status)
