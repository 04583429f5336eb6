"""The end of a script of several processes."""

import subprocess
import sys

SCRIPT = """
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dllm_sd.parallel import processes

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
group, model = distributed.group.WORLD, DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
processes.close_process_group()
assert not distributed.is_initialized()
assert processes._closed == [group]
del group, model
processes.close_process_group()
assert len(processes._closed) == 1
"""


def test_a_closed_group_outlives_the_models_that_used_it():
    """Else the reducer of such a model destroys it, with Python's lock held, and may wait for ever."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
