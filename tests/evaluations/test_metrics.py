import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from evaluations import metrics
from evaluations.extractors import EvaluationError
from evaluations.features import Features, Statistics
from evaluations.metrics import compare, frechet_distance, inception_score, kernel_distance


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def features(array, **kwargs):
    return Features("any", "id", 0, np.array([[8, 8]]), np.asarray(array, np.float32), **kwargs)


def normal(count, width=6, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    arrays = {"logits": rng.standard_normal((count, 4)), "spatial": rng.standard_normal((count, 5))} | kwargs
    return features(rng.standard_normal((count, width)), **arrays)


def moments(mu, sigma, count=40):
    """Samples whose mean and covariance are exactly these."""
    x = np.random.default_rng(1).standard_normal((count, len(mu)))
    x -= x.mean(0)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x, rowvar=False)), x.T).T
    return x @ np.linalg.cholesky(sigma).T + mu


def random_gaussian(width, seed):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((width, width))
    return rng.standard_normal(width), root @ root.T + 0.1 * np.eye(width)


def test_a_set_against_itself():
    found = compare(normal(50), normal(50))
    assert abs(found["fid"]) < 1e-6
    assert abs(found["sfid"]) < 1e-6
    assert (found["precision"], found["recall"]) == (1, 1)


def test_fid_of_known_gaussians():
    (mu1, sigma1), (mu2, sigma2) = random_gaussian(5, 0), random_gaussian(5, 1)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * sqrtm(sigma1 @ sigma2).real)
    one, other = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    found = compare(features(moments(mu1, sigma1)), features(moments(mu2, sigma2)))
    assert found["fid"] == pytest.approx(expected, rel=1e-5)  # the features are float32


def test_sfid_is_of_the_spatial_features(rng):
    (mu1, sigma1), (mu2, sigma2) = random_gaussian(5, 2), random_gaussian(5, 3)
    a, b = moments(mu1, sigma1), moments(mu2, sigma2)
    alike = rng.standard_normal((40, 3))
    found = compare(features(alike, spatial=a), features(alike, spatial=b))
    assert abs(found["fid"]) < 1e-6
    assert found["sfid"] == pytest.approx(compare(features(a), features(b))["fid"], rel=1e-5)


def test_extrapolated_fid_comes_nearer_to_the_truth():
    """The samples are drawn from the reference's own distribution, so the truth is 0."""
    goal = Statistics("id", np.zeros(8), np.eye(8))
    plain, better = [], []
    for seed in range(12):
        x = np.random.default_rng(seed).standard_normal((80, 8))
        found = compare(features(x), None, goal, fid_infinity=True)
        plain.append(found["fid"])
        better.append(found["fid_infinity"])
    assert np.mean(plain) > 0.3
    assert abs(np.mean(better)) < 0.25 * np.mean(plain)


def brute_precision_recall(samples, reference, k=3):
    """By definition, in float64."""

    def covered(points, centres):
        radii = np.sort(cdist(centres, centres), axis=1)[:, k]  # place 0 is the centre itself
        return (cdist(points, centres) <= radii).any(axis=1).mean()

    return {"precision": covered(samples, reference), "recall": covered(reference, samples)}


@pytest.mark.parametrize("block", [2**25, 700])  # all at once, and a few images at a time
def test_precision_and_recall_by_definition(monkeypatch, block, rng):
    monkeypatch.setattr(metrics, "BLOCK", block)
    samples = rng.standard_normal((70, 4)) * 0.7 + 0.8
    reference = rng.standard_normal((90, 4))
    found = metrics.precision_recall(samples, reference)
    assert found == pytest.approx(brute_precision_recall(samples, reference), abs=1e-6)
    assert 0.3 < found["recall"] < found["precision"] < 1


def test_precision_and_recall_are_not_swapped(rng):
    """Samples that show one of two modes: all of them good, half of the reference missed."""
    modes = np.concatenate([rng.standard_normal((60, 4)), rng.standard_normal((60, 4)) + 100])
    found = metrics.precision_recall(rng.standard_normal((50, 4)) * 0.3, modes)
    assert found["precision"] == 1
    assert found["recall"] <= 0.5


