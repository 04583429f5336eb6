"""The equation as it is written down: logits of all sites at once, and what is logged by separate passes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm_sd.losses.sites import choose_sites
from dllm_sd.losses.trust import Drawn
from dllm_sd.methods.method import Method
from dllm_sd.network.view import View
from dllm_sd.objective.plan import MicroBatch

Logits = Callable[[View], Tensor]


def graded(method: Method, batch: MicroBatch, student: Logits, teachers: Sequence[Logits]) -> dict[str, Tensor]:
    """Loss with gradient and columns ``[m]``, from functions of a view to logits ``[m v]``."""

    def view(ids: Tensor, mask: Tensor, sites: Tensor) -> View:
        prompt = torch.zeros((len(ids), ids.shape[1] - sites.shape[1]), dtype=torch.bool)
        return View(ids, mask, torch.cat([prompt, sites], 1))

    canvases, sites = batch.canvases, batch.candidates
    said = [t(view(r.ids, r.mask, sites)).detach() for t, r in zip(teachers, batch.teacher_inputs, strict=True)]
    if method.sites.score is not None:
        sites = choose_sites(batch.candidates, batch.quota, method.sites.score(said[0]))
        said = [logits[sites[batch.candidates]] for logits in said]
    student_logp = (student(view(canvases.ids, canvases.mask, sites)) / method.temperature).log_softmax(-1)
    teacher_logp = student_logp.new_zeros((0, *student_logp.shape))
    if said:
        teacher_logp = (torch.stack(said) / method.temperature).log_softmax(-1)
    token, canvas = canvases.tokens[sites], sites.nonzero()[:, 0]
    logp = student_logp.detach().gather(1, token[:, None])[:, 0]
    student_u, teacher_u = method.support(student_logp, teacher_logp)
    target = method.target(teacher_u)
    divergence = method.divergence(student_u, target, token)
    drawn = Drawn(token, logp, canvases.old_logp[sites], canvas)
    trust = method.trust(student_u, target, drawn, batch.rollout_weight[canvas])
    if method.target.keeps_contexts:
        trust = trust * batch.context_weight[canvas].T
    term = sum(value * trust[t] for t, value in enumerate(divergence)) * batch.coefficient[canvas]
    with torch.no_grad():
        columns = {
            "value": method.divergence.entries(student_u, target, token).sum((0, -1)),
            "clipped": divergence.sum(0),
            "student_entropy": -torch.xlogy(student_logp.exp(), student_logp.exp()).sum(-1),
            **method.target.measures(teacher_u),
            **method.trust.measures(student_u, target, drawn, batch.rollout_weight[canvas]),
        }
        if said:
            first = teacher_logp[0]
            columns["teacher_entropy"] = -torch.xlogy(first.exp(), first.exp()).sum(-1)
            columns["agreement"] = (student_logp.argmax(-1) == first.argmax(-1)).double()
            columns["advantage"] = first.gather(1, token[:, None])[:, 0] - logp
    return {"loss": term.sum(), "term": term.detach(), **columns}
