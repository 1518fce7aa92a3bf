"""A CPU's loops over keys and values in C++ (loops.cpp), for what PyTorch has no operation for: attention that reads
half precision or integers as they lie in memory, and finds similarities while it has keys and values at hand.

PyTorch's operations give the same results, but for the order of sums, and are there where a compiler is not.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adsa import native
from adsa.similarity import TIE_SINGLE
from adsa.storage import CODECS, Codec, Plain

Parts = tuple[Tensor, ...]

_VECTORS = 32  # D is a multiple of so many numbers
_INTEGERS = {"int8": "Int8", "int4": "Int4"}
_PLAIN = {torch.float32: "Float32", torch.bfloat16: "BFloat16"}
# The first of a codec's parts: its dtype, and how many numbers of a vector one of its numbers has.
_WRITTEN = {
    "Float32": (torch.float32, 1),
    "BFloat16": (torch.bfloat16, 1),
    "Int8": (torch.int8, 1),
    "Int4": (torch.uint8, 2),
}
# What the functions of loops.cpp take, see :func:`adsa.native.functions`.
_ARGUMENTS = {
    "attend": "piiiif p iiiii ii ii pp piii pp ii pi pp ipp i f",
    "count_in": "p ii ii i pi ppi",
    "put": "p ii ii i p p ii",
    "merge": "pp ii ii i pp pii",
    "rank": "piiiif iiiii ii ii p pii pip iii pi ii fff pp",
    "least_worthy": "pp iii p ii ff p",
}


class Loops:
    """The loops over keys and values that are written in one way. All tensors are a CPU's.

    Args:
        library: loops.cpp.
        written: how, as that names it.
        dim: D.
    """

    def __init__(self, library: ctypes.CDLL, written: str, dim: int):
        self._made_of, self._dim = (written, dim), dim
        for name, function in native.functions(library, _ARGUMENTS).items():
            setattr(self, f"_{name}", function)

    def __reduce__(self):
        return _loops, self._made_of  # of a cache that is copied or pickled

    def attend(
        self,
        q: Tensor,
        keys: Parts,
        values: Parts,
        bias: Tensor | None = None,
        *,
        first: int = 0,
        new: tuple[int | Tensor, Parts, Parts] | None = None,
        comparison: tuple[bool, Tensor, Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """A token comes in; attention; weights and :meth:`adsa.similarity.RunningSimilarity.score`, where wanted.

        Args:
            q: ``[R, Hq, S, D]``, numbers of a vector without gaps.
            keys, values: as the codec wrote them, ``[R, H, C + N, n]`` each, some slots of tensors without gaps.
            bias: added to scores, float32 ``[1 or R, 1 or H, 1 or S, C + N]``, or None.
            first: C.
            new: the token's slot, counted from C on, int64 ``[R, G, 1]``, or one for all; and as the codec wrote them
                its keys and values, ``[R, H, 1, n]`` each. None: it is here already.
            comparison: whether keys are compared, and not values; ``total`` ``[R, H, D]`` and ``inverse_norm``
                ``[R, G, N or more]`` of the RunningSimilarity, among which a new token is counted; where similarities
                go to, float32 ``[R, G, N]``. None: none are wanted.
            weights: where weights go to, those of a group's heads added up, float32 ``[R, G, S, N]``. None: none are
                wanted.

        Returns:
            ``[R, Hq, S, D]``, in the dtype of ``q``.
        """
        rows, heads, count = keys[0].shape[:3]
        queries, dim, after, given = q.shape[2], self._dim, count - first, q.dtype
        shared = q.shape[1] // heads
        for parts in (keys, values):
            self._check(parts, rows, heads, count)
        if _strides(keys) != _strides(values):
            raise ValueError("keys and values must lie alike")
        native.check("queries", q, (rows, heads * shared, queries, dim))
        q = _read_by_vectors(q)
        out = q.new_empty(rows, queries, heads * shared, dim)
        of_keys, total, inverse_norm, similarities = comparison or (False, None, None, None)
        slot, new_keys, new_values = new or (0, (), ())
        slots, slot = (None, slot) if isinstance(slot, int) else (slot.contiguous(), 0)
        groups = next((found.shape[1] for found in (slots, similarities, weights) if found is not None), heads)
        new_row = new_head = norms = 0
        if similarities is not None:
            norms = max(after, inverse_norm.shape[2])
            native.check("similarities", similarities, (rows, groups, after), torch.float32)
            native.check("total", total, (rows, heads, dim), torch.float32)
            native.check("inverse_norm", inverse_norm, (rows, groups, norms), torch.float32)
        if weights is not None:
            native.check("weights", weights, (rows, groups, queries, after), torch.float32)
        if slots is not None:
            native.check("slots", slots, (rows, groups, 1), torch.int64)
            if similarities is None and weights is None:  # each head for itself
                slots, groups = slots.expand(rows, heads, 1).contiguous(), heads
        if not groups or heads % groups or not 0 <= first <= count or (new is not None and not 0 <= slot < after):
            raise ValueError(
                f"slot {slot} after {first} of {groups} groups must be within {count} slots of {heads} heads"
            )
        if not all(x.is_contiguous() for x in (weights, similarities, total, inverse_norm) if x is not None):
            raise ValueError("weights and similarities must be without gaps")
        if new is not None:
            new_keys, new_values, new_row, new_head = _side_by_side(new_keys, new_values, keys)
        self._attend(
            _at(q), given == torch.bfloat16, *q.stride()[:3], dim**-0.5, _at(out), rows, heads, shared, queries, groups,
            count, first, *_strides(keys), _all(keys), _all(values), *_added(bias, rows, heads, queries, count),
            _all(new_keys), _all(new_values), new_row, new_head, _at(slots), slot, _at(weights), _at(similarities),
            of_keys, _at(total), _at(inverse_norm), norms, TIE_SINGLE,
        )  # fmt: skip
        return out.transpose(1, 2).to(given)

    def _check(self, parts: Parts, rows: int, heads: int, count: int, groups: int = 1) -> None:
        dtype, together = _WRITTEN[self._made_of[0]]
        native.check("keys and values", parts[0], (rows, heads, count, self._dim // together), dtype)
        if not groups or heads % groups:
            raise ValueError(f"groups must be parts of {heads} heads, not {groups}")

    def count_in(self, features: Parts, slot: int | Tensor, total: Tensor, inverse_norm: Tensor) -> None:
        """:meth:`adsa.similarity.RunningSimilarity.add` of the tokens in these slots.

        Args:
            features: as the codec wrote them, ``[R, H, N, n]`` each, some slots of tensors without gaps.
            slot: int64 ``[R, G, 1]``, or one for all.
            total, inverse_norm: of the RunningSimilarity, ``[R, H, D]`` and ``[R, G, N]``.
        """
        (rows, heads, _), groups = total.shape, inverse_norm.shape[1]
        slots, at = (None, slot) if isinstance(slot, int) else (slot.contiguous(), 0)
        self._check(features, rows, heads, features[0].shape[2], groups)
        native.check("total", total, (rows, heads, self._dim), torch.float32)
        native.check("inverse_norm", inverse_norm, (rows, groups, inverse_norm.shape[2]), torch.float32)
        if slots is not None:
            native.check("slots", slots, (rows, groups, 1), torch.int64)
        self._count_in(
            _all(features), rows, heads, *_strides(features), groups, _at(slots), at, _at(total), _at(inverse_norm),
            inverse_norm.shape[2],
        )  # fmt: skip

    def put(self, parts: Parts, slot: Tensor, new: Parts) -> None:
        """A token goes into one slot of each row and head.

        Args:
            parts: where to, ``[R, H, N, n]`` each, some slots of tensors without gaps.
            slot: int64 ``[R, 1 or H, 1]``.
            new: ``[R, H, 1, n]`` each.
        """
        slot, (rows, heads) = slot.contiguous(), parts[0].shape[:2]
        self._check(parts, rows, heads, parts[0].shape[2], slot.shape[1])
        native.check("slots", slot, (rows, slot.shape[1], 1), torch.int64)
        new, _, new_row, new_head = _side_by_side(new, new, parts)
        self._put(
            _all(parts), rows, heads, *_strides(parts), slot.shape[1], _at(slot), _all(new), new_row, new_head
        )  # fmt: skip

    @property
    def merges(self) -> bool:
        """Whether there is :meth:`merge`, which integers don't have."""
        return self._made_of[0] in _PLAIN.values()

    def merge(self, keys: Parts, values: Parts, slot: Tensor, into: Tensor, bias: Tensor) -> None:
        """A token of each row and head becomes part of another, as :class:`adsa.slots.Slots` merges them.

        Args:
            keys, values: as the codec wrote them, ``[R, H, N, n]`` each, some slots of tensors without gaps.
            slot, into: int64 ``[R, G, 1]``, which token, and of which it becomes a part.
            bias: logarithms of how many tokens a slot stands for, float32 ``[R, H, 1, N]``.
        """
        rows, heads, count, _ = keys[0].shape
        slot, into = slot.contiguous(), into.contiguous()
        for parts in (keys, values):
            self._check(parts, rows, heads, count, slot.shape[1])
        if not self.merges:
            raise ValueError("what is merged must be float32 or bfloat16")
        for index in (slot, into):
            native.check("slots", index, (rows, slot.shape[1], 1), torch.int64)
        added = _added(bias, rows, heads, 1, count)
        if _strides(keys) != _strides(values) or len(bias) != rows or bias.shape[1] != heads:
            raise ValueError("keys, values and bias must be of the same slots")
        self._merge(
            _all(keys), _all(values), rows, heads, *_strides(keys), slot.shape[1], _at(slot), _at(into), *added[:3]
        )  # fmt: skip

    def rank(
        self,
        q: Tensor,
        keys: Parts,
        bias: Tensor | None,
        arrivals: Tensor,
        number: Tensor,
        *,
        line: int,
        prefix: int,
        local: int,
        held: Sequence[int],
        few: int,
        named: int,
        merges: bool,
        close: float,
        largest: float,
        fraction: float,
    ) -> tuple[Tensor, Tensor | None]:
        """The ranking of :class:`adsa.policies.adsa_plus.AdsaPlus`, of one head's tokens after the other's.

        Args:
            q: queries that are asked, ``[R, Hq, Q, D]``, numbers of a vector without gaps.
            keys: as the codec wrote them, ``[R, H, C + N, n]`` each, some slots of tensors without gaps.
            bias: added to scores, float32 ``[1 or R, 1 or H, 1, C + N]``, or None.
            arrivals: int32 ``[R, G, N]``, a part of the slots of a tensor that has no gaps.
            number: of the token that comes.
            line: tokens of the last line, into which nothing is merged.
            prefix, local, largest, fraction: as of :meth:`least_worthy`.
            held: arrivals of tokens that hold another's place, and stay.
            few: candidates.
            named: how many are to leave.
            merges: whether they are merged.
            close: least distance, as of :meth:`adsa.slots.Slots.nearest`.

        Returns:
            int64 ``[R, G, named]``: slots of those that leave, and of those that they are merged into, or None.
        """
        rows, heads, count, _ = keys[0].shape
        (groups, after), shared = arrivals.shape[1:], q.shape[1] // heads
        self._check(keys, rows, heads, count, groups)
        native.check("the token's number", number, (), torch.int32)
        native.check("queries", q, (rows, heads * shared, q.shape[2], self._dim))
        native.check("arrivals", arrivals, (rows, groups, min(after, count)), torch.int32)
        if not 0 < named <= few <= after or not q.shape[2]:
            raise ValueError(f"{named} of {few} candidates must be within {after} slots, and asked for by some query")
        q = _read_by_vectors(q)
        held = torch.tensor(held, dtype=torch.int32, device="cpu")
        found, into = torch.empty(2, rows, groups, named, dtype=torch.int64, device="cpu")
        self._rank(
            _at(q), q.dtype == torch.bfloat16, *q.stride()[:3], self._dim**-0.5, rows, heads, shared, q.shape[2],
            groups, count, count - after, *_strides(keys), _all(keys), *_added(bias, rows, heads, 1, count)[:3],
            _at(arrivals), arrivals.stride(1), _at(number), line, prefix, local, _at(held), len(held), few, named,
            close, largest, fraction, _at(found), _at(into) if merges else None,
        )  # fmt: skip
        return found, into if merges else None

    def least_worthy(
        self,
        score: Tensor,
        arrivals: Tensor,
        number: Tensor,
        *,
        prefix: int,
        local: int,
        largest: float,
        fraction: float,
    ) -> Tensor:
        """The slot whose token is to leave, int64 ``[R, G, 1]``.

        Args:
            score: float32 ``[R, G, N]``.
            arrivals: int32 ``[R, G, N]``, a part of the slots of a tensor that has no gaps.
            number, prefix, local, largest, fraction: as of :func:`adsa.kernels.ranks`, whose clock is the number.
        """
        score, (rows, groups, count) = score.contiguous(), arrivals.shape
        native.check("scores", score, (rows, groups, count), torch.float32)
        native.check("arrivals", arrivals, (rows, groups, count), torch.int32)
        found = torch.empty_like(arrivals[..., :1], dtype=torch.int64, memory_format=torch.contiguous_format)
        self._least_worthy(
            _at(score), _at(arrivals), rows * groups, count, arrivals.stride(1), _at(number), prefix, local, largest,
            fraction, _at(found),
        )  # fmt: skip
        return found


