"""Train a class-conditional GPT on the codes that extract_codes_c2i.py made.

    python autoregressive/train/train_c2i.py --code-path codes/train384 --gpt-model GPT-B --results-dir results/b384
    torchrun --nproc_per_node 8 autoregressive/train/train_c2i.py ...      # the same on eight GPUs

A run folder holds log.jsonl, checkpoints/, and samples/ (grids drawn along the way, if --vq-ckpt is given). Started
again with the same folder, a run goes on from its last checkpoint and makes the very steps an unbroken run would have
made. A model for larger images may start from one trained on smaller ones by --init-from: weights don't depend on it.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.utils.data import Dataset

from autoregressive.models.checkpoint import CheckpointError, load_model
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.train.training import (
    Ema,
    JsonLog,
    Meter,
    StopSignal,
    TrainingError,
    add_training_flags,
    build_accelerator,
    build_optimizer,
    learning_rate,
    load_latest_checkpoint,
    plain_args,
    save_checkpoint,
    seed_step,
    set_learning_rate,
    step_loader,
    swapped_weights,
    total_steps,
)
from tokenizer.tokenizer_image.images import image_grid, save_image_atomic, to_uint8
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel


class CodeDataset(Dataset):
    """Codes and labels of one folder.

    An item is (codes int64 [tokens], label), the variant drawn by (seed, epoch, index).

    Attributes:
        meta: what extract_codes_c2i.py wrote beside the codes.
        tokens: codes per image.
    """

    def __init__(self, path: Path, seed: int):
        missing = [name for name in ("codes.npy", "labels.npy", "meta.json") if not (path / name).exists()]
        if missing:
            raise TrainingError(
                f"{path} has no {', '.join(missing)}: make it with autoregressive/train/extract_codes_c2i.py "
                "(started again, it finishes an interrupted job)"
            )
        self.meta = json.loads((path / "meta.json").read_text())
        self.codes = np.load(path / "codes.npy", mmap_mode="r")
        labels = np.load(path / "labels.npy")
        self.kept = np.flatnonzero(labels >= 0)
        self.labels = labels[self.kept]
        self.seed, self.tokens = seed, self.codes.shape[2]
        if not len(self.kept):
            raise TrainingError(f"{path} holds no images")

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        variant = np.random.default_rng((self.seed, epoch, index)).integers(self.codes.shape[1])
        return self.variant(index, variant)

    def variant(self, index: int, variant: int) -> tuple[torch.Tensor, int]:
        """A given variant; 0 is the plain centre crop."""
        codes = self.codes[self.kept[index], variant].astype(np.int64)
        return torch.from_numpy(codes), int(self.labels[index])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--code-path", type=Path, required=True, help="folder made by extract_codes_c2i.py")
    add("--val-code-path", type=Path, help="codes of held-out images, for a validation loss")
    add("--val-images", type=int, default=512, help="how many of them, spread evenly")
    add("--gpt-model", choices=list(GPT_models), default="GPT-B")
    add("--init-from", "--gpt-ckpt", type=Path, dest="init_from", help="start from these weights (EMA if it has them)")
    add("--vocab-size", type=int, help="default: the codes' codebook size")
    add("--num-classes", type=int, help="default: the number of classes of the codes")
    add("--class-dropout-prob", type=float, default=0.1, help="share of images trained without a class, for guidance")
    add("--dropout-p", type=float, default=0.1, help="after attention and feed-forward; 0 if --drop-path-rate is set")
    add("--token-dropout-p", type=float, default=0.1)
    add("--drop-path-rate", type=float, default=0.0)
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for the matrices of the layers")
    add("--vq-ckpt", type=Path, help="tokenizer weights, to draw sample grids")
    add("--sample-every", type=int, default=5000, help="steps between sample grids")
    add("--sample-classes", type=int, nargs="+", help="one image each; default: 32 spread evenly")
    add("--cfg-scale", type=float, default=2.0, help="of the sample grids")
    add("--top-k", type=int, default=0, help="of the sample grids")
    add_training_flags(parser)
    return parser.parse_args(argv)


def build_model(args: argparse.Namespace, data: CodeDataset) -> Transformer:
    """The GPT for these codes, with weights from --init-from if given."""
    vocab_size = args.vocab_size or data.meta["codebook_size"]
    num_classes = args.num_classes or len(data.meta["classes"])
    if vocab_size < data.meta["codebook_size"] or num_classes <= int(data.labels.max()):
        raise TrainingError(
            f"{args.code_path} needs --vocab-size >= {data.meta['codebook_size']} and --num-classes > "
            f"{int(data.labels.max())}, got {vocab_size} and {num_classes}"
        )
    dropout = 0.0 if args.drop_path_rate > 0 else args.dropout_p
    model = GPT_models[args.gpt_model](
        vocab_size=vocab_size,
        num_classes=num_classes,
        block_size=data.tokens,
        cls_token_num=1,
        class_dropout_prob=args.class_dropout_prob,
        resid_dropout_p=dropout,
        ffn_dropout_p=dropout,
        token_dropout_p=args.token_dropout_p,
        drop_path_rate=args.drop_path_rate,
    )
    return load_model(model, args.init_from) if args.init_from else model


@torch.no_grad()
def validation_loss(model: Transformer, data: CodeDataset, images: int, batch: int, device: torch.device) -> float:
    """Mean cross-entropy in nats per token over the plain variants of `images` images, given their classes."""
    chosen = np.linspace(0, len(data) - 1, min(images, len(data))).astype(int)
    total = 0.0
    for i in range(0, len(chosen), batch):
        codes, labels = zip(*(data.variant(j, 0) for j in chosen[i : i + batch]), strict=True)
        codes, labels = torch.stack(codes).to(device), torch.tensor(labels, device=device)
        _, loss = model(idx=codes[:, :-1], cond_idx=labels, targets=codes)
        total += loss.item() * len(codes)
    return total / len(chosen)


def load_tokenizer(args: argparse.Namespace, data: CodeDataset, device: torch.device) -> VQModel:
    """The tokenizer that made the codes."""
    meta = data.meta
    sizes = {"codebook_size": meta["codebook_size"], "codebook_embed_dim": meta["codebook_embed_dim"]}
    return load_model(VQ_models[meta["vq_model"]](**sizes), args.vq_ckpt).eval().to(device)


@torch.no_grad()
def save_samples(path: Path, model: Transformer, vq: VQModel, data: CodeDataset, args: argparse.Namespace) -> None:
    """One image for each of --sample-classes, always from the same seeds."""
    names = data.meta["classes"]
    classes = args.sample_classes or np.linspace(0, len(names) - 1, min(32, len(names))).astype(int).tolist()
    device = next(model.parameters()).device
    images = []
    for i in range(0, len(classes), 32):
        part = classes[i : i + 32]
        seeds = torch.arange(i, i + len(part))
        cond = torch.tensor(part, device=device)
        tokens = generate(model, cond, data.tokens, cfg_scale=args.cfg_scale, top_k=args.top_k, seeds=seeds)
        side = round(data.tokens**0.5)
        images += list(to_uint8(vq.decode_code(tokens, (len(part), vq.config.codebook_embed_dim, side, side))))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image_atomic(path, image_grid(images, 8, [names[c] for c in classes]))


def train(args: argparse.Namespace) -> None:
    """Run until the last step, or until SIGTERM / SIGINT, which saves a checkpoint first."""
    accelerator = build_accelerator(args)
    device, rank = accelerator.device, accelerator.process_index
    data = CodeDataset(args.code_path, args.global_seed)
    held_out = CodeDataset(args.val_code_path, args.global_seed) if args.val_code_path else None
    if held_out and held_out.meta["classes"] != data.meta["classes"]:
        raise TrainingError(f"{args.val_code_path} and {args.code_path} have different classes: extract both alike")

    torch.manual_seed(args.global_seed)
    model = build_model(args, data).to(device)
    optimizer = build_optimizer(model, args, inner=lambda name: name.startswith("layers."))
    ema = Ema(model, args.ema_decay) if args.ema else None
    steps, step = total_steps(args, len(data)), 0
    checkpoint = load_latest_checkpoint(args.results_dir / "checkpoints")
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if ema:
            ema.load(checkpoint["ema"], checkpoint["ema_updates"])
        step = checkpoint["steps"]
        del checkpoint

    log = JsonLog(args.results_dir / "log.jsonl", accelerator, step)
    parameters = sum(p.numel() for p in model.parameters())
    start = {"processes": accelerator.num_processes, "parameters": parameters, "args": plain_args(args)}
    log.write(step=step, start=True, steps=steps, images=len(data), **start)
    vq = load_tokenizer(args, data, device) if args.vq_ckpt and accelerator.is_main_process else None
    loader = step_loader(data, args, step, accelerator)

    raw = model
    model = accelerator.prepare(model)
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = accelerator.prepare(optimizer)
    forward = torch.compile(model) if args.compile else model
    raw.train()
    micro = args.global_batch_size // accelerator.num_processes // args.gradient_accumulation_steps

    def save() -> None:
        if args.no_local_save or not accelerator.is_main_process:
            return
        state = {"model": raw.state_dict(), "optimizer": optimizer.state_dict(), "args": plain_args(args)}
        state |= {"name": args.gpt_model, "config": asdict(raw.config)}
        if ema:
            state |= {"ema": ema.weights, "ema_updates": ema.updates}
        save_checkpoint(args.results_dir / "checkpoints", step, state, args.keep_checkpoints)

    def evaluate(sample: bool) -> None:
        if not accelerator.is_main_process:
            return
        with swapped_weights(raw, ema.weights if ema else None):
            raw.eval()
            if held_out and not sample:
                log.write(step=step, val_loss=validation_loss(raw, held_out, args.val_images, micro, device))
            if vq and sample:
                save_samples(args.results_dir / "samples" / f"{step:07d}.png", raw, vq, data, args)
            raw.train()

    stop, meter = StopSignal(accelerator), Meter()
    saved = step
    while step < steps and not stop.agreed(step):
        seed_step(args.global_seed, step, rank)
        codes, labels = (t.to(device, non_blocking=True) for t in next(loader))
        rate = learning_rate(step, args, steps)
        set_learning_rate(optimizer, rate)
        loss = torch.zeros((), device=device)
        for i, (part, label) in enumerate(zip(codes.split(micro), labels.split(micro), strict=True), 1):
            last = i == args.gradient_accumulation_steps
            with nullcontext() if last else accelerator.no_sync(model):
                _, part_loss = forward(idx=part[:, :-1], cond_idx=label, targets=part)
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

        step += 1
        meter.add(args.global_batch_size, **values)
        if step % args.log_every == 0 or step == steps:
            log.write(step=step, epoch=step * args.global_batch_size / len(data), lr=rate, **meter.read())
        if step % args.eval_every == 0 or step == steps:
            evaluate(sample=False)
            meter.reset()
        if step % args.ckpt_every == 0 or step == steps:
            save()
            saved = step
        if step % args.sample_every == 0 or step == steps:
            evaluate(sample=True)
            meter.reset()
    if saved != step:
        save()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse_args(argv))
    except (TrainingError, CheckpointError) as error:
        sys.exit(f"train_c2i: {error}")


if __name__ == "__main__":
    main()
