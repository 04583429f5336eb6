import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from dllm_sd.errors import InputError
from dllm_sd.network.site_head import SiteHead
from dllm_sd.network.view import View
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.policies.weights import (
    WEIGHTS,
    BaseWeights,
    CheckpointWeights,
    EmaWeights,
    LiveWeights,
    PeerWeights,
    SnapshotWeights,
    TeacherModel,
    add_adapter,
    trained,
)
from dllm_sd.pretrained.model import Lora
from tests.tiers import crossed

IDS = torch.tensor([[4, 5, 0, 0, 0], [6, 7, 8, 0, 0]])
VIEW = View(IDS, torch.ones_like(IDS, dtype=torch.bool), IDS == 0)
LORA = {"lora": Lora(rank=4, alpha=8)}
TEACHERS = [LiveWeights(), BaseWeights(), EmaWeights(), SnapshotWeights()]
KINDS = pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])


def move(policy: MaskedDiffusion, seed: int) -> None:
    """Something like an optimizer step: every trained tensor changes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in trained(policy).values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator, dtype=value.dtype))


def student(policy: MaskedDiffusion) -> torch.Tensor:
    with torch.no_grad():
        return policy.site_logits(VIEW)


def said(teacher: TeacherModel) -> torch.Tensor:
    """The teacher's logits."""
    return teacher(VIEW).logits(slice(None))


def copies(policy: MaskedDiffusion) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trained(policy).items()}


