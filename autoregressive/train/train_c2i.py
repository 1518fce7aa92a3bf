"""Train a class-conditional GPT on the codes that extract_codes_c2i.py made, LlamaGen's or this project's.

    python autoregressive/train/train_c2i.py --code-path codes/train384 --gpt-model GPT-B --results-dir results/b384
    torchrun --nproc_per_node 8 autoregressive/train/train_c2i.py ...      # the same on eight GPUs

A run folder holds log.jsonl, checkpoints/, and samples/ (grids drawn along the way, if --vq-ckpt is given). Started
again with the same folder, a run goes on from its last checkpoint and makes the very steps an unbroken run would have
made. A model for larger images may start from one trained on smaller ones by --init-from: weights don't depend on it.
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from autoregressive.models.checkpoint import CheckpointError, load_model
from autoregressive.models.gpt import Transformer
from autoregressive.train.gpt_training import CodeDataset, Example, add_gpt_flags, build_gpt, train_gpt
from autoregressive.train.training import HelpFormatter, TrainingError


class ClassDataset(CodeDataset):
    """Codes and labels: an item is (codes int64 [tokens], label)."""

    def __init__(self, path: Path, seed: int, num_classes: int | None = None):
        super().__init__(path, seed)
        names = self.meta["classes"]
        self.num_classes = num_classes or len(names)
        self.class_names = [names[i] if i < len(names) else f"class {i}" for i in range(self.num_classes)]
        if self.num_classes <= self.labels.max():
            raise TrainingError(f"{path} needs --num-classes > {self.labels.max()}, got {self.num_classes}")

    def condition(self, index: int, rng: np.random.Generator | None = None) -> tuple[int]:
        return (int(self.labels[index]),)


class LlamaGenDataset(ClassDataset):
    """The same from what LlamaGen's own extraction wrote: PATH/*_codes/{i}.npy, PATH/*_labels/{i}.npy, i = 0, 1, ...

    They hold integers [1, variants, tokens] and [1]. Beside a PATH that ends in ten_crop, PATH_105 (there from crops of
    another --crop-range) gives more variants, as in LlamaGen.
    """

    def __init__(self, path: Path, seed: int, num_classes: int | None = None):
        folders = sorted(path.glob("*_codes"))
        if len(folders) != 1:
            raise TrainingError(
                f"{path} has {len(folders)} folders *_codes, expected one: {', '.join(map(str, folders))}"
            )
        self.labels_path = path / f"{folders[0].name.removesuffix('_codes')}_labels"
        self.code_paths = [folders[0]]
        if path.name.endswith("ten_crop") and (more := path.with_name(f"{path.name}_105") / folders[0].name).is_dir():
            self.code_paths.append(more)
        counts = {str(folder): sum(1 for _ in folder.glob("*.npy")) for folder in (self.labels_path, *self.code_paths)}
        self.count = counts[str(folders[0])]
        last = folders[0] / f"{self.count - 1}.npy"
        if len(set(counts.values())) > 1 or not last.exists():
            raise TrainingError(f"incomplete codes of LlamaGen: there are {counts} files, and {last} must be the last")
        self.seed, self.tokens = seed, self.variants(0).shape[1]
        self.num_classes = num_classes or 1000
        self.meta = {"vq_model": "VQ-16", "codebook_size": 16384, "codebook_embed_dim": 8}  # all that LlamaGen has

    @property
    def identity(self) -> dict[str, str]:
        digest = hashlib.sha256(self.variants(0).tobytes()).hexdigest()[:16]
        return {"the codes": f"{self.count} of LlamaGen, {self.tokens} tokens each, sha256 of the first {digest}"}

    def __len__(self) -> int:
        return self.count

    def variants(self, index: int) -> np.ndarray:
        return np.concatenate([np.load(folder / f"{index}.npy")[0] for folder in self.code_paths])

    def condition(self, index: int, rng: np.random.Generator | None = None) -> tuple[int]:
        label = int(np.load(self.labels_path / f"{index}.npy")[0])
        if label >= self.num_classes:
            raise TrainingError(f"{self.labels_path}/{index}.npy: class {label} needs --num-classes > {label}")
        return (label,)


def open_codes(path: Path, args: argparse.Namespace) -> ClassDataset:
    """The codes of a folder, whoever extracted them."""
    kind = LlamaGenDataset if any(path.glob("*_codes")) else ClassDataset
    return kind(path, args.global_seed, args.num_classes)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--num-classes", type=int, help="default: as many as the codes tell; for LlamaGen's codes 1000")
    parser.add_argument("--sample-classes", type=int, nargs="+", help="one image each; default: 32 spread evenly")
    add_gpt_flags(parser)
    return parser.parse_args(argv)


def build_model(args: argparse.Namespace, data: ClassDataset) -> tuple[Transformer, dict]:
    """The GPT for these codes, with weights from --init-from if given; and nothing to note in the log."""
    model = build_gpt(args, data, num_classes=data.num_classes, cls_token_num=1)
    return load_model(model, args.init_from) if args.init_from else model, {}


def examples(args: argparse.Namespace, data: ClassDataset) -> list[Example]:
    """The --sample-classes, for sample grids."""
    count = data.num_classes
    classes = args.sample_classes or np.linspace(0, count - 1, min(32, count)).astype(int).tolist()
    if not all(0 <= c < count for c in classes):
        raise TrainingError(f"--sample-classes {' '.join(map(str, classes))}: classes are 0 to {count - 1}")
    return [(data.class_names[c] if data.class_names else f"class {c}", (c,)) for c in classes]


def train(args: argparse.Namespace) -> None:
    """See the module's docstring."""
    data = open_codes(args.code_path, args)
    held_out = open_codes(args.val_code_path, args) if args.val_code_path else None
    if held_out and held_out.class_names != data.class_names:
        raise TrainingError(f"{args.val_code_path} and {args.code_path} have different classes: extract both alike")
    train_gpt(args, data, held_out, examples(args, data), lambda: build_model(args, data), {"sample_classes"})


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse_args(argv))
    except (TrainingError, CheckpointError) as error:
        sys.exit(f"train_c2i: {error}")


if __name__ == "__main__":
    main()
