"""From logits to a token: guidance, temperature, top-k, top-p, draw. In LlamaGen's order and with its tie rules."""

import numpy as np
import torch
from torch import Tensor


def guide(logits: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance on raw logits: ``[2B, V]``, conditional rows first, -> ``[B, V]``."""
    cond, uncond = logits.chunk(2)
    return uncond + (cond - uncond) * cfg_scale


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """All logits strictly below the k-th largest become -inf (ties with it stay). 0: off. ``[B, V]``."""
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def filter_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the most likely tokens, up to and including the one whose sum crosses ``top_p``. 1: off. ``[B, V]``."""
    if top_p >= 1.0:
        return logits
    probs, vocab = logits.softmax(-1), logits.shape[-1]
    if logits.device.type != "cpu":
        return logits.masked_fill(_beyond(logits, probs, top_p), -torch.inf)
    # A token is beyond for sure if even V as likely as it would not have 1 - top_p together. Where the others are few,
    # sorting these alone is faster. (Not on a GPU, where sorting is fast and their number would be waited for.)
    likely = probs >= (1 - top_p) / (2 * vocab)
    counts = likely.sum(-1)
    if counts.max() > vocab // 4:
        return logits.masked_fill(_beyond(logits, probs, top_p), -torch.inf)
    row, column = likely.nonzero(as_tuple=True)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    few = torch.stack((logits.new_full((), -torch.inf), logits.new_zeros(())))  # no token: logit, probability
    few = few[:, None, None].repeat(1, len(logits), int(counts.max()))
    few[:, row, place] = torch.stack((logits[row, column], probs[row, column]))
    stays = ~_beyond(*few, top_p)[row, place]
    kept = torch.full_like(logits, -torch.inf)
    kept[row[stays], column[stays]] = logits[row[stays], column[stays]]
    return kept


def _beyond(logits: Tensor, probs: Tensor, top_p: float) -> Tensor:
    """Which tokens come after the one whose sum crosses ``top_p``; of equal ones the first come first. ``[B, N]``."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    mass = probs.gather(1, order).cumsum(-1)
    beyond = torch.zeros_like(mass, dtype=torch.bool)
    beyond[:, 1:] = mass[:, :-1] > top_p  # shifted by one: the token that crosses stays
    return torch.empty_like(beyond).scatter_(1, order, beyond)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that a token is drawn from. ``[B, V]`` -> ``[B, V]``, at least float32."""
    logits = logits / max(temperature, 1e-5)
    return filter_top_p(filter_top_k(logits, top_k), top_p).softmax(-1)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: the first token at which the cumulative probability exceeds ``uniform``.

    Args:
        probs: ``[B, V]``.
        uniform: ``[B]`` in [0, 1), one number per image.

    Returns:
        int64 ``[B]``; never a token of probability 0.
    """
    # A parallel sum in float32 is not monotone: a token of probability 0 could be hit. (MPS has no float64.)
    cdf = probs.cumsum(-1, dtype=probs.dtype if probs.device.type == "mps" else torch.float64)
    total = cdf[:, -1]
    target = torch.minimum(uniform.to(total.dtype) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cdf, target.unsqueeze(-1), right=True).squeeze(-1)


def revise(token: Tensor, old: Tensor, new: Tensor, test: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
    """Make tokens drawn from one distribution ones of another, and keep as many as can be.

    The test of speculative decoding (arXiv 2211.17192): a token stays with probability min(1, new / old), and is else
    drawn anew from the positive part of new - old.

    Args:
        token: int64 ``[B]``, drawn from ``old``.
        old, new: ``[B, V]``.
        test, again: ``[B]`` in [0, 1), for the test and for what is drawn anew.

    Returns:
        int64 ``[B]``, tokens of ``new``; and bool ``[B]``, which of them are those given.
    """
    before, now = (probs.gather(1, token.unsqueeze(1)).squeeze(1) for probs in (old, new))
    more = (new - old).clamp(min=0)
    stays = (test * before < now) | (more.sum(1) == 0)  # the latter by rounding alone
    return torch.where(stays, token, draw(more, again)), stays


def uniform_noise(seeds: Tensor, steps: int) -> Tensor:
    """The noise of each image, which depends on its seed alone. int64 ``[B]`` -> float32 ``[B, steps]``, on the CPU."""
    # Not torch's generator, which uses 32 bits of a seed on the CPU: of 50 000 images, two would share their noise.
    streams = [np.random.Generator(np.random.Philox(seed)) for seed in seeds.tolist()]
    return torch.from_numpy(np.stack([stream.random(steps, dtype=np.float32) for stream in streams]))
