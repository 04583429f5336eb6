"""Compares time and peak memory of an update of d-OPSD's loss with two forms that keep logits of whole canvases.

    python -m tools.bench_update [--canvases 108] [--tokens 456] [--body 100m] [--batch 2048] [--naive-canvases 4]

One rollout whose steps commit `--sites` tokens each; the teacher reads its later blocks, the divergence is the reverse
KL over the whole vocabulary. ``ours`` is the path of the trainer: `plan_update`, `micro_batches`,
`grade_micro_batch`, backward. ``published`` keeps the raw logits of student and teacher over whole canvases and gathers
the sites before the softmax, as d-OPSD's released trainer does; ``naive`` keeps their float32 softmax over whole
canvases too. ``body`` runs the same forwards and backward without the head: what a form needs beyond it and the head's
gradient is due to logits. Each runs in a process of its own; ``published`` and ``naive`` on the first canvases only,
since all do not fit. Printed: core seconds a canvas, peak memory of a micro-batch above weights and gradients (every
allocation counted), the part of it that is due to logits, the share of time outside of forwards and backwards, and how
far loss and gradient norm are from ours on the same canvases.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.network.site_head import run_at_sites
from dllm_sd.network.view import View
from dllm_sd.objective.batching import micro_batches
from dllm_sd.objective.equation import grade_micro_batch
from dllm_sd.objective.plan import MicroBatch, Plan, plan_update
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.policies.weights import LiveWeights, TeacherModel
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.trajectory import Trajectory
from tools.check_memory import peak
from tools.naive import BODIES, body


def now() -> float:
    """Processor seconds of this process, which do not depend on other programs; with a GPU wall-clock seconds."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


