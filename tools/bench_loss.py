"""Compares time and peak memory of the loss at autoregressive sites: ours, naive, TRL's and Liger's chunked losses.

    python -m tools.bench_loss [--vocabulary 151936] [--rows 2] [--prompt 128] [--tokens 128] [--width 128]
    python -m tools.bench_loss --loss jsd|reverse_kl|grpo
    python -m tools.bench_loss --rows 32 --tokens 256 --only ours                # 8,192 sites
    python -m tools.bench_loss --rows 1 --prompt 16 --tokens 16 --repeats 1     # seconds

All forms start from the same hidden states and output heads and end with the gradient of both, each in a process of its
own. ``ours`` is `grade_micro_batch`, ``bare`` the same formula at the sites without what is logged of them,
``naive`` the formula on float32 logits of whole sequences. ``trl`` and ``liger`` run where they are installed: TRL's
`ChunkedDivergenceFunction` (of its DistillationTrainer) and, for the surrogate of GRPO without a reference, its
`ChunkedLogProbFunction` (of its GRPOTrainer), both at the sites alone, as TRL does on GPUs. Values of ``grpo`` differ,
for ours is the factor times the likelihood, whose gradient is that of the surrogate. Printed: core seconds (median of
the repeats), peak memory above weights and their gradient (every allocation counted), ratios to ours, and how far loss
and gradient differ from ours.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from dllm_sd.canvases import AllMaskedCanvas
from dllm_sd.losses.divergences import GeneralisedJSD, ReverseKL, TokenNLL
from dllm_sd.losses.sites import AllMaskedSites
from dllm_sd.losses.targets import Sampled
from dllm_sd.losses.trust import GroupAdvantage
from dllm_sd.methods.method import Method
from dllm_sd.network.lazy_logits import LazyLogits
from dllm_sd.network.site_head import Head, SiteReader
from dllm_sd.network.view import View
from dllm_sd.objective.equation import grade_micro_batch
from dllm_sd.objective.plan import MicroBatch, plan_update
from dllm_sd.policies.weights import BaseWeights
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import Nothing
from dllm_sd.trajectory import Trajectory
from tools.check_memory import peak


@dataclass(frozen=True)
class Case:
    """Hidden states ``[n p+l h]`` and heads ``[v h]`` of student and teacher; position ``i`` predicts token ``i``."""

    student: Tensor
    head: Parameter
    teacher: Tensor
    teacher_head: Tensor
    tokens: Tensor
    """int64 ``[n l]``."""
    sites: Tensor
    """bool ``[n p+l]``."""
    method: Method
    batch: MicroBatch
    beta: float | None
    """``beta`` of the JSD, 1 for reverse KL; None for GRPO."""

    @property
    def advantage(self) -> Tensor:
        """``[m]``."""
        return self.batch.rollout_weight.float().repeat_interleave(self.tokens.shape[1])


BETAS = {"jsd": 0.5, "reverse_kl": 1.0, "grpo": None}
DIVERGENCE = Method(
    gate=All(),
    canvases=AllMaskedCanvas(prompt_mask_ratio=0.0),
    contexts=(Nothing(),),
    teacher=(BaseWeights(),),
    sites=AllMaskedSites(),
    divergence=ReverseKL(),
)
METHODS = {
    "jsd": replace(DIVERGENCE, divergence=GeneralisedJSD(beta=0.5)),
    "reverse_kl": DIVERGENCE,
    "grpo": replace(
        DIVERGENCE,
        rollout=PassAtK(keep="all", until_solved=False),
        contexts=(),
        teacher=(),
        target=Sampled(),
        divergence=TokenNLL(),
        trust=GroupAdvantage(),
    ),
}


def case(options: argparse.Namespace) -> Case:
    """Random rollouts, hidden states and heads of an autoregressive model; all completion positions are graded."""
    torch.manual_seed(0)
    n, p, length, h, v = options.rows, options.prompt, options.tokens, options.width, options.vocabulary
    device, dtype = options.device, getattr(torch, options.dtype)
    tokens = torch.randint(5, v, (n, length))
    trajectory = Trajectory(
        prompt_ids=torch.randint(5, v, (n, p)),
        prompt_mask=torch.ones((n, p), dtype=torch.bool),
        tokens=tokens,
        reveal_step=torch.arange(length).expand(n, -1),
        length=torch.full((n,), length),
        block_length=1,
        mask_id=-1,
        end_ids=(0,),
        pad_id=1,
        causal=True,
    )
    kept = [
        Rollout(Problem("0", {}), i, "", Grade(i % 2 == 0, 1.0 - i % 2, None), trajectory.select(torch.tensor([i])))
        for i in range(n)
    ]
    rollouts = Rollouts(tuple(kept), {"rejected": 0.0})
    method = METHODS[options.loss]
    plan = plan_update(method, rollouts, rollouts.keys(0, 0))
    assert plan is not None
    states = [torch.randn(n, p + length, h, device=device, dtype=dtype) for _ in range(2)]
    heads = [torch.randn(v, h, device=device, dtype=dtype).div_(math.sqrt(h)) for _ in range(2)]
    sites = torch.zeros((n, p + length), dtype=torch.bool, device=device)
    sites[:, p:] = True
    student, head = states[0].requires_grad_(), Parameter(heads[0])
    return Case(
        student,
        head,
        states[1],
        heads[1],
        tokens.to(device),
        sites,
        method,
        plan.micro_batch().to(device),
        BETAS[options.loss],
    )


def ours(x: Case) -> Tensor:
    """The loss of the package."""

    def student(view: View, read: SiteReader) -> Any:
        return read(x.student[view.sites], Head(lambda hidden: linear(hidden, x.head), (x.head,)))

    def teacher(view: View) -> LazyLogits:
        return LazyLogits(x.teacher[view.sites], lambda hidden: linear(hidden, x.teacher_head))

    return grade_micro_batch(x.method, x.batch, student, [teacher] * len(x.method.contexts)).loss


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """JSD or reverse KL at each site, ``[m]``, in float32, from logits ``[m v]``."""
    log_s, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if beta == 1:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logsumexp(torch.stack([log_s + math.log(1 - beta), log_t + math.log(beta)]), 0)
    entries = beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_s.exp() * (log_s - log_m)
    return entries.sum(-1)


def surrogate(logp: Tensor, advantage: Tensor) -> Tensor:
    """GRPO's surrogate, averaged over tokens; on-policy, so that the clip has no effect."""
    return -((logp - logp.detach()).exp() * advantage).mean()


def likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens, ``[... v], [...] -> [...]``, in float32."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def bare(x: Case) -> Tensor:
    """The formula at the sites, without any logging."""
    if x.beta is None:
        return surrogate(likelihood(linear(x.student[x.sites], x.head), x.tokens.flatten()), x.advantage)
    with torch.no_grad():
        target = linear(x.teacher[x.sites], x.teacher_head)
    return divergence(linear(x.student[x.sites], x.head), target, x.beta).mean()


def naive(x: Case) -> Tensor:
    """The formula on float32 logits of whole sequences, prompt included; then the sites are selected."""
    if x.beta is None:
        whole = torch.zeros_like(x.sites, dtype=torch.int64).masked_scatter(x.sites, x.tokens)
        return surrogate(likelihood(linear(x.student, x.head), whole)[x.sites], x.advantage)
    with torch.no_grad():
        target = linear(x.teacher, x.teacher_head)
    return divergence(linear(x.student, x.head), target, x.beta)[x.sites].mean()


def trl(x: Case) -> Tensor:
    """TRL's chunked divergence, or its chunked log-probabilities for GRPO."""
    if x.beta is None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as SIZE  # pyright: ignore[reportMissingImports]

        options = (x.tokens.flatten(), 1.0, SIZE, None, 1.0, ("entropy",))
        logp, *_ = ChunkedLogProbFunction.apply(x.student[x.sites], x.head, None, *options)
        return surrogate(logp, x.advantage)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    states = (x.student[x.sites], x.head, None, x.teacher[x.sites], x.teacher_head, None)
    value, _ = ChunkedDivergenceFunction.apply(*states, x.beta)
    return value.mean()


def liger(x: Case) -> Tensor:
    """Liger's chunked JSD (its soft loss alone, not compiled)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    if x.beta is None:
        raise NotImplementedError("Liger's GRPO loss is not compared")
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=x.beta, compiled=x.student.is_cuda)
    return loss(x.student[x.sites], x.head, x.teacher[x.sites], x.teacher_head, x.tokens.flatten())


def now() -> float:
    """Processor seconds of this process, which do not depend on other programs; with a GPU wall-clock seconds."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


FORMS: dict[str, Callable[[Case], Tensor]] = {"ours": ours, "bare": bare, "naive": naive, "trl": trl, "liger": liger}
PACKAGES = {"trl": "trl", "liger": "liger_kernel"}


def measure(form: Callable[[Case], Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of forward and backward, and their peak bytes above the case and its gradient."""
    x, cuda = case(options), options.device == "cuda"
    leaves = (x.student, x.head)
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf).zero_()  # written, so that its pages are allocated before the measurement
    seconds, loss = [], torch.zeros(())
    for _ in range(options.repeats):
        for leaf in leaves:
            assert leaf.grad is not None
            leaf.grad.zero_()
        start = now()
        loss = form(x)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(now() - start)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    probe = [gradient.flatten()[:: max(1, gradient.numel() // 4096)].tolist() for gradient in gradients]
    return {
        "seconds": statistics.median(seconds),
        "bytes": peak(lambda: form(x).backward(), options.device),
        "loss": float(loss.detach()),
        "probe": probe[0] + probe[1],
    }


def run(form: str) -> dict[str, Any] | None:
    """Measure one form in a process of its own; None if its package is missing or the form fails."""
    package = PACKAGES.get(form)
    if package and importlib.util.find_spec(package) is None:
        print(f"{form:>6}: not installed", flush=True)
        return None
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_loss", *sys.argv[1:], "--form", form], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        print(f"{form:>6}: failed ({reason:.100})", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run all forms and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--loss", choices=tuple(METHODS), default="jsd")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--only", choices=tuple(FORMS), nargs="+", help="run these forms, and compare them with the first"
    )
    parser.add_argument("--form", choices=tuple(FORMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(FORMS[options.form], options)))
        return
    sites = options.rows * options.tokens
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sites} sites, one float32 [m v] is ", end="")
    print(f"{sites * options.vocabulary * 4 / 2**20:.0f} MiB; {options}")
    print(f"{'':>7} {'seconds':>8} {'MiB':>9} {'time x':>7} {'memory x':>8} {'loss diff':>9} {'gradient diff':>13}")
    first = None
    for form in options.only or FORMS:
        if (result := run(form)) is None:
            continue
        first = first or result
        scale = max(map(abs, first["probe"]))
        gap = max(abs(a - b) for a, b in zip(result["probe"], first["probe"], strict=True)) / scale
        print(
            f"{form:>6}: {result['seconds']:>8.3f} {result['bytes'] / 2**20:>9.1f} "
            f"{result['seconds'] / first['seconds']:>7.2f} {result['bytes'] / max(1, first['bytes']):>8.2f} "
            f"{abs(result['loss'] / first['loss'] - 1):>9.1e} {gap:>13.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
