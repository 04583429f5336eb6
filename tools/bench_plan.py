"""Measures the plan of an update: bytes held between micro-batches, peak memory, and processor seconds.

``python -m tools.bench_plan`` plans an update of d-OPSD over rollouts of random tokens, and builds micro-batches. No
model runs.
"""

import argparse
import resource
import time
from typing import Any

import torch
from torch import Tensor

from dllm_sd.methods import METHODS
from dllm_sd.objective.batching import micro_batches
from dllm_sd.objective.plan import plan_update
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.trajectory import Trajectory


def make_rollouts(count: int, steps: int, length: int, prompt: int) -> Rollouts:
    """Correct rollouts of random tokens, revealed from left to right in equal steps."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(length)
    trajectory = Trajectory(
        prompt_ids=torch.randint(10, 1000, (count, prompt), generator=generator),
        prompt_mask=torch.ones(count, prompt, dtype=torch.bool),
        tokens=torch.randint(10, 1000, (count, length), generator=generator),
        reveal_step=(position * steps // length).expand(count, length).contiguous(),
        length=torch.full((count,), length),
        block_length=32,
        mask_id=1,
        end_ids=(2,),
        pad_id=3,
    )
    kept = [
        Rollout(Problem(str(i), {}), 0, "", Grade(True, 1.0, None), single)
        for i, single in enumerate(trajectory.unstack())
    ]
    return Rollouts(tuple(kept), {"rejected": 0.0})


def held_bytes(value: Any) -> int:
    """Bytes of all tensors in a dataclass, and in the dataclasses and tuples in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = vars(value).values() if hasattr(value, "__dict__") else value if isinstance(value, tuple | list) else ()
    return sum(map(held_bytes, parts))


def main() -> None:
    """Print one line of figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--length", type=int, default=896)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--builds", type=int, default=64, help="micro-batches to build")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rollouts = make_rollouts(options.rollouts, options.steps, options.length, options.prompt)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = plan_update(METHODS["d_opsd"].method, rollouts, rollouts.keys(0, 0))
    assert plan is not None
    planned = time.process_time()
    batches = micro_batches(plan, options.tokens)
    cut = time.process_time()
    for (index,) in batches[: options.builds]:
        plan.micro_batch(index)
    built, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{plan.size} canvases in {len(batches)} micro-batches: held {held_bytes(plan) / 2**20:.1f} MiB, peak "
        f"{(peak - before) / 2**10:.0f} MiB more; core seconds: plan {planned - start:.2f}, cut {cut - planned:.2f}, "
        f"{1000 * (built - cut) / max(1, min(options.builds, len(batches))):.1f} ms a micro-batch"
    )


if __name__ == "__main__":
    main()
