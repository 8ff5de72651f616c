"""Lobes, clusters and co-occurrence: planted blocks, independent rows, frequency alone, scikit-learn as the oracle."""

import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from darkmatter_ext.estimators.clusters import adjusted_mutual_information, deciles, permuted, spectral_clusters
from darkmatter_ext.estimators.co_occurrence import MEASURES, CoOccurrence, present, unrelated
from darkmatter_ext.estimators.lobes import angles, dark_numbers, lobe_numbers, random_numbers
from darkmatter_ext.runtime.inputs import InputError

F, D, CHUNKS = 120, 24, 800
BLOCK = torch.arange(F) % 2


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _counted(there):
    counts = CoOccurrence.empty(there.shape[1])
    for part in there.split(100):
        counts.add(part)
    return counts


def _blocks_fire(seed=0):
    """[CHUNKS, F]: a chunk is of one block, whose latents fire in a third of its chunks."""
    generator = _generator(seed)
    chunk = torch.randint(2, (CHUNKS,), generator=generator)
    return (torch.rand(CHUNKS, F, generator=generator) < 1 / 3) & (chunk[:, None] == BLOCK)


def _cones(seed=1):
    """[F, D] rows about the direction of their block."""
    centres = torch.eye(D)[:2]
    return centres[BLOCK] + 0.15 * torch.randn(F, D, generator=_generator(seed))


def _numbers(there, rows, draws=30):
    counts, dealt = _counted(there), _counted(unrelated(there, _generator(7)))
    return lobe_numbers(counts, dealt, rows, (2, 4), ("phi", "dice"), draws=draws, seed=0)


# ---- counts


def test_affinities_are_their_definitions():
    there = torch.rand(50, 6, generator=_generator()) < 0.4
    counts = _counted(there)
    merged = _counted(there[:20])
    merged.merge(_counted(there[20:]))
    assert merged.chunks == counts.chunks == 50
    assert merged.both.equal(counts.both)
    phi = torch.corrcoef(there.double().T)
    torch.testing.assert_close(counts.affinity("phi"), phi)
    a, b = there[:, 0], there[:, 1]
    both, either = (a & b).sum(), (a | b).sum()
    expected = {
        "phi": phi[0, 1], "jaccard": both / either, "dice": 2 * both / (a.sum() + b.sum()),
        "overlap": both / min(a.sum(), b.sum()), "simple": (a == b).double().mean(),
    }  # fmt: skip
    for measure in MEASURES:
        assert counts.affinity(measure)[0, 1].item() == pytest.approx(float(expected[measure])), measure
    assert counts.of(torch.tensor([4, 1])).affinity("phi")[0, 1].item() == pytest.approx(phi[4, 1].item())
    with pytest.raises(InputError, match="measure: must be one of phi, jaccard"):
        counts.affinity("cosine")


