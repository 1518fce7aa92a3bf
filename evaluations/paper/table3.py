"""The paper's Table 3: what prefix, selection and local window are each worth, in all combinations. See --help."""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from adsa import CacheConfig  # noqa: E402
from autoregressive.sample.entry import guarded  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.paper.protocol import add_model_flag, load_protocol, output_folder  # noqa: E402
from evaluations.paper.report import write_report  # noqa: E402
from evaluations.paper.rows import METRICS, NONE, class_row, differences  # noqa: E402

DESCRIPTION = """\
Table 3 of the paper: ADSA without its prefix (the first tokens), its selection (the least redundant V) or its local
window (the newest tokens), in all eight combinations at each budget, by FID, Inception Score, precision, recall and
KID, with paired tests against dense.

The slots of a part that is left out go to the selection, or without one to the local window, or without either to the
prefix; the newest token always stays. With no part at all, tokens are chosen at random.

Samples and evaluates what is not there yet, in the sample_dir of the protocol; started again, it goes on. Writes
table.md and table.json. The demo's 35 904 images, 6336 of which are Table 1's, take an estimated five hours on two CPU
cores (with NPROC=2 FLAGS="--per-proc-batch-size 32"), without a network."""

PARTS = ("prefix", "select", "local")
# FID, IS, precision, recall, all with LlamaGen-XL and 384 of 576 tokens.
PAPER = {
    "one of prefix and select left out": ("7.41", "163.61", "0.70", "0.60"),
    "the other of them left out": ("2.70", "249.29", "0.80", "0.57"),
    "local left out": ("51.07", "41.62", "0.37", "0.47"),
    "all three": ("2.58", "245.50", "0.80", "0.57"),
}
PAPER_TITLE = (
    "## The paper's numbers, not ours\n\nLlamaGen-XL on ImageNet with 384 of 576 tokens, 50 000 images of one seed "
    "(arXiv 2506.18226, Table 3). The marks that tell its rows apart are lost in the text that we have; it says that "
    "leaving out `local` costs most, which settles one row and leaves two open."
)
HOW = """\
n of the first tokens always stay, m of the newest, and K of the others are chosen. What a missing part leaves goes to
the selection, or without one to the local window, or without either to the prefix; m is at least 1, as the newest token
attends to itself. In the row without any part the others are chosen at random, so that it too has its budget. Mean +-
standard deviation over the seeds, where there are several. Features by {extractor}: numbers of other extractors do not
compare."""


def combination(budget: int, prefix: bool, select: bool, local: bool) -> dict[str, Any]:
    """The cache of ADSA at this budget with some of its parts, as keys of CacheConfig.

    The prefix has the length that ADSA gives it, and the window likewise, unless they have to fill what others leave.
    """
    n, m = CacheConfig("adsa", budget).split
    if prefix and select and local:
        return {"policy": "adsa", "budget": budget}  # as in table 1, whose runs these are
    if select:
        return {"policy": "adsa", "budget": budget, "prefix": n if prefix else 0, "local": m if local else 1}
    if local:
        n = n if prefix else 0
        return {"policy": "streaming", "budget": budget, "prefix": n, "local": budget - n}
    if prefix:
        return {"policy": "streaming", "budget": budget, "prefix": budget - 1, "local": 1}
    return {"policy": "random", "budget": budget, "prefix": 0, "local": 1}


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flag(parser)
    args = parser.parse_args(argv)
    protocol = load_protocol(args.model)
    task, folder = protocol.c2i, output_folder(args, "table3", protocol)
    seeds = task.ablation_seeds or task.seeds
    dense = class_row(task, None, seeds)
    rows, lines, numbers = {}, [], []
    for budget, *parts in product(task.budgets, (True, False), (True, False), (True, False)):
        cache = combination(budget, *parts)
        row = class_row(task, cache, seeds)
        names = [name for name, there in zip(PARTS, parts, strict=True) if there]
        rows[f"{budget}: {' + '.join(names) or 'none'}"] = row
        n, m = CacheConfig.from_dict(cache).split
        marks = ["yes" if there else "" for there in parts]
        lines.append([str(budget), *marks, f"{n} + {cache['budget'] - n - m} + {m}", *row.cells()])
        numbers.append({"budget": budget, "parts": names, **row.numbers(dense)})
    lines.append(["dense", *[NONE] * 3, str(dense.cost.tokens), *dense.cells()])
    about = (
        f"## Measured\n\nModel {protocol.name}, {task.images} images of each row and seed, seeds "
        f"{', '.join(map(str, seeds))}; reference {task.reference}.\n\n{HOW.format(extractor=task.feature_extractor)}"
    )
    names = [name for name, _, _ in METRICS.values()]
    text = [
        about,
        markdown.table(["budget", *PARTS, "n + K + m", *names], lines),
        differences(rows, dense),
        PAPER_TITLE,
        markdown.table(["row", *names[:4]], [[name, *cells] for name, cells in PAPER.items()]),
    ]
    record = {
        "model": protocol.name,
        "seeds": seeds,
        "images": task.images,
        "reference": str(task.reference),
        "extractor": task.feature_extractor,
        "dense": dense.numbers(),
        "rows": numbers,
        "paper": PAPER,
    }
    runs = dict.fromkeys(run for row in (dense, *rows.values()) for run in row.runs)
    write_report(folder, "table3", argv, task, "\n\n".join(text), record, runs)


if __name__ == "__main__":
    guarded(main)
