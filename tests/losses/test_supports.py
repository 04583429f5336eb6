import math

import pytest
import torch

from dllm_sd.errors import InputError
from dllm_sd.losses import (
    SUPPORTS,
    FullVocabulary,
    TopK,
    gather_top_k,
    kl_entries,
    log_tail,
    top_k_index,
    top_k_overlap,
)
from dllm_sd.losses.supports import MIN_TAIL
from tests.oracles import divergences as oracle


def random_logp(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1).to(dtype)


ALL = [FullVocabulary()] + [
    TopK(k=5, of=of, rest=rest) for of in ("teacher", "student", "rollout") for rest in ("renormalise", "bucket")
]
KEEP = TopK(k=5, rest="keep")


def test_the_table_names_every_support():
    assert {"full": FullVocabulary, "top_k": TopK} == SUPPORTS


@pytest.mark.parametrize("support", ALL, ids=repr)
def test_probabilities_on_every_support_sum_to_one(support):
    student, teacher = support(random_logp(6, 30), random_logp(3, 6, 30, seed=1))
    assert student.shape == teacher.shape[1:]
    for logp in (student, teacher):
        torch.testing.assert_close(logp.exp().sum(-1), torch.ones(logp.shape[:-1], dtype=torch.float64))


@pytest.mark.parametrize("rest", ["renormalise", "bucket", "keep"])
@pytest.mark.parametrize("k", [30, 1000])
def test_top_k_of_the_whole_vocabulary_is_the_full_vocabulary(k, rest):
    given = random_logp(6, 30), random_logp(2, 6, 30, seed=1)
    for ours, full in zip(TopK(k=k, rest=rest)(*given), FullVocabulary()(*given), strict=True):
        assert torch.equal(ours, full)


def test_top_k_keeps_the_first_teachers_entries_or_the_students_or_those_of_the_rollouts_policy():
    student, teacher = random_logp(4, 12), random_logp(3, 4, 12, seed=1)
    for support, source in (
        (TopK(k=3), teacher[0]),
        (TopK(k=3, of="student"), student),
        (TopK(k=3, of="rollout"), teacher[2]),
    ):
        kept_student, kept_teacher = support(student, teacher)
        for m in range(4):
            index = oracle.top_k(source[m].exp().tolist(), 3)
            for full, kept in ((student[m], kept_student[m]), (teacher[1, m], kept_teacher[1, m])):
                p = [full[v].exp().item() for v in index]
                assert sorted(kept.exp().tolist()) == pytest.approx(sorted(x / sum(p) for x in p), rel=1e-12)


@pytest.mark.parametrize("of", ["teacher", "student", "rollout"])
def test_keep_leaves_the_full_vocabularys_log_probabilities_at_the_kept_ids(of):
    student, teacher = random_logp(4, 12), random_logp(2, 4, 12, seed=1)
    kept_student, kept_teacher = TopK(k=3, of=of, rest="keep")(student, teacher)
    source = {"teacher": teacher[0], "student": student, "rollout": teacher[1]}[of]
    index = torch.stack([row.topk(3, sorted=False).indices for row in source])
    for full, kept in ((student, kept_student), (teacher[0], kept_teacher[0]), (teacher[1], kept_teacher[1])):
        assert torch.equal(kept, torch.stack([row[ids] for row, ids in zip(full, index, strict=True)]))
    assert (kept_student.exp().sum(-1) < 1).all()


@pytest.mark.parametrize("c", [0, 1])
def test_the_rollouts_policy_comes_after_a_teacher(c):
    with pytest.raises(InputError, match=rf"support\.of is 'rollout' but the method has {c} teacher contexts"):
        TopK(k=3, of="rollout")(random_logp(4, 12), random_logp(c, 4, 12))


def test_the_bucket_holds_the_probability_of_what_was_left_out():
    student, teacher = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]).log()
    kept_student, kept_teacher = TopK(k=1, rest="bucket")(student, teacher)
    torch.testing.assert_close(kept_student.exp(), torch.tensor([[0.05, 0.95]]))
    torch.testing.assert_close(kept_teacher.exp(), torch.tensor([[[0.4, 0.6]]]))


