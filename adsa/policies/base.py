"""What a policy is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from adsa.cache import LayerCache


@dataclass(frozen=True)
class Policy:
    """Scores cached tokens. Frozen and stateless: what must be remembered lives in the :class:`LayerCache`.

    To add one: subclass it in a file of this folder, set ``name``, write ``score``, and list it in ``__init__.py``.

    Attributes:
        name: as it stands in configs.
        needs_similarity: whether the cache must keep running similarities of V (``layer.similarity``).
    """

    name: ClassVar[str]
    needs_similarity: ClassVar[bool] = False

    def split(self, budget: int) -> tuple[int, int]:
        """The (prefix, local) that this policy takes of a budget where the config names none; the paper names none."""
        return budget // 8, budget // 2

    def score(self, layer: "LayerCache") -> Tensor:
        """Worth of every cached token, higher = keep.

        Args:
            layer: the cache, with ``layer.v`` ``[B, H, N, D]`` and ``layer.positions`` ``[B, G, N]``, N being the
                image tokens now in it and G = H for a choice per head, 1 for one per layer.

        Returns:
            ``[B, G, N]``, within +-100 000. Of equal scores the lowest position is evicted first (mode "evict") or
            kept first (mode "select").
        """
        raise NotImplementedError
