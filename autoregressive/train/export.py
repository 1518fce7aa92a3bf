"""Export the weights of a training run (tokenizer or GPT) as one small .safetensors file.

    python autoregressive/train/export.py --run runs/gpt_demo --out pretrained_models/demo/gpt_c2i.safetensors

The averaged weights of the newest checkpoint are taken, if the run keeps an average. The file's metadata holds the
model's registered name, its ModelArgs as JSON and the step, so that samplers need no flags for it.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from autoregressive.models.checkpoint import CheckpointError, save_safetensors
from autoregressive.train.training import TrainingError, load_latest_checkpoint

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def export(run: Path, out: Path, dtype: torch.dtype, ema: bool = True) -> dict[str, str]:
    """Write the newest checkpoint of `run` to `out`; returns the metadata. Raises TrainingError if there is none."""
    checkpoint = load_latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise TrainingError(f"{run} has no checkpoints (expected {run}/checkpoints/*.pt)")
    weights = checkpoint["ema"] if ema and "ema" in checkpoint else checkpoint["model"]
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if "quantize.codebook_used" in weights:  # the trainer's window of recent codes: not exact in half precision
        weights["quantize.codebook_used"].zero_()
    metadata = {
        "model": checkpoint["name"],
        "args": json.dumps(checkpoint["config"]),
        "steps": str(checkpoint["steps"]),
    }
    save_safetensors(out, weights, metadata)
    return metadata


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of vq_train.py or train_c2i.py")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True, help="prefer averaged weights")
    args = parser.parse_args(argv)
    try:
        metadata = export(args.run, args.out, DTYPES[args.dtype], args.ema)
    except (TrainingError, CheckpointError) as error:
        sys.exit(f"export: {error}")
    print(f"{args.out}: {metadata['model']} of step {metadata['steps']}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
