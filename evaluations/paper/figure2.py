"""Where the GPT looks while it samples: mean attention by distance, in the plane and in raster order. See --help."""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adsa import CacheConfig, LayerCache  # noqa: E402
from autoregressive.models.generate import generate, new_cache  # noqa: E402
from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import device_name  # noqa: E402
from autoregressive.sample.run_folder import bar_interval  # noqa: E402
from autoregressive.sample.sampler import Sampler  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from evaluations.paper.protocol import Task, TextTask, add_model_flag, load_protocol, output_folder  # noqa: E402
from evaluations.paper.report import save_plot, write_report  # noqa: E402

DESCRIPTION = """\
Sample images with the dense cache and note every attention weight of every layer and head: the mean by row and column
offset of query and key, by their distance in raster order, and its shares by layer (the paper's Figure 2).

Writes offsets.png, distance.png, layers.png, table.md and table.json. If table.json is of the same models, seed and
images, nothing is sampled anew. The demo's 64 images take about two minutes on two cores."""

FIRST = 0.05  # of all tokens: those that fix the style, by the paper's section 3
MASS = 0.9  # of the attention on image tokens
TITLES = {
    "condition": "condition",
    "self": "itself",
    "above": "above, columns -1 to 2",
    "recent": "last row's length, others",
    "first": "first 5 %, others",
    "rest": "the rest",
}


class LayerNotes:
    """Sums over the images of one layer's attention; the means over its heads are what is added.

    Attributes:
        weights: float32 [Q, 1 + T], what each query gives to the condition and to each of the T image tokens. The
            queries are the first Q = T - 1 image tokens: the last one is drawn and never asks.
        entropy: [Q], nats, of the attention on image tokens alone.
        needed: [Q], how many image tokens have MASS of it.
    """

    def __init__(self, tokens: int, device: torch.device):
        self.weights = torch.zeros(tokens - 1, 1 + tokens, device=device)
        self.entropy = torch.zeros(tokens - 1, device=device)
        self.needed = torch.zeros(tokens - 1, device=device)

    def add(self, scores: Tensor, condition_slots: int) -> None:
        """One query for each image and head. ``scores``: [B, H, C + N], the condition first, then N tokens in order."""
        weights, image = scores.softmax(-1), scores[..., condition_slots:].softmax(-1)
        query = image.shape[-1] - 1
        self.weights[query, 0] += weights[..., :condition_slots].sum(-1).mean(1).sum()
        self.weights[query, 1 : query + 2] += weights[..., condition_slots:].mean(1).sum(0)
        self.entropy[query] += torch.special.entr(image).sum(-1).mean(1).sum()
        held = image.sort(-1, descending=True).values.cumsum(-1)
        self.needed[query] += ((held < MASS).sum(-1) + 1.0).mean(1).sum()


class Watched:
    """A layer of a dense KV cache that also notes the attention of its first `rows` rows."""

    def __init__(self, layer: LayerCache, notes: LayerNotes, rows: int):
        self.layer, self.notes, self.rows = layer, notes, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.layer.attend(q, k, v)
        if self.layer.count:
            self.notes.add(self.scores(q), self.layer.slots.condition_slots)
        return out

    def scores(self, q: Tensor) -> Tensor:
        """What the softmax is taken of, [B, Hq, C + N] in float32 or wider. ``q``: [B, Hq, 1, D]."""
        keys, _, bias = self.layer.held()
        keys = keys[: self.rows]
        wide = torch.promote_types(keys.dtype, torch.float32)
        q = q[: self.rows, :, 0].to(wide).unflatten(1, (keys.shape[1], -1))  # heads by the head of their keys
        scores = q @ keys.to(wide).mT / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + bias[: self.rows]
        return scores.flatten(1, 2)


@dataclass(frozen=True)
class Attention:
    """Means over images and heads: the arrays of :class:`LayerNotes`, for all layers; float64 [L, Q, ...]."""

    weights: np.ndarray
    entropy: np.ndarray
    needed: np.ndarray

    @classmethod
    def uniform(cls, tokens: int) -> "Attention":
        """One layer that looks everywhere alike, with one condition token; for comparison."""
        cached = np.arange(1, tokens)
        weights = np.tri(tokens - 1, tokens + 1, 1) / (cached[:, None] + 1)
        return cls(weights[None], np.log(cached)[None], np.ceil(MASS * cached)[None])


