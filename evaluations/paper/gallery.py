"""Images of several runs below each other, those of one seed in a column: figures 5, 10 and 11."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from evaluations import markdown
from evaluations.features import open_set
from evaluations.flags import positive
from evaluations.paper.protocol import ClassTask, Task, add_model_flag, load_protocol, output_folder
from evaluations.paper.report import write_report
from evaluations.paper.rows import COSTS, Cost, told_times
from evaluations.paper.runs import class_names, sampled
from tokenizer.tokenizer_image.images import image_grid, save_image_atomic


def budgets_figure(name: str, kind: str, about: str, images: int, argv: Sequence[str] | None) -> None:
    """The script of a figure that shows images of the dense cache and of each budget.

    Args:
        name: "figure10".
        kind: the task in the protocol, "c2i" or "t2i".
        about: for --help.
        images: default of --images.
        argv: the script's arguments; None: the process's own.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flag(parser)
    add_gallery_flags(parser, images)
    args = parser.parse_args(argv)
    protocol = load_protocol(args.model)
    task: Task = getattr(protocol, kind)
    folder = output_folder(args, name, protocol)
    caches = [None, *({"policy": "adsa", "budget": budget} for budget in task.budgets)]
    runs = [sampled(task, cache, task.seeds[0], args.images) for cache in caches]
    costs = [Cost.of(cache, [run]) for cache, run in zip(caches, runs, strict=True)]
    titled = {cost.title: run for cost, run in zip(costs, runs, strict=True)}
    save_image_atomic(folder / f"{name}.png", gallery(titled, captions(runs[0], task), args.columns))
    table = markdown.table(["cache", *COSTS], [[cost.title, *cost.cells()] for cost in costs])
    numbers = {"seed": task.seeds[0], "images": args.images, "rows": [cost.numbers() for cost in costs]}
    write_report(folder, name, argv, task, f"![{name}]({name}.png)\n\n{table}\n\n{told_times(costs)}", numbers, runs)


def add_gallery_flags(parser: argparse.ArgumentParser, images: int) -> None:
    """Add --images, with this default, and --columns."""
    add = parser.add_argument
    add("--images", type=positive, default=images, metavar="N", help="sampled by each cache (default: %(default)s)")
    add("--columns", type=positive, default=8, metavar="N", help="shown of these, evenly spread (default: %(default)s)")


def gallery(runs: Mapping[str, Path], texts: Sequence[str], columns: int) -> Image.Image:
    """A row of images for each run, with its title below.

    Args:
        runs: finished runs of equal seeds and conditions, by title.
        texts: what each image shows.
        columns: how many images of each, evenly spread.
    """
    columns = min(columns, len(texts))
    chosen = [i * len(texts) // columns for i in range(columns)]
    rows = {}
    for title, run in runs.items():
        images, _, _ = open_set(run, "")
        rows[title] = [images.read(i) for i in chosen]
    return stacked(rows, [texts[i] for i in chosen])


def stacked(rows: Mapping[str, Sequence[np.ndarray]], texts: Sequence[str]) -> Image.Image:
    """Rows of images below each other, by title, which goes below each; one text for each column."""
    panels = [np.asarray(image_grid(images, len(texts), texts)) for images in rows.values()]
    return image_grid(panels, 1, list(rows), padding=8, font_size=16)


def captions(run: Path, task: Task) -> list[str]:
    """The class or prompt of each image of a run."""
    if isinstance(task, ClassTask):
        names = class_names(task)
        return [names[label] for label in np.load(run / "labels.npy")]
    return (run / "captions.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
