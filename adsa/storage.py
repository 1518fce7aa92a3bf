"""How keys and values lie in memory: as numbers of the model, or as integers with a scale."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

ALL = slice(None)


class Codec(Protocol):
    """A way to write vectors ``[..., D]`` as one or more tensors ``[..., n]``, and back."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]: ...

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """``out``: where to, ``[..., D]`` of at least float32; None: to memory of its own, or where it is."""
        ...


class Plain:
    """As they are."""

    def encode(self, x: Tensor) -> tuple[Tensor]:
        return (x,)

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return parts[0].to(dtype) if out is None else out.copy_(parts[0])


class Int8:
    """255 steps from -max to max of each vector, and the size of a step in half precision: D + 2 bytes.

    A number is off by half a step at most, but for the step's own rounding by 2^-11.
    """

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _wide(x)
        step = (x.abs().amax(-1, keepdim=True) / 127).half()
        return (x * _inverse(step, x.dtype)).round().clamp(-127, 127).to(torch.int8), step

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        codes, step = parts
        return (_wide(codes) if out is None else out.copy_(codes)).mul_(_wide(step)).to(dtype)


class Int4:
    """16 steps from the least to the largest of every 32 numbers, or of the most up to 32 that divide D.

    With the least and the size of a step in half precision: D / 2 + D / 8 bytes.
    """

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = _wide(x).unflatten(-1, (-1, _group(x.shape[-1])))
        low, high = x.aminmax(dim=-1, keepdim=True)
        low = low.half()
        step = ((high - low.to(x.dtype)) / 15).half()
        codes = ((x - low.to(x.dtype)) * _inverse(step, x.dtype)).round().clamp(0, 15).to(torch.uint8).flatten(-2)
        return codes[..., ::2] * 16 + codes[..., 1::2], low.squeeze(-1), step.squeeze(-1)

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        pairs, low, step = parts
        low, step, x = _wide(low), _wide(step), out
        if x is None:
            x = torch.empty(*pairs.shape[:-1], 2 * pairs.shape[-1], dtype=low.dtype, device=pairs.device)
        x[..., ::2], x[..., 1::2] = pairs >> 4, pairs & 15
        x = x.unflatten(-1, (low.shape[-1], -1)).mul_(step.unsqueeze(-1)).add_(low.unsqueeze(-1))
        return x.flatten(-2).to(dtype)


def _wide(x: Tensor) -> Tensor:
    """In at least float32: in half precision, a small step's inverse is beyond all numbers."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse(step: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / step, and 0 where there is no step."""
    step = step.to(dtype)
    return torch.where(step > 0, step.reciprocal(), 0.0)


def _group(dim: int) -> int:
    return max(size for size in range(1, 33) if dim % size == 0)


CODECS: dict[str, Codec] = {"int8": Int8(), "int4": Int4()}


class Storage:
    """The keys, or the values, of one or more layers: ``[R, H, N, D]`` in slots.

    Args:
        codec: how they are written.
        shape: R, H, N, D.
        dtype: of what goes in, and comes out if no other is asked for.
        device: where.
    """

    def __init__(self, codec: Codec, shape: tuple[int, int, int, int], dtype: torch.dtype, device):
        batch, heads, slots, dim = shape
        self.codec, self.heads, self.dim, self.dtype = codec, heads, dim, dtype
        like = codec.encode(torch.zeros(1, dim, dtype=dtype, device=device))
        self.parts = [part.new_zeros(batch, heads, slots, part.shape[-1]) for part in like]

    def write(self, slot: int, x: Tensor, rows: slice = ALL) -> None:
        """Into slots from this one on. ``x``: ``[B, H, S, D]``, for these rows."""
        for part, new in zip(self.parts, self.codec.encode(x.to(self.dtype)), strict=True):
            part[rows, :, slot : slot + x.shape[2]] = new

    def put(self, slot: Tensor, x: Tensor, rows: slice = ALL) -> None:
        """Into one slot of each of these rows and head. ``slot``: int64 ``[B, 1 or H, 1]``; ``x``: ``[B, H, 1, D]``."""
        for part, new in zip(self.parts, self.codec.encode(x.to(self.dtype)), strict=True):
            part = part[rows]
            if part.is_cpu:
                part.view(-1, part.shape[-1]).index_copy_(0, self._vectors(part, slot), new.flatten(0, 2))
            else:
                part.scatter_(2, slot.unsqueeze(-1).expand_as(new), new)

    def as_written(self, first: int, end: int, rows: slice = ALL) -> tuple[Tensor, ...]:
        """Slots ``first`` to before ``end`` as the codec wrote them, ``[B, H, end - first, n]`` each."""
        return tuple(part[rows, :, first:end] for part in self.parts)

    def read(
        self, first: int, end: int, rows: slice = ALL, dtype: torch.dtype | None = None, room: Tensor | None = None
    ) -> Tensor:
        """Slots ``first`` to before ``end``, ``[B, H, end - first, D]``; a view, where that is possible.

        Args:
            first, end, rows: which.
            dtype: of what comes out; None: of what goes in.
            room: numbers of that dtype, at least float32, to be used where it is no view, if they are enough.
        """
        parts, dtype = self.as_written(first, end, rows), dtype or self.dtype
        out, shape = None, (*parts[0].shape[:3], self.dim)
        if room is not None and parts[0].dtype != dtype and math.prod(shape) <= len(room):
            out = room[: math.prod(shape)].view(shape)
        return self.codec.decode(parts, dtype, out)

    def pick(self, slots: Tensor, rows: slice = ALL, dtype: torch.dtype | None = None) -> Tensor:
        """Those that each of these rows and head names. ``slots``: int64 ``[B, 1 or H, M]`` -> ``[B, H, M, D]``."""
        picked = []
        for part in self.parts:
            part = part[rows]
            if part.is_cpu:
                vectors = part.view(-1, part.shape[-1]).index_select(0, self._vectors(part, slots))
                picked.append(vectors.view(*part.shape[:2], -1, part.shape[-1]))
            else:
                picked.append(part.gather(2, slots.unsqueeze(-1).expand(-1, self.heads, -1, part.shape[-1])))
        return self.codec.decode(tuple(picked), dtype or self.dtype)

    def _vectors(self, part: Tensor, slots: Tensor) -> Tensor:
        """Numbers of these slots' vectors. On a CPU gather and scatter_ go number by number, up to 50 times as slow."""
        first = part.shape[2] * torch.arange(part.shape[0] * self.heads, device=part.device).view(-1, self.heads, 1)
        return (first + slots).flatten()

    def to(self, device: torch.device | str) -> None:
        """Move all to a device, without waiting for it."""
        self.parts = [part.to(device, non_blocking=True) for part in self.parts]

    def keep(self, kept: Callable[[Tensor], Tensor]) -> None:
        """Put what this function makes of each tensor in its place: other rows."""
        self.parts = [kept(part) for part in self.parts]