def measure(sampler: Sampler, conditions: Callable, seeds: np.ndarray, batch: int) -> Attention:
    """Sample images and note their attention: of the conditional half of guidance, as the other has no class or text.

    Args:
        sampler: the models; its cache is not used, but the dense one.
        conditions: image indices -> (cond, masks), as :meth:`Sampler.tokens` takes them.
        seeds: int64, one per image.
        batch: images at a time.
    """
    gpt, tokens, device = sampler.gpt, sampler.tokens_per_image, sampler.device
    notes = [LayerNotes(tokens, device) for _ in gpt.layers]
    with tqdm(total=len(seeds), desc="watching", unit=" images", mininterval=bar_interval()) as bar:
        for start in range(0, len(seeds), batch):
            images = range(start, min(start + batch, len(seeds)))
            cond, masks = conditions(images)
            if cond.is_floating_point():
                cond = cond.to(gpt.tok_embeddings.weight.dtype)
            kv = new_cache(gpt, len(images), tokens, masks, sampler.sampling.cfg_scale)
            kv.layers = [Watched(layer, note, len(images)) for layer, note in zip(kv.layers, notes, strict=True)]
            part = torch.from_numpy(seeds[start : images.stop])
            generate(gpt, cond.to(device), tokens, **asdict(sampler.sampling), seeds=part, kv=kv)
            bar.update(len(images))
    means = ([getattr(note, name) / len(seeds) for note in notes] for name in ("weights", "entropy", "needed"))
    return Attention(*(torch.stack(mean).cpu().double().numpy() for mean in means))


# From weights to numbers. Queries and keys are image tokens; all arrays [Q, T], Q = T - 1.


def distances(tokens: int) -> np.ndarray:
    """Steps in raster order from key back to query; negative where there is nothing to look at yet."""
    return np.arange(tokens - 1)[:, None] - np.arange(tokens)


