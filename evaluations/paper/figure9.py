"""Memory against batch size: weights and KV cache apart, dense against each budget. See --help."""

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adsa import CacheConfig  # noqa: E402
from autoregressive.models.generate import new_cache  # noqa: E402
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer  # noqa: E402
from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import device_name, start_processes  # noqa: E402
from autoregressive.sample.run_folder import RunError, bar_interval  # noqa: E402
from autoregressive.sample.sampler import PRECISIONS, Blueprint, cache_title, peak_memory  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from evaluations.paper.protocol import Task, TextTask, add_model_flag, load_protocol, output_folder  # noqa: E402
from evaluations.paper.report import save_plot, write_report  # noqa: E402
from tokenizer.files import write_json  # noqa: E402
from tokenizer.tokenizer_image.vq_model import ModelArgs as VQArgs  # noqa: E402
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel  # noqa: E402

DESCRIPTION = """\
Memory against batch size, weights and KV cache apart, dense against each budget (the paper's Figure 9): by the formula,
for the models of --model and for LlamaGen-XL; and measured, where a point fits into --max-gib, by a process of its own
that makes weights and cache, fills them and does the last decode step. Weights need no file, as their values don't
matter, but where the sizes of a model stand in its checkpoint alone.

Writes a plot for each model, table.md and table.json. Points that table.json has from this machine are not measured
anew. The demo takes about ten minutes on two cores."""

GIB = 2**30
DEVICES_GB = (24, 40, 80)  # of 10^9 bytes


@dataclass(frozen=True)
class Shape:
    """What a model's memory depends on.

    Attributes:
        name: of the protocol and task, as "demo c2i".
        gpt, vq: the models' arguments.
        precision: of GPT and cache, a key of PRECISIONS; the tokenizer is float32.
        guided: whether guidance doubles the rows.
        budgets: cached image tokens.
    """

    name: str
    gpt: ModelArgs
    vq: VQArgs
    precision: str
    guided: bool
    budgets: tuple[int, ...]

    @property
    def title(self) -> str:
        precision = "fp32" if self.precision == "none" else self.precision
        return f"{self.name}: {self.gpt.block_size} tokens, {precision}{', with guidance' if self.guided else ''}"

    @property
    def caches(self) -> dict[str, CacheConfig]:
        """By title: dense, and each budget; where there is text, also dense with a slot for each text token."""
        dense = CacheConfig("full")
        found = {"dense, text not folded": replace(dense, fold_condition=False)} if self.gpt.cls_token_num > 1 else {}
        for config in (dense, *(CacheConfig("adsa", budget) for budget in self.budgets)):
            found[cache_title(config, self.gpt.block_size)] = config
        return found

    def models(self) -> tuple[Transformer, VQModel]:
        """Without weights."""
        with torch.device("meta"):
            models = Transformer(self.gpt).to(PRECISIONS[self.precision]), VQModel(self.vq)
        return tuple(model.eval().requires_grad_(False) for model in models)