def loops(codec: Codec, dtype: torch.dtype, dim: int) -> Loops | None:
    """Those for keys and values of a CPU that are written in this way, or None where there are none.

    Args:
        codec: that writes them.
        dtype: that goes in.
        dim: D.
    """
    name = next((name for name, of in CODECS.items() if of is codec), None)
    written = _PLAIN.get(dtype) if isinstance(codec, Plain) else _INTEGERS.get(name)
    return None if written is None or dtype not in _PLAIN or dim % _VECTORS else _loops(written, dim)


def _loops(written: str, dim: int) -> Loops | None:
    return _compiled(written, dim) if native.wanted() else None


@functools.cache
def _compiled(written: str, dim: int) -> Loops | None:
    library = native.library(Path(__file__).with_suffix(".cpp"), FORMAT=written, HEAD_DIM=dim)
    return None if library is None else Loops(library, written, dim)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _all(parts: Parts) -> ctypes.Array | None:
    return (ctypes.c_void_p * len(parts))(*map(_at, parts)) if parts else None


def _read_by_vectors(q: Tensor) -> Tensor:
    """Queries of a dtype that C++ reads, numbers of a vector without gaps."""
    q = q if q.dtype in _PLAIN else q.float()
    return q if q.stride(3) == 1 else q.contiguous()


