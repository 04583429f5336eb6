import math

import pytest
import torch
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses import (
    TARGETS,
    Barycenter,
    Each,
    FullVocabulary,
    GeneralisedJSD,
    Plain,
    PurifiedPMI,
    ReverseKL,
    Sampled,
    TopK,
    kl_entries,
)
from tests.oracles import divergences, targets

NO_TOKEN = torch.zeros(0, dtype=torch.int64)
MERGING = [
    PurifiedPMI(),
    PurifiedPMI(beta=0.7, bound=1.5),
    PurifiedPMI(beta=2.0, bound=None),
    PurifiedPMI(bound=2.0, centre="base"),
    Barycenter(),
    Barycenter(beta=3.0, alpha_max=0.9),
    Barycenter(floor=0.03),
]


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teachers(c: int, m: int = 4, v: int = 7) -> Tensor:
    return logits(c, m, v).log_softmax(-1)


def of_probs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()[:, None]


def expected(target: PurifiedPMI | Barycenter, probabilities: list[list[float]]) -> list[float]:
    """The oracle's target of one site."""
    if isinstance(target, PurifiedPMI):
        return targets.pmi(*probabilities, beta=target.beta, bound=target.bound, centre=target.centre)
    return targets.barycenter(*probabilities, beta=target.beta, alpha_max=target.alpha_max, floor=target.floor)[1]


def test_the_table_names_every_target():
    assert {
        "plain": Plain,
        "each": Each,
        "sampled": Sampled,
        "pmi": PurifiedPMI,
        "barycenter": Barycenter,
    } == TARGETS


def test_every_target_says_how_many_contexts_it_needs():
    needed = {name: part.contexts for name, part in TARGETS.items()}
    assert needed == {"plain": 1, "each": None, "sampled": None, "pmi": 3, "barycenter": 2}


def test_plain_is_the_one_teacher():
    assert torch.equal(Plain()(teachers(1)), teachers(1))


@pytest.mark.parametrize("c", [0, 2, 3])
def test_plain_refuses_any_other_number_of_teachers(c):
    with pytest.raises(InputError, match=rf"exactly one teacher context and got {c}"):
        Plain()(teachers(c))


@pytest.mark.parametrize("c", [1, 3])
def test_each_keeps_the_teachers_apart(c):
    assert torch.equal(Each()(teachers(c)), teachers(c))


def test_each_refuses_no_teacher():
    with pytest.raises(InputError, match="at least one teacher context"):
        Each()(teachers(0))


@pytest.mark.parametrize("c", [0, 1, 2])
def test_sampled_hands_on_whatever_is_there(c):
    assert torch.equal(Sampled()(teachers(c)), teachers(c))


@pytest.mark.parametrize("target", [Plain(), Each(), Sampled()], ids=repr)
def test_targets_that_merge_nothing_measure_nothing(target):
    assert target.measures(teachers(1)) == {}


@pytest.mark.parametrize("target", MERGING, ids=repr)
def test_merged_targets_equal_the_oracle(target):
    given = teachers(target.contexts, m=50, v=9)
    ours = target(given)
    assert ours.shape == (1, 50, 9)
    for m in range(50):
        assert ours[0, m].exp().tolist() == pytest.approx(expected(target, given[:, m].exp().tolist()), rel=1e-11)


@pytest.mark.parametrize("target", MERGING, ids=repr)
@pytest.mark.parametrize("beta", [0.5, 1])
def test_losses_and_gradients_on_merged_targets_equal_the_oracle(target, beta):
    student, given = logits(6, 9, seed=5).requires_grad_(), teachers(target.contexts, m=6, v=9).requires_grad_()
    value = GeneralisedJSD(beta=beta)(student.log_softmax(-1), target(given), NO_TOKEN)
    value.sum().backward()
    assert given.grad is None
    assert student.grad is not None
    for m in range(6):
        merged = expected(target, given[:, m].exp().tolist())
        loss, gradient = divergences.value_and_gradient(student[m].tolist(), merged, beta, "none", 0)
        assert value[0, m].item() == pytest.approx(loss, abs=1e-13, rel=1e-11)
        assert student.grad[m].tolist() == pytest.approx(gradient, abs=1e-13, rel=1e-10)


@pytest.mark.parametrize(("target", "words"), [(PurifiedPMI(), "three"), (Barycenter(), "two")])
@pytest.mark.parametrize("c", [0, 1, 4])
def test_merged_targets_refuse_any_other_number_of_teachers(target, words, c):
    for call in (target, target.measures):
        with pytest.raises(InputError, match=rf"exactly {words} teacher contexts and got {c}: give informed"):
            call(teachers(c))


