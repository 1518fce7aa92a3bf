"""Measure what holding the text tokens as one slot saves: slots, bytes, and milliseconds per decode step.

    python scripts/benchmark_fold.py                                                   the demo's shape and GPT-XL's
    python scripts/benchmark_fold.py --shapes GPT-XL --batch-size 16 --precision bf16

Weights are random, as nothing measured depends on them. Each cache is filled as it is near the end of an image of 1024
tokens; then some decode steps are timed, all caches with and without the fold in turn, over and over. The medians go
into table.md, and everything into table.json, in the folder --output.
"""

import argparse
import copy
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adsa import CacheConfig, KVCache  # noqa: E402
from autoregressive.models.generate import new_cache  # noqa: E402
from autoregressive.models.gpt import GPT_models, Transformer  # noqa: E402
from autoregressive.sample.grid import compared  # noqa: E402
from autoregressive.sample.job import device_name, versions  # noqa: E402
from autoregressive.sample.options import OptionError, Options, RunOptions  # noqa: E402
from autoregressive.sample.sampler import PRECISIONS, cache_title  # noqa: E402
from evaluations import markdown  # noqa: E402
from tokenizer.files import atomic_file, write_json  # noqa: E402

TOKENS = 1024
# What the shipped text model has, and LlamaGen's.
SHAPES = {
    "GPT-Demo": {"cls_token_num": 24, "caption_dim": 384, "vocab_size": 4096},
    "GPT-XL": {"cls_token_num": 120, "caption_dim": 2048, "vocab_size": 16384},
}


@dataclass
class Case:
    """One cache, filled, and the milliseconds that a step took in each repeat."""

    title: str
    fold: bool
    kv: KVCache
    times: list[float] = field(default_factory=list)

    def row(self) -> dict:
        text, image = self.kv.condition_slots, self.kv.slots
        return {
            "cache": self.title,
            "fold": self.fold,
            "text_slots": text,
            "image_slots": image,
            "slots": text + image,
            "kv_bytes": self.kv.kv_nbytes(),
            "bytes": self.kv.nbytes(),
            "ms_per_step": round(statistics.median(self.times), 4),
            "ms_per_step_all": [round(ms, 4) for ms in self.times],
        }


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model of this shape with random weights."""
    with torch.device("meta"):
        model = GPT_models[shape](model_type="t2i", block_size=TOKENS, **SHAPES[shape])
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.02)
    return model


def filled(model: Transformer, config: CacheConfig, images: int, steps: int) -> KVCache:
    """A cache as it is `steps` before the end, for guided sampling: random tokens, a quarter of the text no padding."""
    args, weight = model.config, model.tok_embeddings.weight
    masks = torch.zeros(images, args.cls_token_num)
    masks[:, -(args.cls_token_num // 4) :] = 1
    kv = new_cache(model, images, TOKENS, masks, 2.0, config)
    features = torch.randn(2 * images, args.cls_token_num, args.caption_dim).to(weight)
    model(cond_idx=features, cache=kv)
    for _ in range(min(kv.layers[0].slots.capacity, TOKENS - steps)):
        for layer in kv.layers:
            layer.update(*torch.randn(2, 2 * images, args.kv_heads, 1, args.head_dim, device=weight.device))
    return kv


def step_time(model: Transformer, kv: KVCache, steps: int) -> float:
    """Milliseconds per step of a decode that goes on from a copy of this cache."""
    kv, device = copy.deepcopy(kv), model.tok_embeddings.weight.device
    token = torch.zeros(kv.batch, 1, dtype=torch.long, device=device)
    positions = torch.arange(model.config.cls_token_num + TOKENS)[-steps:].to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for position in positions.split(1):
        model(idx=token, input_pos=position, cache=kv)
    wait()
    return 1000 * (time.perf_counter() - start) / steps


@torch.no_grad()
def measure(shape: str, caches: Sequence[CacheConfig], args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row of the table for each cache, without the fold and with it."""
    torch.manual_seed(0)
    model = build(shape, device, PRECISIONS[args.precision])
    cases = []
    for config in caches:
        for fold in (False, True):
            kv = filled(model, replace(config, fold_condition=fold), args.batch_size, args.steps)
            cases.append(Case(cache_title(config, TOKENS), fold, kv))
    for repeat in tqdm(range(-1, args.repeats), desc=shape, unit=" rounds"):  # the first warms up
        for case in cases[:: -1 if repeat % 2 else 1]:
            ms = step_time(model, case.kv, args.steps)
            if repeat >= 0:
                case.times.append(ms)
    return [{"shape": shape} | case.row() for case in cases]


def table(rows: Sequence[dict]) -> str:
    """Markdown; each row with the fold tells its time against the row before, without."""
    columns = ["shape", "cache", "fold", "slots (text + image)", "KV MiB", "ms per step", "with fold / without"]
    lines = []
    for i, row in enumerate(rows):
        fold, ratio = "no", ""
        if row["fold"]:
            fold, ratio = "yes", f"{row['ms_per_step'] / rows[i - 1]['ms_per_step']:.3f}"
        slots = f"{row['slots']} ({row['text_slots']} + {row['image_slots']})"
        mib, ms = f"{row['kv_bytes'] / 2**20:.1f}", f"{row['ms_per_step']:.2f}"
        lines.append([row["shape"], row["cache"], fold, slots, mib, ms, ratio])
    return markdown.table(columns, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument(
        "--caches", nargs="+", default=["full", "adsa-512"], metavar="CACHE", help="full or POLICY-BUDGET (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images; guidance doubles the rows (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="decode steps that are timed together (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="how often, for the median (%(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="none", help="none is fp32 (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--output", type=Path, default=Path("results/fold"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    for name in ("batch_size", "steps", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    try:
        caches = [variant.cache_config() for variant in compared(Options(run=RunOptions(compare=args.caches)))]
        args.output.mkdir(parents=True, exist_ok=True)
    except (OptionError, OSError) as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    command = shlex.join(["python", "scripts/benchmark_fold.py", *(sys.argv[1:] if argv is None else argv)])
    rows = [row for shape in args.shapes for row in measure(shape, caches, args, device)]
    about = {
        "command": command,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": versions(),
        "tokens": TOKENS,
        **{name: getattr(args, name) for name in ("batch_size", "precision", "steps", "repeats")},
    }
    cores = f", {about['threads']} threads" if about["threads"] else ""
    told = (
        f"`{command}` on {about['device']}{cores}, torch {torch.__version__}, precision {args.precision}; "
        f"{args.batch_size} guided image(s), the last {args.steps} of {TOKENS} steps, median of {args.repeats}."
    )
    write_json(args.output / "table.json", about | {"rows": rows})
    with atomic_file(args.output / "table.md") as file:
        file.write(f"{table(rows)}\n\n{told}\n".encode())
    print(table(rows))
    print(args.output / "table.md")


if __name__ == "__main__":
    main()
