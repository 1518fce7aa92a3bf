"""What train_c2i.py and train_t2i.py share: codes, the loop, validation losses and sample grids."""

import argparse
import hashlib
import json
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from autoregressive.models.checkpoint import load_model
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.train.training import (
    Ema,
    MappedArray,
    TrainingError,
    TrainingRun,
    add_training_flags,
    build_accelerator,
    build_optimizer,
    set_learning_rate,
    swapped_weights,
    writing,
)
from tokenizer.tokenizer_image.images import image_grid, save_image_atomic, to_uint8
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel


class CodeDataset(Dataset):
    """Codes of one folder. Subclasses know what the images show.

    An item is (codes int64 [tokens], *condition), addressed by (epoch, index). What is drawn at random, as the variant
    of the codes, is drawn by (seed, epoch, index).

    Attributes:
        meta: what extract_codes_c2i.py wrote beside the codes.
        class_names: to be kept with the model, if it has classes and they have names.
        labels: int [images], class of each image.
        tokens: codes per image.
    """

    class_names: list[str] | None = None

    def __init__(self, path: Path, seed: int):
        missing = [name for name in ("codes.npy", "labels.npy", "meta.json") if not (path / name).exists()]
        if missing:
            raise TrainingError(
                f"{path} has no {', '.join(missing)}: make it with autoregressive/train/extract_codes_c2i.py "
                "(started again, it finishes an interrupted job)"
            )
        self.path, self.meta = path, json.loads((path / "meta.json").read_text())
        self.codes = MappedArray(path / "codes.npy")
        labels = np.load(path / "labels.npy")
        self.kept = np.flatnonzero(labels >= 0)
        self.labels = labels[self.kept]
        self.seed, self.tokens = seed, self.codes.array.shape[2]
        if not len(self.kept):
            raise TrainingError(f"{path} holds no images")

    @property
    def identity(self) -> dict[str, str]:
        """What tells these codes from others, for people and for comparison."""
        images, variants, tokens = self.codes.array.shape
        digest = hashlib.sha256((self.path / "meta.json").read_bytes()).hexdigest()[:16]
        return {"the codes": f"{images} x {variants} x {tokens}, sha256 of meta.json {digest}"}

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        return self.item(index, np.random.default_rng((self.seed, epoch, index)))

    def item(self, index: int, rng: np.random.Generator | None = None) -> tuple:
        """One image's codes and condition; without `rng` its plain centre crop and first condition."""
        variants = self.variants(index)
        codes = variants[0 if rng is None else rng.integers(len(variants))]
        return torch.from_numpy(codes.astype(np.int64)), *self.condition(index, rng)

    def variants(self, index: int) -> np.ndarray:
        """All variants of one image's codes, [variants, tokens]; the first is the plain centre crop."""
        return self.codes[self.kept[index]]

    def condition(self, index: int, rng: np.random.Generator | None = None) -> tuple:
        """What the model is told of an image: what `generate` takes as (cond,) or (cond, emb_masks), for one image."""
        raise NotImplementedError

    def inputs(self, *condition: Tensor) -> dict[str, Tensor]:
        """The condition of a batch as arguments of Transformer.forward, with all codes but the last."""
        return {"cond_idx": condition[0]}


Example = tuple[str, tuple]  # what to write under a sample, and its condition


# May change when a run goes on, besides FREE_FLAGS: validation and sample grids; and where the codes lie, as they are
# told by what they are.
FREE_GPT_FLAGS = {"code_path", "val_code_path", "val_images", "vq_ckpt", "sample_every", "cfg_scale", "top_k"}


