"""What a probe says of the sites of autoregressive rollouts, one site at a time, in loops over plain numbers."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from dllm_sd.network.view import View

Logp = list[float]


def log_probabilities(policy: Any, prompt: Sequence[int], written: Sequence[int], temperature: float) -> Logp:
    """Of the token after ``written``."""
    ids = torch.tensor([[*prompt, *written, 0]])
    sites = torch.zeros_like(ids, dtype=torch.bool)
    sites[0, -1] = True
    with torch.no_grad():
        logits = policy.site_logits(View(ids, torch.ones_like(sites), sites))[0].double() / temperature
    top = max(logits.tolist())
    normaliser = top + math.log(math.fsum(math.exp(x - top) for x in logits.tolist()))
    return [x - normaliser for x in logits.tolist()]


def normalised(values: Sequence[float]) -> Logp:
    top = max(values)
    whole = top + math.log(math.fsum(math.exp(x - top) for x in values))
    return [x - whole for x in values]


def forward_kl(student: Logp, target: Logp, clip: float = math.inf) -> float:
    return math.fsum(min(math.exp(t) * (t - s), clip) for s, t in zip(student, target, strict=True))


def half_jsd(student: Logp, target: Logp) -> float:
    middle = [math.log((math.exp(s) + math.exp(t)) / 2) for s, t in zip(student, target, strict=True)]
    return (forward_kl(middle, target) + forward_kl(middle, student)) / 2


def purified(informed: Logp, alone: Logp, plain: Logp, bound: float = 10.0) -> Logp:
    """Equations 13 to 17 of arXiv 2607.02234 with beta 1."""
    gap = [x - y for x, y in zip(informed, alone, strict=True)]
    centre = fmean(gap)
    return normalised([p + bound * math.tanh((g - centre) / bound) for p, g in zip(plain, gap, strict=True)])


def best(values: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def overlap(student: Logp, teacher: Logp, k: int) -> float:
    return len({*best(student, k)} & {*best(teacher, k)}) / k


def summed_up(sites: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Groups, shares and premise of sites with ``whole``, ``supported``, ``targeted``, ``clipped``, ``right``, ``at``,
    ``known`` (before or at the deviation), ``p/...`` and what is averaged."""
    whole = math.fsum(site["whole"] for site in sites)
    ends = [math.fsum(site[name] for site in sites) for name in ("whole", "supported", "targeted", "clipped")]
    taken = [(x - y) / whole for x, y in pairwise(ends)]
    found: dict[str, Any] = {"shares": taken}
    wanted = {
        "all": list(sites),
        "right": [site for site in sites if site["right"]],
        "wrong": [site for site in sites if not site["right"]],
        "first_deviation": [site for site in sites if site["at"]],
    }
    names = ("targeted", "student_entropy", "teacher_entropy", "agreement", "overlap", "advantage")
    found["groups"] = {
        group: [len(chosen), math.fsum(s["targeted"] for s in chosen) / ends[2]]
        + [fmean(site[name] for site in chosen) for name in names]
        for group, chosen in wanted.items()
        if chosen
    }
    readers = [name for name in sites[0] if name.startswith("p/")]
    places = {
        "before": [site for site in sites if site["known"] and not site["at"]],
        "at": wanted["first_deviation"],
        "doubts": [
            site for site in sites if site["known"] and not (site["at"] and site["right"]) and site["p/student"] < 0.5
        ],
    }
    found["premise"] = {
        reader[2:]: {place: fmean(site[reader] for site in chosen) for place, chosen in places.items()}
        for reader in readers
    }
    return found
