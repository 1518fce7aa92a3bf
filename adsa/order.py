"""What a cache must know beforehand of image tokens that don't come in raster order."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """Bounds on what comes in; which tokens it is, :meth:`~adsa.cache.KVCache.expect` is told from pass to pass.

    A token may hold the place of another that is not known yet. Until the place's own token comes, or the next one that
    holds it, such a token is never evicted; then that one takes over the slot.

    Attributes:
        width: how many come at once, at most.
        held: how many hold another's place, at most.
        arrivals: how many come in all, at most.
    """

    width: int
    held: int
    arrivals: int
