import pytest
import torch

from dllm_sd.errors import InputError
from dllm_sd.losses.sites import SITES, AllMaskedSites, Revealed, TeacherTop, choose_sites, rank_descending


def flags(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


MASKED = flags("xxxx..xx", ".....xxx", "........")
ACTIVE = flags("xxxx....", ".....x..", "........")
REVEALED = flags("x..x....", ".....x..", "........")


def test_the_table_names_every_rule():
    assert {"revealed": Revealed, "all_masked": AllMaskedSites, "teacher_top": TeacherTop} == SITES


def test_revealed_grades_what_the_student_commits():
    candidates, quota = Revealed()(MASKED, ACTIVE, REVEALED)
    assert torch.equal(candidates, REVEALED)
    assert quota.tolist() == [2, 1, 0]


def test_all_masked_grades_every_masked_position_or_those_of_the_block():
    candidates, quota = AllMaskedSites()(MASKED, ACTIVE, REVEALED)
    assert torch.equal(candidates, MASKED)
    assert quota.tolist() == [6, 3, 0]
    candidates, quota = AllMaskedSites(block=True)(MASKED, ACTIVE, REVEALED)
    assert torch.equal(candidates, ACTIVE)
    assert quota.tolist() == [4, 1, 0]


@pytest.mark.parametrize(("count", "quota"), [(None, [2, 1, 0]), (1, [1, 1, 0]), (3, [3, 1, 0]), (9, [4, 1, 0])])
def test_teacher_top_chooses_within_the_active_block_and_never_more_than_there_is(count, quota):
    candidates, ours = TeacherTop(count=count)(MASKED, ACTIVE, REVEALED)
    assert torch.equal(candidates, ACTIVE)
    assert ours.tolist() == quota


def test_teacher_top_refuses_a_count_below_one():
    with pytest.raises(InputError, match="count is 0; give a whole number of at least 1, or null"):
        TeacherTop(count=0)


def test_confidence_is_the_largest_log_probability_or_the_largest_raw_logit():
    logits = torch.tensor([[5.0, 5.0, 5.0], [1.0, -9.0, -9.0]], dtype=torch.float64)
    assert TeacherTop(by="logit").score(logits).tolist() == [5.0, 1.0]
    expected = logits.softmax(-1).amax(-1).log()
    torch.testing.assert_close(TeacherTop(by="probability").score(logits), expected, atol=1e-12, rtol=0)


def test_the_best_candidates_are_chosen_by_score():
    candidates = flags("xx.x", "..xx", "xxxx")
    score = torch.tensor([0.1, 0.9, 0.5, -3.0, -2.0, 1.0, 2.0, 3.0, 4.0])
    chosen = choose_sites(candidates, torch.tensor([2, 1, 0]), score)
    assert torch.equal(chosen, flags(".x.x", "...x", "...."))


def test_ties_are_chosen_from_left_to_right():
    chosen = choose_sites(flags("x.xx", "xxxx"), torch.tensor([2, 3]), torch.zeros(7))
    assert torch.equal(chosen, flags("x.x.", "xxx."))


def test_exactly_the_quota_is_chosen_among_the_candidates():
    generator = torch.Generator().manual_seed(0)
    candidates = torch.rand(50, 40, generator=generator) < 0.5
    quota = (torch.rand(50, generator=generator) * candidates.sum(1)).long()
    score = torch.rand(int(candidates.sum()), generator=generator)
    chosen = choose_sites(candidates, quota, score)
    assert torch.equal(chosen.sum(1), quota)
    assert not (chosen & ~candidates).any()
    table = torch.zeros(candidates.shape).masked_scatter(candidates, score)
    for row in range(50):
        if 0 < quota[row] < candidates[row].sum():
            assert table[row][chosen[row]].min() >= table[row][candidates[row] & ~chosen[row]].max()


def test_ranks_count_from_the_largest():
    values = torch.tensor([[0.5, -torch.inf, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    assert rank_descending(values).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