def with_weights(policy: MaskedDiffusion, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The student's logits if it had these weights."""
    now = copies(policy)
    with torch.no_grad():
        for name, value in trained(policy).items():
            value.copy_(weights[name])
        logits = policy.site_logits(VIEW)
        for name, value in trained(policy).items():
            value.copy_(now[name])
    return logits


def test_the_table_names_all_weights():
    assert {
        "live": LiveWeights,
        "base": BaseWeights,
        "ema": EmaWeights,
        "snapshot": SnapshotWeights,
        "checkpoint": CheckpointWeights,
        "peer": PeerWeights,
    } == WEIGHTS


@KINDS
def test_live_weights_are_the_students(make_policy, options):
    policy = make_policy(**options)
    teacher = TeacherModel(LiveWeights(), policy)
    for update in (1, 2):
        move(policy, update)
        teacher.after_update(update)
        assert torch.equal(said(teacher), student(policy))


@KINDS
def test_base_weights_are_the_initial_ones_after_any_number_of_updates(make_policy, options):
    policy = make_policy(**options)
    before, teacher = student(policy), TeacherModel(BaseWeights(), policy)
    for update in (1, 2, 3):
        move(policy, update)
        teacher.after_update(update)
    assert not torch.allclose(student(policy), before)
    torch.testing.assert_close(said(teacher), before, atol=1e-13, rtol=0)
    assert teacher.checkpoint_tensors == {}


def test_the_base_of_an_adapter_is_not_stored_but_switched_off_for_the_teacher_only(make_policy):
    policy = make_policy(**LORA)
    teacher = TeacherModel(BaseWeights(), policy)
    assert teacher.copy == {}
    move(policy, 1)
    moved = student(policy)
    said(teacher)
    assert torch.equal(student(policy), moved)
    assert all(value.requires_grad for value in trained(policy).values())
    assert set(trained(policy)) == set(copies(make_policy(**LORA)))


@pytest.fixture
def begun(make_policy, tmp_path):
    """Builds a policy whose adapter goes on from another one."""
    former = make_policy(**LORA)
    move(former, 9)
    save_file(copies(former), tmp_path / "model.safetensors")
    return lambda: make_policy(lora=replace(LORA["lora"], start=str(tmp_path)))


def test_the_base_of_an_adapter_that_goes_on_is_the_start_of_the_run_or_the_checkpoint(make_policy, begun):
    policy, bare = begun(), student(make_policy(**LORA))
    start = student(policy)
    models = {
        weights: TeacherModel(weights, policy)
        for weights in (BaseWeights(), BaseWeights("checkpoint"), EmaWeights(0.5))
    }
    for update in (1, 2):
        move(policy, update)
        for teacher in models.values():
            teacher.after_update(update)
    assert not torch.allclose(start, bare)
    assert not torch.allclose(start, student(policy))
    torch.testing.assert_close(said(models[BaseWeights()]), start, atol=1e-13, rtol=0)
    torch.testing.assert_close(said(models[BaseWeights("checkpoint")]), bare, atol=1e-13, rtol=0)
    assert models[BaseWeights()].copy
    assert not models[BaseWeights("checkpoint")].copy
    assert models[BaseWeights()].checkpoint_tensors == {}  # read again from model.lora.start
    with models[BaseWeights()].applied():  # as rollouts by the base and writers ask for it
        torch.testing.assert_close(student(policy), start, atol=1e-13, rtol=0)


def test_a_resumed_run_has_the_base_of_its_start(begun):
    policy = begun()
    start = student(policy)
    move(policy, 1)
    saved = copies(policy)
    again = begun()
    teacher = TeacherModel(BaseWeights(), again)  # as the trainer does: teachers first, then the checkpoint
    with torch.no_grad():
        for name, value in trained(again).items():
            value.copy_(saved[name])
    torch.testing.assert_close(said(teacher), start, atol=1e-13, rtol=0)


@KINDS
def test_without_a_start_both_bases_are_the_checkpoint(make_policy, options):
    policy = make_policy(**options)
    before = student(policy)
    teachers = [TeacherModel(weights, policy) for weights in (BaseWeights(), BaseWeights("checkpoint"))]
    move(policy, 1)
    for teacher in teachers:
        assert bool(teacher.copy) == (not options)
        torch.testing.assert_close(said(teacher), before, atol=1e-13, rtol=0)


@KINDS
def test_the_moving_average_follows_its_formula(make_policy, options):
    policy = make_policy(**options)
    teacher, expected = TeacherModel(EmaWeights(decay=0.9), policy), copies(policy)
    for update in (1, 2, 3):
        move(policy, update)
        teacher.after_update(update)
        expected = {name: 0.9 * expected[name] + 0.1 * value for name, value in copies(policy).items()}
    assert teacher.checkpoint_tensors.keys() == expected.keys()
    for name, value in teacher.checkpoint_tensors.items():
        torch.testing.assert_close(value, expected[name], atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(said(teacher), with_weights(policy, expected), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(said(teacher), student(policy))


@pytest.mark.parametrize(("decay", "like"), [(0.0, LiveWeights()), (1.0, BaseWeights())])
def test_the_moving_averages_at_the_ends_are_live_and_base(make_policy, decay, like):
    policy = make_policy()
    average, other = TeacherModel(EmaWeights(decay=decay), policy), TeacherModel(like, policy)
    move(policy, 1)
    average.after_update(1)
    torch.testing.assert_close(said(average), said(other), atol=1e-13, rtol=0)


@KINDS
def test_a_snapshot_is_renewed_every_so_many_updates(make_policy, options):
    policy = make_policy(**options)
    teacher, renewed = TeacherModel(SnapshotWeights(every=2), policy), student(policy)
    for update in range(1, 6):
        move(policy, update)
        teacher.after_update(update)
        if update in (2, 4):
            renewed = student(policy)
        assert torch.equal(said(teacher), renewed), update


@pytest.mark.parametrize(("weights", "options"), crossed(TEACHERS, [{}, LORA]))
def test_a_teacher_has_no_gradient_and_leaves_the_student_alone(make_policy, weights, options):
    policy = make_policy(**options)
    teacher, before = TeacherModel(weights, policy), copies(policy)
    logits = said(teacher)
    assert not logits.requires_grad
    policy.site_logits(VIEW).square().mean().backward()
    assert not any(value.requires_grad for value in teacher.copy.values())
    assert all(torch.equal(value, before[name]) for name, value in trained(policy).items())
    assert all(value.grad is not None for value in trained(policy).values())


@pytest.mark.parametrize("weights", TEACHERS, ids=repr)
def test_teachers_see_no_dropout_and_leave_the_mode_as_it_was(make_policy, weights):
    policy = make_policy(lora=Lora(rank=4, alpha=8, dropout=0.5))
    move(policy, 1)
    teacher = TeacherModel(weights, policy)
    policy.module.eval()
    quiet = said(teacher)
    assert not policy.module.training
    policy.module.train()
    assert torch.equal(said(teacher), quiet)
    assert torch.equal(said(teacher), quiet)
    assert all(module.training for module in policy.module.modules())
    assert not torch.equal(student(policy), student(policy))  # the student does see it


@pytest.mark.parametrize("weights", [LiveWeights(), BaseWeights(), EmaWeights()], ids=repr)
def test_gradient_checkpointing_changes_neither_teacher_nor_gradient(make_policy, weights):
    results = []
    for gradient_checkpointing in (False, True):
        policy = make_policy(gradient_checkpointing=gradient_checkpointing)
        policy.module.train()
        teacher = TeacherModel(weights, policy)
        move(policy, 1)
        gap = policy.site_logits(VIEW) - said(teacher).detach()
        (gap + policy.site_logits(VIEW)).square().sum().backward()
        results.append((said(teacher), {name: value.grad for name, value in trained(policy).items()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("weights", "options"), crossed([EmaWeights(decay=0.5), SnapshotWeights(every=1)], [{}, LORA]))
def test_a_moving_teacher_can_be_saved_and_restored(make_policy, weights, options):
    policy = make_policy(**options)
    teacher = TeacherModel(weights, policy)
    move(policy, 1)
    teacher.after_update(1)
    saved = {name: value.clone() for name, value in teacher.checkpoint_tensors.items()}
    assert saved.keys() == trained(policy).keys()  # nothing frozen is stored
    again = TeacherModel(weights, policy)
    move(policy, 2)
    again.load(saved)
    assert torch.equal(said(again), said(teacher))


@pytest.mark.parametrize(
    "build", [lambda: EmaWeights(decay=1.1), lambda: EmaWeights(decay=-0.1), lambda: SnapshotWeights(every=0)]
)
def test_impossible_weights_are_refused(build):
    with pytest.raises(InputError, match=r"method\.teacher"):
        build()


def test_teachers_of_a_policy_share_nothing_but_the_module(make_policy):
    policy = make_policy()
    slow, fast = TeacherModel(EmaWeights(decay=0.99), policy), TeacherModel(replace(EmaWeights(), decay=0.5), policy)
    move(policy, 1)
    for teacher in (slow, fast):
        teacher.after_update(1)
    assert not torch.equal(said(slow), said(fast))


def grown(policy: MaskedDiffusion) -> MaskedDiffusion:
    """The policy with an adapter that trains a copy of the output head as well (`modules_to_save`)."""
    model = policy.module.model
    assert isinstance(model, PeftModel)
    network = model.unload()
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        policy.module = SiteHead(get_peft_model(network, settings))  # pyright: ignore[reportArgumentType]
    return policy


def flags(policy: MaskedDiffusion) -> dict[str, bool]:
    return {name: value.requires_grad for name, value in policy.module.named_parameters()}


@pytest.mark.parametrize("weights", [EmaWeights(decay=0.75), SnapshotWeights(every=1)], ids=repr)
def test_a_copy_beside_an_adapter_is_a_second_adapter_with_saved_modules(make_policy, weights):
    policy = grown(make_policy(**LORA))
    move(policy, 0)
    names, expected = set(trained(policy)), copies(policy)
    teacher = TeacherModel(weights, policy)
    assert set(trained(policy)) == names
    assert any("modules_to_save" in name for name in names)
    slots = {name for name, value in flags(policy).items() if "teacher1" in name}
    assert len(slots) == len(names)
    assert not any(flags(policy)[name] for name in slots)
    assert torch.equal(said(teacher), student(policy))
    share = 0.75 if isinstance(weights, EmaWeights) else 0.0
    for update in (1, 2, 3):
        move(policy, update)
        teacher.after_update(update)
        expected = {name: share * expected[name] + (1 - share) * value for name, value in copies(policy).items()}
    torch.testing.assert_close(said(teacher), with_weights(policy, expected), atol=1e-12, rtol=1e-12)
    move(policy, 4)
    torch.testing.assert_close(said(teacher), with_weights(policy, expected), atol=1e-12, rtol=1e-12)


def test_an_average_keeps_more_digits_than_a_saved_module_has(make_policy):
    policy = grown(make_policy(dtype="bfloat16", **LORA))
    head = next(name for name in trained(policy) if "modules_to_save" in name)
    live = trained(policy)[head]
    with torch.no_grad():
        live.fill_(1.0)
    teacher = TeacherModel(EmaWeights(decay=0.999), policy)
    with torch.no_grad():
        live.fill_(2.0)
    for update in range(1, 21):
        teacher.after_update(update)
    average = 2 - 0.999**20
    assert live.dtype == torch.bfloat16
    torch.testing.assert_close(teacher.checkpoint_tensors[head], torch.full(live.shape, average), atol=1e-6, rtol=0)
    slot = dict(policy.module.named_parameters())[head.replace("default", "teacher1")]
    torch.testing.assert_close(slot, torch.full(live.shape, average, dtype=torch.bfloat16), atol=0, rtol=0)
    assert torch.isfinite(said(teacher)).all()


@pytest.mark.parametrize(("weights", "options"), crossed(TEACHERS, [{}, LORA, {"dtype": "bfloat16"}]))
def test_a_call_leaves_weights_flags_and_modes_as_they_were_even_if_it_fails(
    make_policy, weights, options, monkeypatch
):
    policy = make_policy(**options)
    teacher = TeacherModel(weights, policy)
    move(policy, 1)
    policy.module.train()
    frozen = next(name for name, value in flags(policy).items() if value)
    dict(policy.module.named_parameters())[frozen].requires_grad_(False)  # somebody froze a part of the student
    before, logits = flags(policy), student(policy)
    values = {name: value.detach().clone() for name, value in policy.module.named_parameters()}
    said(teacher)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(policy.module), "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            said(teacher)
    assert flags(policy) == before
    for name, value in policy.module.named_parameters():
        assert torch.equal(value, values[name]), name
    assert torch.equal(student(policy), logits)
    assert all(module.training for module in policy.module.modules())


@KINDS
def test_teachers_of_all_kinds_work_side_by_side(make_policy, options):
    policy = make_policy(**options)
    kinds = (
        LiveWeights(),
        BaseWeights(),
        EmaWeights(decay=0.9),
        EmaWeights(decay=0.5),
        SnapshotWeights(every=1),
        SnapshotWeights(every=2),
    )
    teachers = [TeacherModel(weights, policy) for weights in kinds]
    start = copies(policy)
    slow, fast, second = start, start, start
    for update in (1, 2, 3):
        move(policy, update)
        live = copies(policy)
        for teacher in teachers:
            teacher.after_update(update)
        slow = {name: 0.9 * slow[name] + 0.1 * live[name] for name in live}
        fast = {name: 0.5 * fast[name] + 0.5 * live[name] for name in live}
        second = live if update == 2 else second
    live = copies(policy)
    for _ in range(2):  # none of them disturbs another
        for teacher, weights in zip(teachers, (live, start, slow, fast, live, second), strict=True):
            torch.testing.assert_close(said(teacher), with_weights(policy, weights), atol=1e-12, rtol=1e-12)


def test_a_graph_that_was_recorded_before_a_teachers_call_is_still_good(make_policy):
    gradients = []
    for teaches in (False, True):
        policy = make_policy()
        teacher = TeacherModel(EmaWeights(), policy)
        move(policy, 1)
        loss = policy.site_logits(VIEW).square().mean()
        if teaches:
            said(teacher)
        loss.backward()
        gradients.append({name: value.grad for name, value in trained(policy).items()})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_a_second_adapter_draws_no_random_numbers(make_policy):
    policy = make_policy(**LORA)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert add_adapter(EmaWeights(), policy) == "teacher1"
    assert torch.equal(torch.rand(3), expected)
    assert [add_adapter(weights, policy) for weights in (LiveWeights(), BaseWeights())] == [None, None]
    assert add_adapter(EmaWeights(), make_policy()) is None
