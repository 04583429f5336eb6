"""Time and peak memory of one update, beside the naive form that keeps the logits of whole canvases.

    python tools/bench_update.py [--vocabulary 126464] [--tokens 456] [--canvases 16] [--sites 2]

Both forms run the same body on the same canvases with the same loss (reverse KL, full vocabulary), each in a process
of its own so that the peaks do not mix. Printed: seconds (median of the repeats), peak memory above the weights and
their gradient, ratios, and how far loss and gradient differ. Times on shared machines are noisy: compare the ratios.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dllm_sd.policies.site_head import SiteHead


def problem(options: argparse.Namespace) -> tuple[LlamaForCausalLM, Tensor, Tensor, Tensor]:
    """A small body under a large head; student and teacher canvases ``[n s]`` and sites ``[n s]``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        intermediate_size=3 * options.width,
    )
    config.is_causal = False
    model = LlamaForCausalLM(config).to(options.device).eval()
    shape = (options.canvases, options.tokens)
    student = torch.randint(options.vocabulary, shape, device=options.device)
    teacher = torch.randint(options.vocabulary, shape, device=options.device)
    sites = torch.zeros(shape, dtype=torch.bool, device=options.device)
    sites[:, -options.sites :] = True
    return model, student, teacher, sites


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean reverse KL over sites of logits ``[m v]``."""
    log_s, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean()


def gathered(model: LlamaForCausalLM, student: Tensor, teacher: Tensor, sites: Tensor) -> Tensor:
    """Ours: hidden states are gathered before the head."""
    module, mask = SiteHead(model), torch.ones_like(sites)
    with torch.no_grad():
        target = module(teacher, mask, sites)
    return reverse_kl(module(student, mask, sites), target)


def naive(model: LlamaForCausalLM, student: Tensor, teacher: Tensor, sites: Tensor) -> Tensor:
    """The published form: logits of the whole canvas for student and teacher, then the sites."""
    with torch.no_grad():
        target = model(input_ids=teacher, use_cache=False).logits
    logits = model(input_ids=student, use_cache=False).logits
    return reverse_kl(logits[sites], target[sites])


def measure(form: Callable[..., Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak bytes of forward and backward, above what the weights and their gradient hold."""
    model, *canvases = problem(options)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    cuda = options.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    loss = torch.zeros(())
    for _ in range(options.repeats):
        model.zero_grad(set_to_none=False)
        start = time.perf_counter()
        loss = form(model, *canvases)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {
        "seconds": statistics.median(seconds),
        "bytes": peak - before,
        "loss": float(loss.detach()),
        "gradient_norm": float(norm),
    }


def main() -> None:
    """Run both forms and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=126_464)
    parser.add_argument("--tokens", type=int, default=456)
    parser.add_argument("--canvases", type=int, default=16)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--form", choices=("gathered", "naive"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure({"gathered": gathered, "naive": naive}[options.form], options)))
        return
    results = {}
    for form in ("gathered", "naive"):
        command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[form] = json.loads(done.stdout.splitlines()[-1])
        print(f"{form:>9}: {results[form]['seconds']:8.3f} s  {results[form]['bytes'] / 2**20:9.1f} MiB", flush=True)
    ours, theirs = results["gathered"], results["naive"]
    print(f"  ratio: {theirs['seconds'] / ours['seconds']:8.2f} x  {theirs['bytes'] / max(1, ours['bytes']):9.1f} x")
    print(f"relative difference of the loss {abs(ours['loss'] / theirs['loss'] - 1):.1e}", end=", ")
    print(f"of the gradient norm {abs(ours['gradient_norm'] / theirs['gradient_norm'] - 1):.1e}")


if __name__ == "__main__":
    main()
