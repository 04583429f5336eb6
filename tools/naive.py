"""Shared by the decoding benchmarks: random models, a stand-in task, and the published decoding procedure.

The oracle follows LLaDA's and d-OPSD's released samplers: one prompt at a time, logits of the whole canvas at every
step, Gumbel noise and softmax over all of them, a Python loop over rows, and retries one after another.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dllm_sd.decoding.settings import Decoding
from dllm_sd.policies.loading import build_policy
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.pretrained.chat import Chat
from dllm_sd.pretrained.model import Model, Shape
from dllm_sd.randomness import make_key
from dllm_sd.tasks.task import Grade, NoChanceLevel, Problem, Split

BODIES = {
    "tiny": Shape(),  # 64 wide, 4 layers, the tokenizer's own vocabulary
    "100m": Shape("llama", 320, 16, 5, 960, 126_464),  # 21M of 102M are layers
    "8b": Shape("llama", 4096, 32, 32, 12_288, 126_464),  # the sizes of LLaDA-8B
}


class Numbers(Chat):
    """Encodes token ids as text, so that every row of a random model's head has a text."""

    def encode(self, messages: Any, thinking: bool | None = None) -> list[int]:
        """The token ids in the last message."""
        return [int(word) for word in messages[-1]["content"].split()]

    def text(self, tokens: Sequence[int]) -> str:
        """The token ids, separated by spaces."""
        return " ".join(map(str, tokens))


@dataclass(frozen=True)
class StandIn(NoChanceLevel):
    """A task with prompts of unequal length, whose grade is a hash of the problem and the number of the attempt.

    The task counts the attempts itself, so that procedures with different random numbers get the same grades.
    """

    count: int
    rate: float
    shortest: int = 20
    longest: int = 120
    seen: dict[str, int] = field(default_factory=dict)

    def problems(self, split: Split = "test") -> list[Problem]:
        """``count`` problems of random ids without special tokens."""
        draw = random.Random(0)
        sizes = [draw.randrange(self.shortest, self.longest + 1) for _ in range(self.count)]
        return [Problem(str(i), {"ids": [draw.randrange(5, 25) for _ in range(n)]}) for i, n in enumerate(sizes)]

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        """The prompt: the ids as text."""
        return [{"role": "user", "content": " ".join(map(str, problem.fields["ids"]))}]

    def reference(self, problem: Problem) -> None:
        """None."""

    def final_answer(self, problem: Problem) -> None:
        """None."""

    def grade(self, problem: Problem, completion: str) -> Grade:
        """The grade of the next attempt at the problem."""
        attempt = self.seen.get(problem.id, 0)
        self.seen[problem.id] = attempt + 1
        correct = make_key("stand-in", problem.id, attempt) < self.rate * 2**63
        return Grade(correct, float(correct), None)


def body(options: argparse.Namespace, vocabulary: int | None = None) -> MaskedDiffusion:
    """The randomly initialised model that ``options.body`` names."""
    shape = BODIES[options.body]
    if vocabulary is not None:
        shape = replace(shape, vocab_size=vocabulary)
    model = Model(random_init=True, tokenizer="tiny", shape=shape, dtype=options.dtype)
    policy = build_policy(model, options.device)
    assert isinstance(policy, MaskedDiffusion)
    assert policy.chat is not None
    policy.chat = Numbers(policy.chat.tokenizer, policy.chat.end_id)
    policy.suppress = ()
    return policy


@torch.no_grad()
def generate(policy: MaskedDiffusion, prompt: Sequence[int], settings: Decoding) -> Tensor:
    """One completion int64 ``[l]``, decoded as the published samplers do it; no early end."""
    network, mask_id, start = policy.module.network, policy.mask_id, len(prompt)
    canvas = torch.full((1, start + settings.length), mask_id, device=policy.device)
    canvas[0, :start] = torch.tensor(prompt)
    for block in range(settings.num_blocks):
        end = start + (block + 1) * settings.block_length
        for count in settings.schedule:
            masked = canvas == mask_id
            logits = network(input_ids=canvas, use_cache=False).logits
            allowed = logits.clone()
            allowed[..., [mask_id, *settings.suppress]] = -torch.inf
            token = _noisy(allowed, settings.temperature).argmax(-1)
            confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            token = torch.where(masked, token, canvas)
            confidence = torch.where(masked, confidence, -torch.inf)
            transfer = torch.zeros_like(masked)
            for row in range(len(canvas)):
                transfer[row, confidence[row].topk(count).indices] = True
            canvas[transfer] = token[transfer]
    return canvas[0, start:]


def _noisy(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits
    return logits.exp() / (-torch.rand_like(logits).log()) ** temperature


def equal_greedy(policy: MaskedDiffusion, prompts: Sequence[Sequence[int]], settings: Decoding) -> tuple[int, int]:
    """Number of tokens of greedy completions that both procedures agree on, and number of compared tokens."""
    keys = [make_key("greedy", i) for i in range(len(prompts))]
    ours = policy.decode(prompts, settings, keys)
    same = total = 0
    for row, prompt in enumerate(prompts):
        length = int(ours.length[row])
        same += int((ours.tokens[row, :length] == generate(policy, prompt, settings).cpu()[:length]).sum())
        total += length
    return same, total


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(policy: MaskedDiffusion) -> float:
    """Seconds, after waiting for the device."""
    sync(policy.device)
    return time.perf_counter()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the decoding benchmarks."""
    parser.add_argument("--body", choices=tuple(BODIES), default="tiny")
    parser.add_argument("--vocabulary", type=int, help="rows of the head; default: those of the body")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--naive-problems", type=int, help="number of problems for the naive procedure; 0 skips it")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--tokens-per-step", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.3, help="share of attempts that the stand-in grader accepts")
    parser.add_argument(
        "--early-end", action="store_true", help="ours stops after an end token; the naive procedure never does"
    )
    parser.add_argument("--greedy", type=int, default=4, help="problems on which greedy tokens are compared")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")


def decoding(options: argparse.Namespace) -> Decoding:
    """The greedy decoding settings of the options."""
    return Decoding(
        length=options.length,
        block_length=options.block,
        tokens_per_step=options.tokens_per_step,
        batch_size=options.batch,
        early_end=options.early_end,
    )
