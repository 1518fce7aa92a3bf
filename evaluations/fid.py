"""FID, sFID, Inception Score, precision, recall and KID of a set of images against a reference. See --help."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import start_processes  # noqa: E402
from evaluations.extractors import INCEPTION, EvaluationError, load_extractor  # noqa: E402
from evaluations.features import Features, ImageSet, extract, open_set  # noqa: E402
from evaluations.flags import add_work_flags, positive  # noqa: E402
from evaluations.metrics import compare  # noqa: E402
from evaluations.table import write_result  # noqa: E402

EPILOG = """\
SAMPLES and REFERENCE are each an .npz file of images (arr_0, uint8 [N, H, W, 3]), the folder of a sampling run, or a
folder of images with any folders inside. REFERENCE may also be a file of features, as this script leaves beside the
images (*features-EXTRACTOR.npz), or ADM's .npz of statistics (mu, sigma, mu_s, sigma_s, with arr_0 or without).

JSON goes to stdout, and for a run into its metrics.json too, where evaluations/table.py finds it; a table to stderr.

examples:
  the paper's protocol: 50 000 samples against ADM's ImageNet reference
    torchrun --standalone --nproc-per-node 8 evaluations/fid.py samples/RUN VIRTUAL_imagenet256_labeled.npz
  the demo, which needs no network
    python evaluations/fid.py samples/RUN pretrained_models/demo/reference.features-efficientnet-lite0.npz \\
        --feature-extractor efficientnet-lite0
  pictures of some folders alone
    python evaluations/fid.py samples/RUN data/emoji/train --reference-classes '*_twemoji' \\
        --feature-extractor efficientnet-lite0"""


def evaluate(
    samples: str | Path,
    reference: str | Path,
    state: PartialState,
    *,
    feature_extractor: str = INCEPTION,
    batch_size: int = 64,
    num_workers: int = 0,
    image_size: int | None = None,
    reference_classes: list[str] | None = None,
    fid_infinity: bool = False,
) -> dict[str, Any] | None:
    """All metrics of SAMPLES against REFERENCE, see the module's --help. Called by all processes alike.

    Returns:
        What is printed as JSON, on the main process; None on the others. Metrics that can't be had are None.

    Raises:
        EvaluationError: the message names the file or value and the way out.
    """
    load = functools.cache(lambda: load_extractor(feature_extractor))

    def features(images: ImageSet | Features | None) -> Features | None:
        if images is None or isinstance(images, Features):
            return images
        return extract(
            images,
            feature_extractor,
            load,
            state,
            batch_size=batch_size,
            workers=num_workers,
            image_size=image_size,
        )

    ours, _, notes = open_set(Path(samples), feature_extractor, image_size)
    theirs, statistics, more = open_set(Path(reference), feature_extractor, image_size, reference_classes)
    if ours is None:
        raise EvaluationError(f"{samples}: holds statistics but no images to judge")
    identity = statistics.identity if theirs is None else theirs.identity
    samples_id = ours.identity
    ours, theirs = features(ours), features(theirs)
    if not state.is_main_process:
        return None
    found = compare(ours, theirs, statistics, fid_infinity=fid_infinity, device=state.device)
    protocol, told = found.pop("protocol"), found.pop("notes")
    return {
        "samples": str(samples),
        "samples_id": samples_id,
        "reference": " ".join([str(reference), *(reference_classes or ())]),
        "reference_id": identity,
        "extractor": feature_extractor,
        "image_size": image_size,
        "counts": {"samples": len(ours), "reference": None if theirs is None else len(theirs)},
        **found,
        "protocol": protocol,
        "notes": notes + more + told,
        "versions": {name: version(name) for name in ("torch", "torch-fidelity", "timm", "open_clip_torch")},
    }


def summary(result: dict[str, Any]) -> str:
    """The result as a table for people."""

    def number(value: float | None, deviation: float | None = None, digits: int = 3) -> str:
        if value is None:
            return "-"
        return f"{value:.{digits}f}" + ("" if deviation is None else f" +- {deviation:.{digits}f}")

    counts = result["counts"]
    rows = [
        ("extractor", result["extractor"]),
        ("samples", f"{counts['samples']} of {result['samples']}"),
        ("reference", f"{counts['reference'] or 'statistics'} of {result['reference']}"),
        ("FID", number(result["fid"])),
        *([("FID, extrapolated", number(result["fid_infinity"]))] if "fid_infinity" in result else []),
        ("sFID", number(result["sfid"])),
        ("Inception Score", number(result["is"], result["is_std"])),
        ("precision", number(result["precision"])),
        ("recall", number(result["recall"])),
        ("KID", number(result["kid"], result["kid_std"], 6)),
        *(("note", note) for note in result["notes"]),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split(". See")[0] + ".", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help="images to judge")
    add("reference", metavar="REFERENCE", help="images that they should resemble")
    add(
        "--feature-extractor",
        default=INCEPTION,
        metavar="NAME",
        help=f"{INCEPTION} (default: the FID network), efficientnet-lite0 (needs no network), timm/NAME or "
        "open_clip/NAME/TAG. Numbers of different extractors do not compare",
    )
    add(
        "--image-size",
        type=positive,
        metavar="PIXELS",
        help="first crop and scale all images to squares of this size, as ADM does (default: images as they are)",
    )
    add(
        "--reference-classes",
        nargs="+",
        metavar="GLOB",
        help="only these of the folders in a REFERENCE folder (default: all of it)",
    )
    add("--fid-infinity", action="store_true", help="also extrapolate FID to infinitely many samples; slow")
    add_work_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    args = vars(parse_args(argv))
    state = start_processes(args.pop("cpu"))
    samples, reference = args.pop("samples"), args.pop("reference")
    try:
        result = evaluate(samples, reference, state, **args)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(f"{error}; a smaller --batch-size than {args['batch_size']} needs less") from error
    if result is None:
        return
    print(summary(result), file=sys.stderr)
    print(json.dumps(result, indent=2))
    if os.path.exists(os.path.join(samples, "run.json")):
        write_result(Path(samples), result)


if __name__ == "__main__":
    guarded(main)
