import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp

from evaluations import paired
from evaluations.metrics import kernel_distance
from evaluations.paired import kernel_sums, kid_difference, paired_t


@pytest.fixture
def features():
    """Two sets of 40 paired images, the second a little off, and a reference of 30."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(40, 5))
    return one, one + 0.3 * rng.normal(size=(40, 5)) + 0.1, rng.normal(size=(30, 5))


def mmd(x, y):
    """KID's unbiased estimate by its definition, pair by pair."""

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    def mean(a, b, same):
        return np.mean([kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)])

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_difference_of_kid_is_that_of_its_definition(features, monkeypatch):
    one, other, reference = features
    monkeypatch.setattr(paired, "BLOCK", 7 * 40)  # so that there is more than one block, and a smaller last one
    found = kid_difference([(kernel_sums(one, reference), kernel_sums(other, reference))])
    assert found.mean == pytest.approx(mmd(one, reference) - mmd(other, reference), rel=1e-9)
    assert found.count == 40


def test_difference_of_kid_is_that_of_torch_fidelity(features):
    """Its KID over one subset, which is the whole set."""
    one, other, reference = (part[:30] for part in features)
    kids = [kernel_distance(part, reference, 30)["kid"] for part in (one, other)]
    found = kid_difference([(kernel_sums(one, reference), kernel_sums(other, reference))])
    assert found.mean == pytest.approx(kids[0] - kids[1], rel=1e-6)


def test_interval_is_the_jackknife_by_hand(features):
    one, other, reference = (part[:12] for part in features)
    without = np.array(
        [mmd(np.delete(one, i, 0), reference) - mmd(np.delete(other, i, 0), reference) for i in range(len(one))]
    )
    error = np.sqrt(11 / 12 * np.square(without - without.mean()).sum())
    found = kid_difference([(kernel_sums(one, reference), kernel_sums(other, reference))])
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * error, rel=1e-6)
    assert found.p == pytest.approx(2 * norm.sf(abs(found.mean) / error))


def test_intervals_hold_what_they_say():
    """Of two sets of one distribution, half of whose noise is shared, 95 % of the intervals hold 0."""
    rng, held = np.random.default_rng(1), 0
    reference = rng.normal(size=(60, 4)) + 0.5
    for _ in range(200):
        shared = rng.normal(size=(60, 4))
        sums = [kernel_sums((shared + rng.normal(size=(60, 4))) / np.sqrt(2), reference) for _ in range(2)]
        found = kid_difference([tuple(sums)])
        held += found.low <= 0 <= found.high
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
    assert 180 <= held <= 199  # 190 expected; five standard deviations are 15


def test_seeds_are_averaged(features):
    one, other, reference = features
    a, b = kernel_sums(one, reference), kernel_sums(other, reference)
    single, double = kid_difference([(a, b)]), kid_difference([(a, b), (b, a)])
    assert double.mean == pytest.approx(0)
    assert double.high - double.low == pytest.approx((single.high - single.low) / np.sqrt(2))
    assert double.count == 80


def test_a_run_and_itself(features):
    sums = kernel_sums(features[0], features[2])
    found = kid_difference([(sums, sums)])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert paired_t([1.0, 2.0], [1.0, 2.0]).p == 1
    assert paired_t([2.0, 3.0], [1.0, 2.0]).p == 0


def test_unequal_runs_are_refused(features):
    one, other, reference = features
    with pytest.raises(ValueError, match="40 and 39 images"):
        kid_difference([(kernel_sums(one, reference), kernel_sums(other[1:], reference))])


def test_t_test_of_pairs():
    found = paired_t([3.0, 4.0, 6.0], [2.0, 4.0, 3.0])
    assert found.p == pytest.approx(ttest_1samp([1.0, 0.0, 3.0], 0).pvalue)
    assert found.mean == pytest.approx(4 / 3)
    half = 4.302653 * np.std([1, 0, 3], ddof=1) / np.sqrt(3)  # Student's t with two degrees of freedom
    assert (found.low, found.high) == (pytest.approx(4 / 3 - half), pytest.approx(4 / 3 + half))
    assert paired_t([1.0], [2.0]) is None