def offsets(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """How many rows the key is above the query, and how many columns it is to the right of it."""
    grid = math.isqrt(tokens)
    (rows, columns), (key_rows, key_columns) = (np.divmod(np.arange(count), grid) for count in (tokens - 1, tokens))
    return rows[:, None] - key_rows, key_columns - columns[:, None]


def groups(tokens: int) -> dict[str, np.ndarray]:
    """Kinds of keys, bool [Q, T] each; every key that there is belongs to one, the first that it fits.

    "above" is within a column of the query, or of the token that the query predicts, which is to the right of it.
    """
    distance, (rows, columns) = distances(tokens), offsets(tokens)
    keys = np.broadcast_to(np.arange(tokens), distance.shape)
    kinds = {
        "self": distance == 0,
        "above": (rows == 1) & (columns >= -1) & (columns <= 2),
        "recent": distance < math.isqrt(tokens),
        "first": keys < math.ceil(FIRST * tokens),
        "rest": distance >= 0,
    }
    left = distance >= 0
    for name, kind in kinds.items():
        kinds[name], left = kind & left, left & ~kind
    return kinds


def shares(attention: Attention, queries: slice) -> list[dict[str, float]]:
    """Of each layer, what the mean query of `queries` gives to the condition and to each of :func:`groups`."""
    kinds = groups(attention.weights.shape[2] - 1)
    found = []
    for weights, entropy, needed in zip(attention.weights, attention.entropy, attention.needed, strict=True):
        weights = weights[queries]
        row = {"condition": weights[:, 0].mean()}
        row |= {name: (weights[:, 1:] * kind[queries]).sum(1).mean() for name, kind in kinds.items()}
        found.append(row | {"entropy": entropy[queries].mean(), "tokens_for_90": needed[queries].mean()})
    return found


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Key by key."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def by_offset(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean weight of all pairs with the same offsets (NaN where there is no such pair), and their part of the mass.

    Args:
        weights: [Q, T], of image tokens alone.

    Returns:
        Two of [W, 2 W - 1], W being the tokens of a row: rows above, and columns from W - 1 left to W - 1 right.
    """
    queries, tokens = weights.shape
    grid, seen = math.isqrt(tokens), distances(tokens) >= 0
    rows, columns = (offset[seen] for offset in offsets(tokens))
    index = rows * (2 * grid - 1) + columns + grid - 1
    size, shape = grid * (2 * grid - 1), (grid, 2 * grid - 1)
    sums = np.bincount(index, weights[seen], size).reshape(shape)
    pairs = np.bincount(index, minlength=size).reshape(shape)
    return np.divide(sums, pairs, out=np.full(shape, np.nan), where=pairs > 0), sums / queries


def by_distance(weights: np.ndarray) -> np.ndarray:
    """The mean weight of all pairs at each distance, [T - 1], from 0: the query itself. ``weights``: [Q, T]."""
    distance = distances(weights.shape[1])
    seen = distance >= 0
    return np.bincount(distance[seen], weights[seen]) / np.bincount(distance[seen])


def peaks(curve: np.ndarray, grid: int, count: int = 3) -> list[dict[str, float]]:
    """Near 1, 2, ... rows' length, +-2: where the curve is highest, and how often the mean of what is around.

    Around is up to half a row before and after those five.
    """
    found = []
    for whole in range(grid, min(len(curve) - grid // 2, (count + 1) * grid), grid):
        distance = whole - 2 + int(curve[whole - 2 : whole + 3].argmax())
        around = [d for d in range(whole - grid // 2, whole + grid // 2 + 1) if abs(d - whole) > 2]
        found.append({"distance": distance, "times_surroundings": curve[distance] / curve[around].mean()})
    return found


def by_budget(attention: Attention, budget: int) -> dict[str, float]:
    """What ADSA, with its own split of this budget, leaves to the choice: means over layers, and queries when full."""
    prefix, local = CacheConfig("adsa", budget).split
    tokens = attention.weights.shape[2] - 1
    distance, keys = distances(tokens), np.arange(tokens)
    weights = attention.weights.mean(0)[budget:]
    kinds = {"prefix": keys < prefix + 0 * distance, "local": (keys >= prefix) & (distance < local) & (distance >= 0)}
    mass = {name: float((weights[:, 1:] * kind[budget:]).sum(1).mean()) for name, kind in kinds.items()}
    condition = float(weights[:, 0].mean())
    return {
        "budget": budget,
        "prefix_tokens": prefix,
        "local_tokens": local,
        "chosen_tokens": budget - prefix - local,
        "tokens_between": (budget + 1 + tokens - 1) / 2 - prefix - local,  # of the mean query
        "condition": condition,
        **mass,
        "between": 1 - condition - sum(mass.values()),
    }


def numbers(attention: Attention, budgets: Sequence[int]) -> dict[str, Any]:
    """All that the table and the plots tell."""
    tokens = attention.weights.shape[2] - 1
    image, uniform = attention.weights[..., 1:], Attention.uniform(tokens)
    everything, late = slice(None), slice(tokens // 2, None)
    mean, part = by_offset(image.mean(0))
    curve = by_distance(image.mean(0))
    return {
        "tokens": tokens,
        "first_tokens": math.ceil(FIRST * tokens),
        "shares": {
            "all": mean_of(shares(attention, everything)),
            "all_uniform": mean_of(shares(uniform, everything)),
            "second_half": mean_of(shares(attention, late)),
            "second_half_uniform": mean_of(shares(uniform, late)),
            "layers": shares(attention, everything),
        },
        "by_budget": [by_budget(attention, budget) for budget in budgets if budget < tokens - 1],
        "peaks": peaks(curve, math.isqrt(tokens)),
        "distance": {"mean": curve.tolist(), "layers": [by_distance(layer).tolist() for layer in image]},
        "offsets": {
            "axes": "rows above the query from 0; columns from the far left to the far right",
            "mean": [[None if math.isnan(x) else x for x in row] for row in mean.tolist()],
            "share": part.tolist(),
        },
    }


# Results


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    tokens, found = record["tokens"], record["shares"]
    rows = {
        "**all layers**": found["all"],
        "if it were even": found["all_uniform"],
        "**all layers, second half of the image**": found["second_half"],
        "if it were even, second half": found["second_half_uniform"],
    }
    rows |= {f"layer {i}": row for i, row in enumerate(found["layers"], start=1)}
    shares = [
        [name, *(f"{100 * row[key]:.1f}" for key in TITLES), f"{row['entropy']:.2f}", f"{row['tokens_for_90']:.0f}"]
        for name, row in rows.items()
    ]
    told = "; ".join(f"{peak['times_surroundings']:.2f} times at {peak['distance']}" for peak in record["peaks"])
    lines = [
        f"{record['images']} images of {tokens} tokens, seed {record['seeds'][0]}, dense cache.",
        "",
        f"Share of attention in %, mean of images, heads and queries. The first {record['first_tokens']} tokens are "
        f"5 %, a row has {math.isqrt(tokens)}. A key counts where it fits first, from the left. Entropy (nats) and the "
        f"tokens that have 90 % are of the attention on image tokens alone.",
        "",
        markdown.table(["", *TITLES.values(), "entropy", "tokens for 90 %"], shares),
        "",
        f"Peaks near whole rows, in raster order: {told}, against the mean of what is around.",
    ]
    rows = []
    for row in record["by_budget"]:
        cells = [str(row["budget"]), f"{100 * row['condition']:.1f}"]
        cells += [f"{100 * row[name]:.1f} ({row[f'{name}_tokens']} tokens)" for name in ("prefix", "local")]
        kept = f"{row['chosen_tokens']} of {row['tokens_between']:.0f} on average"
        rows.append([*cells, f"{100 * row['between']:.1f}", kept])
    if rows:
        lines += [
            "",
            "Once the cache is full, the share of the dense attention (%) on what ADSA always keeps, and on what lies "
            "between, of which it keeps a part:",
            "",
            markdown.table(["budget", "condition", "prefix", "local", "between", "kept of those between"], rows),
        ]
    return "\n".join(lines)


def draw(record: dict[str, Any], folder: Path) -> None:
    """Write the three plots."""
    grid = math.isqrt(record["tokens"])
    mean = np.array(record["offsets"]["mean"], dtype=float)
    figure, axes = plt.subplots(figsize=(8, 4.2))
    edge = grid - 0.5
    norm = LogNorm(np.nanmin(mean[mean > 0]), np.nanmax(mean))
    picture = axes.imshow(mean, norm=norm, origin="lower", extent=(-edge, edge, -0.5, edge), cmap="magma")
    axes.set(xlabel="column of the key, from the query's (tokens)", ylabel="rows above the query (tokens)")
    axes.set_title("Mean attention weight of an image token on another")
    figure.colorbar(picture, label="attention weight")
    save_plot(folder / "offsets.png", figure)

    figure, axes = plt.subplots(figsize=(8, 3.6))
    for row in range(1, grid):
        axes.axvline(row * grid, color="0.8", linewidth=0.7, label=f"whole rows ({grid} tokens)" if row == 1 else None)
    axes.semilogy(record["distance"]["mean"], linewidth=1)
    axes.set(xlabel="distance in raster order (tokens)", ylabel="mean attention weight", xlim=(0, record["tokens"] - 1))
    axes.legend()
    save_plot(folder / "distance.png", figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    layers = record["shares"]["layers"]
    numbered = range(1, len(layers) + 1)
    for key, title in TITLES.items():
        left.plot(numbered, [100 * row[key] for row in layers], marker="o", markersize=3, label=title)
    left.set(xlabel="layer", ylabel="share of attention (%)", ylim=(0, 1.4 * left.get_ylim()[1]))
    left.legend(fontsize=8, ncol=2, loc="upper left")
    right.plot(numbered, [row["tokens_for_90"] for row in layers], marker="o", markersize=3)
    even = record["shares"]["all_uniform"]["tokens_for_90"]
    right.axhline(even, color="0.6", linestyle="--", label="if attention were even")
    right.set(xlabel="layer", ylabel="image tokens for 90 % of attention", ylim=(0, None))
    right.legend(fontsize=8)
    save_plot(folder / "layers.png", figure)


def sampling_job(task: Task, images: int, seed: int) -> dict[str, Any]:
    """What the task's sampling script would run with the dense cache; classes are drawn at random."""
    argv = ["--config", str(task.config), *task.flags, "--cache-policy", "full", "--no-compile"]
    argv += ["--seed", str(seed), "--num-fid-samples", str(images)]
    argv += ["--prompts", str(task.prompts)] if isinstance(task, TextTask) else ["--label-distribution", "uniform"]
    return importlib.import_module(f"autoregressive.sample.{task.script}").job(argv)


def earlier(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The numbers of an earlier table.json, if it answers the same; any other is written over."""
    try:
        record = json.loads(path.read_text())
        return record if {key: record[key] for key in asked} == json.loads(json.dumps(asked)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flag(parser)
    add = parser.add_argument
    add("--task", choices=("c2i", "t2i"), default="c2i", help="whose GPT: by class, or by text (default: %(default)s)")
    add("--images", type=positive, default=64, metavar="N", help="to sample (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the images and their classes (default: %(default)s)")
    args = parser.parse_args(argv)
    protocol = load_protocol(args.model)
    task = getattr(protocol, args.task)
    folder = output_folder(args, "figure2" if args.task == "c2i" else "figure2_t2i", protocol)

    job = sampling_job(task, args.images, args.seed)
    asked = {
        "settings": job["settings"],
        "seeds": [args.seed],
        "images": len(job["seeds"]),
        "budgets": list(task.budgets),
        "machine": device_name(job["state"].device),
    }
    record = earlier(folder / "table.json", asked)
    if record is None:
        if isinstance(task, TextTask):
            job["conditions"].encode(range(asked["images"]))
        attention = measure(job["load"](), job["conditions"], job["seeds"], job["batch_size"])
        record = asked | rounded(numbers(attention, task.budgets))
    draw(record, folder)
    write_report(folder, "figure2", argv, task, table(record), record)


def rounded(value: Any) -> Any:
    """To six digits, all numbers in lists and dicts."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    guarded(main)
