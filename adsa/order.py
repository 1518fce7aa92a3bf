"""In which order image tokens come into a cache, where that is not raster order."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Order:
    """Raster positions in order of arrival, as a decoding schedule has them.

    A position that stands here twice is a place that another token holds until its own comes. Until then it is never
    evicted; then its own takes over the slot.

    Attributes:
        positions: of the first token that comes, of the second, and so on.
        width: how many come at once, at most.
    """

    positions: tuple[int, ...]
    width: int

    @cached_property
    def replaces(self) -> dict[int, int]:
        """{arrival: the earlier one whose slot it takes}."""
        first, found = {}, {}
        for arrival, position in enumerate(self.positions):
            if position in first:
                found[arrival] = first[position]
            first[position] = arrival
        return found

    @cached_property
    def awaited(self) -> list[list[int]]:
        """For each arrival, those already there that another will replace."""
        held: list[list[int]] = []
        gone = {old: new for new, old in self.replaces.items()}
        now: list[int] = []
        for arrival in range(len(self.positions)):
            now = [old for old in now if gone[old] >= arrival]
            held.append(list(now))
            if arrival in gone:
                now.append(arrival)
        return held

    @cached_property
    def furthest(self) -> list[int]:
        """The largest position among the first arrivals, up to each."""
        found, most = [], -1
        for position in self.positions:
            most = max(most, position)
            found.append(most)
        return found
