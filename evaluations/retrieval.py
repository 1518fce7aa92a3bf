"""How well a CLIP finds the captions of images, and the images of captions. See --help."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from accelerate import PartialState  # noqa: E402

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import start_processes  # noqa: E402
from autoregressive.train.text_features import read_captions  # noqa: E402
from autoregressive.train.training import TrainingError  # noqa: E402
from evaluations.clip import embed_images, embed_texts, ready_clip  # noqa: E402
from evaluations.extractors import EvaluationError  # noqa: E402
from evaluations.features import FolderImages  # noqa: E402
from evaluations.flags import add_clip_flags, add_work_flags  # noqa: E402

SEED = 2020
CANDIDATES = 100  # in R-precision

EPILOG = """\
CAPTIONS has an image a line: {"image": "name.png", "captions": ["a cat", ...]}; an image's first caption is taken.

JSON goes to stdout: the share of images whose own caption comes first or among the first five of all captions
(image_to_text_r1, image_to_text_r5), the same the other way round, R-precision (the own caption before 99 others drawn
at random), and the mean cosine of pairs and of images with others' captions. A tie counts as lost.

example:
    python evaluations/retrieval.py data/emoji/captions_val.jsonl --clip-model local-dir:pretrained_models/demo/clip"""


class CaptionedImages(FolderImages):
    """The images of a captions file, in its order.

    Attributes:
        texts: the first caption of each.
    """

    def __init__(self, path: Path):
        try:
            captions = read_captions(path)
        except TrainingError as error:
            raise EvaluationError(str(error)) from error
        self.path, self.files = path, [path.parent / name for name in captions]
        self.texts = [found[0] for found in captions.values()]
        self._identify(path.parent)

    def cache(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.features-{name}.npz")


def retrieval(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Recall at 1 and 5 among all pairs, both ways, and mean cosines.

    Args:
        images, texts: float [N, D] of length 1, N at least 2; of one pair in each row.
    """
    cosines = images @ texts.T
    own = np.diag(cosines)
    found = {}
    for name, matrix in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        rank = (matrix >= own[:, None]).sum(1)
        found |= {f"{name}_r{k}": float((rank <= k).mean()) for k in (1, 5)}
    others = (cosines.sum() - own.sum()) / (cosines.size - len(own))
    return found | {"cosine": float(own.mean()), "cosine_of_others": float(others)}


def r_precision(images: np.ndarray, texts: np.ndarray, own: Sequence[int]) -> np.ndarray:
    """Which images are nearer to their own text than to 99 others (Xu et al., arXiv:1711.10485); to all, if fewer.

    The others are drawn without replacement by a fixed seed: images of the same texts in the same order meet the same.

    Args:
        images: float [N, D] of length 1.
        texts: float [U, D] of length 1, U at least 2, of different texts.
        own: which is the text of each image, [N].

    Returns:
        bool [N].
    """
    rng = np.random.default_rng(SEED)
    found = np.empty(len(images), bool)
    for index, text in enumerate(own):
        others = rng.choice(len(texts) - 1, min(CANDIDATES, len(texts)) - 1, replace=False)
        others += others >= text
        found[index] = images[index] @ texts[text] > (texts[others] @ images[index]).max()
    return found


def evaluate(
    captions: Path,
    state: PartialState,
    *,
    clip_model: str,
    pretrained: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, Any] | None:
    """What is printed as JSON, on the main process; None on the others. Called by all processes alike.

    Raises:
        EvaluationError: the message names the file or value and the way out.
    """
    pairs = CaptionedImages(captions)
    texts, own = distinct(pairs.texts)
    if len(texts) < 2:
        raise EvaluationError(f"{captions}: the first captions are all the same; retrieval needs two different ones")
    clip = ready_clip(clip_model, pretrained, state)
    images = embed_images(clip, pairs, None, state, batch_size=batch_size, workers=num_workers)
    embedded = embed_texts(clip, texts, state, batch_size=batch_size)
    if not state.is_main_process:
        return None
    return {
        "captions": str(captions),
        "clip_model": clip.name,
        "clip_weights": clip.weights,
        "counts": {"images": len(pairs), "captions": len(texts)},
        **retrieval(images, embedded[own]),
        "r_precision": float(r_precision(images, embedded, own).mean()),
        "r_precision_candidates": min(CANDIDATES, len(texts)),
    }


def distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different ones of some texts, and for each text its place among them."""
    place: dict[str, int] = {}
    own = [place.setdefault(text, len(place)) for text in texts]
    return list(place), own


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(
        description=__doc__.split(" See")[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("captions", metavar="CAPTIONS", type=Path, help="captions file (.jsonl)")
    add_clip_flags(parser)
    add_work_flags(parser)
    args = vars(parser.parse_args(argv))
    result = evaluate(args.pop("captions"), start_processes(args.pop("cpu")), **args)
    if result is not None:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    guarded(main)
