"""traces.jsonl: what student and teachers predicted at the graded sites of the logged rollouts.

Axes: ``n`` canvases of an update, ``l`` completion, ``p`` prompt, ``j`` traced sites, ``t`` targets, ``c`` teachers.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dllm_sd.objective.plan import Plan
from dllm_sd.objective.tracing import TracedSites, Tracer
from dllm_sd.rollouts.rollout import Rollout, Rollouts, TeacherBrief
from dllm_sd.training.advantage import REGIONS
from dllm_sd.training.metrics import graded_entry
from dllm_sd.trajectory import Trajectory


class UpdateTrace:
    """The traced rollouts of one update: the first ones that are logged, also if the gate rejected them."""

    def __init__(self, plan: Plan | None, rollouts: Rollouts, count: int, sites: int) -> None:
        """Choose what is traced; it depends on the update alone, so that micro-batches and processes do not matter.

        Args:
            plan: the plan of the update; None if it has no site.
            rollouts: its rollouts.
            count: how many of them are traced.
            sites: how many sites are traced, shared equally by the rollouts; of a rollout with more every second,
                third, ... one.
        """
        self.plan, self.rollouts, chosen = plan, rollouts, rollouts.chosen[:count]
        row_of = {(one.key_parts, one.attempt): row for row, one in enumerate(rollouts.kept)}
        self.rows = [row_of.get((one.key_parts, one.attempt)) for one in chosen]
        self.shown = [one if row is None else rollouts.kept[row] for one, row in zip(chosen, self.rows, strict=True)]
        self.found: list[dict[str, Any]] = []
        """The traced sites of this process; `canvas` is the index in the plan."""
        size = 0 if plan is None else plan.size
        self._first, self._every = torch.full((size,), -1), torch.ones(size, dtype=torch.int64)
        graded = [row for row in self.rows if plan is not None and row is not None and bool((plan.rows == row).any())]
        for row in graded:
            assert plan is not None
            own = plan.rows == row
            quota = plan.quota[own]
            self._first[own] = quota.cumsum(0) - quota
            self._every[own] = math.ceil(int(quota.sum()) / max(1, sites // len(graded)))

    def tracer(self, index: Tensor, device: torch.device) -> Tracer | None:
        """A tracer for the micro-batch of the canvases ``index``; None if none of them is traced."""
        first = self._first[index]
        return Tracer(first.to(device), self._every[index].to(device)) if bool((first >= 0).any()) else None

    def add(self, index: Tensor, tracer: Tracer) -> None:
        """Take over what the tracer of the canvases ``index`` has recorded."""
        traced = tracer.sites
        if traced is not None:
            length = self.rollouts.kept[0].trajectory.tokens.shape[1]
            self.found += _site_entries(traced, index[traced.canvas], traced.column - (tracer.width - length))

    def entries(
        self, update: int, found: Sequence[dict[str, Any]], pieces: "Pieces", regions: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """The lines of traces.jsonl, one for each traced rollout.

        Args:
            update: number of the update.
            found: `found` of all processes.
            pieces: the texts of tokens.
            regions: the region of each token by a critique (`region_map`), int64 ``[b l]``; None without one.
        """
        return [
            {**self._entry(update, slot, rollout, row, found, pieces), "blamed": _blamed(regions, row)}
            for slot, (rollout, row) in enumerate(zip(self.shown, self.rows, strict=True))
        ]

    def _entry(
        self,
        update: int,
        slot: int,
        rollout: Rollout,
        row: int | None,
        found: Sequence[dict[str, Any]],
        pieces: "Pieces",
    ) -> dict[str, Any]:
        own = None if self.plan is None or row is None else self.plan.rows == row
        graded = 0 if self.plan is None or own is None else int(self.plan.quota[own].sum())
        sites = [site for site in found if own is not None and bool(own[site["canvas"]])]
        sites.sort(key=lambda site: (site["canvas"], site["position"]))
        kept = sorted({site["canvas"] for site in sites})
        canvases = self._canvases(kept)
        numbers = {canvas: number for number, canvas in enumerate(kept)}
        reveal_step = rollout.trajectory.reveal_step[0].tolist()
        for site in sites:
            number, position = numbers[site["canvas"]], site["position"]
            step = canvases[number]["step"]
            if rollout.trajectory.causal:  # one canvas has all of its steps
                step = reveal_step[position] if position >= 0 else 0
            site |= {"canvas": number, "step": step}
        entry = {**_rollout_entry(rollout), "gated": row is None, "canvases": canvases}
        ids = {*entry["prompt"], *entry["tokens"], *_ids(sites)}
        ids.update(token for teacher in entry["teachers"] for token in teacher["prompt"] or ())
        return {
            "update": update,
            "slot": slot,
            **entry,
            "graded": graded,
            "sites": sites,
            "pieces": {str(token): pieces[token] for token in sorted(ids)},
        }

    def _canvases(self, index: Sequence[int]) -> list[dict[str, Any]]:
        """The canvases ``index`` of the plan: decoding step, masked positions, and what each teacher sees of them."""
        if self.plan is None or not index:
            return []
        batch = self.plan.micro_batch(torch.tensor(index))
        trajectory = self.plan.builder.trajectory
        width = trajectory.prompt_ids.shape[1]
        masked = (batch.canvases.ids == trajectory.mask_id) & batch.canvases.mask
        return [
            {
                "step": int(batch.canvases.steps[i]),
                "masked": _ranges(masked[i], width),
                "shown": [
                    _ranges(teacher.shown[i], teacher.shown.shape[1] - trajectory.tokens.shape[1])
                    for teacher in batch.teacher_inputs
                ],
            }
            for i in range(batch.size)
        ]


class Pieces(dict[int, str]):
    """The text of single tokens, as they stand within a text; tokens without a text of their own have their name."""

    def __init__(self, policy: Any) -> None:
        """Keep the policy whose tokenizer spells the tokens."""
        super().__init__()
        self._policy = policy

    def __missing__(self, token: int) -> str:
        once, twice = (self._policy.text([token] * count) for count in (1, 2))
        text = twice[len(once) :]  # the second of two equal tokens: tokenizers drop a space at the start of a text
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            text = str(self._policy.chat.tokenizer.convert_ids_to_tokens(token))
        self[token] = text
        return text


def _rollout_entry(rollout: Rollout) -> dict[str, Any]:
    """The fields of a line that are known without the loss."""
    trajectory = rollout.trajectory
    prompt = trajectory.prompt_ids[0][trajectory.prompt_mask[0]].tolist()
    return {
        **graded_entry(rollout),
        "causal": trajectory.causal,
        "prompt": prompt,
        "tokens": trajectory.tokens[0].tolist(),
        "reveal_step": trajectory.reveal_step[0].tolist(),
        "length": int(trajectory.length[0]),
        "blocks": _block_starts(trajectory),
        "teachers": [_teacher_entry(brief) for brief in rollout.briefs],
    }


def _teacher_entry(brief: TeacherBrief) -> dict[str, Any]:
    prompt = None if brief.prompt is None else list(brief.prompt)
    return {"prompt": prompt, "hint": brief.text, "weight": brief.weight}


def _block_starts(trajectory: Trajectory) -> list[int]:
    """The first position of each block; none of an autoregressive trajectory, whose blocks are its tokens."""
    if trajectory.causal:
        return []
    block = trajectory.block[0].tolist()
    return [0, *(i + 1 for i, (a, b) in enumerate(pairwise(block)) if a != b)]


def _site_entries(traced: TracedSites, canvas: Tensor, position: Tensor) -> list[dict[str, Any]]:
    """The traced sites as JSON."""
    return [
        {
            "canvas": int(canvas[j]),
            "position": int(position[j]),
            "token": int(traced.token[j]),
            "divergence": _numbers(traced.value[j]),
            "clipped": _numbers(traced.clipped[j]),
            "trust": _numbers(traced.trust[j]),
            **dict(zip(("student", "teachers"), _distributions(traced, j), strict=True)),
        }
        for j in range(len(traced.token))
    ]


def _distributions(traced: TracedSites, j: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the student and the teachers predict at a site: the best tokens with probabilities, and the drawn one's."""
    student, *teachers = (
        {"drawn": _digits(drawn, 6), "top": [[int(token), _digits(p, 6)] for token, p in zip(*best, strict=True)]}
        for *best, drawn in zip(traced.ids[j], traced.logp[j].exp(), traced.drawn[j].exp(), strict=True)
    )
    return student, teachers


def _numbers(values: Tensor) -> list[float]:
    """Numbers as JSON; the value of a float32 is kept exactly."""
    return [_digits(value, 9 if values.dtype == torch.float32 else 17) for value in values]


def _digits(value: Tensor, digits: int) -> float:
    return float(f"{float(value):.{digits}g}")


def _blamed(regions: Tensor | None, row: int | None) -> list[int]:
    """The positions of a rollout that are in the first wrong step of a critique, as ranges."""
    return [] if regions is None or row is None else _ranges(regions[row] == REGIONS.index("error"), 0)


def _ids(sites: Iterable[dict[str, Any]]) -> set[int]:
    return {token for site in sites for one in (site["student"], *site["teachers"]) for token, _ in one["top"]}


def _ranges(row: Tensor, prompt: int) -> list[int]:
    """The true columns of bool ``[p+l]`` as flat ranges ``start, stop, ...`` of positions; those of the prompt are
    below 0."""
    padded = torch.nn.functional.pad(row.int(), (1, 1))
    return [int(column) - prompt for column in padded.diff().nonzero()[:, 0]]
