"""AdamW and its learning-rate schedule."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from dllm_sd.settings import Optim


def build_optimizer(parameters: Iterable[nn.Parameter], settings: Optim) -> torch.optim.AdamW:
    """AdamW over the trained parameters."""
    return torch.optim.AdamW(
        list(parameters),
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def learning_rate(optimizer: torch.optim.Optimizer, settings: Optim, updates: int) -> Callable[[int], float]:
    """The learning rate as a function of the update alone, counted from 1: so nothing of it needs saving.

    Update `warmup` is the first at the full rate, the last update is the one closest to `final_lr`.
    """
    name, options = "constant_with_warmup", dict[str, Any]()
    if settings.schedule == "linear" and settings.final_lr < 1:
        name, options = "polynomial", {"power": 1.0, "lr_end": max(settings.final_lr * settings.lr, 1e-30)}
    if settings.schedule == "cosine":
        name, options = "cosine_with_min_lr", {"min_lr_rate": settings.final_lr}
    total = max(updates + (settings.final_lr == 0), settings.warmup + 1)
    schedule = get_scheduler(name, optimizer, settings.warmup, total, options)
    assert isinstance(schedule, LambdaLR)
    scale = schedule.lr_lambdas[0]
    return lambda update: settings.lr * scale(update)