@pytest.mark.parametrize("target", MERGING, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_entries_give_finite_targets_and_measures(target, dtype):
    raw = logits(target.contexts, 5, 8).to(dtype)
    raw[0, 0, :3] = -torch.inf  # only the informed teacher forbids them
    raw[-1, 1, :3] = -torch.inf  # only the plain one
    raw[:, 2, :3] = -torch.inf  # all
    raw[1:, 3, 4:] = -torch.inf  # all but the informed one
    raw[0, 4, 0], raw[-1, 4, 1] = 900.0, 900.0  # probabilities underflow
    given = raw.log_softmax(-1)
    ours = target(given)
    assert ours.dtype == dtype
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.exp().sum(-1), torch.ones(1, 5, dtype=dtype))
    assert all(value.isfinite().all() for value in target.measures(given).values())


@pytest.mark.parametrize("target", MERGING, ids=repr)
def test_top_k_of_the_whole_vocabulary_gives_the_merged_target_of_the_full_one(target):
    student, given = logits(6, 9, seed=5).log_softmax(-1), teachers(target.contexts, m=6, v=9)
    for divergence in (GeneralisedJSD(), ReverseKL()):
        whole, full = (
            divergence(kept, target(merged), NO_TOKEN)
            for kept, merged in (support(student, given) for support in (TopK(k=9, rest="bucket"), FullVocabulary()))
        )
        assert torch.equal(whole, full)


@pytest.mark.parametrize("centre", ["uniform", "base"])
def test_pmi_is_the_informed_teacher_where_the_reference_alone_says_what_the_base_says(centre):
    informed, plain, _ = teachers(3, m=20)
    given = torch.stack([informed, plain, plain])
    torch.testing.assert_close(PurifiedPMI(bound=None, centre=centre)(given)[0], informed)
    bounded = PurifiedPMI(bound=100.0, centre=centre)(given)[0]
    assert kl_entries(bounded, informed).sum(-1).max() < 1e-3
    assert kl_entries(PurifiedPMI(bound=1.0)(given)[0], informed).sum(-1).mean() > 0.1


@pytest.mark.parametrize("target", MERGING[:4], ids=repr)
def test_pmi_is_the_base_where_the_question_adds_nothing_to_the_reference(target):
    informed, plain, _ = teachers(3, m=20)
    given = torch.stack([informed, informed, plain])
    torch.testing.assert_close(target(given)[0], plain)
    assert target.measures(given)["target/shift"].abs().max() < 1e-12


def test_without_a_bound_centring_changes_nothing_and_with_one_it_does():
    given = teachers(3, m=20)
    plain_shift = (given[2] + given[0] - given[1]).log_softmax(-1)
    for centre in ("uniform", "base"):
        torch.testing.assert_close(PurifiedPMI(bound=None, centre=centre)(given)[0], plain_shift)
    uniform, base = PurifiedPMI(bound=1.0)(given), PurifiedPMI(bound=1.0, centre="base")(given)
    assert (uniform - base).abs().max() > 0.1


def test_a_larger_beta_keeps_pmi_closer_to_the_base():
    given = teachers(3, m=50)
    shift = [PurifiedPMI(beta=beta).measures(given)["target/shift"] for beta in (0.5, 1.0, 2.0, 1e6)]
    assert (shift[0] > shift[1]).all()
    assert (shift[1] > shift[2]).all()
    assert shift[3].max() < 1e-6


def test_pmi_and_its_measures_by_hand():
    given = of_probs([0.8, 0.2], [0.2, 0.8], [0.5, 0.5])
    # gaps are +log 4 and -log 4, so centred they stay as they are
    for target, odds in ((PurifiedPMI(bound=None), 16.0), (PurifiedPMI(beta=2.0, bound=None), 4.0)):
        first = odds / (odds + 1)
        assert target(given).exp()[0, 0].tolist() == pytest.approx([first, 1 - first])
        shift = math.log(2) + first * math.log(first) + (1 - first) * math.log(1 - first)
        assert target.measures(given)["target/shift"].tolist() == pytest.approx([shift])
        assert target.measures(given)["target/bound_share"].tolist() == [0]
    bounded = math.exp(2 * math.tanh(math.log(4)))
    assert PurifiedPMI(bound=1.0)(given).exp()[0, 0, 0].item() == pytest.approx(bounded / (bounded + 1))
    assert PurifiedPMI(bound=1.0).measures(given)["target/bound_share"].tolist() == [1]


def test_the_bound_share_counts_entries_beyond_the_bound():
    given = of_probs([0.7, 0.1, 0.1, 0.1], [0.1, 0.3, 0.3, 0.3], [0.25] * 4)
    # gaps log 7 and three times -log 3; their mean is (log 7 - 3 log 3) / 4 = -0.337, so 2.283 and -0.761 three times
    share = {bound: PurifiedPMI(bound=bound).measures(given)["target/bound_share"].item() for bound in (0.5, 1.0, 3.0)}
    assert share == {0.5: 1.0, 1.0: 0.25, 3.0: 0.0}


