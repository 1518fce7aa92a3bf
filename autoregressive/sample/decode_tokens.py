"""Make images anew from the tokens of a sampling run, with another size or way of scaling. See --help."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from autoregressive.models.checkpoint import load_model  # noqa: E402
from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import run_job, start_processes  # noqa: E402
from autoregressive.sample.options import ModelOptions  # noqa: E402
from autoregressive.sample.run_folder import RunError, RunFolder, read_record  # noqa: E402
from autoregressive.sample.sampler import decode_images, tokenizer_on_meta  # noqa: E402
from tokenizer.files import fingerprint  # noqa: E402
from tokenizer.tokenizer_image.vq_model import VQModel  # noqa: E402

DESCRIPTION = """\
Decode the tokens that a finished sampling run has kept, by its tokenizer alone, into another run folder beside it:
PNGs, samples.npz and run.json, with the run's labels or captions. Nothing is sampled anew. Killed and started again
with the same command, it goes on where it was."""
EXAMPLES = """\
examples:
  a run that was scaled down from 384 to 256 pixels as LlamaGen does: now antialiased
    python autoregressive/sample/decode_tokens.py samples/RUN --antialias
  at the size of the tokenizer
    python autoregressive/sample/decode_tokens.py samples/RUN --image-size-eval 384"""
KEPT = ("labels.npy", "seeds.npy", "captions.txt", "result.jsonl")  # besides the images


class Decoder:
    """Stands in a job for a Sampler whose tokens are there already.

    Attributes:
        seconds, cache_report: as a Sampler's.
    """

    def __init__(self, vq: VQModel, source: RunFolder, device: torch.device, antialias: bool):
        self.vq, self.source, self.device, self.antialias = vq, source, device, antialias
        self.seconds, self.cache_report = {"vq": 0.0}, {}

    def tokens(self, cond: Tensor, seeds: Tensor, masks: None) -> Tensor:
        """The tokens of the images whose indices `cond` has, [B, N]."""
        return torch.from_numpy(np.stack([self.source.read_tokens(index) for index in cond.tolist()]).astype(np.int64))

    def images(self, tokens: Tensor, size: int) -> np.ndarray:
        """uint8 [B, size, size, 3]."""
        start = time.perf_counter()
        images = decode_images(self.vq, tokens.to(self.device), size, antialias=self.antialias)
        self.seconds["vq"] += time.perf_counter() - start
        return images


def job(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What :func:`run_job` is to be called with, for these arguments; no model is read yet. None: the process's own."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a finished run")
    add("--antialias", action="store_true", help="scale images down antialiased (bicubic); default: as LlamaGen does")
    add("--image-size-eval", type=int, metavar="PX", help="scale images to this; default: the run's own size")
    add("--vq-ckpt", metavar="FILE", help="where the tokenizer lies now, if it was moved; another one is refused")
    add("--per-proc-batch-size", type=int, default=32, metavar="N", help="images at a time (default: %(default)s)")
    add("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    args = parser.parse_args(argv)
    if min(args.per_proc_batch_size, args.image_size_eval or 1) < 1:
        parser.error("--per-proc-batch-size and --image-size-eval must be at least 1")

    record = read_record(args.run)
    if record["status"] != "complete":
        raise RunError(f"{args.run}: this run is not complete; run the same sampling command again, which finishes it")
    settings = record["settings"]
    if "decode.antialias" in settings:
        raise RunError(f"{args.run}: was decoded from another run's tokens and has none: name that run")
    size = args.image_size_eval or settings["run.image_size_eval"]
    source = RunFolder(args.run, settings["run.num_fid_samples"], settings["run.image_size_eval"])
    options = ModelOptions(**record["config"]["model"])
    options.vq_ckpt = args.vq_ckpt or options.vq_ckpt
    vq = tokenizer_on_meta(options)
    if fingerprint(options.vq_ckpt) | {"file": ""} != settings["model.vq_ckpt"] | {"file": ""}:
        raise RunError(f"{options.vq_ckpt}: not the tokenizer of {args.run}; name that one by --vq-ckpt")
    state = start_processes(args.cpu)
    way = f"size-{size}{'-antialias' if args.antialias else ''}"
    decoded = {"run.image_size_eval": size, "decode.antialias": args.antialias, "decode.device": state.device.type}

    def load() -> Decoder:
        return Decoder(load_model(vq, options.vq_ckpt, device=state.device), source, state.device, args.antialias)

    return {
        "state": state,
        "folder": RunFolder(args.run.parent / f"{args.run.name}-decoded-{way}", source.total, size, keeps_tokens=False),
        "batch_size": args.per_proc_batch_size,
        "settings": settings | decoded,
        "details": {"config": record["config"], "decoded_from": args.run.name},
        "files": {name: (args.run / name).read_bytes() for name in KEPT if (args.run / name).exists()},
        "seeds": np.zeros(source.total, np.int64),  # nothing is drawn
        "load": load,
        "conditions": lambda batch: (torch.tensor(batch), None),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    arguments = job(argv)
    run_job(**arguments)
    if arguments["state"].is_main_process:
        folder = arguments["folder"]
        print(f"{folder.total} images in {folder.path}\n{folder.npz}")


if __name__ == "__main__":
    guarded(main)
