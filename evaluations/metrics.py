"""FID, sFID, Inception Score, precision, recall and KID from features, by torch-fidelity's functions.

In float64, since KID is a small difference of large sums, and distances come from matrix products.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from tqdm import tqdm

from evaluations.extractors import EvaluationError
from evaluations.features import Features, Statistics

SEED = 2020  # torch-fidelity's
IS_SPLITS = 10  # of 5000 images in the usual protocol
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # as in ADM
ENOUGH = 10_000  # images for a FID that can be compared with others' at all
BLOCK = 2**25  # distances in memory at a time


def compare(
    samples: Features,
    reference: Features | None,
    statistics: Statistics | None = None,
    *,
    fid_infinity: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """All metrics of a set of samples.

    Args:
        samples: of the images to judge.
        reference: of the images that they should resemble, by the same extractor.
        statistics: stand for the reference in FID and sFID; without a reference, what needs its images is None.
        fid_infinity: extrapolate FID to infinitely many samples as well.
        device: where distances are computed.

    Returns:
        JSON-able: fid, (fid_infinity,) sfid, is, is_std, precision, recall, kid, kid_std, each None where it can't be
        had; the protocol; and notes, a list of sentences.

    Raises:
        EvaluationError: features of other widths.
    """
    with tqdm(total=5, desc="FID", unit=" metrics", leave=False, disable=None) as bar:

        def begin(what: str) -> None:
            bar.update()
            bar.set_description(what)

        own = moments(samples.features)
        images = None if reference is None else reference.features
        goal = _goal(images, statistics and (statistics.mu, statistics.sigma))
        found: dict[str, Any] = {"fid": frechet_distance(own, goal)}
        if fid_infinity:
            bar.set_description("FID of infinitely many")
            found["fid_infinity"] = extrapolated_fid(samples.features, goal)
        begin("sFID")
        found["sfid"] = None
        goal = _goal(
            None if reference is None else reference.spatial, statistics and (statistics.mu_s, statistics.sigma_s)
        )
        if samples.spatial is not None and goal is not None:
            found["sfid"] = frechet_distance(moments(samples.spatial), goal)
        begin("Inception Score")
        splits = max(1, min(IS_SPLITS, len(samples) // 2))
        found |= inception_score(samples.logits, splits)
        begin("precision and recall")
        found |= precision_recall(samples.features, images, device)
        begin("KID")
        subset = _kid_subset(samples, reference)
        found |= kernel_distance(samples.features, images, subset)
    return found | {
        "protocol": {
            "fid_against": "images" if statistics is None else "statistics",
            "is_splits": splits,
            "neighbours": NEIGHBOURS,
            "kid_subsets": KID_SUBSETS,
            "kid_subset_size": subset,
            "seed": SEED,
        },
        "notes": _notes(samples, reference, statistics, fid_infinity),
    }


def moments(features: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and covariance of features [N, D], for :func:`frechet_distance`."""
    return fid_features_to_statistics(_double(features))


