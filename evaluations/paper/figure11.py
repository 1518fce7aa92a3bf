"""Figure 11: images from prompts by the dense cache and by each budget, from the same seeds.

    bash scripts/reproduce_figure11.sh                  the demo: about three minutes on two cores
    bash scripts/reproduce_figure11.sh --model XL       LlamaGen-XL: for a GPU

Samples the first few prompts by each cache, unless they are there. Leaves figure11.png, with a row for each cache and
the images of one seed and prompt in a column, table.md and table.json.
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
    budgets_figure("figure11", "t2i", __doc__, 8, argv)


if __name__ == "__main__":
    guarded(main)
