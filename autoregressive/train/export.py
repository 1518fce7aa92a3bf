"""Export the weights of a training run (tokenizer or GPT) as one small .safetensors file.

    python autoregressive/train/export.py --run runs/gpt_demo --out pretrained_models/demo/gpt_c2i.safetensors

The averaged weights of the newest checkpoint are taken, if the run keeps an average. The file's metadata holds the
model's registered name, its ModelArgs as JSON and the step, so that samplers need no flags for it. The names of a GPT's
classes, if they are known, go into classes.json beside it, where samplers find them.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from autoregressive.models.checkpoint import CheckpointError, save_safetensors
from autoregressive.train.training import TrainingError, load_latest_checkpoint
from tokenizer.files import write_json

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WHOLE = re.compile("(.*)")


def export(run: Path, out: Path, dtype: torch.dtype, ema: bool = True, pattern: re.Pattern = WHOLE) -> dict[str, str]:
    """Write the newest checkpoint of `run` to `out`, and class names beside it; returns the metadata.

    Raises:
        TrainingError: there is no checkpoint, or `pattern` does not match a class; see :func:`class_names`.
        CheckpointError: `out` can't be written.
    """
    checkpoint = load_latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise TrainingError(f"{run} has no checkpoints (expected {run}/checkpoints/*.pt)")
    names = class_names(checkpoint, pattern)
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
    if names:
        write_json(out.with_name("classes.json"), {"classes": names})
    return metadata


def class_names(checkpoint: dict, pattern: re.Pattern) -> list[str] | None:
    """The names that train_c2i.py keeps in a checkpoint, or for one from before it did so, those beside the codes.

    Names are cut to the first group of `pattern`. Raises TrainingError where it doesn't match.
    """
    names = checkpoint.get("classes")
    if "classes" not in checkpoint and "code_path" in checkpoint["args"]:
        names = json.loads((Path(checkpoint["args"]["code_path"]) / "meta.json").read_text())["classes"]
    if names is None:
        return None
    found = [pattern.fullmatch(name) for name in names]
    if None in found:
        raise TrainingError(f"--class-pattern {pattern.pattern} does not match the class {names[found.index(None)]}")
    return [match[min(1, pattern.groups)] for match in found]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of vq_train.py or train_c2i.py")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True, help="prefer averaged weights")
    parser.add_argument(
        "--class-pattern",
        metavar="REGEX",
        type=re.compile,
        default=WHOLE,
        help="for classes.json: what its group holds of a folder's name is the name of the class; default: all of it",
    )
    args = parser.parse_args(argv)
    try:
        metadata = export(args.run, args.out, DTYPES[args.dtype], args.ema, args.class_pattern)
    except (TrainingError, CheckpointError, OSError) as error:
        sys.exit(f"export: {error}")
    print(f"{args.out}: {metadata['model']} of step {metadata['steps']}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
