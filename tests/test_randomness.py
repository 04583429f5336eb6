import torch

from dllm_sd.randomness import fold, key_tensor, make_key, permutation, uniform


def test_a_key_depends_on_every_part_on_its_type_and_on_the_order():
    keys = [make_key(1, 2, "a"), make_key(1, 2, "b"), make_key(2, 1, "a"), make_key("1", 2, "a"), make_key(12, "a")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)


def splitmix64(x: int) -> int:
    """One output of the published generator, in Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_folding_and_numbers_are_those_of_splitmix64():
    assert splitmix64(1234567) == 6457827717110365317  # published test vector
    for key in [0, 1, 2**63 - 1, make_key("any")]:
        bits = [splitmix64(key ^ splitmix64(counter % 2**64)) for counter in [0, 1, 2, -1]]
        folded = [int(fold(torch.tensor(key), counter)) % 2**64 for counter in [0, 1, 2, -1]]
        assert folded == bits
        assert uniform(torch.tensor(key), 3).tolist() == [((b >> 41) + 0.5) / 2**23 for b in bits[:3]]


def test_a_key_never_changes():
    # Pinned: another value would silently change every run that is resumed with a newer version.
    assert make_key(42, 7, "problem-3", 1, "decode") == 3862406486118617068
    assert make_key() == make_key()


def test_the_same_key_gives_the_same_numbers_in_any_batch_and_of_any_count():
    keys = key_tensor([make_key("row", i) for i in range(9)])
    together = uniform(keys, 50)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(keys[order], 50), together[order])
    assert torch.equal(torch.stack([uniform(key, 50) for key in keys]), together)
    assert torch.equal(uniform(keys, 7), together[:, :7])


def test_numbers_do_not_depend_on_the_global_generator():
    keys = key_tensor([make_key("row", 0)])
    torch.manual_seed(0)
    first = uniform(keys, 5), permutation(3, 10)
    torch.manual_seed(1)
    assert torch.equal(uniform(keys, 5), first[0])
    assert permutation(3, 10) == first[1]


def test_uniform_numbers_lie_strictly_between_zero_and_one():
    u = uniform(key_tensor(range(100)), 20_000)
    assert u.dtype == torch.float32
    assert 0 < u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1


def test_uniform_numbers_have_the_moments_of_the_uniform_distribution():
    count = 1_000_000
    u = uniform(key_tensor([make_key("moments")]), count)[0].double()
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / count) ** 0.5  # var of (u - 1/2)^2 is 1/180
    filled = torch.histc(u, bins=100, min=0, max=1)
    assert ((filled - count / 100) ** 2 / (count / 100)).sum() < 99 + 5 * (2 * 99) ** 0.5  # chi-squared, 99 degrees


def test_neighbouring_keys_and_counters_are_uncorrelated():
    u = uniform(key_tensor(range(1000)), 1000).double() - 0.5
    for left, right in [(u[:, 1:], u[:, :-1]), (u[1:], u[:-1])]:
        correlation = (left * right).mean() * 12
        assert abs(correlation) < 5 / left.numel() ** 0.5


def test_folding_gives_distinct_keys():
    keys = key_tensor([make_key("fold", i) for i in range(300)])
    folded = fold(keys[:, None], torch.arange(-1, 300))
    assert folded.unique().numel() == folded.numel()
    twice = fold(fold(keys, 3), 5)
    assert not torch.isin(twice, fold(fold(keys, 5), 3)).any()


def test_folding_a_number_is_folding_a_tensor():
    keys = key_tensor([5, 6])
    assert torch.equal(fold(keys, 8), fold(keys, torch.tensor([8, 8])))


def test_a_permutation_is_one_and_depends_on_its_key_alone():
    assert sorted(permutation(7, 100)) == list(range(100))
    assert permutation(7, 100) == permutation(7, 100)
    assert permutation(7, 100) != permutation(8, 100)
    assert permutation(2**63 - 1, 1) == [0]


def test_every_order_of_a_permutation_is_as_likely():
    counts: dict[tuple[int, ...], int] = {}
    for i in range(6000):
        order = tuple(permutation(make_key("order", i), 3))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * (6000 * 1 / 6 * 5 / 6) ** 0.5 for count in counts.values())
