"""Figure 4: the first tokens fix the global style. With the first share of an image's tokens fixed, the seed changes.

    bash scripts/reproduce_figure4.sh                  the demo: about 25 minutes on two cores
    bash scripts/reproduce_figure4.sh --model XL       LlamaGen-XL: for a GPU

Samples first images, and to each others of its class that start with 0 to 50 % of its tokens and go on with other
seeds, by the dense cache; what is sampled already is used again. Leaves in its folder

    figure4.png     first images, others with 5 % of their tokens fixed, and others with none
    curve.png       likeness to the first image against the share that is fixed, with 95 % intervals over images
    table.md, table.json

Likeness is the cosine of the extractor's features, the intersection of colour histograms, and the distance of mean
colours; of whole images, and of what lies below the fixed tokens, since those are the same pixels. One row of tokens
more is left out there, as the tokenizer's decoder mixes neighbours. For comparison the same is measured (on the same
part of the image) of pairs of the same class with nothing fixed, and of first images of other classes.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from autoregressive.sample import sample_c2i_ddp  # noqa: E402
from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import device_name, versions  # noqa: E402
from autoregressive.sample.sampler import Sampler, image_seeds  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.bootstrap import mean_interval  # noqa: E402
from evaluations.extractors import EvaluationError, Extractor, load_extractor  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from evaluations.paper.likeness import MEASURES, described  # noqa: E402
from evaluations.paper.protocol import ClassTask, add_model_flag, load_protocol, output_folder  # noqa: E402
from evaluations.paper.report import interval_told, plt, save_plot, write_report  # noqa: E402
from evaluations.paper.runs import class_names  # noqa: E402
from tokenizer.files import atomic_file, remove_partial, write_json  # noqa: E402
from tokenizer.tokenizer_image.images import image_grid, save_image_atomic  # noqa: E402

SHARES = (0, 1, 2, 5, 10, 20, 30, 40, 50)  # percent of the tokens
SHOWN = 5  # the share of the picture, as in the paper
MARGIN = 1  # rows of tokens below the fixed ones that are not compared
REGIONS = ("whole image", "below what is fixed")
PAIRS = ("share fixed", "nothing fixed", "other classes")
TITLES = {"features": "cosine of features", "histogram": "histogram intersection", "colour": "distance of mean colours"}
ROWS = 6  # of the picture
Statistics = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # {measure: mean, low, high}


def fixed_tokens(tokens: int) -> list[int]:
    """How many tokens of an image are fixed, for each share."""
    return [round(share * tokens / 100) for share in SHARES]


def first_row_below(fixed: int, grid: int, image_size: int) -> int:
    """The pixel row from which on images with so many fixed tokens are compared."""
    return min(-(-fixed // grid) + MARGIN, grid - 1) * image_size // grid if fixed else 0


@dataclass
class Continued:
    """Images and others that start as they do.

    Attributes:
        folder: where their tokens are kept.
        sampler: that made them.
        image_size: of theirs, in pixels.
        batches: files of tokens, each with labels [B], first [B, T] and others [B, S, K, T]: for each share the same K
            seeds.
    """

    folder: Path
    sampler: Sampler
    image_size: int
    batches: list[Path]

    def images(self, tokens: np.ndarray) -> np.ndarray:
        """uint8 [..., H, W, 3] from tokens [..., T]."""
        flat = torch.from_numpy(tokens.reshape(-1, tokens.shape[-1]))
        decoded = self.sampler.images(flat, self.image_size)
        return decoded.reshape(*tokens.shape[:-1], *decoded.shape[1:])


def continued(task: ClassTask, images: int, variants: int) -> Continued:
    """Sample images and others that start as they do, unless they are there; batch by batch.

    Args:
        task: of the protocol; seeds[0] makes the images, another seed the others.
        images: N.
        variants: K.
    """
    argv = ["--config", str(task.config), *task.flags, "--seed", str(task.seeds[0]), "--num-fid-samples", str(images)]
    job = sample_c2i_ddp.job(argv)
    other_seed = max(task.seeds) + 1
    settings = job["settings"] | {"shares": SHARES, "variants": variants, "other_seed": other_seed}
    folder = task.sample_dir / "figure4" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    about = {"settings": settings, "device": device_name(job["state"].device), "versions": versions()}
    write_json(folder / "run.json", about)
    sampler = job["load"]()
    seeds = torch.from_numpy(job["seeds"])
    other_seeds = torch.from_numpy(image_seeds(other_seed, images * variants)).view(images, variants)
    found = Continued(folder, sampler, settings["model.image_size"], [])
    with tqdm(total=images * (1 + len(SHARES) * variants), desc="sampling", unit=" images") as bar:
        for start in range(0, images, job["batch_size"]):
            batch = range(start, min(start + job["batch_size"], images))
            file = folder / f"tokens-{start:06d}.npz"
            found.batches.append(file)
            if file.exists():
                bar.update(len(batch) * (1 + len(SHARES) * variants))
                continue
            cond, _ = job["conditions"](batch)
            first = sampler.tokens(cond, seeds[batch.start : batch.stop])
            bar.update(len(batch))
            others = torch.empty(len(batch), len(SHARES), variants, first.shape[1], dtype=torch.long)
            for share, count in enumerate(fixed_tokens(first.shape[1])):
                for variant in range(variants):
                    own = other_seeds[batch.start : batch.stop, variant]
                    others[:, share, variant] = sampler.tokens(cond, own, start=first[:, :count])
                    bar.update(len(batch))
            with atomic_file(file) as archive:
                np.savez(archive, labels=cond.numpy(), first=first.cpu().numpy(), others=others.numpy())
    return found


def likenesses(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], labels: np.ndarray, tops: Sequence[int], extractor: Extractor
) -> dict[str, np.ndarray]:
    """How alike images are to those that they were continued from.

    Args:
        batches: first images uint8 [B, H, W, 3], and others [B, S, K, H, W, 3].
        labels: [N], of all of them.
        tops: for each share, the pixel row from which on images are compared below what is fixed.
        extractor: see :func:`described`.

    Returns:
        {measure: float64 [2, 3, S, N]}: of whole images and of what is below; the means over K others with the share
        fixed, over K with nothing fixed, and over all first images of other classes.

    Raises:
        EvaluationError: all images are of one class.
    """
    differ = labels[:, None] != labels
    if not differ.any(1).all():
        raise EvaluationError("all images are of one class, and others are needed to compare with: more --images")
    parts = {top: sorted({0, *(s for s, own in enumerate(tops) if top in (0, own))}) for top in {0, *tops}}
    alone = {(top, name): [] for top in parts for name in MEASURES}
    same = {(top, name): [] for top in parts for name in MEASURES}
    for first, others in batches:
        for top, shares in parts.items():
            one = described(first[:, top:], extractor)
            chosen = others[:, shares, :, top:]
            many = described(chosen.reshape(-1, *chosen.shape[3:]), extractor)
            for name, alike in MEASURES.items():
                alone[top, name].append(one[name])
                of_many = many[name].reshape(*chosen.shape[:3], -1)
                same[top, name].append(alike(one[name][:, None, None], of_many).mean(2))
    found = {name: np.empty((2, 3, len(tops), len(labels))) for name in MEASURES}
    for name, alike in MEASURES.items():
        for (region, share), top in [((0, s), 0) for s in range(len(tops))] + [((1, s), t) for s, t in enumerate(tops)]:
            of_first, of_same = np.concatenate(alone[top, name]), np.concatenate(same[top, name])
            among = np.stack([alike(one, of_first) for one in of_first])
            of_other = (among * differ).sum(1) / differ.sum(1)
            own = of_same[:, parts[top].index(share)]
            found[name][region, :, share] = own, of_same[:, 0], of_other
    return found


def picture(found: Continued, names: Sequence[str]) -> Image.Image:
    """Rows of a first image, others with SHOWN percent of their tokens fixed, and others with none."""
    content = [(file, place) for file in found.batches for place in range(len(np.load(file)["labels"]))]
    rows = min(ROWS, len(content))
    images, texts = [], []
    for file, place in (content[i * len(content) // rows] for i in range(rows)):
        with np.load(file) as tokens:
            first, others = tokens["first"][place], tokens["others"][place]
            texts.append(names[tokens["labels"][place]])
        some, none = others[SHARES.index(SHOWN)], others[0]
        images += [*found.images(np.stack([first, *some, *none]))]
        texts += [f"{SHOWN} % fixed"] * len(some) + ["nothing fixed"] * len(none)
    return image_grid(images, len(images) // rows, texts)


def curve(statistics: Statistics) -> Figure:
    """Likeness against the share that is fixed; see :func:`main`."""
    figure, axes = plt.subplots(len(REGIONS), len(MEASURES), figsize=(11, 6.2), sharex=True, squeeze=False)
    for column, (name, (mean, low, high)) in enumerate(statistics.items()):
        for row, region in enumerate(REGIONS):
            axis = axes[row, column]
            for pair, label in enumerate(PAIRS):
                axis.plot(SHARES, mean[row, pair], ".-", label=label)
                axis.fill_between(SHARES, low[row, pair], high[row, pair], alpha=0.2)
            axis.set(ylabel=TITLES[name], title=region)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("tokens fixed, %")
    axes[0, 0].legend()
    return figure


def table(statistics: Statistics, gains: Statistics, tokens: int) -> str:
    """Markdown, a row for each region and share; see :func:`main`."""
    titles = [column for title in TITLES.values() for column in (title, "less nothing fixed", "other classes")]
    lines = []
    for region, part in enumerate(REGIONS):
        for share, count in enumerate(fixed_tokens(tokens)):
            cells = [part, f"{SHARES[share]} %", str(count)]
            for name, (mean, low, high) in statistics.items():
                gain, *edges = (values[region, share] for values in gains[name])
                own, other = (region, 0, share), mean[region, 2, share]
                cells += [interval_told(mean[own], (low[own], high[own])), interval_told(gain, edges), f"{other:.3f}"]
            lines.append(cells)
    return markdown.table(["part", "fixed", "tokens", *titles], lines)


def plain(statistics: Statistics) -> dict[str, dict[str, list]]:
    """For JSON."""
    return {
        name: {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
        for name, (mean, low, high) in statistics.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flag(parser)
    add = parser.add_argument
    add("--images", type=positive, default=64, metavar="N", help="first images (default: %(default)s)")
    add(
        "--variants",
        type=positive,
        default=3,
        metavar="K",
        help="others for each and each share (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    protocol = load_protocol(args.model)
    task = protocol.c2i
    folder = output_folder(args, "figure4", protocol)
    extractor = load_extractor(task.feature_extractor)
    found = continued(task, args.images, args.variants)
    save_image_atomic(folder / "figure4.png", picture(found, class_names(task)))

    sampler = found.sampler
    grid = math.isqrt(sampler.tokens_per_image)
    tops = [first_row_below(count, grid, found.image_size) for count in fixed_tokens(sampler.tokens_per_image)]
    labels = np.concatenate([np.load(file)["labels"] for file in found.batches])
    pairs = (np.load(file) for file in tqdm(found.batches, desc="comparing", unit=" batches"))
    decoded = ((found.images(tokens["first"]), found.images(tokens["others"])) for tokens in pairs)
    likeness = likenesses(decoded, labels, tops, extractor.to(sampler.device))
    # For each of REGIONS, PAIRS and SHARES: [2, 3, S]; and [2, S], what is gained by fixing a share.
    statistics = {name: mean_interval(np.moveaxis(values, -1, 0)) for name, values in likeness.items()}
    gains = {name: mean_interval(np.moveaxis(values[:, 0] - values[:, 1], -1, 0)) for name, values in likeness.items()}
    save_plot(folder / "curve.png", curve(statistics))

    images = f"{args.images} images, {args.variants} others for each and each share"
    text = f"""\
![figure 4](figure4.png)

![likeness against the share fixed](curve.png)

Likeness to the image whose first tokens are fixed, by {task.feature_extractor} and by colours: mean over {images}
(and 95 % interval, bootstrap over images). Beside it how much that is more than for pairs of the same class with
nothing fixed, image by image, and what pairs of other classes have; both on the same part of the image.

{table(statistics, gains, sampler.tokens_per_image)}"""

    numbers = {
        "seed": task.seeds[0],
        "images": args.images,
        "variants": args.variants,
        "feature_extractor": task.feature_extractor,
        "shares": SHARES,
        "tokens": fixed_tokens(sampler.tokens_per_image),
        "first_row_below": tops,
        "axes": {"regions": REGIONS, "pairs": PAIRS},
        "likeness": plain(statistics),
        "less_nothing_fixed": plain(gains),
    }
    write_report(folder, "figure4", argv, task, text, numbers, [found.folder])


if __name__ == "__main__":
    guarded(main)