@pytest.mark.parametrize("of", ["teacher", "student"])
@pytest.mark.parametrize("k", [1, 5, 29])
def test_the_bucket_never_makes_a_kl_larger_than_the_full_one(k, of):
    student, teacher = random_logp(200, 30), random_logp(1, 200, 30, seed=1)
    s, t = TopK(k=k, of=of, rest="bucket")(student, teacher)
    slack = MIN_TAIL  # what raising a tail to this floor can add at most
    assert (kl_entries(s, t).sum(-1) <= kl_entries(student, teacher).sum(-1) + slack).all()
    assert (kl_entries(t, s).sum(-1) <= kl_entries(teacher, student).sum(-1) + slack).all()


def test_the_tail_is_accurate_when_it_is_tiny_and_floored_when_it_is_nothing():
    for tail in (0.5, 1e-3, 1e-6):
        kept = torch.tensor([math.log1p(-tail)], dtype=torch.float64)
        assert log_tail(kept).item() == pytest.approx(math.log(tail), rel=1e-9)
    certain = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    log_tail(certain).sum().backward()
    assert log_tail(certain).item() == pytest.approx(math.log(1e-7), rel=1e-6)
    assert certain.grad is not None
    assert certain.grad.item() == 0


def test_without_a_teacher_only_the_students_entries_can_be_kept():
    none = torch.empty(0, 4, 12)
    student, teacher = TopK(k=3, of="student")(random_logp(4, 12), none)
    assert student.shape == (4, 3)
    assert teacher.shape == (0, 4, 3)
    assert FullVocabulary()(student, none)[1].shape == (0, 4, 12)
    with pytest.raises(InputError, match=r"support\.of is 'teacher' but the method has no teacher"):
        TopK(k=3)(random_logp(4, 12), none)


def test_choosing_the_students_entries_passes_no_gradient_but_their_values_do():
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    student, _ = TopK(k=3, of="student", rest="bucket")(logits.log_softmax(-1), random_logp(1, 4, 12))
    student[:, 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("support", [*ALL, KEEP], ids=repr)
def test_impossible_entries_keep_values_and_gradients_free_of_nan(support):
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    logits[0, :10] = -torch.inf
    logits.requires_grad_()
    teacher = random_logp(2, 3, 12, dtype=torch.float32).clone()
    teacher[:, 0, 8:] = -torch.inf
    student, target = support(logits.log_softmax(-1), teacher)
    kl_entries(student, target).sum().backward()
    assert not student.isnan().any()
    assert not target.isnan().any()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("support", [*ALL, KEEP], ids=repr)
def test_float64_is_preserved_and_bfloat16_is_widened(support):
    for given, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        student, teacher = support(random_logp(4, 12, dtype=given), random_logp(2, 4, 12, seed=1, dtype=given))
        assert student.dtype == teacher.dtype == expected
        assert student.isfinite().all()
        assert teacher.isfinite().all()


def test_gather_takes_the_same_entries_from_every_context():
    logp = random_logp(2, 4, 12)
    index = top_k_index(logp[0], 3)
    for c in range(2):
        for m in range(4):
            assert torch.equal(gather_top_k(logp, index)[c, m], logp[c, m, index[m]])


def test_overlap_is_the_share_of_the_teachers_entries_that_the_student_has():
    student = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]]).log_softmax(-1)
    teacher = torch.tensor([[4.0, 1, 3, 2], [4, 3, 2, 1]]).log_softmax(-1)
    assert top_k_overlap(student, teacher, 2).tolist() == [0.5, 0.0]
    assert top_k_overlap(student, teacher[None], 2).tolist() == [[0.5, 0.0]]
    assert top_k_overlap(student, teacher, 99).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("field", ["k", "of", "rest"])
def test_a_wrong_field_is_named(field):
    wrong = {"k": 0, "of": "both", "rest": "drop"}[field]
    with pytest.raises(InputError, match=rf"support\.{field} is"):
        TopK(**{field: wrong})
