"""CLIP score and R-precision: how well the images of a text-conditional run fit their prompts. See --help."""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402

from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import start_processes  # noqa: E402
from evaluations.bootstrap import CONFIDENCE, RESAMPLES, mean_interval  # noqa: E402
from evaluations.clip import embed_images, embed_texts, ready_clip  # noqa: E402
from evaluations.extractors import EvaluationError, folder_state  # noqa: E402
from evaluations.features import FolderImages, ImageSet, open_set, slug  # noqa: E402
from evaluations.flags import add_clip_flags, add_work_flags, positive  # noqa: E402
from evaluations.retrieval import CANDIDATES, SEED, distinct, r_precision  # noqa: E402
from evaluations.table import write_result  # noqa: E402
from tokenizer.files import atomic_file  # noqa: E402

EPILOG = """\
RUN is the folder of a finished run of sample_t2i_ddp.py, or one as LlamaGen leaves it: images/ and captions.txt.

As in GigaGAN's and LlamaGen's evaluation: images are cropped to squares and scaled to 256 pixels (Lanczos), then to
the model's size; "A photo depicts" goes before each prompt; what doesn't fit is cut; the score is the mean cosine.
(LlamaGen's GPU computes in half precision; here it is float32.) R-precision is the share of images that are nearer to
their own prompt than to 99 others of the run. Intervals hold 95 %, by bootstrap over images.

JSON goes to stdout and into RUN's metrics.json, scores of the single images into RUN/clip_scores-MODEL.jsonl.

examples:
  the paper's protocol, by eight GPUs
    torchrun --standalone --nproc-per-node 8 evaluations/clip_score.py samples/RUN
  the demo, which needs no network and was trained on captions without a preface
    python evaluations/clip_score.py samples/RUN --clip-model local-dir:pretrained_models/demo/clip --prefix ''"""


def evaluate(
    run: Path,
    state: PartialState,
    *,
    clip_model: str,
    pretrained: str | None = None,
    prefix: str = "A photo depicts",
    image_size: int = 256,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, Any] | None:
    """Score a run, and keep the scores in its folder; see the module's --help. Called by all processes alike.

    Returns:
        What is printed as JSON, on the main process; None on the others.

    Raises:
        EvaluationError: the message names the file or value and the way out.
    """
    images, prompts, notes = open_run(run)
    texts, own = distinct(prompts)
    clip = ready_clip(clip_model, pretrained, state)
    pictures = embed_images(clip, images, image_size, state, batch_size=batch_size, workers=num_workers)
    prefixed = [f"{prefix} {text}" if prefix else text for text in texts]
    embedded = embed_texts(clip, prefixed, state, batch_size=batch_size)
    if not state.is_main_process:
        return None
    scores = np.einsum("nd,nd->n", pictures, embedded[own])
    hits = r_precision(pictures, embedded, own) if len(texts) > 1 else None
    file = run / f"clip_scores-{slug(clip.name)}.jsonl"
    _write_scores(file, prompts, scores, hits)
    result = {
        "run": str(run),
        "samples_id": images.identity,
        "clip_model": clip.name,
        "clip_weights": clip.weights,
        "clip_files": folder_state(clip_model),
        "prefix": prefix,
        "image_size": image_size,
        "counts": {"images": len(scores), "prompts": len(texts)},
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        **_mean("clip_score", scores),
        **_mean("r_precision", hits),
        "protocol": {
            "r_precision_candidates": min(CANDIDATES, len(texts)),
            "confidence": CONFIDENCE,
            "bootstrap_resamples": RESAMPLES,
            "seed": SEED,
        },
        "scores": file.name,
        "notes": notes,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch")},
    }
    write_result(run, result, "clip_score", ("clip_model",))
    return result


def open_run(run: Path) -> tuple[ImageSet, list[str], list[str]]:
    """The images of a run, the prompt of each, and notes. Raises EvaluationError where they don't match."""
    try:
        prompts = (run / "captions.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{run / 'captions.txt'}: no readable prompts ({error}); RUN is a folder that sample_t2i_ddp.py has filled"
        ) from error
    if (run / "run.json").exists():
        images, notes = open_set(run, "")[0], []
    else:
        images, notes = FolderImages(run / "images"), []
        images.files.sort(key=lambda file: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", str(file))])
        if len(prompts) > len(images):  # LlamaGen writes all prompts, however few it samples
            notes.append(f"{run}: {len(prompts)} prompts, of which the first {len(images)} have an image")
            prompts = prompts[: len(images)]
    if len(prompts) != len(images) or len(prompts) < 2:
        raise EvaluationError(
            f"{run}: {len(images)} images and {len(prompts)} prompts in captions.txt; there must be one for each, and "
            "two or more"
        )
    return images, prompts, notes


def _mean(name: str, values: np.ndarray | None) -> dict[str, Any]:
    """The mean of some values and its interval, under their names."""
    if values is None:
        return {name: None, f"{name}_interval": None}
    mean, low, high = map(float, mean_interval(values, SEED))
    return {name: mean, f"{name}_interval": [low, high]}


def _write_scores(file: Path, prompts: Sequence[str], scores: np.ndarray, hits: np.ndarray | None) -> None:
    with atomic_file(file) as lines:
        for index, text in enumerate(prompts):
            hit = None if hits is None else bool(hits[index])
            line = {"index": index, "text": text, "clip_score": round(float(scores[index]), 6), "r_precision": hit}
            lines.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def summary(result: dict[str, Any]) -> str:
    """The result as a table for people."""

    def number(name: str) -> str:
        if result[name] is None:
            return "-"
        low, high = result[f"{name}_interval"]
        return f"{result[name]:.4f}  ({low:.4f} to {high:.4f})"

    counts, candidates = result["counts"], result["protocol"]["r_precision_candidates"]
    rows = [
        ("model", result["clip_model"]),
        ("images", f"{counts['images']} of {counts['prompts']} prompts, {result['run']}"),
        ("CLIP score", number("clip_score")),
        ("R-precision", f"{number('r_precision')} among {candidates}"),
        *(("note", note) for note in result["notes"]),
    ]
    return "\n".join(f"{name:<13}{value}" for name, value in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(
        description=__doc__.split(" See")[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of a run with its prompts")
    add_clip_flags(parser)
    add("--prefix", default="A photo depicts", metavar="TEXT", help="goes before each prompt (default: %(default)s)")
    add(
        "--image-size",
        type=positive,
        default=256,
        metavar="PIXELS",
        help="to which images are scaled before the model scales them to its size (default: %(default)s)",
    )
    add_work_flags(parser)
    args = vars(parser.parse_args(argv))
    state = start_processes(args.pop("cpu"))
    try:
        result = evaluate(args.pop("run"), state, **args)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(f"{error}; a smaller --batch-size than {args['batch_size']} needs less") from error
    if result is not None:
        print(summary(result), file=sys.stderr)
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    guarded(main)
