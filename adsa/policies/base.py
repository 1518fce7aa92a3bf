"""What a policy is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

if TYPE_CHECKING:
    from adsa.slots import Slots


@dataclass(frozen=True)
class Policy:
    """Scores cached tokens. Frozen and stateless: what must be remembered lives in :class:`~adsa.slots.Slots`.

    To add one: subclass it in a file of this folder, set ``name``, write ``score``, and list it in ``__init__.py`` and
    in ``adsa/names.py``.

    Attributes:
        name: as it stands in configs.
        similarity_of: "v" or "k", if the cache must keep running similarities of these (``layer.similarity``).
        attention_window: if the cache must remember attention (``layer.attention``): that of how many of the last
            queries, or 0 for all. Such a policy needs :meth:`LayerCache.attend` or ``attend_to``, which pay for them.
        query_lines: if the cache must remember queries (``layer.queries``): those of how many lines of the image.
            Such a policy needs :meth:`LayerCache.attend` or ``attend_to`` as well.
        merges: whether what leaves is merged into what stays, where the config doesn't say.
        renewal: how many steps one ranking serves, where the config doesn't say and the budget allows.
        planar: whether it looks at rows and columns of the image (``layer.columns``).
        revision: to be raised when the same keys come to keep other tokens, so that runs and results of before are not
            taken for those of now.
    """

    name: ClassVar[str]
    similarity_of: ClassVar[Literal["k", "v"] | None] = None
    attention_window: ClassVar[int | None] = None
    query_lines: ClassVar[int] = 0
    merges: ClassVar[bool] = False
    renewal: ClassVar[int] = 1
    planar: ClassVar[bool] = False
    revision: ClassVar[int | None] = None

    def split(self, budget: int) -> tuple[int, int]:
        """The (prefix, local) that this policy takes of a budget where the config names none; the paper names none.

        ADSA's were measured (results/sweeps): at 256 of 576 tokens no other split is better by more than its error.
        """
        return budget // 8, budget // 2

    def score(self, layer: "Slots") -> Tensor:
        """Worth of every cached token, higher = keep.

        On a GPU it may be recorded and played: by operations on the device alone, without ``.item()`` and the like.

        Args:
            layer: the rows of all layers that choose together in time, R of them, with ``layer.k`` and ``layer.v``
                ``[R, H, N, D]`` and ``layer.positions`` ``[R, G, N]``, N being the image tokens now there and G = H for
                a choice per head, 1 for one per layer. What time it is, ``layer.newest``, ``layer.age`` and
                ``layer.clock`` tell; ``layer.count`` would be that of the recording where steps are played.

        Returns:
            ``[R, G, N]``; ranked in steps of 2^-28, and beyond +-32 767 all alike. Of equal scores the one that came
            first is evicted first (mode "evict") or kept first (mode "select").
        """
        raise NotImplementedError

    def victims(self, layer: "Slots") -> tuple[Tensor, Tensor | None]:
        """Whose tokens are to leave: by :meth:`score`, or in a way that comes to the same and is faster.

        A policy whose class has such a way overrides this together with ``score``.

        Returns:
            int64 ``[R, G, layer.ranked]`` each: slots of these tokens, the least worthy first; and of those that they
            are to be merged into, or None.
        """
        return layer.victims_by_score(self.score(layer))
