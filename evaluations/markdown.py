"""Tables in Markdown."""

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 0, spaced: bool = False) -> str:
    """A table, without a newline at its end.

    Args:
        columns: titles.
        rows: the cells of each, one for each column.
        right: how many of the last columns are aligned to the right, as numbers are.
        spaced: with blanks in the line under the titles.
    """
    bar = " | " if spaced else "|"
    rule = bar.join(["", *["---"] * (len(columns) - right), *["---:"] * right, ""]).strip()
    titles = " | ".join(columns).lstrip()  # a first column without a title has one blank
    return "\n".join([f"| {titles} |", rule, *(f"| {' | '.join(cells)} |" for cells in rows)])
