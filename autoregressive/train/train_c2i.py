"""Train a class-conditional GPT on the codes that extract_codes_c2i.py made.

    python autoregressive/train/train_c2i.py --code-path codes/train384 --gpt-model GPT-B --results-dir results/b384
    torchrun --nproc_per_node 8 autoregressive/train/train_c2i.py ...      # the same on eight GPUs

A run folder holds log.jsonl, checkpoints/, and samples/ (grids drawn along the way, if --vq-ckpt is given). Started
again with the same folder, a run goes on from its last checkpoint and makes the very steps an unbroken run would have
made. A model for larger images may start from one trained on smaller ones by --init-from: weights don't depend on it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from autoregressive.models.checkpoint import CheckpointError, load_model
from autoregressive.models.gpt import Transformer
from autoregressive.train.gpt_training import CodeDataset, Example, add_gpt_flags, build_gpt, train_gpt
from autoregressive.train.training import TrainingError


class ClassDataset(CodeDataset):
    """Codes and labels: an item is (codes int64 [tokens], label)."""

    def condition(self, index: int, rng: np.random.Generator | None = None) -> tuple[int]:
        return (int(self.labels[index]),)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-classes", type=int, help="default: the number of classes of the codes")
    parser.add_argument("--sample-classes", type=int, nargs="+", help="one image each; default: 32 spread evenly")
    add_gpt_flags(parser)
    return parser.parse_args(argv)


def build_model(args: argparse.Namespace, data: ClassDataset) -> tuple[Transformer, dict]:
    """The GPT for these codes, with weights from --init-from if given; and nothing to note in the log."""
    num_classes = args.num_classes or len(data.meta["classes"])
    if num_classes <= int(data.labels.max()):
        raise TrainingError(f"{args.code_path} needs --num-classes > {int(data.labels.max())}, got {num_classes}")
    model = build_gpt(args, data, num_classes=num_classes, cls_token_num=1)
    return load_model(model, args.init_from) if args.init_from else model, {}


def examples(args: argparse.Namespace, data: ClassDataset) -> list[Example]:
    """The --sample-classes, for sample grids."""
    names = data.meta["classes"]
    classes = args.sample_classes or np.linspace(0, len(names) - 1, min(32, len(names))).astype(int).tolist()
    return [(names[c], (c,)) for c in classes]


def train(args: argparse.Namespace) -> None:
    """See the module's docstring."""
    data = ClassDataset(args.code_path, args.global_seed)
    held_out = ClassDataset(args.val_code_path, args.global_seed) if args.val_code_path else None
    if held_out and held_out.meta["classes"] != data.meta["classes"]:
        raise TrainingError(f"{args.val_code_path} and {args.code_path} have different classes: extract both alike")
    train_gpt(args, data, held_out, examples(args, data), lambda: build_model(args, data), {"sample_classes"})


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse_args(argv))
    except (TrainingError, CheckpointError) as error:
        sys.exit(f"train_c2i: {error}")


if __name__ == "__main__":
    main()
