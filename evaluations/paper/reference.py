"""Make the file of features that a protocol names as its reference, from the reference's images.

    python evaluations/paper/reference.py --model demo

Reads c2i.reference_images (of the folders that c2i.reference_classes names), writes c2i.reference. That file stands for
the images in FID and its kin, so that they need not be there.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.options import shown  # noqa: E402
from evaluations.extractors import EvaluationError  # noqa: E402
from evaluations.features import slug, write_features  # noqa: E402
from evaluations.paper.protocol import load_protocol  # noqa: E402
from evaluations.paper.runs import features_of, reference_images  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", metavar="NAME", help="a protocol of configs/paper, or a .yaml file")
    task = load_protocol(parser.parse_args(argv).model).c2i
    ending = f".features-{slug(task.feature_extractor)}.npz"
    if not task.reference.name.endswith(ending):
        raise EvaluationError(f"c2i.reference is {shown(task.reference)}, and a file of features is called *{ending}")
    found = features_of(reference_images(task), task)
    write_features(task.reference, replace(found, logits=None))  # which are for scores of samples
    print(f"{len(found)} images: {task.reference}")


if __name__ == "__main__":
    guarded(main)
