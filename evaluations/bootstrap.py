"""Means over images, with the interval that the choice of the images leaves open."""

import numpy as np

RESAMPLES, CONFIDENCE = 10_000, 0.95


def mean_interval(values: np.ndarray, seed: int = 2020) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, and the percentile bootstrap's 95 % intervals of them (Efron and Tibshirani 1993, section 13.3).

    For a paired comparison give the differences, image by image.

    Args:
        values: [N] or [N, ...], one for each image; columns are resampled together.
        seed: of the resampling.

    Returns:
        mean, low, high: float64 [...] each.
    """
    values = np.asarray(values, np.float64)
    count, flat = len(values), np.reshape(values, (len(values), -1))
    rng, at_a_time = np.random.default_rng(seed), min(RESAMPLES, max(1, 2**22 // count))
    own = count * np.arange(at_a_time)[:, None]
    means = np.empty((RESAMPLES, flat.shape[1]))
    for first in range(0, RESAMPLES, at_a_time):
        part = means[first : first + at_a_time]
        drawn = rng.integers(count, size=(len(part), count))
        # How often each image is drawn stands for the draws themselves. (Counts from rng.multinomial take far longer.)
        times = np.bincount((drawn + own[: len(part)]).ravel(), minlength=drawn.size).reshape(drawn.shape)
        part[:] = times @ flat / count
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail], axis=0).reshape(2, *values.shape[1:])
    return values.mean(0), low, high