def test_inception_score_of_certain_and_even_classes():
    logits = 60 * np.eye(5)[np.arange(100) % 5]
    assert inception_score(logits, 1) == {"is": pytest.approx(5), "is_std": pytest.approx(0)}
    assert inception_score(np.zeros((100, 5)), 10)["is"] == pytest.approx(1)


def test_inception_score_does_not_depend_on_the_order_of_classes():
    by_class = 60 * np.eye(5)[np.arange(1000) // 200]
    shuffled = np.random.default_rng(0).permutation(by_class)
    found, other = inception_score(by_class, 10), inception_score(shuffled, 10)
    assert found["is"] == pytest.approx(other["is"], abs=2 * found["is_std"])
    assert found["is"] > 4.7  # splits in the given order would be of one class each: 1


def test_order_does_not_matter():
    samples, reference = normal(60, seed=1), normal(80, seed=2)
    turned = [features(s.features[::-1], logits=s.logits[::-1], spatial=s.spatial[::-1]) for s in (samples, reference)]
    found, other = compare(samples, reference), compare(*turned)
    for key in ("fid", "sfid", "precision", "recall"):
        assert found[key] == pytest.approx(other[key], rel=1e-9), key
    for key in ("is", "kid"):
        assert abs(found[key] - other[key]) < found[f"{key}_std"], key


def test_kid_by_definition(rng):
    x, y = rng.standard_normal((12, 3)), rng.standard_normal((12, 3)) + 1

    def kernel(a, b):
        return (a @ b.T / 3 + 1) ** 3

    off = ~np.eye(12, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    assert kernel_distance(x, y, 12) == {"kid": pytest.approx(expected), "kid_std": pytest.approx(0, abs=1e-9)}


def test_kid_is_unbiased_where_fid_is_not():
    found = compare(normal(30, width=40, seed=1), normal(30, width=40, seed=2))
    assert found["fid"] > 10
    assert abs(found["kid"]) < found["kid_std"]
    assert found["protocol"]["kid_subset_size"] == 15  # halves, or there would be no deviation
    assert any("KID" in note for note in found["notes"])


def test_what_cannot_be_had_is_none(rng):
    found = compare(features(rng.standard_normal((2, 4))), features(rng.standard_normal((3, 4))))
    missing = {
        key for key in ("fid", "sfid", "is", "is_std", "precision", "recall", "kid", "kid_std") if found[key] is None
    }
    assert missing == {"sfid", "is", "is_std", "precision", "recall"}  # no third neighbours among three


def test_statistics_stand_for_the_reference_in_fid():
    goal, spatial = random_gaussian(6, 5), random_gaussian(5, 6)
    statistics = Statistics("id", *(np.float32(array) for array in (*goal, *spatial)))
    found = compare(normal(40), None, statistics)
    assert found["fid"] == pytest.approx(compare(normal(40), features(moments(*goal)))["fid"], rel=1e-4)
    assert found["sfid"] is not None
    assert [found[key] for key in ("precision", "recall", "kid", "kid_std")] == [None] * 4
    assert found["protocol"]["fid_against"] == "statistics"
    with_images = compare(normal(40), normal(50, seed=9), statistics)
    assert with_images["fid"] == found["fid"]
    assert with_images["kid"] is not None


def test_features_of_another_network_are_refused():
    with pytest.raises(EvaluationError, match="features of 6 numbers against statistics of 7"):
        compare(normal(40), None, Statistics("id", *random_gaussian(7, 0)))


def test_only_a_large_set_goes_without_a_warning(monkeypatch):
    monkeypatch.setattr(metrics, "ENOUGH", 40)
    assert compare(normal(40), normal(40))["notes"] == []
    assert "of 39 images are biased upwards" in compare(normal(40), normal(39))["notes"][0]