def cache_bytes(shape: Shape, config: CacheConfig, images: int, device: str = "cpu") -> dict[str, int]:
    """The formula: bytes of the KV cache of a batch.

    Keys and values are 2 * layers * rows * heads * (condition slots + image slots) * head_dim numbers. What ADSA notes
    beside them is, for each layer, row and head, a position and a norm for each image slot, and head_dim sums. With
    text there is a bias for each slot, for padding and fold.

    Args:
        shape: of the models; rows are images, or twice as many under guidance.
        config: "full", or "adsa" as it is by default.
        images: in the batch.
        device: "cpu" or "cuda": where a bias in half precision takes two slots for the fold.

    Returns:
        "kv", and "notes": all the rest.
    """
    args, tokens = shape.gpt, shape.gpt.block_size
    number = PRECISIONS[shape.precision].itemsize
    sums = max(number, 4)
    bias = sums if device == "cpu" else number
    text = args.cls_token_num > 1
    condition = (1 if bias >= 4 else 2) if text and config.fold_condition else args.cls_token_num
    slots = condition + config.slots(tokens)
    rows = images * (2 if shape.guided else 1)
    heads = rows * args.kv_heads
    notes = rows * slots * bias if text else 0
    if config.slots(tokens) < tokens:
        notes += heads * (config.budget * (4 + sums) + args.head_dim * sums)
    return {"kv": 2 * args.n_layer * heads * slots * args.head_dim * number, "notes": args.n_layer * notes}


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def measure(shape: Shape, config: CacheConfig, images: int, device: str) -> dict[str, int]:
    """Make weights and cache, fill them, and do the last decode step. To be run in a process that did nothing before.

    Returns:
        "allocated" and "kv": bytes of the cache by its storages, in all and of keys and values alone. And by torch's
        allocator on CUDA, by the process' resident memory on the CPU: "weights", "cache", and "step", what taking in
        the condition and the last token took at its peak beyond both.
    """
    gpt, vq = shape.models()
    base = in_use(device)
    for model in (gpt, vq):
        for tensor in model.to_empty(device=device).state_dict().values():
            tensor.zero_()
    weights = in_use(device) - base

    args, guidance = gpt.config, 2.0 if shape.guided else 1.0
    masks = torch.ones(images, args.cls_token_num) if args.cls_token_num > 1 else None
    kv = new_cache(gpt, images, args.block_size, masks, guidance, config)
    for tensor in kv.tensors():
        tensor.fill_(1)  # or the system would not give the memory
    cache = in_use(device) - base - weights

    for layer in kv.layers:  # as full as they are before the last token
        zeros = torch.zeros(1, device=device).expand(kv.batch, args.kv_heads, args.cls_token_num, args.head_dim)
        layer.insert_condition(zeros, zeros)
        layer.count = layer.slots.count = layer.slots.filled = min(layer.slots.capacity, args.block_size - 1)
        layer.slots.clock.fill_(layer.count)
    token = torch.zeros(kv.batch, 1, dtype=torch.long, device=device)
    position = torch.tensor([args.cls_token_num + args.block_size - 1], device=device)
    with torch.no_grad():
        gpt(idx=token, input_pos=position, cache=kv)
    return {
        "allocated": kv.nbytes(),
        "kv": kv.kv_nbytes(),
        "weights": weights,
        "cache": cache,
        "step": max(0, peak(device) - base - weights - cache),
    }


def in_use(device: str) -> int:
    """Bytes: on CUDA those of torch's allocator, on the CPU the process' resident memory."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def peak(device: str) -> int:
    """The most that :func:`in_use` has been in this process."""
    status = Path("/proc/self/status")
    if device == "cuda" or not status.exists():
        return peak_memory(torch.device(device))
    # Linux' ru_maxrss, which peak_memory reads, begins with the memory of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])


def measured(shape: Shape, config: CacheConfig, images: int, device: str) -> dict[str, int]:
    """:func:`measure` in a fresh process.

    Raises:
        RunError: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, shape, config, images, device).result()
        except BrokenProcessPool:
            raise RunError(
                f"measuring {shape.name} with {images} images: the process was killed, as when memory runs out; give "
                f"a smaller --max-gib. What was measured so far is not measured anew"
            ) from None