class Clock:
    """Counts the seconds inside forward and backward passes."""

    def __init__(self) -> None:
        self.inside = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside this context."""
        start = now()
        yield
        self.inside += now() - start


def rollout(options: argparse.Namespace, policy: MaskedDiffusion) -> Rollouts:
    """A rollout with one step per canvas, decoded from left to right within its blocks."""
    length = options.canvases * options.sites
    prompt = options.tokens - length
    generator = torch.Generator().manual_seed(0)
    trajectory = Trajectory(
        prompt_ids=torch.randint(5, 25, (1, prompt), generator=generator),
        prompt_mask=torch.ones((1, prompt), dtype=torch.bool),
        tokens=torch.randint(5, 25, (1, length), generator=generator),
        reveal_step=torch.arange(length)[None] // options.sites,
        length=torch.tensor([length]),
        block_length=length // 2 if options.blocks is None else length // options.blocks,
        mask_id=policy.mask_id,
        end_ids=tuple(policy.end_ids),
        pad_id=policy.pad_id,
    )
    return Rollouts((Rollout(Problem("0", {}), 0, "", Grade(True, 1.0, None), trajectory),), {"rejected": 0.0})


def ours(policy: MaskedDiffusion, method: Method, plan: Plan, batch: int, clock: Clock) -> Tensor:
    """Run the micro-batches as the trainer does."""
    loss, teacher, student = torch.zeros(()), TeacherModel(LiveWeights(), policy), partial(run_at_sites, policy.module)
    policy.module.train()

    def timed(form: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with clock.running():
                return form(*arguments)

        return call

    for (index,) in micro_batches(plan, batch):
        graded = grade_micro_batch(method, plan.micro_batch(index).to(policy.device), timed(student), [timed(teacher)])
        with clock.running():
            graded.loss.backward()
        loss += graded.loss.detach().cpu()
    return loss


def views(batch: MicroBatch) -> tuple[View, View]:
    """The views of student and teacher."""
    prompt = torch.zeros_like(batch.canvases.ids[:, : -batch.candidates.shape[1]], dtype=torch.bool)
    sites = torch.cat([prompt, batch.candidates], 1)
    seen = batch.teacher_inputs[0]
    return View(batch.canvases.ids, batch.canvases.mask, sites), View(seen.ids, seen.mask, sites)


def whole(gathered: bool, policy: MaskedDiffusion, method: Method, plan: Plan, batch: int, clock: Clock) -> Tensor:
    """Compute logits of whole canvases; the sites are gathered before the softmax (``gathered``) or after it."""
    network, total = policy.module.network, torch.zeros(())

    def logp(view: View) -> Tensor:
        logits = network(input_ids=view.ids, use_cache=False).logits
        kept.append(logits)
        return (logits[view.sites] if gathered else logits).float().log_softmax(-1)

    for (index,) in micro_batches(plan, batch):
        piece, kept = plan.micro_batch(index), list[Tensor]()
        student, teacher = views(piece)
        with torch.no_grad():
            target = logp(teacher)
        student_logp = logp(student)
        value = (student_logp.exp() * (student_logp - target)).sum(-1)
        value = value if gathered else value[student.sites]
        loss = (value * piece.coefficient.repeat_interleave(piece.quota).float()).sum()
        loss.backward()
        total += loss.detach()
    return total


def bare(policy: MaskedDiffusion, method: Method, plan: Plan, batch: int, clock: Clock) -> Tensor:
    """Run forward and backward passes without the output head."""
    for (index,) in micro_batches(plan, batch):
        student, teacher = views(plan.micro_batch(index))
        with torch.no_grad():
            run_at_sites(policy.module, teacher, lambda hidden, head: hidden)
        run_at_sites(policy.module, student, lambda hidden, head: hidden.sum()).backward()
    return torch.zeros(())


SAME = "ours, same canvases"
OTHERS = {"published": partial(whole, True), "naive": partial(whole, False)}
FORMS = {"ours": ours, SAME: ours, **OTHERS, "body": bare}


def measure(form: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure seconds and peak bytes of an update up to its gradient."""
    policy = body(options, options.vocabulary)
    parameters = list(policy.module.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    method: Any = METHODS["d_opsd"].method
    rollouts = rollout(options, policy)
    warm = plan_update(method, rollouts, rollouts.keys(0, 0))
    assert warm is not None
    FORMS[form](policy, method, warm.select(torch.arange(1)), options.batch, Clock())
    policy.module.zero_grad(set_to_none=False)
    start, clock = now(), Clock()
    plan = plan_update(method, rollouts, rollouts.keys(0, 0))
    assert plan is not None
    plan = plan if form == "ours" else plan.select(torch.arange(min(options.naive_canvases, plan.size)))
    loss = FORMS[form](policy, method, plan, options.batch, clock)
    seconds = now() - start
    norm = torch.stack([x.grad.norm() for x in parameters if x.grad is not None]).norm()
    first = micro_batches(plan, options.batch)[0][0]
    highest = peak(lambda: FORMS[form](policy, method, plan.select(first), options.batch, Clock()), options.device)
    return {
        "canvases": plan.size,
        "sites": plan.num_sites,
        "seconds": seconds / plan.size,
        "outside": (seconds - clock.inside) / seconds if form.startswith("ours") else None,
        "mib": highest / 2**20,
        "loss": float(loss),
        "gradient_norm": float(norm),
    }


def main() -> None:
    """Run the forms and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--body", choices=tuple(BODIES), default="100m")
    parser.add_argument("--vocabulary", type=int, default=126_464)
    parser.add_argument("--tokens", type=int, default=456)
    parser.add_argument("--canvases", type=int, default=108)
    parser.add_argument("--naive-canvases", type=int, default=4)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--blocks", type=int, help="of the completion; 2 by default")
    parser.add_argument("--batch", type=int, default=2048, help="padded tokens of a micro-batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=tuple(FORMS), nargs="+")
    parser.add_argument("--form", choices=tuple(FORMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(options.form, options)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {options}")
    print(f"{'':>20} {'canvases':>8} {'s/canvas':>9} {'MiB':>8} {'outside':>8} {'loss':>12} {'gradient norm':>14}")
    results: dict[str, dict[str, Any]] = {}
    for form in options.only or FORMS:
        command = [sys.executable, "-m", "tools.bench_update", *sys.argv[1:], "--form", form]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        x = results[form] = json.loads(done.stdout.splitlines()[-1])
        outside = "" if x["outside"] is None else f"{x['outside']:.2%}"
        print(
            f"{form:>20} {x['canvases']:>8} {x['seconds']:>9.3f} {x['mib']:>8.0f} {outside:>8} {x['loss']:>12.5e} "
            f"{x['gradient_norm']:>14.6e}",
            flush=True,
        )
    if not {SAME, "body"} <= results.keys():
        return
    ours, body_only = results[SAME], results["body"]
    head, least = (rows * options.vocabulary * 4 / 2**20 for rows in (BODIES[options.body].hidden_size, ours["sites"]))
    our_logits = max(least, ours["mib"] - body_only["mib"] - head)
    for name in OTHERS.keys() & results.keys():
        other = results[name]
        logits = other["mib"] - body_only["mib"] - head
        gaps = [abs(other[key] / ours[key] - 1) for key in ("loss", "gradient_norm")]
        print(
            f"{name}: time {other['seconds'] / ours['seconds']:.2f} x, memory {other['mib'] / ours['mib']:.2f} x; ",
            end="",
        )
        print(f"due to logits: {logits:.0f} MiB, of ours at most {our_logits:.0f}; ", end="")
        print(f"differences: loss {gaps[0]:.1e}, norm {gaps[1]:.1e}")


if __name__ == "__main__":
    main()
