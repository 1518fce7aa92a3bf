"""A CPU's loops over keys and values, and the means to have torch.compile put these and others into C++.

Keys and values are read as they lie, in half precision or as integers, where PyTorch's own operations need them in
single precision first. Sums are in another order. The first steps wait for the compiler: seconds, or half a minute
until its results lie in torch's cache on disk.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from adsa.similarity import add_unit, mean_similarities
from adsa.storage import Codec

Parts = tuple[Tensor, ...]


def attention(q: Tensor, keys: Parts, values: Parts, codec: Codec, bias: Tensor | None) -> Tensor:
    """Attention of one query in each head.

    Args:
        q: ``[R, H, Hq / H, D]``, scaled, of at least float32, which sums are in.
        keys, values: as the codec wrote them, ``[R, H, C + N, n]`` each.
        codec: theirs.
        bias: added to scores, ``[1 or R, 1 or H, 1, C + N]``, or None.

    Returns:
        ``[R, H, Hq / H, D]``.
    """
    keys, values = codec.decode(keys, q.dtype), codec.decode(values, q.dtype)
    scores = (q.unsqueeze(3) * keys.unsqueeze(2)).sum(-1)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return (weights.unsqueeze(-1) * values.unsqueeze(2)).sum(3)


def count_in(features: Parts, codec: Codec, slot: Tensor, total: Tensor) -> Tensor:
    """Add the token in these slots to those that a :class:`~adsa.similarity.RunningSimilarity` compares with.

    Args:
        features: as the codec wrote them, ``[R, H, N, n]`` each.
        codec: theirs.
        slot: int64 ``[R, G, 1]``.
        total: of the RunningSimilarity.

    Returns:
        Its ``inverse_norm`` of the token, ``[R, G, 1]``, for the caller to put there: here that took a second loop.
    """
    index = slot.unsqueeze(-1)
    new = tuple(part.gather(2, index.expand(-1, part.shape[1], -1, part.shape[3])) for part in features)
    return add_unit(total, codec.decode(new, total.dtype), joint=slot.shape[1] == 1)


def compared_attention(
    q: Tensor,
    keys: Parts,
    values: Parts,
    codec: Codec,
    bias: Tensor | None,
    of_keys: bool,
    total: Tensor,
    inverse_norm: Tensor,
    similarities: Tensor,
) -> Tensor:
    """:func:`attention`, and :meth:`adsa.similarity.RunningSimilarity.score`.

    Args:
        q, keys, values, codec, bias: as there.
        of_keys: whether keys are compared, and not values.
        total, inverse_norm: of the RunningSimilarity.
        similarities: where to, ``[R, G, N]``.
    """
    features = codec.decode(keys if of_keys else values, q.dtype)[:, :, -similarities.shape[2] :]
    dots = (total.unsqueeze(2) * features).sum(-1)
    dots = dots.sum(1, keepdim=True) if similarities.shape[1] == 1 else dots
    similarities.copy_(mean_similarities(dots, inverse_norm))
    return attention(q, keys, values, codec, bias)


def for_all_shapes(function: Callable) -> Callable:
    """``function`` by torch.compile, whose limit of graphs is raised: a cache that grows, a full one, of each dtype."""
    import torch._dynamo.config as dynamo  # slow to import

    for name in ("recompile_limit", "cache_size_limit"):  # the second is its name before torch 2.7
        if hasattr(dynamo, name):
            setattr(dynamo, name, max(256, getattr(dynamo, name)))
    return torch.compile(function)


loop = functools.cache(for_all_shapes)


@functools.cache
def failure() -> str | None:
    """Why no loop can be compiled here, tried once: torch wants a C++ compiler and a folder to write to."""
    try:
        loop(_twice)(torch.ones(2))
    except Exception as error:  # of many kinds
        error = getattr(error, "inner_exception", error)
        return f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return None


def _twice(x: Tensor) -> Tensor:
    return 2 * x
