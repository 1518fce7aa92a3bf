"""Figure 10: class-conditional images of the dense cache and of each budget, from the same seeds.

    bash scripts/reproduce_figure10.sh                  the demo: about two minutes on two cores
    bash scripts/reproduce_figure10.sh --model XL       LlamaGen-XL: for a GPU

Samples a few images by each cache, unless they are there. Leaves figure10.png, with a row for each cache and the images
of one seed and class in a column, table.md and table.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from autoregressive.sample.entry import guarded  # noqa: E402
from evaluations.paper.gallery import budgets_figure  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    budgets_figure("figure10", "c2i", __doc__, 48, argv)


if __name__ == "__main__":
    guarded(main)
