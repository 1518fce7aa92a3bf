"""Do two sets of runs differ? Paired tests, for runs that share their seeds and so their noise, image by image."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, ttest_rel
from tqdm import tqdm

CONFIDENCE = 0.95
BLOCK = 2**25  # kernel values in memory at a time


@dataclass(frozen=True)
class Difference:
    """The mean of one less the other.

    Attributes:
        mean: of the differences.
        low, high: its 95 % interval.
        p: of a mean this far from 0 or farther, if there is no difference; two-sided.
        count: pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    count: int

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def paired_t(one: Sequence[float], other: Sequence[float]) -> Difference | None:
    """Student's t-test of pairs, as of two caches by seed or by prompt; None for fewer than two pairs."""
    differences = np.subtract(one, other, dtype=np.float64)
    count, mean = len(differences), float(differences.mean()) if len(differences) else 0.0
    if count < 2:
        return None
    if np.ptp(differences) == 0:  # as of a run and itself; a t is not defined
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, count)
    found = ttest_rel(one, other)
    low, high = found.confidence_interval(CONFIDENCE)
    return Difference(mean, float(low), float(high), float(found.pvalue), count)


@dataclass(frozen=True)
class KernelSums:
    """What KID needs to know of a set of samples X and a reference Y: sums of k over rows of the kernel matrices.

    k(x, y) = (x . y / D + 1)^3, the usual kernel of KID (Bińkowski et al., arXiv:1801.01401).

    Attributes:
        own: float64 [N], of k(x_i, x_j) over j other than i.
        cross: float64 [N], of k(x_i, y_j) over all j.
        reference: how many images that has.
    """

    own: np.ndarray
    cross: np.ndarray
    reference: int

    def distance(self) -> float:
        """The unbiased MMD^2, less the term of the reference alone, which is the same for all samples."""
        count = len(self.own)
        return self.own.sum() / (count * (count - 1)) - 2 * self.cross.sum() / (count * self.reference)

    def distances_without_one(self) -> np.ndarray:
        """:meth:`distance` without image i, for every i: float64 [N]."""
        count = len(self.own) - 1
        own, cross = self.own.sum() - 2 * self.own, self.cross.sum() - self.cross
        return own / (count * (count - 1)) - 2 * cross / (count * self.reference)


def kernel_sums(samples: np.ndarray, reference: np.ndarray, device: torch.device | str = "cpu") -> KernelSums:
    """The sums of a set of features.

    Args:
        samples: [N, D], N at least 3.
        reference: [M, D].
        device: where products are computed, in float64 and in blocks.
    """
    x, y = (torch.from_numpy(np.asarray(part, np.float64)).to(device) for part in (samples, reference))
    rows = max(1, BLOCK // max(len(x), len(y)))
    own, cross = [], []
    with tqdm(total=len(x), desc="kernel sums", unit=" images", leave=False, disable=None) as bar:
        for part in x.split(rows):
            itself = _kernel((part * part).sum(1), x.shape[1])
            own.append(_kernel(part @ x.T, x.shape[1]).sum(1) - itself)
            cross.append(_kernel(part @ y.T, x.shape[1]).sum(1))
            bar.update(len(part))
    return KernelSums(torch.cat(own).cpu().numpy(), torch.cat(cross).cpu().numpy(), len(y))


def _kernel(products: torch.Tensor, width: int) -> torch.Tensor:
    return (products / width + 1) ** 3


def kid_difference(pairs: Sequence[tuple[KernelSums, KernelSums]]) -> Difference:
    """The difference of KID, one less the other, between runs whose images are paired by their index.

    The KIDs are the unbiased estimates over all images; the reference is taken as it is. The standard error of a pair
    of runs is the jackknife's: image i is left out of both (Efron and Stein 1981). Pairs of runs with different seeds
    are independent; their differences are averaged. The interval and p are the normal distribution's.

    Args:
        pairs: the sums of two runs of one seed and one reference each.

    Raises:
        ValueError: runs of different lengths, or with fewer than three images.
    """
    means, variances = [], []
    for one, other in pairs:
        count = len(one.own)
        if len(other.own) != count or count < 3 or one.reference != other.reference:
            raise ValueError(f"{count} and {len(other.own)} images make no pairs: expected as many of each, 3 at least")
        means.append(one.distance() - other.distance())
        without = one.distances_without_one() - other.distances_without_one()
        variances.append((count - 1) / count * np.square(without - without.mean()).sum())
    mean, error = float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(pairs))
    reach = float(norm.ppf((1 + CONFIDENCE) / 2)) * error
    p = float(2 * norm.sf(abs(mean) / error)) if error else 1.0 if mean == 0 else 0.0
    return Difference(mean, mean - reach, mean + reach, p, sum(len(one.own) for one, _ in pairs))