@pytest.mark.parametrize("target", MERGING[4:], ids=repr)
def test_barycenter_measures_equal_the_oracle(target):
    given = teachers(2, m=50, v=9)
    measured = target.measures(given)
    assert list(measured) == ["target/disagreement", "target/alpha"]
    for m in range(50):
        informed, plain = given[:, m].exp().tolist()
        alpha, _ = targets.barycenter(informed, plain, target.beta, target.alpha_max, target.floor)
        d = targets.disagreement(informed, plain, target.floor)
        assert measured["target/disagreement"][m].item() == pytest.approx(d, rel=1e-12)
        assert measured["target/alpha"][m].item() == pytest.approx(alpha, rel=1e-12)


def test_where_both_agree_the_barycenter_is_the_teacher():
    informed = teachers(1, m=20)[0]
    target, given = Barycenter(alpha_max=1.0), torch.stack([informed, informed])
    torch.testing.assert_close(target(given)[0], informed)
    assert target.measures(given)["target/alpha"].abs().max() < 1e-12


def test_the_barycenter_lies_between_the_two():
    given = teachers(2, m=50)
    merged = Barycenter(beta=3.0, alpha_max=0.8)(given)[0]
    low, high = given.amin(0), given.amax(0)
    odds = [logp[:, :1] - logp[:, 1:] for logp in (merged, *given)]
    slack = 1e-12
    assert (odds[0] >= torch.minimum(odds[1], odds[2]) - slack).all()
    assert (odds[0] <= torch.maximum(odds[1], odds[2]) + slack).all()
    assert (merged >= low - slack).all()  # the geometric mean lies between, and its norm is at most 1
    assert (high.exp().sum(-1) > 1).all()
    for end in range(2):
        to_merged, apart = (kl_entries(given[end], other).sum(-1) for other in (merged, given[1 - end]))
        assert (to_merged < apart).all()


def test_alpha_grows_with_the_disagreement_up_to_its_maximum():
    informed, plain = teachers(2, m=1)[:, 0]
    steps = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    given = torch.stack([(informed + steps * (plain - informed)).log_softmax(-1).flip(0), informed.expand(20, -1)])
    measured = Barycenter(beta=20.0).measures(given)
    for values in measured.values():
        assert (values.diff() < 0).all()
    assert measured["target/alpha"].max() < 0.15
    assert Barycenter(beta=1e9).measures(given)["target/alpha"][0].item() == 0.15
    assert Barycenter(alpha_max=0.0).measures(given)["target/alpha"].tolist() == [0] * 20


def test_the_barycenter_by_hand():
    given = of_probs([0.8, 0.2], [0.2, 0.8])
    disagreement = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    alpha = math.tanh(disagreement)  # sigmoid(x) - 1/2 = tanh(x / 2) / 2, here with beta = 2 and alpha_max = 1
    target = Barycenter(beta=2.0, alpha_max=1.0)
    assert target.measures(given)["target/disagreement"].item() == pytest.approx(disagreement)
    assert target.measures(given)["target/alpha"].item() == pytest.approx(alpha)
    odds = 4 ** (1 - 2 * alpha)
    assert target(given).exp()[0, 0].tolist() == pytest.approx([odds / (odds + 1), 1 / (odds + 1)])


def test_the_floor_counts_small_probabilities_as_itself():
    given = of_probs([1.0, 0.0], [0.5, 0.5])
    merged = Barycenter(alpha_max=0.0, floor=0.25)(given)
    assert merged.exp()[0, 0].tolist() == pytest.approx([0.8, 0.2])  # 1 : 0.25


def test_the_barycenter_works_on_a_bucketed_support():
    student, given = logits(6, 30, seed=5).log_softmax(-1), teachers(2, m=6, v=30)
    kept, bucketed = TopK(k=4, of="student", rest="bucket")(student, given)
    merged = Barycenter()(bucketed)
    assert merged.shape == (1, *kept.shape)
    for m in range(6):
        wanted = expected(Barycenter(), bucketed[:, m].exp().tolist())
        assert merged[0, m].exp().tolist() == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize(
    ("part", "field", "wrong"),
    [
        (PurifiedPMI, "beta", 0.0),
        (PurifiedPMI, "beta", math.nan),
        (PurifiedPMI, "bound", 0.0),
        (PurifiedPMI, "bound", math.nan),
        (PurifiedPMI, "centre", "mean"),
        (Barycenter, "beta", 0.0),
        (Barycenter, "alpha_max", -0.1),
        (Barycenter, "alpha_max", 1.1),
        (Barycenter, "alpha_max", math.nan),
        (Barycenter, "floor", 0.0),
        (Barycenter, "floor", 1.0),
    ],
)
def test_a_wrong_field_is_named(part, field, wrong):
    with pytest.raises(InputError, match=rf"target\.{field} is"):
        part(**{field: wrong})
