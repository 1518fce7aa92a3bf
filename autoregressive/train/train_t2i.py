"""Train a text-conditional GPT on codes (extract_codes_c2i.py) and text features (extract_text_features.py).

    python autoregressive/train/train_t2i.py --code-path codes/photos --text-path features/photos --gpt-model GPT-XL \\
        --results-dir results/t2i
    torchrun --nproc_per_node 8 autoregressive/train/train_t2i.py ...      # the same on eight GPUs

Both are made from one captions file. Of the captions of an image, each epoch draws one. The run folder, and going on
from it, are as in train_c2i.py. --init-from takes weights of a text model, or of a class model of the same size: then
everything but the embedding of the condition is taken over.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.checkpoint import CheckpointError, load_model, read_state_dict
from autoregressive.models.gpt import Transformer
from autoregressive.train.gpt_training import CodeDataset, Example, add_gpt_flags, build_gpt, train_gpt
from autoregressive.train.text_features import TextFeatures
from autoregressive.train.training import HelpFormatter, TrainingError


def attention_mask(valid: Tensor, image_tokens: int) -> Tensor:
    """Who attends to whom in training: causal, and nobody to padding but padding itself, so that no row is empty.

    Args:
        valid: bool [B, T], which condition tokens are no padding.
        image_tokens: S, those that follow them.

    Returns:
        bool [B, 1, T + S, T + S].
    """
    columns = torch.cat([valid, valid.new_ones(len(valid), image_tokens)], dim=1)
    length = columns.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    mask = causal & columns[:, None]
    return (mask | torch.eye(length, dtype=torch.bool, device=valid.device))[:, None]


class CaptionDataset(CodeDataset):
    """Codes and captions: an item is (codes int64 [tokens], features float32 [T, C], valid bool [T])."""

    def __init__(self, codes: Path, text: Path, seed: int, length: int | None = None):
        super().__init__(codes, seed)
        self.text = TextFeatures(text)
        self.length = length or self.text.meta["max_length"]
        if self.length < self.text.meta["max_length"]:
            raise TrainingError(
                f"--cls-token-num {self.length} is less than the {self.text.meta['max_length']} tokens that captions "
                f"of {text} may have"
            )
        names = json.loads((codes / "images.json").read_text())
        self.images = [names[i] for i in self.kept]
        missing = [name for name in self.images if name not in self.text.captions]
        if missing:
            raise TrainingError(
                f"{text} has no captions for {len(missing)} images of {codes}, such as {missing[0]}: make both from "
                "one captions file (extract_codes_c2i.py --data-path, extract_text_features.py --captions)"
            )

    @property
    def identity(self) -> dict[str, str]:
        return super().identity | self.text.identity

    def caption(self, index: int, rng: np.random.Generator | None = None) -> str:
        """One of an image's captions, or without `rng` its first."""
        captions = self.text.captions[self.images[index]]
        return captions[0 if rng is None else rng.integers(len(captions))]

    def condition(self, index: int, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
        return self.text.padded(self.caption(index, rng), self.length)

    def inputs(self, features: Tensor, valid: Tensor) -> dict[str, Tensor]:
        return {"cond_idx": features, "mask": attention_mask(valid, self.tokens - 1)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--text-path", type=Path, required=True, help="folder made by extract_text_features.py")
    add("--val-text-path", type=Path, help="the same for --val-code-path")
    add("--cls-token-num", type=int, help="condition tokens; default: the max_length of the features")
    add(
        "--sample-images",
        type=int,
        default=32,
        help="of a sample grid: half of training, then half of held-out captions, at least one each",
    )
    add_gpt_flags(parser)
    args = parser.parse_args(argv)
    if (args.val_code_path is None) != (args.val_text_path is None):
        parser.error("--val-code-path and --val-text-path go together")
    return args


def load_shared(model: Transformer, path: Path) -> list[str]:
    """Load weights of a text or of a class model; the latter has no captions, so that what embeds them stays as it is.

    Returns:
        Names of the tensors that stay as they are.

    Raises:
        CheckpointError: the file can't be read or is of another size.
    """
    table = read_state_dict(path).get("cls_embedding.embedding_table.weight")
    if table is None:
        load_model(model, path)
        return []
    with torch.device("meta"):
        classes = {"num_classes": len(table), "class_dropout_prob": 0}  # with a null class or without: as many rows
        donor = Transformer(replace(model.config, model_type="c2i", cls_token_num=1, **classes))
    taken = load_model(donor, path).state_dict()
    fresh = [name for name in model.state_dict() if name not in taken]
    model.load_state_dict({name: taken.get(name, tensor) for name, tensor in model.state_dict().items()})
    return fresh


def build_model(args: argparse.Namespace, data: CaptionDataset) -> tuple[Transformer, dict]:
    """The GPT for these codes and features; what --init-from gave it goes into the log."""
    condition = {"model_type": "t2i", "caption_dim": data.text.meta["caption_dim"], "cls_token_num": data.length}
    model = build_gpt(args, data, **condition)
    notes = {"text_encoder": data.text.meta["text_encoder"]["name"]}
    if args.init_from:
        fresh = load_shared(model, args.init_from)
        notes |= {"tensors_taken": len(model.state_dict()) - len(fresh), "tensors_fresh": fresh}
    return model, notes


def examples(args: argparse.Namespace, datasets: list[CaptionDataset]) -> list[Example]:
    """First captions of images spread evenly over each data set."""
    found = []
    for data in datasets:
        count = min(max(1, args.sample_images // len(datasets)), len(data))
        for i in np.linspace(0, len(data) - 1, count).astype(int):
            found.append((data.caption(i), data.condition(i)))
    return found


def train(args: argparse.Namespace) -> None:
    """See the module's docstring."""
    data = CaptionDataset(args.code_path, args.text_path, args.global_seed, args.cls_token_num)
    held_out = None
    if args.val_code_path:
        held_out = CaptionDataset(args.val_code_path, args.val_text_path, args.global_seed, data.length)
        if held_out.text.meta["text_encoder"] != data.text.meta["text_encoder"]:
            raise TrainingError(f"{args.val_text_path} and {args.text_path} are of different text encoders")
    shown = examples(args, [data, held_out] if held_out else [data])
    free = {"text_path", "val_text_path", "sample_images"}
    train_gpt(args, data, held_out, shown, lambda: build_model(args, data), free)


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse_args(argv))
    except (TrainingError, CheckpointError) as error:
        sys.exit(f"train_t2i: {error}")


if __name__ == "__main__":
    main()