def add_gpt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that both GPT trainers share."""
    add = parser.add_argument
    add("--code-path", type=Path, required=True, help="folder made by extract_codes_c2i.py")
    add("--val-code-path", type=Path, help="codes of held-out images, for a validation loss")
    add("--val-images", type=int, default=512, help="how many of them, spread evenly")
    add("--gpt-model", choices=list(GPT_models), default="GPT-B")
    add("--init-from", "--gpt-ckpt", type=Path, dest="init_from", help="start from these weights (EMA if it has them)")
    add("--vocab-size", type=int, help="default: the codes' codebook size")
    add("--class-dropout-prob", type=float, default=0.1, help="share of images trained without condition, for guidance")
    add("--dropout-p", type=float, default=0.1, help="after attention and feed-forward; 0 if --drop-path-rate is set")
    add("--token-dropout-p", type=float, default=0.1)
    add("--drop-path-rate", type=float, default=0.0)
    add("--token-noise", type=float, default=0.0, help="replace up to this share of an image's input tokens by others'")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for the matrices of the layers")
    add("--vq-ckpt", type=Path, help="tokenizer weights, to draw sample grids")
    add("--sample-every", type=int, default=5000, help="steps between sample grids")
    add("--cfg-scale", type=float, default=2.0, help="of the sample grids")
    add("--top-k", type=int, default=0, help="of the sample grids")
    add_training_flags(parser)


def build_gpt(args: argparse.Namespace, data: CodeDataset, **condition) -> Transformer:
    """The GPT for these codes, freshly initialised; `condition` are the ModelArgs of the condition."""
    vocab_size = args.vocab_size or data.meta["codebook_size"]
    if vocab_size < data.meta["codebook_size"]:
        raise TrainingError(f"{args.code_path} needs --vocab-size >= {data.meta['codebook_size']}, got {vocab_size}")
    dropout = 0.0 if args.drop_path_rate > 0 else args.dropout_p
    return GPT_models[args.gpt_model](
        vocab_size=vocab_size,
        block_size=data.tokens,
        class_dropout_prob=args.class_dropout_prob,
        resid_dropout_p=dropout,
        ffn_dropout_p=dropout,
        token_dropout_p=args.token_dropout_p,
        drop_path_rate=args.drop_path_rate,
        **condition,
    )


def noised(codes: Tensor, share: float) -> Tensor:
    """Input codes [B, N] with some replaced by what another image of the batch has in that place.

    In each image a share between 0 and `share`, drawn evenly. Trained to say what comes next all the same, a model that
    knows its data by heart finds back after a token that it has sampled wrong, and heeds its condition more.
    """
    share = torch.rand(len(codes), 1, device=codes.device) * share
    other = codes.gather(0, torch.randint(len(codes), codes.shape, device=codes.device))
    return torch.where(torch.rand(codes.shape, device=codes.device) < share, other, codes)


def _batch(items: list[tuple], device: torch.device) -> list[Tensor]:
    return [t.to(device) for t in default_collate(items)]


@torch.no_grad()
def validation_loss(model: Transformer, data: CodeDataset, images: int, batch: int, device: torch.device) -> float:
    """Mean cross-entropy in nats per token over the plain variants of `images` images, given their conditions."""
    chosen = np.linspace(0, len(data) - 1, min(images, len(data))).astype(int)
    total = 0.0
    for i in range(0, len(chosen), batch):
        codes, *condition = _batch([data.item(j) for j in chosen[i : i + batch]], device)
        _, loss = model(idx=codes[:, :-1], targets=codes, **data.inputs(*condition))
        total += loss.item() * len(codes)
    return total / len(chosen)


def load_tokenizer(args: argparse.Namespace, data: CodeDataset, device: torch.device) -> VQModel:
    """The tokenizer that made the codes."""
    meta = data.meta
    sizes = {"codebook_size": meta["codebook_size"], "codebook_embed_dim": meta["codebook_embed_dim"]}
    return load_model(VQ_models[meta["vq_model"]](**sizes), args.vq_ckpt).eval().to(device)


@torch.no_grad()
def save_samples(
    path: Path, model: Transformer, vq: VQModel, examples: list[Example], args: argparse.Namespace
) -> None:
    """One image for each example, always from the same seeds."""
    config = model.config
    images = []
    for i in range(0, len(examples), 32):
        part = examples[i : i + 32]
        cond, *masks = _batch([condition for _, condition in part], next(model.parameters()).device)
        seeds = torch.arange(i, i + len(part))
        options = {"cfg_scale": args.cfg_scale, "top_k": args.top_k, "seeds": seeds}
        tokens = generate(model, cond, config.block_size, *masks, **options)
        shape = (len(part), vq.config.codebook_embed_dim, config.grid_size, config.grid_size)
        images += list(to_uint8(vq.decode_code(tokens, shape)))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image_atomic(path, image_grid(images, 8, [title for title, _ in examples]))


def train_gpt(
    args: argparse.Namespace,
    data: CodeDataset,
    held_out: CodeDataset | None,
    examples: list[Example],
    build_model: Callable[[], tuple[Transformer, dict]],
    free: set[str] = frozenset(),
) -> None:
    """Run until the last step, or until SIGTERM / SIGINT, which saves a checkpoint first.

    Args:
        args: the flags of add_gpt_flags.
        data: training images.
        held_out: images for the validation loss.
        examples: conditions of the sample grids.
        build_model: makes the model that training starts from, and fields for the log's first line.
        free: flags besides FREE_GPT_FLAGS that may change when a run goes on.
    """
    accelerator = build_accelerator(args)
    device = accelerator.device

    torch.manual_seed(args.global_seed)
    model, notes = build_model()
    model = model.to(device)
    optimizer = build_optimizer(model, args, inner=lambda name: name.startswith("layers."))
    ema = Ema(model, args.ema_decay) if args.ema else None
    run = TrainingRun(
        args,
        accelerator,
        len(data),
        data.identity,
        {"model": model, "optimizer": optimizer},
        ema,
        about={"name": args.gpt_model, "config": asdict(model.config), "classes": data.class_names},
        free=FREE_GPT_FLAGS | free,
        notes=notes,
    )
    vq = load_tokenizer(args, data, device) if args.vq_ckpt and accelerator.is_main_process else None

    raw = model
    model = accelerator.prepare(model)
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = accelerator.prepare(optimizer)
    forward = torch.compile(model) if args.compile else model
    raw.train()
    micro = args.global_batch_size // accelerator.num_processes // args.gradient_accumulation_steps

    def evaluate(sample: bool) -> None:
        if not accelerator.is_main_process:
            return
        with swapped_weights(raw, ema.weights if ema else None):
            raw.eval()
            if held_out and not sample:
                run.log.write(step=run.step, val_loss=validation_loss(raw, held_out, args.val_images, micro, device))
            if vq and sample:
                path = args.results_dir / "samples" / f"{run.step:07d}.png"
                with writing(path):
                    save_samples(path, raw, vq, examples, args)
            raw.train()
        run.meter.reset()

    with closing(run.batches(data)) as batches:
        for batch in batches:
            batch = [t.to(device, non_blocking=True) for t in batch]
            set_learning_rate(optimizer, run.learning_rate())
            loss = torch.zeros((), device=device)
            parts = zip(*(t.split(micro) for t in batch), strict=True)
            for i, (codes, *condition) in enumerate(parts, 1):
                last = i == args.gradient_accumulation_steps
                with nullcontext() if last else accelerator.no_sync(model):
                    inputs = noised(codes[:, :-1], args.token_noise) if args.token_noise else codes[:, :-1]
                    _, part_loss = forward(idx=inputs, targets=codes, **data.inputs(*condition))
                    part_loss = part_loss / args.gradient_accumulation_steps
                    accelerator.backward(part_loss)
                loss += part_loss.detach()
            values = {"loss": loss}
            if args.max_grad_norm:
                values["grad_norm"] = accelerator.clip_grad_norm_(raw.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.update(raw)

            run.count(values)
            if run.due(args.eval_every):
                evaluate(sample=False)
            if run.due(args.ckpt_every):
                run.save()
            if run.due(args.sample_every):
                evaluate(sample=True)
    run.finish()