def shape_of(task: Task, name: str, device: torch.device) -> Shape:
    """The models of a task: by their registered names, where the configuration gives these, else by the checkpoints.

    Args:
        task: of a protocol.
        name: of the protocol.
        device: that samples; the precision follows it where none is given, but for LlamaGen-XL, which is for GPUs.

    Raises:
        OptionError, CheckpointError: the configuration tells no sizes, and a checkpoint is missing.
    """
    text, options = isinstance(task, TextTask), task.options()
    model, precision = options.model, options.model.precision
    named = model.gpt_model in GPT_models and model.vq_model in VQ_models and model.image_size is not None
    if named and not (Path(model.gpt_ckpt).exists() and Path(model.vq_ckpt).exists()):
        with torch.device("meta"):
            vq = VQ_models[model.vq_model]()
            tokens = (model.image_size // vq.config.downsample_size) ** 2
            condition = {"model_type": "t2i", "cls_token_num": 120} if text else {"model_type": "c2i"}
            gpt = GPT_models[model.gpt_model](block_size=tokens, vocab_size=vq.config.codebook_size, **condition)
    else:
        blueprint = Blueprint(model, device)
        gpt, vq = blueprint.gpt, blueprint.vq
    return Shape(
        name=f"{name} {'t2i' if text else 'c2i'}",
        gpt=gpt.config,
        vq=vq.config,
        precision=precision or ("bf16" if device.type == "cuda" or name == "XL" else "none"),
        guided=options.sampling.cfg_scale > 1,
        budgets=task.budgets,
    )


# Results


def rows_of(shape: Shape, batch_sizes: Sequence[int], device: str) -> list[dict[str, Any]]:
    """By the formula, a row for each batch size and cache; what is saved is told against the dense cache."""
    gpt, vq = map(weight_bytes, shape.models())
    rows = []
    for images in batch_sizes:
        dense = sum(cache_bytes(shape, CacheConfig("full"), images, device).values())
        for title, config in shape.caches.items():
            parts = cache_bytes(shape, config, images, device)
            cache = sum(parts.values())
            rows.append(
                {
                    "model": shape.name,
                    "precision": shape.precision,
                    "device": device,
                    "images": images,
                    "cache": title,
                    "gpt_bytes": gpt,
                    "vq_bytes": vq,
                    "kv_bytes": parts["kv"],
                    "cache_bytes": cache,
                    "total_bytes": gpt + vq + cache,
                    "cache_saved": round(1 - cache / dense, 6),
                    "total_saved": round(1 - (gpt + vq + cache) / (gpt + vq + dense), 6),
                }
            )
    return rows


def fitting(row: dict[str, Any], room: float) -> int:
    """How many images at a time fit into `room` bytes beside the weights, by the formula, which has no activations."""
    per_image = row["cache_bytes"] / row["images"]
    return max(0, int((room - row["gpt_bytes"] - row["vq_bytes"]) // per_image))


def table(shapes: Sequence[Shape], rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a section for each model."""
    lines = [
        "GiB (2^30 bytes) of the KV cache with all that belongs to it, by the formula, and in brackets what is saved "
        "of weights and cache together, against the dense cache. Largest batches are for GB of 10^9 bytes, and leave "
        "no room for activations.",
    ]
    for shape in shapes:
        mine = [row for row in rows if row["model"] == shape.name]
        titles = list(shape.caches)
        ones = {row["cache"]: row for row in mine[: len(titles)]}
        gpt, vq = (f"{mine[0][key] / GIB:.3f}" for key in ("gpt_bytes", "vq_bytes"))
        cells = []
        for start in range(0, len(mine), len(titles)):
            cells.append([str(mine[start]["images"])])
            for row in mine[start : start + len(titles)]:
                saved = "" if row["cache"] == "dense" else f" ({100 * row['total_saved']:.1f} %)"
                cells[-1].append(f"{row['cache_bytes'] / GIB:.3f}{saved}")
        cells.append(["saved of the cache", *(f"{100 * row['cache_saved']:.1f} %" for row in ones.values())])
        for room in DEVICES_GB:
            cells.append([f"largest batch in {room} GB", *(str(fitting(row, room * 1e9)) for row in ones.values())])
        lines += [
            "",
            f"## {shape.title}",
            "",
            f"Weights: GPT {gpt} GiB, tokenizer (fp32) {vq} GiB.",
            "",
            markdown.table(["images", *titles], cells),
            *measured_table([row for row in mine if row["measured"]]),
        ]
    return "\n".join(lines)


def measured_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: the measured points of one model; none if there are none."""
    if not rows:
        return []
    off = [abs(row["measured"]["allocated"] - row["cache_bytes"]) for row in rows]
    what = "resident memory" if rows[0]["device"] == "cpu" else "memory of torch's allocator"
    cells = []
    for row in rows:
        found = {key: value / 2**20 for key, value in row["measured"].items()}
        weights, cache = ((row["gpt_bytes"] + row["vq_bytes"]) / 2**20, row["cache_bytes"] / 2**20)
        both = [f"{found['weights']:.1f} ({weights:.1f})", f"{found['cache']:.1f} ({cache:.1f})"]
        cells.append([str(row["images"]), row["cache"], *both, f"{found['step']:.1f}"])
    columns = ["images", "cache", "weights (formula)", "cache (formula)", "a decode step beyond both"]
    return [
        "",
        f"Measured in {len(rows)} points: the cache's storages are off the formula by at most {max(off)} bytes. MiB of "
        f"{what} that a process of its own takes:",
        "",
        markdown.table(columns, cells),
    ]


def draw(shape: Shape, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of weights and cache for each batch size, measured points upon them, and what is saved of all."""
    rows = [row for row in rows if row["model"] == shape.name]
    sizes = list(dict.fromkeys(row["images"] for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(3, 2))
    width = 0.8 / len(shape.caches)
    for i, title in enumerate(shape.caches):
        mine = [row for row in rows if row["cache"] == title]
        x = np.arange(len(sizes)) + (i + 0.5) * width - 0.4
        weights = np.array([row["gpt_bytes"] + row["vq_bytes"] for row in mine]) / GIB
        left.bar(x, weights, width, color="0.6", label="weights" if i == 0 else None)
        left.bar(x, [row["cache_bytes"] / GIB for row in mine], width, bottom=weights, color=f"C{i}", label=title)
        points = [(at, row["measured"]) for at, row in zip(x, mine, strict=True) if row["measured"]]
        heights = [(point["weights"] + point["cache"]) / GIB for _, point in points]
        label = "measured" if points and not any(line.get_label() == "measured" for line in left.lines) else None
        left.plot([at for at, _ in points], heights, "k_", markersize=8, label=label)
        if title != "dense":
            saved = [100 * row["total_saved"] for row in mine]
            right.plot(sizes, saved, "o-", color=f"C{i}", markersize=3, label=title)
            right.axhline(100 * mine[0]["cache_saved"], color=f"C{i}", linestyle=":", linewidth=1)
    left.set_xticks(range(len(sizes)), sizes)
    left.set(xlabel="images in a batch", ylabel="memory (GiB)", title=shape.title)
    left.legend(fontsize=8)
    right.set_xscale("log", base=2)
    right.set_xticks(sizes, sizes)
    right.set(xlabel="images in a batch", ylabel="saved of weights and cache (%)", title="dotted: of the cache alone")
    right.legend(fontsize=8)
    save_plot(path, figure)


def key_of(row: dict[str, Any]) -> str:
    """What a measured point is known by: all that the formula says of it."""
    return json.dumps({key: value for key, value in row.items() if key != "measured"})


def earlier(path: Path, machine: str) -> dict[str, dict[str, int]]:
    """The points that an earlier table.json has from this machine, by :func:`key_of`."""
    try:
        record = json.loads(path.read_text())
        rows = record["rows"] if record["machine"] == machine else []
        return {key_of(row): row["measured"] for row in rows if row["measured"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flag(parser)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=("c2i", "t2i"), default=["c2i", "t2i"], help="of each model (default: both)")
    sizes = [1, 2, 4, 8, 16, 32, 64]
    told = f"images (default: {' '.join(map(str, sizes))})"
    add("--batch-sizes", nargs="+", type=positive, default=sizes, metavar="N", help=told)
    add(
        "--max-gib",
        type=float,
        metavar="G",
        help="measure points up to this size, 0: none (default: half of the memory that is free, on a CPU at most 8)",
    )
    args = parser.parse_args(argv)
    protocol = load_protocol(args.model)
    protocols = [protocol] if protocol.name == "XL" else [protocol, load_protocol("XL")]
    folder = output_folder(args, "figure9", protocol)
    task = getattr(protocol, args.tasks[0])
    device = start_processes(task.cpu).device
    shapes = [shape_of(getattr(each, name), each.name, device) for each in protocols for name in args.tasks]
    room = free_gib(device) if args.max_gib is None else args.max_gib

    machine = device_name(device)
    rows = [row for shape in shapes for row in rows_of(shape, sorted(set(args.batch_sizes)), device.type)]
    known = earlier(folder / "table.json", machine)
    for row in rows:
        row["measured"] = known.get(key_of(row))
    by_name = {shape.name: shape for shape in shapes}
    wanted = [row for row in rows if row["measured"] is None and row["total_bytes"] <= room * GIB]
    for row in tqdm(wanted, desc="measuring", unit=" points", mininterval=bar_interval()):
        shape = by_name[row["model"]]
        row["measured"] = measured(shape, shape.caches[row["cache"]], row["images"], device.type)
        write_json(folder / "table.json", {"machine": machine, "rows": rows})
    for shape in shapes:
        draw(shape, rows, folder / f"{shape.name.replace(' ', '_')}.png")
    write_report(folder, "figure9", argv, task, table(shapes, rows), {"seeds": [], "rows": rows})


def free_gib(device: torch.device) -> float:
    """How large a point may be where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2 / GIB
    return min(8.0, psutil.virtual_memory().available / 2 / GIB)


if __name__ == "__main__":
    guarded(main)
