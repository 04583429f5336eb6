"""What teachers write before they grade: with their own weights, and the same over any number of processes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dllm_sd.decoding.settings import Decoding
from dllm_sd.experience.text_generator import TextGenerator
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.weights import (
    BaseWeights,
    CheckpointWeights,
    EmaWeights,
    LiveWeights,
    SnapshotWeights,
    TeacherModel,
    trained,
)
from dllm_sd.pretrained.model import Lora
from dllm_sd.randomness import make_key
from dllm_sd.teachers import Reasoning
from tests.tiers import later
from tests.training.several import Processes, gathering, move

PROMPTS = [[4, 5, 14, 6], [7], [8, 9, 10, 11, 12, 13, 4], [5, 16, 5], [20, 21]]
KEYS = [make_key("row", i) for i in range(len(PROMPTS))]
REASONING = Reasoning(length=16, temperature=0.7)
DECODE = Decoding(length=8, block_length=4, tokens_per_step=1, temperature=0.0, top_k=20)
LORA = {"lora": Lora(rank=4, alpha=8)}


def texts(policy: AnyPolicy, **changes: Any) -> list[str]:
    """What a policy as it is now writes."""
    settings = replace(DECODE, length=REASONING.length, temperature=0.7, **changes)
    done = policy.decode(PROMPTS, settings, KEYS)
    return [policy.text(row[:end].tolist()) for row, end in zip(done.tokens, done.length, strict=True)]


def write(teachers: Sequence[TeacherModel], context: int = 0, rank: int = 0, world: int = 1) -> list[str]:
    accelerator: Any = Processes(rank, world)
    return TextGenerator(teachers, DECODE, accelerator)(context, PROMPTS, REASONING, KEYS)


BACKBONES: dict[str, dict[str, Any]] = {"denoiser": {}, "autoregressive": {"as_": "autoregressive"}}


@pytest.fixture
def build(request: pytest.FixtureRequest, make_policy: Callable[..., Any]) -> Callable[..., AnyPolicy]:
    """Random policies of one backbone."""
    return lambda **options: make_policy(**BACKBONES[request.param], **options)


def on(*first: str) -> pytest.MarkDecorator:
    """All backbones as the cases of a test, of which some are in the first tier, each in some of the tests."""
    cases = [*first, *later(*(name for name in BACKBONES if name not in first))]
    return pytest.mark.parametrize("build", cases, indirect=True)


DENOISER, AUTOREGRESSIVE = on("denoiser"), on("autoregressive")


OLDER = [*product((LORA, {}), (BaseWeights(), SnapshotWeights(5), EmaWeights(0.9)))]
SWITCHED = [("denoiser", LORA, BaseWeights()), ("autoregressive", {}, SnapshotWeights(5))]
REST = [case for case in ((name, *older) for name in BACKBONES for older in OLDER) if case not in SWITCHED]


@pytest.mark.parametrize(("build", "options", "weights"), [*SWITCHED, *later(*REST)], indirect=["build"])
def test_the_teachers_weights_write_and_not_the_students(build, options, weights):
    policy = build(**options)
    move(policy, 1)  # adapters begin with nothing
    if isinstance(weights, BaseWeights) and options:
        policy_base = build(**options)
        before = texts(policy_base)
    else:
        before = texts(policy)
    teacher = TeacherModel(weights, policy)
    move(policy, 2)
    after = texts(policy)
    live = {name: value.clone() for name, value in trained(policy).items()}
    assert write([teacher]) == before != after
    assert texts(policy) == after
    assert all(torch.equal(value, live[name]) for name, value in trained(policy).items())


@AUTOREGRESSIVE
def test_the_live_teacher_writes_as_the_student_does_now(build):
    policy = build()
    teacher = TeacherModel(LiveWeights(), policy)
    before = write([teacher])
    move(policy, 2)
    assert write([teacher]) == texts(policy) != before


@AUTOREGRESSIVE
def test_another_checkpoint_writes_with_its_own_weights(build):
    policy, other = build(), build(seed=5)
    teachers = [TeacherModel(LiveWeights(), policy), TeacherModel(CheckpointWeights("other"), policy, other=other)]
    assert write(teachers, context=1) == texts(other) != texts(policy)
    assert write(teachers, context=0) == texts(policy)


@DENOISER
def test_length_and_temperature_are_those_of_the_analysis_and_all_else_of_the_run(build):
    policy = build()
    teacher = [TeacherModel(LiveWeights(), policy)]
    assert write(teacher) == texts(policy)
    assert max(map(len, write(teacher))) > 8
    accelerator: Any = Processes()
    narrow = TextGenerator(teacher, replace(DECODE, top_k=1), accelerator)(0, PROMPTS, REASONING, KEYS)
    assert narrow == texts(policy, top_k=1) != texts(policy)
    short = TextGenerator(teacher, DECODE, accelerator)(0, PROMPTS, Reasoning(length=4), KEYS)
    assert max(map(len, short)) <= 4


@AUTOREGRESSIVE
def test_an_analysis_ends_at_the_end_token(build):
    policy = build()
    settings = replace(DECODE, length=REASONING.length, temperature=0.7)
    done = policy.decode(PROMPTS, settings, KEYS)
    assert done.ended.any()
    for text, row, ended in zip(
        write([TeacherModel(LiveWeights(), policy)]), done.tokens.tolist(), done.ended, strict=True
    ):
        if ended:
            assert text == policy.text(row[: row.index(policy.end_ids[0])])


@AUTOREGRESSIVE
def test_other_keys_write_other_texts(build):
    accelerator: Any = Processes()
    scribe = TextGenerator([TeacherModel(LiveWeights(), build())], DECODE, accelerator)
    keys = [make_key("other", i) for i in range(len(PROMPTS))]
    assert scribe(0, PROMPTS, REASONING, KEYS) == scribe(0, PROMPTS, REASONING, KEYS)
    assert scribe(0, PROMPTS, REASONING, keys) != scribe(0, PROMPTS, REASONING, KEYS)


@pytest.mark.parametrize("world", [3, *later(2, 7)])
@DENOISER
def test_dealt_over_processes_the_texts_are_the_same_in_the_same_order(build, monkeypatch, world):
    teacher = [TeacherModel(LiveWeights(), build())]
    alone = write(teacher)
    parts = gathering(monkeypatch)
    found = [write(teacher, rank=rank, world=world) for rank in range(world)][-1]
    assert found == alone
    assert [len(part) for part in parts] == [len(range(rank, 5, world)) for rank in range(world)]


@AUTOREGRESSIVE
def test_a_real_accelerator_of_one_process_gathers_nothing(build):
    teacher = [TeacherModel(LiveWeights(), build())]
    assert TextGenerator(teacher, DECODE, Accelerator())(0, PROMPTS, REASONING, KEYS) == write(teacher)


@DENOISER
def test_writing_leaves_modes_and_random_numbers_alone(build):
    policy = build(lora=Lora(rank=4, alpha=8, dropout=0.3))
    policy.module.train()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    one, again = (write([TeacherModel(BaseWeights(), policy)]) for _ in range(2))
    assert one == again
    assert policy.module.training
    assert torch.equal(torch.get_rng_state(), state)
