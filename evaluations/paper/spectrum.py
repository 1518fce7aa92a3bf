"""Sharper details? Spatial frequencies of images by the dense cache, by each budget, and of the data.

    bash scripts/reproduce_spectrum.sh                  the demo: two minutes, once Table 1's runs are there
    bash scripts/reproduce_spectrum.sh --model XL       LlamaGen-XL: for a GPU

Takes the runs of the first seed that Table 1 is made of, and samples what is not there. Leaves in its folder
spectrum.png (radial power spectra of the luminance, and their ratio to the dense cache's), table.md and table.json:
the share of energy above half the Nyquist frequency, with intervals by bootstrap over images, and its difference from
dense, image by image.

The data are seen in the runs' size, cropped and scaled as ADM does. Where runs are scaled down by LlamaGen's bicubic
filter, which is not antialiased, high frequencies are folded back: then levels are those of the scaling as well, and
only the differences between caches count.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.options import shown  # noqa: E402
from autoregressive.sample.run_folder import bar_interval  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.bootstrap import mean_interval  # noqa: E402
from evaluations.extractors import EvaluationError  # noqa: E402
from evaluations.features import Features, FolderImages, ImageSet, open_set  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from evaluations.paper.floor import reconstructed  # noqa: E402
from evaluations.paper.protocol import ClassTask, add_model_flag, load_protocol, output_folder  # noqa: E402
from evaluations.paper.report import interval_told, plt, save_plot, write_report  # noqa: E402
from evaluations.paper.rows import NONE, Cost  # noqa: E402
from evaluations.paper.runs import reference_images, reference_set, sampled  # noqa: E402
from tokenizer.tokenizer_image.images import center_crop  # noqa: E402

BATCH, MOST = 32, 10_000  # images at a time, and of a set
HOW = """\
Share of the energy of the luminance between 1/4 and 1/2 cycles per pixel (half of Nyquist and Nyquist), in images of
{size} pixels under a Hann window, without the mean; mean over images, with 95 % intervals by bootstrap. White noise has
75 %."""
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, of gamma-coded values, as Pillow's mode L


@dataclass
class Spectrum:
    """Of a set of N images of P x P pixels.

    Attributes:
        frequencies: [P // 2], in cycles per pixel.
        power: [N, P // 2].
        shares: [N], of energy in high frequencies.
    """

    frequencies: np.ndarray
    power: np.ndarray
    shares: np.ndarray


def power_spectra(luminance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radial power spectra of square images, and the share of their energy in high frequencies.

    Of the luminance Y, less its mean, under a periodic Hann window w: P = |FFT(w (Y - mean))|^2 / sum(w^2), where the
    mean is weighted by w, so that nothing is left at frequency 0. White noise of variance s^2 has power s^2 everywhere.

    The high-frequency share is sum(P where 1/4 < f <= 1/2) / sum(P where 0 < f <= 1/2), with f the distance from
    frequency 0 in cycles per pixel: 1/2 is the Nyquist frequency, and the corners beyond it, which not all directions
    have, don't count. It is 3/4 for white noise, and 0 by definition for an image of one colour.

    Args:
        luminance: [B, N, N].

    Returns:
        frequencies [N // 2], in cycles per pixel, 1/N apart; the power [B, N // 2] at each, which is the mean over the
        ring of that width around it; and the shares [B]. All float64.
    """
    size = luminance.shape[1]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    window = np.outer(hann, hann)
    mean = (luminance * window).sum((1, 2), keepdims=True) / window.sum()
    power = np.abs(np.fft.fft2(window * (luminance - mean))) ** 2 / (window**2).sum()

    axis = np.fft.fftfreq(size)
    radius = np.hypot(*np.meshgrid(axis, axis))
    ring = np.round(radius * size).astype(int).ravel()
    rings = size // 2
    members = np.bincount(ring)[1 : rings + 1]
    flat = power.reshape(len(power), -1)
    radial = np.stack([np.bincount(ring, weights)[1 : rings + 1] / members for weights in flat])

    energy = power[:, (radius > 0) & (radius <= 0.5)].sum(1)
    high = power[:, (radius > 0.25) & (radius <= 0.5)].sum(1)
    shares = np.divide(high, energy, out=np.zeros_like(high), where=energy > 1e-20 * size**2)
    return np.arange(1, rings + 1) / size, radial, shares


def spectrum(images: ImageSet, size: int) -> Spectrum:
    """Of a set of images, or of MOST of a larger one, evenly spread.

    Args:
        images: those of another size are cropped and scaled as ADM does.
        size: pixels along a side.
    """
    count = min(len(images), MOST)
    chosen = [i * len(images) // count for i in range(count)]
    power, shares = [], []
    with tqdm(total=count, desc=f"spectra of {shown(images.path)}", unit=" images", mininterval=bar_interval()) as bar:
        for start in range(0, count, BATCH):
            pictures = [images.read(i) for i in chosen[start : start + BATCH]]
            pictures = [p if p.shape[:2] == (size, size) else center_crop(Image.fromarray(p), size) for p in pictures]
            frequencies, of_power, of_shares = power_spectra(np.stack(pictures) @ LUMA / 255)
            power.append(of_power)
            shares.append(of_shares)
            bar.update(len(pictures))
    return Spectrum(frequencies, np.concatenate(power), np.concatenate(shares))


def data_set(task: ClassTask) -> ImageSet:
    """The reference's images. Raises EvaluationError if they are not there."""
    found = reference_set(task)[0] if task.reference.exists() else None
    return reference_images(task) if found is None or isinstance(found, Features) else found


def plot(spectra: Mapping[str, Spectrum], paired: Sequence[str]) -> Figure:
    """Mean power against frequency; and its ratio to the first one's, with an interval for those that are paired."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    dense = next(iter(spectra.values()))
    base = dense.power.mean(0)
    for title, found in spectra.items():
        (line,) = left.loglog(found.frequencies, found.power.mean(0), label=title)
        if found is dense:
            right.axhline(0, color=line.get_color())
            continue
        right.semilogx(found.frequencies, 10 * np.log10(found.power.mean(0) / base), color=line.get_color())
        if title in paired:
            _, low, high = mean_interval((found.power - dense.power) / base)
            edges = (10 * np.log10(np.clip(1 + edge, 1e-3, None)) for edge in (low, high))
            right.fill_between(found.frequencies, *edges, color=line.get_color(), alpha=0.2)
    for axis in (left, right):
        axis.axvline(0.25, color="grey", linestyle=":")
        axis.set_xlabel("frequency, cycles per pixel (dotted: half of Nyquist)")
        axis.grid(alpha=0.3, which="both")
    left.set(title="radial power spectrum of the luminance", ylabel="power")
    right.set(title="against dense, with 95 % intervals", ylabel="ratio of power, dB")
    left.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flag(parser)
    add = parser.add_argument
    add("--images", type=positive, metavar="N", help="of each cache (default: as Table 1 has)")
    args = parser.parse_args(argv)
    protocol = load_protocol(args.model)
    task = protocol.c2i
    folder = output_folder(args, "spectrum", protocol)
    caches = [None, *({"policy": "adsa", "budget": budget} for budget in task.budgets)]
    runs = [sampled(task, cache, task.seeds[0], args.images) for cache in caches]
    titles = [Cost.of(cache, [run]).title for cache, run in zip(caches, runs, strict=True)]
    sets = {title: open_set(run, "")[0] for title, run in zip(titles, runs, strict=True)}
    size = sets[titles[0]].read(0).shape[0]
    notes = []
    for title, find in (
        ("data", lambda: data_set(task)),
        ("data, VQ reconstructions", lambda: FolderImages(reconstructed(task))),
    ):
        try:
            sets[title] = find()
        except EvaluationError as error:
            notes.append(f"Not measured: {title}: {error}.")
    spectra = {title: spectrum(images, size) for title, images in sets.items()}
    save_plot(folder / "spectrum.png", plot(spectra, titles))

    dense, lines, rows = spectra[titles[0]], [], []
    for title, found in spectra.items():
        mean, *interval = map(float, mean_interval(found.shares))
        row = {"title": title, "images": len(found.shares), "share": mean, "share_interval": interval}
        less = NONE
        if title in titles[1:]:
            difference, *of_difference = map(float, mean_interval(found.shares - dense.shares))
            row |= {"less_dense": difference, "less_dense_interval": of_difference}
            less = interval_told(100 * difference, [100 * edge for edge in of_difference])
        lines.append([title, str(row["images"]), interval_told(100 * mean, [100 * edge for edge in interval]), less])
        rows.append(row | {"power": found.power.mean(0).tolist()})
    columns = ["images of", "images", "high-frequency energy, %", "less dense, image by image"]
    table = markdown.table(columns, lines)
    text = "\n\n".join(["![spectra](spectrum.png)", HOW.format(size=size), table, *notes])
    numbers = {
        "seed": task.seeds[0],
        "image_size": size,
        "frequencies": dense.frequencies.tolist(),
        "rows": rows,
        "notes": notes,
    }
    write_report(folder, "spectrum", argv, task, text, numbers, runs)


if __name__ == "__main__":
    guarded(main)
