"""The signal of a method against one that is computed site by site, and what its shares and places are."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch

from dllm_sd.decoding.settings import Decoding
from dllm_sd.losses import (
    DIVERGENCES,
    ForwardKL,
    GatedGap,
    GeneralisedJSD,
    PolicyGradient,
    PurifiedPMI,
    ReverseKL,
    TokenNLL,
    TopK,
)
from dllm_sd.methods.method import Method
from dllm_sd.network.site_head import run_at_sites
from dllm_sd.objective.plan import plan_update
from dllm_sd.policies.weights import BaseWeights, TeacherModel
from dllm_sd.probing.deviations import Deviations, find_deviations
from dllm_sd.probing.signal import (
    OVERLAP_K,
    Models,
    Sites,
    groups,
    measure_sites,
    of_controls,
    of_method,
    premise,
    shares,
    yardstick,
)
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.rollout import Prompted
from dllm_sd.rollouts.rules import PassAtK, gather
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import Nothing, Reference
from dllm_sd.teachers.prompts import build_teacher_prompts
from dllm_sd.trajectory import NEVER
from tests.oracles import probing as oracle
from tests.stub_task import StubTask

PROMPTED = [Prompted(Problem(f"p{i}", {}), tuple(range(4, 6 + i))) for i in range(5)]
ROLLOUT = PassAtK(attempts=1, temperature=1.0)
INFORMED = Reference(template="({hint}){question}")
TOP = Method(
    rollout=ROLLOUT,
    gate=All(),
    contexts=(INFORMED,),
    support=TopK(k=6),
    divergence=ForwardKL(clip="entry"),
    temperature=1.3,
)
PURIFIED = Method(
    rollout=ROLLOUT,
    gate=All(),
    contexts=(INFORMED, Reference(template="({hint}){question}", question=False), Nothing()),
    target=PurifiedPMI(),
    divergence=GeneralisedJSD(beta=0.5),
)


class Near(StubTask):
    """A task whose reference begins as some rollout does."""

    text = ""

    def reference(self, problem: Problem) -> str:
        return self.text


def nobody(*_: Any) -> list[str]:
    return []


@pytest.fixture(scope="module")
def causal(make_policy: Callable[..., Any]) -> Any:
    return make_policy(as_="autoregressive")


def material(method: Method, policy: Any) -> tuple[Any, Any, Any, Any]:
    task = cast(Any, Near())
    tried = method.rollout(policy, task, PROMPTED, Decoding(length=12), 3, 0)
    rollouts = gather(method.rollout, method.gate, tried)
    start = max((rollout.text for rollout in rollouts.kept), key=len)[:3]
    task.text = f"{start[:2]}{'1' if start[2] != '1' else '2'}"
    hinted = build_teacher_prompts(rollouts, method.contexts, task, policy, nobody, (0, 0))
    plan = plan_update(method, hinted, hinted.keys(0, 0))
    teachers = [TeacherModel(BaseWeights(), policy) for _ in method.contexts]
    # few tokens at a time, so that there are several micro-batches
    models = Models(partial(run_at_sites, policy.module), teachers, policy.device, 60)
    return task, hinted, plan, models


def measured(method: Method, policy: Any) -> tuple[Sites, Any, str]:
    task, hinted, plan, models = material(method, policy)
    deviations = find_deviations(policy, task, method.contexts, hinted)
    observe = of_method(method, range(len(method.contexts)))
    return measure_sites(method, [plan], models, hinted, deviations, observe), hinted, task.text


def one_by_one(method: Method, policy: Any, hinted: Any, text: str) -> list[dict[str, float]]:
    reference, found = policy.encode_completion(text), []
    for rollout in hinted.kept:
        trajectory = rollout.trajectory
        prompts = [
            trajectory.prompt_ids[0].tolist(),
            *(b.prompt or trajectory.prompt_ids[0].tolist() for b in rollout.briefs),
        ]
        written, known = trajectory.tokens[0, : int(trajectory.length)].tolist(), True
        for place, token in enumerate(written):
            student, *teachers = (
                oracle.log_probabilities(policy, prompt, written[:place], method.temperature) for prompt in prompts
            )
            wanted = reference[place] if place < len(reference) else None
            site = {"right": rollout.grade.correct, "known": known, "at": known and token != wanted}
            known = known and token == wanted
            if method is TOP:
                kept = oracle.best(teachers[0], 6)
                near, far = (oracle.normalised([x[i] for i in kept]) for x in (student, teachers[0]))
                site["whole"] = oracle.forward_kl(student, teachers[0])
                site["supported"] = site["targeted"] = oracle.forward_kl(near, far)
                site["clipped"] = oracle.forward_kl(near, far, 0.05)
            else:
                informed, alone, plain = teachers
                target = oracle.purified(informed, alone, plain)
                site["whole"] = site["supported"] = oracle.half_jsd(student, teachers[0])
                site["targeted"] = site["clipped"] = oracle.half_jsd(student, target)
                if wanted is not None:
                    site["p/target"] = math.exp(target[wanted])
            site["student_entropy"] = -math.fsum(x * math.exp(x) for x in student)
            site["teacher_entropy"] = -math.fsum(x * math.exp(x) for x in teachers[0])
            site["agreement"] = float(oracle.best(student, 1) == oracle.best(teachers[0], 1))
            site["overlap"] = oracle.overlap(student, teachers[0], OVERLAP_K)
            site["advantage"] = teachers[0][token] - student[token]
            if wanted is not None:
                site["p/student"] = math.exp(student[wanted])
                site |= {f"p/teacher {i}": math.exp(x[wanted]) for i, x in enumerate(teachers)}
            found.append(site)
    return found


@pytest.mark.parametrize("method", [TOP, PURIFIED], ids=["support and clip", "purified"])
def test_groups_shares_and_premise_are_those_of_sites_taken_one_by_one(method: Method, causal: Any) -> None:
    sites, hinted, text = measured(method, causal)
    expected = oracle.summed_up(one_by_one(method, causal, hinted, text))
    taken = shares(sites, method)
    assert taken is not None
    assert [taken.support, taken.purification, taken.clip] == pytest.approx(expected["shares"], abs=1e-9)
    found = {name: list(vars(group).values()) for name, group in groups(sites).items()}
    assert found.keys() == expected["groups"].keys() >= {"all", "right", "wrong", "first_deviation"}
    for name, values in expected["groups"].items():
        assert found[name] == pytest.approx(values, abs=1e-7), name  # shares of top-k entries are float32
    said = premise(sites)
    assert said.keys() == expected["premise"].keys()
    for reader, places in expected["premise"].items():
        assert {place: said[reader][place] for place in places} == pytest.approx(places, abs=1e-9)


def test_a_control_that_is_the_teacher_adds_all_and_the_student_itself_nothing(causal: Any) -> None:
    contexts = (INFORMED, INFORMED, Nothing())
    method = Method(rollout=ROLLOUT, gate=All(), contexts=contexts, target=PurifiedPMI(), divergence=ReverseKL())
    task, hinted, plan, models = material(method, causal)
    deviations = find_deviations(causal, task, contexts, hinted)
    sites = measure_sites(method, [plan], models, hinted, deviations, of_controls(("own", "another", "no_question")))
    assert sites.total("gained") > 0
    assert sites.total("gained/another") == pytest.approx(sites.total("gained"))
    assert sites.total("gained/no_question") == pytest.approx(0, abs=1e-12)
    assert float(sites.columns["divergence/no_question"].abs().max()) == pytest.approx(0, abs=1e-12)


def test_distances_are_measured_in_the_method_s_divergence_if_it_is_one() -> None:
    for name, part in DIVERGENCES.items():
        one = part()
        assert (yardstick(one) is one) == (name in ("forward_kl", "reverse_kl", "jsd")), name
    for other in (TokenNLL(), GatedGap(), PolicyGradient(tokens="sampled")):
        assert yardstick(other) == ReverseKL()


def by_hand(**columns: list[float]) -> Sites:
    n = len(next(iter(columns.values())))
    none = torch.zeros(n, dtype=torch.bool)
    return Sites(
        {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()},
        row=torch.zeros(n, dtype=torch.int64),
        right=none,
        place=torch.zeros(n, dtype=torch.int64),
        wrong_step=none,
    )


def test_what_support_target_and_clip_take_adds_up_with_what_is_left() -> None:
    sites = by_hand(whole=[3, 1], supported=[2, 1], targeted=[1.5, 0.5], clipped=[0.5, -0.5])
    taken = shares(sites, TOP)
    assert taken is not None
    assert (taken.support, taken.purification, taken.clip, taken.left) == (0.25, 0.25, 0.5, 0.0)
    assert shares(by_hand(whole=[0, 0], supported=[0, 0], targeted=[0, 0], clipped=[0, 0]), TOP) is None


def test_a_site_is_before_at_or_after_the_first_deviation() -> None:
    reference = torch.tensor([[1, 2, 3, 4], [NEVER] * 4])
    wrong = torch.tensor([[False, True, False, True], [False] * 4])
    order = torch.tensor([[2, 1, 0, 1], [0, 1, 2, 3]])  # a denoiser: two wrong tokens at step 1
    first = torch.tensor([1, torch.iinfo(torch.int64).max])
    found = Deviations(reference, wrong, order, first, torch.zeros_like(wrong), causal=False)
    rows, steps, positions = torch.tensor(
        [(0, 0, 2), (0, 1, 1), (0, 1, 3), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, -1, 1), (0, -1, 0), (1, 0, 0)]
    ).T
    assert found.place(rows, steps, positions).tolist() == [0, 1, 1, 0, 2, 0, 1, 2, -1]


def test_a_mistake_is_a_deviation_of_a_wrong_rollout_in_its_first_wrong_step() -> None:
    columns = {"p/student": torch.tensor([0.1, 0.2, 0.3, 0.9], dtype=torch.float64)}
    right, place = torch.tensor([True, False, False, False]), torch.tensor([1, 1, 1, 0])
    rows, located = torch.arange(4), torch.tensor([False, True, False, False])
    known = premise(Sites(columns, rows, right, place, located))["student"]
    # No doubt at the deviation of the right rollout, which is another solution.
    assert known == pytest.approx({"before": 0.9, "at": 0.2, "mistake": 0.2, "doubts": 0.25})
    unknown = Sites(columns, rows, right, place, torch.zeros_like(right))
    assert premise(unknown)["student"]["mistake"] == pytest.approx(0.25)