def frechet_distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The Fréchet distance of two Gaussians {"mu": [D], "sigma": [D, D]}, float64 (Heusel et al., arXiv:1706.08500)."""
    if one["mu"].shape != other["mu"].shape:
        raise EvaluationError(
            f"features of {one['mu'].size} numbers against statistics of {other['mu'].size}: made by another network"
        )
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def extrapolated_fid(features: np.ndarray, goal: dict[str, np.ndarray], points: int = 15) -> float:
    """FID as it would be with infinitely many samples (Chong and Forsyth, CVPR 2020, arXiv:1911.07023).

    FID's bias falls as 1/N. So a line is fitted to the FIDs of random subsets of N/2 to N samples against 1/N, and read
    off at 0. (The authors go down to N/10, where the law no longer holds unless N is large.) The bias that comes from
    the reference's size remains.

    Args:
        features: [N, D].
        goal: mu and sigma of the reference.
        points: how many subsets.
    """
    rng = np.random.default_rng(SEED)
    sizes = np.linspace(len(features) / 2, len(features), points).astype(int).clip(2)
    fids = []
    for size in tqdm(sizes, desc="FID of subsets", leave=False, disable=None):
        subset = features[rng.permutation(len(features))[:size]]
        fids.append(frechet_distance(moments(subset), goal))
    return float(np.polyfit(1 / sizes, fids, 1)[1])


def inception_score(logits: np.ndarray | None, splits: int) -> dict[str, float | None]:
    """IS and its deviation over splits, after a seeded shuffle (Salimans et al., arXiv:1606.03498)."""
    if logits is None:
        return {"is": None, "is_std": None}
    found = isc_features_to_metric(_double(logits), splits, shuffle=True, rng_seed=SEED)
    return {"is": found[KEY_METRIC_ISC_MEAN], "is_std": found[KEY_METRIC_ISC_STD]}


def precision_recall(
    samples: np.ndarray, reference: np.ndarray | None, device: torch.device | str = "cpu"
) -> dict[str, float | None]:
    """The share of samples within the reference's manifold, and of the reference within the samples'.

    A manifold is the union of the balls around a set's images that reach to their third nearest neighbours in it
    (Kynkäänniemi et al., arXiv:1904.06991). None for sets without third neighbours.
    """
    if reference is None or min(len(samples), len(reference)) <= NEIGHBOURS:
        return {"precision": None, "recall": None}
    found = prc_features_to_metric(
        _double(samples).to(device),
        _double(reference).to(device),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=max(1, BLOCK // max(len(samples), len(reference))),
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


def kernel_distance(samples: np.ndarray, reference: np.ndarray | None, subset: int | None) -> dict[str, float | None]:
    """KID: mean and deviation of the unbiased estimate over random subsets (Bińkowski et al., arXiv:1801.01401)."""
    if reference is None:
        return {"kid": None, "kid_std": None}
    found = kid_features_to_metric(
        _double(samples),
        _double(reference),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=subset,
        rng_seed=SEED,
        verbose=False,
    )
    return {"kid": found[KEY_METRIC_KID_MEAN], "kid_std": found[KEY_METRIC_KID_STD]}


def _kid_subset(samples: Features, reference: Features | None) -> int | None:
    """1000 as usual, but of small sets a half: subsets that are all the same set would have no deviation."""
    return None if reference is None else max(2, min(KID_SUBSET_SIZE, len(samples) // 2, len(reference) // 2))


def _goal(
    features: np.ndarray | None, statistics: tuple[np.ndarray | None, np.ndarray | None] | None
) -> dict[str, np.ndarray] | None:
    """Mu and sigma of the reference: the statistics if there are any, else of its features."""
    if statistics is not None:
        mu, sigma = statistics
        if mu is None or sigma is None:
            return None
        return {"mu": np.asarray(mu, np.float64), "sigma": np.asarray(sigma, np.float64)}
    return None if features is None else fid_features_to_statistics(_double(features))


def _notes(
    samples: Features, reference: Features | None, statistics: Statistics | None, fid_infinity: bool
) -> list[str]:
    notes = []
    count = min(len(samples), len(reference) if reference is not None and statistics is None else len(samples))
    if count < ENOUGH:
        notes.append(
            f"FID and sFID of {count} images are biased upwards (enough are {ENOUGH}): compare them at equal counts "
            f"only, and trust KID, which is unbiased" + ("" if fid_infinity else ", or ask for --fid-infinity")
        )
    if fid_infinity and len(samples) < 2 * samples.features.shape[1]:
        notes.append(
            f"fid_infinity is rough, as {len(samples)} samples are fewer than twice the {samples.features.shape[1]} "
            f"features"
        )
    if reference is not None and samples.sizes.tolist() != reference.sizes.tolist():
        notes.append(
            f"in pixels the samples are {_told(samples.sizes)} and the reference {_told(reference.sizes)}: this "
            f"difference counts as well; --image-size crops and scales both to one size"
        )
    return notes


def _told(sizes: np.ndarray) -> str:
    first = " x ".join(map(str, sizes[0][::-1]))
    return first if len(sizes) == 1 else f"{first} (and {len(sizes) - 1} other sizes)"


def _double(features: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(features, np.float64))
