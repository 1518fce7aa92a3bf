"""Tables in Markdown."""

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 0) -> str:
    """A table, without a newline at its end.

    Args:
        columns: titles.
        rows: the cells of each, one for each column.
        right: how many of the last columns are aligned to the right, as numbers are.
    """
    rule = "|".join(["", *["---"] * (len(columns) - right), *["---:"] * right, ""])
    return "\n".join([f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(cells)} |" for cells in rows)])
