"""Log-probabilities of the trainer's network for tokens that another engine has sampled."""

import torch
from torch import Tensor

from dllm_sd.losses.numerics import at_least_float32
from dllm_sd.network.merging import inference
from dllm_sd.network.site_head import Head, SiteHead, run_at_sites
from dllm_sd.network.view import View
from dllm_sd.trajectory import Trajectory

SITES = 64
"""Sites whose logits exist at the same time."""
STEPS = 8
"""Decoding steps of a denoised completion that are scored, evenly spread from the first to the last."""


def rescore(module: SiteHead, trajectory: Trajectory, temperature: float) -> Tensor:
    """Score the tokens of one completion again.

    Args:
        module: the network with the weights that should have decoded.
        trajectory: a batch of one.
        temperature: of sampling; 0 scores at temperature 1, as `Trajectory.logp` does.

    Returns:
        float ``[1 l]``, `Trajectory.logp` as this network would have given it; NaN at positions that are not scored:
        all steps of an autoregressive completion are, and `STEPS` of a denoised one.
    """
    if trajectory.causal:
        row, ids = torch.tensor([0]), trajectory.tokens
        sites = trajectory.is_written
        seen = sites
    else:
        count = int(trajectory.num_steps)
        steps = torch.linspace(0, count - 1, min(STEPS, count)).round().long()
        row = torch.zeros_like(steps)
        ids, sites = trajectory.canvas(row, steps), trajectory.revealed(row, steps)
        seen = torch.ones_like(sites)
    prompt = trajectory.prompt_mask[row]
    view = View(
        torch.cat([trajectory.prompt_ids[row], ids], 1),
        torch.cat([prompt, seen], 1),
        torch.cat([torch.zeros_like(prompt), sites], 1),
    )
    tokens = trajectory.tokens[row][sites]

    def read(hidden: Tensor, head: Head) -> Tensor:
        pieces = zip(hidden.split(SITES), tokens.to(hidden.device).split(SITES), strict=True)
        return torch.cat([_token_logp(head(states), drawn, temperature or 1.0) for states, drawn in pieces])

    with inference(module):
        device = module.device
        scored = run_at_sites(module, View(*(x.to(device) for x in (view.ids, view.mask, view.sites))), read)
    logp = torch.full(trajectory.tokens.shape, torch.nan)
    logp[0, sites.nonzero()[:, 1]] = scored.float().cpu()
    return logp


def _token_logp(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (at_least_float32(logits) / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
