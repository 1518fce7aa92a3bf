"""Images per second against batch size, to the batch that fills a GPU (Figure 9 as speed). See --help."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.optimize import nnls  # noqa: E402

from adsa.config import DTYPES  # noqa: E402
from autoregressive.models.gpt import GPT_models  # noqa: E402
from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.options import OptionError, shown  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.paper.figure9 import weight_bytes  # noqa: E402
from evaluations.paper.report import plt, save_plot  # noqa: E402
from tokenizer.files import atomic_file  # noqa: E402
from tokenizer.tokenizer_image.vq_model import VQ_models  # noqa: E402

DESCRIPTION = """\
What a smaller cache is worth where memory is full: steps that scripts/benchmark.sh has timed at two batch sizes or
more, carried on to the largest batch that fits. The time of a step is taken as a part that is the same for all batches
and one that grows with the images; the batch is what weights (of a registered size with the tokenizer's, else of the
layers) and cache leave room for, without activations. Other batches than those timed are computed, not measured, and
marked as such."""
DEVICES_GB = (8, 24, 48, 80)  # of 10^9 bytes


@dataclass(frozen=True)
class Line:
    """A cache's steps.

    Attributes:
        cache: its name.
        images: batch sizes that were timed, ascending.
        rates: images/s there, if all steps of an image were as those timed.
        steps: of an image.
        weights, per_image: bytes; of an image, those of the cache.
        fixed, each: seconds of a step that all batches take, and that each image adds.
    """

    cache: str
    images: list[int]
    rates: list[float]
    steps: int
    weights: float
    per_image: float
    fixed: float
    each: float

    def fits(self, room: float) -> int:
        """Images, into so many bytes."""
        return max(0, int((room - self.weights) // self.per_image))

    def rate(self, images: float) -> float:
        """Images/s of a batch, computed."""
        return images / (self.steps * (self.fixed + self.each * images))


def lines_of(record: dict[str, Any]) -> list[Line]:
    """Of the table.json of a benchmark: caches that were timed at two batch sizes or more.

    Raises:
        OptionError: there are none.
    """
    weights = weights_of(record)
    timed: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        turns = list(row["turns"].values())
        if turns and turns[0]["demand"]:
            timed.setdefault(row["cache"], []).append(row)
    found = []
    for cache, rows in timed.items():
        rows = sorted(rows, key=lambda row: row["images"])
        if len({row["images"] for row in rows}) < 2:
            continue
        images = np.array([row["images"] for row in rows])
        seconds = np.array([row["summary"]["step_ms"]["p50"] / 1000 for row in rows])
        # Least squares of relative errors, so that small batches count as well, without negative parts.
        each, fixed = nnls(np.stack([images, np.ones_like(images)], 1) / seconds[:, None], np.ones_like(seconds))[0]
        turn = next(iter(rows[-1]["turns"].values()))
        beside, per_image = turn["demand"]["weight_bytes"], rows[-1]["summary"]["cache_bytes"] / rows[-1]["images"]
        rates = [row["summary"]["steady_images_per_second"] for row in rows]
        fit = float(fixed), float(each)
        found.append(Line(cache, images.tolist(), rates, turn["steps"], weights or beside, per_image, *fit))
    if not found:
        raise OptionError("no cache was timed at two batch sizes: give scripts/benchmark.sh --batches 1 16 64")
    return found


def weights_of(record: dict[str, Any]) -> int | None:
    """Bytes of a registered size and the tokenizer in float32, as in Figure 9; None: it is not registered."""
    if record["model"] not in GPT_models:
        return None
    with torch.device("meta"):
        gpt = GPT_models[record["model"]](block_size=record["settings"]["tokens"])
        return weight_bytes(gpt.to(DTYPES[record["settings"]["dtype"]])) + weight_bytes(VQ_models["VQ-16"]())


def table(lines: Sequence[Line]) -> str:
    """Markdown: measured batches, then those that fit."""
    measured = sorted({images for line in lines for images in line.images})
    rows = []
    for line in lines:
        known = dict(zip(line.images, line.rates, strict=True))
        rows.append([line.cache, *(f"{known[n]:.3f}" if n in known else "-" for n in measured)])
        for gb in DEVICES_GB:
            fits = line.fits(gb * 1e9)
            rows[-1].append(f"{line.rate(fits):.3f} ({fits})" if fits else "-")
    return markdown.table(["cache", *map(str, measured), *(f"{gb} GB, computed" for gb in DEVICES_GB)], rows)


def draw(lines: Sequence[Line], title: str, path: Path) -> None:
    """Measured points, and dashed what is computed, with a mark where a device is full."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for number, line in enumerate(lines):
        color = f"C{number}"
        axes.plot(line.images, line.rates, "o-", color=color, markersize=4, label=line.cache)
        most = max(line.images[-1], line.fits(DEVICES_GB[-1] * 1e9))
        beyond = np.geomspace(line.images[0], most, 60)
        axes.plot(beyond, line.rate(beyond), "--", color=color, linewidth=0.8)
        full = [fits for gb in DEVICES_GB if (fits := line.fits(gb * 1e9))]
        axes.plot(full, [line.rate(fits) for fits in full], "s", color=color, markersize=6, markerfacecolor="none")
    axes.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="images/s", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title=f"squares: {', '.join(map(str, DEVICES_GB))} GB full, computed", title_fontsize=8)
    save_plot(path, figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE.json", help="of scripts/benchmark.sh, with several --batches")
    add("--caches", nargs="+", metavar="NAME", help="these, as the table calls them (default: all)")
    add("--output", type=Path, metavar="DIR", help="(default: the table's folder)")
    args = parser.parse_args(argv)
    try:
        record = json.loads(args.table.read_text(encoding="utf-8"))
        lines = lines_of(record)
        title = f"{record['model']}, {record['settings']['dtype']}"
        made = f"`{record['command']}` on {record['machine']}"
    except OptionError as error:
        raise OptionError(f"{args.table}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(f"{args.table}: no table.json of scripts/benchmark.sh ({error!r})") from error
    known = [line.cache for line in lines]
    if unknown := set(args.caches or ()) - set(known):
        raise OptionError(
            f"--caches {', '.join(sorted(unknown))}: not timed at two batch sizes; {', '.join(known)} are"
        )
    lines = [line for line in lines if line.cache in (args.caches or known)]
    folder = args.output or args.table.parent
    folder.mkdir(parents=True, exist_ok=True)
    text = (
        f"{title}: images/s by images in a batch, from {shown(args.table)} ({made}), if all steps of an image were as "
        "its last, which take longest; and computed from these for the largest batch, in brackets, that weights and "
        f"cache leave room for.\n\n{table(lines)}\n\n![plot](throughput.png)\n"
    )
    draw(lines, title, folder / "throughput.png")
    with atomic_file(folder / "throughput.md") as file:
        file.write(text.encode())
    print(text)
    print(folder / "throughput.md")


if __name__ == "__main__":
    guarded(main)