def test_an_entry_counts_once_a_chunk():
    there = present(torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 2, 0]), 3, 4)
    assert there.int().tolist() == [[0, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_dealt_anew_keeps_frequency_and_nothing_else():
    there = _blocks_fire()
    other = unrelated(there, _generator(3))
    assert other.sum(0).equal(there.sum(0))
    same = (BLOCK[:, None] == BLOCK) & ~torch.eye(F, dtype=torch.bool)
    assert _counted(there).affinity("phi")[same].mean() > 0.1
    assert abs(_counted(other).affinity("phi")[same].mean()) < 0.01


# ---- clusters


def test_adjusted_mutual_information_is_scikit_learns():
    a = torch.randint(5, (200,), generator=_generator(0))
    others = permuted(torch.randint(3, (200,), generator=_generator(1)), 4, seed=0)
    found = adjusted_mutual_information(a, others)
    for value, other in zip(found.tolist(), others, strict=True):
        assert value == pytest.approx(adjusted_mutual_info_score(a, other), abs=1e-7)
    assert adjusted_mutual_information(a, (4 - a)[None]).item() == pytest.approx(1)
    assert abs(adjusted_mutual_information(a, permuted(a, 200, seed=1)).mean().item()) < 0.005  # chance is 0


def test_labels_are_permuted_within_groups():
    labels, groups = torch.arange(40) % 4, torch.arange(40) // 20
    drawn = permuted(labels, 5, seed=0, groups=groups)
    for own in drawn:
        assert own[:20].sort().values.equal(labels[:20].sort().values)
    assert not drawn[0].equal(labels)
    assert deciles(torch.tensor([5.0, 1, 9, 7])).tolist() == [2, 0, 7, 5]


def test_spectral_clusters_find_blocks_whatever_the_solver():
    affinity = (BLOCK[:, None] == BLOCK).double() + 0.1
    for counts in ((2,), (2, 40)):  # few clusters of many points, and nearly as many as an iterative solver can give
        found = spectral_clusters(affinity[:90, :90], counts, seed=0)[2]
        assert adjusted_mutual_information(found, BLOCK[:90][None]).item() == pytest.approx(1)


# ---- planted truths


@pytest.mark.runs
def test_blocks_in_two_cones_are_lobes():
    numbers, lobes = _numbers(_blocks_fire(), _cones())
    assert numbers["ami/phi/2"] == pytest.approx(1, abs=0.05)
    assert adjusted_mutual_information(lobes, BLOCK[None]).item() > 0.6  # four lobes, of two blocks
    for null in ("permuted", "frequency", "gaussian"):
        assert numbers[f"ami_null/{null}/2/mean"] < 0.5
    for null in ("permuted", "frequency"):
        assert numbers[f"ami_null/{null}/2/mean"] + 10 * numbers[f"ami_null/{null}/2/sd"] < numbers["ami/phi/2"]
    assert abs(numbers["ami_dealt/2"]) < 0.1


def test_rows_that_know_nothing_of_the_blocks_are_within_every_null():
    rows = _cones()[torch.randperm(F, generator=_generator(5))]
    numbers, _ = _numbers(_blocks_fire(), rows)
    for k in (2, 4):
        for null in ("permuted", "frequency"):
            mean, sd = (numbers[f"ami_null/{null}/{k}/{key}"] for key in ("mean", "sd"))
            assert abs(numbers[f"ami/phi/{k}"] - mean) < 4 * sd
    assert (
        abs(numbers["locality/4"] - numbers["locality_null/permuted/4/mean"])
        < 5 * numbers["locality_null/permuted/4/sd"]
    )


@pytest.mark.runs
def test_frequency_alone_fools_permuted_labels_and_not_permutation_within_deciles():
    """A few dense chunks have all latents, the more the more frequent they are: phi groups latents by frequency, and so do
    rows; given its frequency, neither knows anything of the other."""
    generator = _generator(2)
    rate = torch.linspace(0.02, 0.5, F)
    busy = torch.rand(CHUNKS, 1, generator=generator)  # of a chunk: what all latents share
    there = torch.rand(CHUNKS, F, generator=generator) < rate * (0.2 + 1.6 * busy)
    rows = 0.25 * torch.randn(F, D, generator=generator)
    angle = rate / rate.max() * torch.pi / 1.2
    rows[:, 0] += angle.cos()
    rows[:, 1] += angle.sin()
    shuffled = torch.randperm(F, generator=generator)
    numbers, _ = _numbers(there[:, shuffled], rows[shuffled], draws=60)

    def z(null, k=2):
        mean, sd = (numbers[f"ami_null/{null}/{k}/{key}"] for key in ("mean", "sd"))
        return (numbers[f"ami/phi/{k}"] - mean) / sd

    assert z("permuted") > 8
    assert z("frequency") < 3


def test_angles_are_of_directions():
    rows = torch.tensor([[1.0, 0], [0, 2], [-3, 0]])
    expected = torch.tensor([[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(angles(rows), expected)


# ---- dark matter


def test_an_error_in_one_lobes_directions_is_found_there():
    """Rows of the first block span 4 of 40 directions, where the error is; with it everywhere, no lobe stands out."""
    d, generator = 60, _generator(4)
    rows = torch.randn(F, d, generator=generator)
    rows[BLOCK == 0, 4:] *= 0.02
    frequency = torch.arange(F) // 12
    inside = torch.diag(torch.tensor([1.0] * 4 + [0.0] * (d - 4)))
    numbers = dark_numbers(rows, BLOCK, frequency, inside, draws=10, seed=0)
    assert numbers["dark/largest_lobe"] == pytest.approx(1, abs=0.01)
    even = dark_numbers(rows, BLOCK, frequency, torch.eye(d), draws=10, seed=0)
    assert even["dark/largest_lobe"] == pytest.approx(16 / d)
    assert even["dark/largest_lobe_null/mean"] == pytest.approx(16 / d)
    assert even["dark/rows_in_top_random"] == pytest.approx(10 / d)


def test_random_rows_agree_with_what_they_fire_on_and_rows_dealt_anew_do_not():
    """Tied codes of random directions: near rows fire together, which is no learning; with other rows nothing agrees."""
    rows = torch.nn.functional.normalize(torch.randn(F, 6, generator=_generator(2)), dim=1)
    x = torch.randn(CHUNKS, 6, generator=_generator(3))
    there = torch.zeros(CHUNKS, F, dtype=torch.bool).scatter_(1, (x @ rows.T).topk(12).indices, True)
    own = random_numbers(_counted(there), rows, (4,), seed=0)["ami_random_directions/4"]
    other = random_numbers(_counted(there), rows[torch.randperm(F, generator=_generator(4))], (4,), seed=0)
    assert own > 0.3
    assert abs(other["ami_random_directions/4"]) < 0.05
