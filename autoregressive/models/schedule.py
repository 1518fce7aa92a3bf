"""In which order the tokens of an image are decoded: one after the other, or several rows at once (ZipAR)."""

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


@dataclass(frozen=True)
class Schedule:
    """Raster order, or ZipAR's (arXiv 2412.04062): a row begins when the row above is ``window`` tokens ahead.

    The first row goes alone, as the second may not begin before there is any row end to go on from. Token c of row
    r > 0 is drawn in pass ``columns + (r - 1) * window + c``, counted from 0, the condition's pass.

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
    def passes(self) -> list[Pass]:
        """What goes in after the condition's pass, which the first token is drawn from."""
        if self.is_raster:
            return [Pass((at,), (at,), (0,), (at + 1,)) for at in range(self.tokens - 1)]
        columns, window, lines = self.columns, self.window, self.tokens // self.columns
        begins = [0] + [columns + (row - 1) * window for row in range(1, lines)]
        made = []
        for number in range(1, begins[-1] + columns):
            feeds = {}  # position: (its source, what is drawn from it)
            for row, begin in enumerate(begins):
                column, first = number - begin, row * columns
                if column == 0:  # of the rows that have ended, the last but for raster order's own
                    known = max(above for above in range(row) if begins[above] + columns <= number)
                    feeds[first - 1] = (known * columns + columns - 1, first)
                elif 0 < column < columns:
                    feeds[first + column - 1] = (first + column - 1, first + column)
                elif column == columns and row + 1 < lines and begins[row + 1] < number:
                    feeds[first + columns - 1] = (first + columns - 1, None)  # the place's own, at last
            at = sorted(feeds)
            rows = tuple(index for index, position in enumerate(at) if feeds[position][1] is not None)
            draws = tuple(feeds[at[index]][1] for index in rows)
            made.append(Pass(tuple(at), tuple(feeds[position][0] for position in at), rows, draws))
        return made

    @cached_property
    def order(self) -> Order | None:
        """In which order a cache gets the tokens; None: in raster order."""
        if self.is_raster:
            return None
        return Order(
            tuple(p for step in self.passes for p in step.positions), max(len(p.positions) for p in self.passes)
        )

    def on(self, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(positions, sources, rows) of each pass as int64 tensors, by one copy to the device."""
        parts = [part for step in self.passes for part in (step.positions, step.sources, step.rows)]
        flat = torch.tensor([value for part in parts for value in part], dtype=torch.int64).to(device)
        split = iter(flat.split([len(part) for part in parts]))
        return list(zip(split, split, split, strict=True))
