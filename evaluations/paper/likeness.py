"""How alike two images are, or parts of them: by what a network sees, and by their colours alone."""

import numpy as np
import torch

from evaluations.extractors import Extractor

BINS = 8  # of each colour channel


def described(images: np.ndarray, extractor: Extractor) -> dict[str, np.ndarray]:
    """What images are compared by.

    Args:
        images: uint8 [N, H, W, 3], at least one pixel high. The extractor sees each scaled to its own size.
        extractor: on the device to compute on.

    Returns:
        "features" [N, D]; "histogram" [N, 512], the shares of pixels in 8 x 8 x 8 equal parts of RGB; "colour" [N, 3],
        the mean RGB in 0 to 1. All float64.
    """
    device = next(extractor.parameters(), torch.empty(0)).device
    found = {"features": [], "histogram": [], "colour": []}
    for part in np.split(images, range(32, len(images), 32)):
        with torch.inference_mode():
            features = extractor(torch.from_numpy(part).to(device).permute(0, 3, 1, 2))["features"]
        bins = np.ravel_multi_index(tuple(np.moveaxis(part // (256 // BINS), -1, 0)), (BINS,) * 3)
        histograms = np.stack([np.bincount(one.ravel(), minlength=BINS**3) for one in bins])
        found["features"].append(features.double().cpu().numpy())
        found["histogram"].append(histograms / histograms.sum(1, keepdims=True))
        found["colour"].append(part.mean((1, 2)) / 255)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of features [..., D]; 1 for the same direction."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))


def intersection(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of histograms [..., 512]: the share of pixels with the same colour (Swain and Ballard 1991); 1 for the same."""
    return np.minimum(one, other).sum(-1)


def colour_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of mean colours [..., 3]: Euclidean; 0 for the same, at most the root of 3."""
    return np.linalg.norm(one - other, axis=-1)


MEASURES = {"features": cosine, "histogram": intersection, "colour": colour_distance}
