"""In which order the tokens of an image are decoded: one after the other, or several rows at once (ZipAR)."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adsa.order import Order


@dataclass(frozen=True)
class Pass:
    """One forward pass of image tokens; all by raster position.

    Attributes:
        positions: of the tokens that go in, ascending.
        sources: whose token goes in at each of these: its own, or while that is not known, another row's end.
        rows: of the pass's logits, those that a token is drawn from.
        draws: the tokens drawn, one for each of ``rows``.
    """

    positions: tuple[int, ...]
    sources: tuple[int, ...]
    rows: tuple[int, ...]
    draws: tuple[int, ...]

    @property
    def stand_ins(self) -> set[int]:
        """The positions at which another row's end goes in."""
        return {place for place, source in zip(self.positions, self.sources, strict=True) if place != source}


@dataclass(frozen=True)
class Schedule:
    """Raster order, or ZipAR's (arXiv 2412.04062): a row begins when the row above is ``window`` tokens ahead.

    The first row goes alone, as the second may not begin before there is any row end to go on from. Token c of row
    r > 0 is drawn in pass ``columns + (r - 1) * window + c``, counted from 0, the condition's pass; later where rows
    are kept waiting (:class:`~autoregressive.models.adaptive.AdaptiveWindow`).

    A row that begins before the row above has ended lacks the token before its own first. The newest row end that is
    known goes in at that place; when the place's own token is there, its keys and values take over.

    Args:
        tokens: of the image.
        columns: in a row.
        window: 1 to ``columns``; None or ``columns``: raster order.

    Raises:
        ValueError: for other windows, or a last row that is not whole.
    """

    tokens: int
    columns: int
    window: int | None = None

    def __post_init__(self):
        if self.window is None:
            return
        if not 1 <= self.window <= self.columns:
            raise ValueError(f"the ZipAR window must be 1 to {self.columns}, the tokens of a row, not {self.window}")
        if self.tokens % self.columns:
            raise ValueError(
                f"ZipAR decodes whole rows, and {self.tokens} tokens are not: a row has {self.columns}; leave out the "
                f"window for raster order"
            )

    @property
    def is_raster(self) -> bool:
        return self.window in (None, self.columns)

    @cached_property
    def order(self) -> Order | None:
        """What a cache must know of it beforehand; None: raster order. Rows that wait stay within it."""
        if self.is_raster:
            return None
        lines = self.tokens // self.columns
        early = max(0, lines - 2)  # rows that may begin before the row above has ended, at least a window behind it
        return Order(
            width=max(1, min(self.columns // self.window + 1, lines - 1)),
            held=min((self.columns - 1) // self.window, early),
            arrivals=self.tokens - 1 + early * (self.columns - self.window),
        )

    @cached_property
    def passes(self) -> list[Pass]:
        """What goes in after the condition's pass, which the first token is drawn from, if no row waits."""
        return list(self.walk())

    def walk(self, waiting: Collection[int] = ()) -> Iterator[Pass]:
        """The passes after the condition's, one by one.

        Args:
            waiting: positions of first tokens that may change. When the next pass is asked for, the row of such a one
                does not go on: the token is drawn again, with one more token in the row above.
        """
        if self.is_raster:
            yield from (Pass((at,), (at,), (0,), (at + 1,)) for at in range(self.tokens - 1))
            return
        columns = self.columns
        drawn = [1] + [0] * (self.tokens // columns - 1)  # tokens of each row
        held = set()  # rows whose end another row's stands in for
        while drawn[-1] < columns:
            feeds = {}  # position: (its source, what is drawn from it)
            whole = [row for row, count in enumerate(drawn) if count == columns]
            for row, count in enumerate(drawn):
                last = row * columns + count - 1
                if 0 < count < columns:
                    feeds[last] = (last, last + 1)
                elif count == columns and row in held:  # the place's own, at last
                    feeds[last] = (last, None)
                    held.remove(row)
                elif count == 0:
                    if drawn[row - 1] == columns:
                        feeds[last] = (last, last + 1)
                    elif row > 1 and drawn[row - 1] >= self.window:
                        feeds[last] = (whole[-1] * columns + columns - 1, last + 1)
                        held.add(row - 1)
                    break
            at = sorted(feeds)
            rows = tuple(index for index, position in enumerate(at) if feeds[position][1] is not None)
            draws = tuple(feeds[at[index]][1] for index in rows)
            yield Pass(tuple(at), tuple(feeds[position][0] for position in at), rows, draws)
            for position in draws:
                if position not in waiting:
                    drawn[position // columns] += 1

    def on(
        self, device: torch.device, waiting: Collection[int] | None = None
    ) -> Iterator[tuple[Pass, tuple[Tensor, Tensor, Tensor]]]:
        """Each pass, with its (positions, sources, rows) as int64 tensors.

        What is known beforehand goes to the device by one copy.

        Args:
            waiting: as :meth:`walk` takes it; None: no row ever waits.
        """
        for known in [self.passes] if waiting is None else ([step] for step in self.walk(waiting)):
            parts = [part for step in known for part in (step.positions, step.sources, step.rows)]
            flat = torch.tensor([value for part in parts for value in part], dtype=torch.int64).to(device)
            split = iter(flat.split([len(part) for part in parts]))
            yield from zip(known, zip(split, split, split, strict=True), strict=True)