def _added(bias: Tensor | None, rows: int, heads: int, queries: int, count: int) -> tuple[int | None, int, int, int]:
    """Where the bias lies, and how far it is from a row, a head and a query to the next."""
    if bias is None:
        return None, 0, 0, 0
    native.check("bias", bias, (*bias.shape[:3], count), torch.float32)
    if bias.stride(3) != 1:
        raise ValueError("bias of neighbouring slots must be neighbours")
    return _at(bias), *bias.expand(rows, heads, queries, -1).stride()[:3]


def _side_by_side(keys: Parts, values: Parts, stored: Parts) -> tuple[Parts, Parts, int, int]:
    """A token's keys and values, and how many vectors lie from a row to the next, and from a head to the next."""
    rows, heads = stored[0].shape[:2]
    for made in (keys, values):
        for x, to in zip(made, stored, strict=True):
            native.check("a token's numbers", x, (rows, heads, 1, to.shape[3]), to.dtype)
    row, head = _strides(keys)
    if len(keys) == 1 and all(
        x.stride() == (row * x.shape[3], head * x.shape[3], x.stride(2), 1) for x in (keys[0], values[0])
    ):
        return keys, values, row, head
    return tuple(x.contiguous() for x in keys), tuple(x.contiguous() for x in values), heads, 1


def _strides(parts: Parts) -> tuple[int, int]:
    """Slots from a row to the next, and from a head to the next: the same for each part."""
    return parts[0].stride(0) // parts[0].shape[3], parts[0].stride(1) // parts[0].shape[3]
