"""Figure 5: a small recency window alone, beside ADSA and streaming (prefix and window) at its budget, and dense.

    bash scripts/reproduce_figure5.sh                  the demo: about 20 minutes on two cores
    bash scripts/reproduce_figure5.sh --model XL       LlamaGen-XL: for a GPU

Samples the same seeds and classes by each cache, unless they are there. Leaves figure5.png, with a row for each cache
and the images of one seed in a column, and table.md and table.json: the cosine of each image's features with those of
the dense image of its seed and class. Dense images of the same classes and other seeds tell what the class alone is
worth.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from autoregressive.sample.entry import guarded  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.bootstrap import mean_interval  # noqa: E402
from evaluations.features import open_set  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from evaluations.paper.gallery import add_gallery_flags, captions, gallery  # noqa: E402
from evaluations.paper.likeness import cosine  # noqa: E402
from evaluations.paper.protocol import add_model_flag, load_protocol, output_folder  # noqa: E402
from evaluations.paper.report import interval_told, write_report  # noqa: E402
from evaluations.paper.rows import COSTS, Cost, told_times  # noqa: E402
from evaluations.paper.runs import features_of, sampled  # noqa: E402
from tokenizer.tokenizer_image.images import save_image_atomic  # noqa: E402

POLICIES = ("adsa", "streaming", "window")


def likeness(values: np.ndarray, adsa: np.ndarray) -> dict[str, Any]:
    """The mean cosine [N] of a cache with the dense one, and its difference from ADSA's, with their intervals."""
    mean, *interval = map(float, mean_interval(values))
    difference, *of_difference = map(float, mean_interval(values - adsa))
    return {
        "cosine": mean,
        "cosine_interval": interval,
        "less_adsa": difference,
        "less_adsa_interval": of_difference,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flag(parser)
    parser.add_argument(
        "--budget", type=positive, default=64, metavar="N", help="cached image tokens (default: %(default)s)"
    )
    add_gallery_flags(parser, 256)
    args = parser.parse_args(argv)
    protocol = load_protocol(args.model)
    # In turn, and not drawn by the seed: the classes of both seeds are the same.
    task = replace(
        protocol.c2i,
        flags=(*protocol.c2i.flags, "--label-distribution", "balanced"),
        sample_dir=protocol.c2i.sample_dir / "balanced",  # apart from runs of as many images with classes as drawn
    )
    folder = output_folder(args, "figure5", protocol)
    seed, other_seed = task.seeds[0], max(task.seeds) + 1
    caches = [None, *({"policy": policy, "budget": args.budget} for policy in POLICIES)]
    runs = [sampled(task, cache, seed, args.images) for cache in caches]
    other = sampled(task, None, other_seed, args.images)
    costs = [Cost.of(cache, [run]) for cache, run in zip([*caches, None], [*runs, other], strict=True)]
    titled = {cost.title: run for cost, run in zip(costs[:-1], runs, strict=True)}
    save_image_atomic(folder / "figure5.png", gallery(titled, captions(runs[0], task), args.columns))

    dense, *features = (features_of(open_set(run, task.feature_extractor)[0], task).features for run in [*runs, other])
    values = [cosine(dense, of_cache) for of_cache in features]
    lines, rows = [], []
    for title, cost, of_cache in zip([*list(titled)[1:], "dense, other seeds"], costs[1:], values, strict=True):
        found = likeness(of_cache, values[0])
        told = [interval_told(found[key], found[f"{key}_interval"]) for key in ("cosine", "less_adsa")]
        lines.append([title, *told, *cost.cells()])
        rows.append({"title": title, **found, **cost.numbers()})
    text = f"""\
![figure 5](figure5.png)

Likeness to the dense image of the same seed and class: cosine of the features of {task.feature_extractor}, mean over
{args.images} images (and 95 % interval, bootstrap over images).

{markdown.table(["cache", "likeness to dense", "less ADSA's, image by image", *COSTS], lines)}

{told_times(costs[1:])}"""
    numbers = {
        "seed": seed,
        "other_seed": other_seed,
        "images": args.images,
        "budget": args.budget,
        "feature_extractor": task.feature_extractor,
        "rows": rows,
    }
    write_report(folder, "figure5", argv, task, text, numbers, [*runs, other])


if __name__ == "__main__":
    guarded(main)
