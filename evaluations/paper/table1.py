"""The paper's Table 1: FID and its kin, cache, memory and time of the dense cache and of each budget. See --help."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from autoregressive.sample.entry import guarded  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.extractors import EvaluationError  # noqa: E402
from evaluations.paper.floor import reconstructed  # noqa: E402
from evaluations.paper.protocol import ClassTask, add_model_flag, load_protocol, output_folder  # noqa: E402
from evaluations.paper.report import write_report  # noqa: E402
from evaluations.paper.rows import (  # noqa: E402
    COSTS,
    METRICS,
    NONE,
    Row,
    class_row,
    differences,
    spread,
    told_times,
)
from evaluations.paper.runs import evaluated  # noqa: E402

DESCRIPTION = """\
Table 1 of the paper: class-conditional images of the dense cache and of ADSA at each budget, by FID, Inception Score,
precision, recall and KID, with the slots, memory and time that they cost; mean and deviation over the seeds, paired
tests against dense. Also the tokenizer's own reconstructions of the reference, which no GPT is expected to beat.

Samples and evaluates what is not there yet, in the sample_dir of the protocol; started again, it goes on. Writes
table.md and table.json. The demo's 6336 images take about an hour on two CPU cores (with NPROC=2
FLAGS="--per-proc-batch-size 32"), without a network. Give all rows the same NPROC and FLAGS, and the machine nothing
else to do, or their times do not compare."""

# model: FID, IS, precision, recall, KV cache, context. The first ones are others', as the paper has them.
PAPER = {
    "GigaGAN": ("3.45", "225.5", "0.84", "0.61", NONE, NONE),
    "LDM-4": ("3.60", "247.7", NONE, NONE, NONE, "4096"),
    "MaskGIT": ("6.18", "182.1", "0.80", "0.51", NONE, NONE),
    "MaskGIT-re": ("4.02", "355.6", "0.80", "0.51", NONE, NONE),
    "LlamaGen-XL (dense)": ("2.62", "244.08", "0.80", "0.57", "576", "576"),
    "ADSA-384": ("2.58", "245.50", "0.80", "0.57", "384 (-33.3 %)", "384"),
    "ADSA-256": ("2.64", "245.78", "0.80", "0.57", "256 (-55.6 %)", "256"),
}
PAPER_TITLE = (
    "## The paper's numbers, not ours\n\nLlamaGen-XL on ImageNet, 50 000 images of one seed, Inception features "
    "(arXiv 2506.18226, Table 1)."
)
HOW = """\
Mean +- standard deviation over the seeds. KID is unbiased, FID falls with the number of images: compare it at equal
counts only. Features by {extractor}: numbers of other extractors do not compare."""


def section(task: ClassTask, resize: str) -> tuple[str, dict, list[Row]]:
    """The tables of one way of resizing, as Markdown, as numbers for JSON, and their rows."""
    caches = [None, *({"policy": "adsa", "budget": budget} for budget in task.budgets)]
    dense, *sparse = rows = [class_row(task, cache, task.seeds, resize) for cache in caches]
    lines = [[row.cost.title, *row.cells(), *row.cost.cells()] for row in rows]
    numbers = {"resize": resize, "rows": [dense.numbers(), *(row.numbers(dense) for row in sparse)]}
    title = "VQ reconstructions of the reference"
    try:
        folder = reconstructed(task, resize)
    except EvaluationError as error:  # the images are not there
        lines.insert(0, [title, "not measured", *[NONE] * (len(METRICS) - 1 + len(COSTS))])
        numbers["vq_reconstructions"] = None
        note = f"The reconstructions are not measured: {error}."
    else:
        floor = evaluated(folder, task)
        cells = [spread([] if floor[key] is None else [floor[key]], d, scale) for key, (_, scale, d) in METRICS.items()]
        lines.insert(0, [title, *cells, *[NONE] * len(COSTS)])
        numbers["vq_reconstructions"] = {key: floor[key] for key in (*METRICS, "counts")}
        pictures = task.reference_images or task.reference
        note = (
            f"The reconstructions are of the {floor['counts']['samples']} images in {pictures}. Where those are "
            "the reference itself, each is compared with its original as well: no independent sample."
        )
    table = markdown.table(["cache", *(name for name, _, _ in METRICS.values()), *COSTS], lines)
    tests = differences({row.cost.title: row for row in sparse}, dense)
    return f"{table}\n\n{note}\n\n{tests}", numbers, rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flag(parser)
    args = parser.parse_args(argv)
    protocol = load_protocol(args.model)
    task, folder = protocol.c2i, output_folder(args, "table1", protocol)
    parts, sections = [], []
    for resize in task.resizes or ("llamagen",):
        text, numbers, rows = section(task, resize)  # rows of the same runs each time
        heading = {
            "llamagen": "Resized as LlamaGen does, without antialiasing",
            "antialias": "Resized with antialiasing",
        }
        parts.append(f"### {heading[resize]}\n\n{text}" if task.resizes else text)
        sections.append(numbers)
    about = (
        f"## Measured\n\nModel {protocol.name}, {task.images} images of each cache and seed, seeds "
        f"{', '.join(map(str, task.seeds))}; reference {task.reference}.\n\n"
        f"{HOW.format(extractor=task.feature_extractor)}"
    )
    columns = ["model", *(METRICS[key][0] for key in ("fid", "is", "precision", "recall")), "KV cache", "context"]
    theirs = markdown.table(columns, [[name, *cells] for name, cells in PAPER.items()])
    text = "\n\n".join([about, *parts, told_times([row.cost for row in rows]), PAPER_TITLE, theirs])
    numbers = {
        "model": protocol.name,
        "seeds": task.seeds,
        "images": task.images,
        "reference": str(task.reference),
        "extractor": task.feature_extractor,
        "sections": sections,
        "paper": PAPER,
    }
    write_report(folder, "table1", argv, task, text, numbers, [run for row in rows for run in row.runs])


if __name__ == "__main__":
    guarded(main)
