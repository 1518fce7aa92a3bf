"""Every policy at the same budgets, on common random numbers: against data and dense images. See --help."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adsa import CacheConfig  # noqa: E402
from adsa.policies import POLICIES  # noqa: E402
from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import start_processes  # noqa: E402
from autoregressive.sample.options import OptionError  # noqa: E402
from autoregressive.sample.run_folder import differing  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.bootstrap import mean_interval  # noqa: E402
from evaluations.features import open_set  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from evaluations.metrics import frechet_distance, moments  # noqa: E402
from evaluations.paired import Difference, KernelSums, kernel_sums, kid_difference, paired_t  # noqa: E402
from evaluations.paper.gallery import captions, stacked  # noqa: E402
from evaluations.paper.likeness import cosine  # noqa: E402
from evaluations.paper.loss import Setting, Sweep, compass_of  # noqa: E402
from evaluations.paper.protocol import (  # noqa: E402
    ClassTask,
    Protocol,
    Task,
    add_model_flag,
    load_protocol,
    output_folder,
)
from evaluations.paper.report import interval_told, plt, save_plot, styles, write_report  # noqa: E402
from evaluations.paper.rows import NONE, Cost, spread, told  # noqa: E402
from evaluations.paper.runs import (  # noqa: E402
    again,
    class_names,
    evaluated,
    features_of,
    identity_of,
    reference_set,
    sampled,
    scored,
)
from evaluations.perplexity import parse_cache  # noqa: E402
from tokenizer.files import write_json  # noqa: E402
from tokenizer.tokenizer_image.images import save_image_atomic  # noqa: E402

DESCRIPTION = """\
Sample the same seeds and conditions with every policy at every budget, and compare: with the data (KID and FID by
class, CLIP score by text), and with the dense images of the same noise (cosine of features, image by image; FID; tokens
that are the same). Beside it, where the protocol names codes of real images: how much worse the model predicts these.
And which classes or prompts change most at the smallest budget, with pictures.

Each cache and seed is a cell: cells/*.json in the output folder, or in that of another table (--cells), from which
table.md, table.json and the plots are made. A cell that is there is not made again, and needs no images any more. Cells
of other policies, budgets and seeds than the flags name stay, and are left out."""
BUDGETS = {"c2i": [384, 256, 192, 128, 96, 64], "t2i": [768, 512, 256, 170]}
LOSS_IMAGES = 64  # real ones, that are predicted
DIGITS = 6  # of numbers by image
SPLIT = ("budget", "prefix", "local")
CACHES = (
    "more caches, as perplexity.py takes them: adsa_plus-96:merge=false, full:dtype=int8; what is not told is as it is "
    "by default"
)
# What judges images by class, and by text: key, its title, what it is multiplied by, digits. The first is tested.
JUDGES = {
    "c2i": (("kid", "KID x 1000", 1000, 3), ("fid", "FID", 1, 2)),
    "t2i": (("clip_score", "CLIP score", 1, 4), ("r_precision", "R-precision", 1, 4)),
}


@dataclass(frozen=True)
class Cell:
    """One cache with one seed.

    Attributes:
        cache: keys of CacheConfig with its split; None: dense.
        judged: of fid.py or clip_score.py.
        cost: what :class:`Cost` tells.
        against_dense: "fid", and by image "likeness" and "same_tokens"; empty for the dense cache itself.
        images: by image: "own" and "cross" of :class:`KernelSums`, or "clip_score"; and "kind", its class or prompt.
        reference: images that it has; 0 by text.
    """

    cache: dict[str, Any] | None
    judged: dict[str, Any]
    cost: dict[str, Any]
    against_dense: dict[str, Any]
    images: dict[str, list]
    reference: int

    @cached_property
    def sums(self) -> KernelSums:
        return KernelSums(np.array(self.images["own"]), np.array(self.images["cross"]), self.reference)


class Experiment:
    """Makes cells, and reads those that are there.

    Args:
        protocol: whose.
        kind: "c2i" or "t2i".
        images: of each cell.
        folder: of the cells.
    """

    def __init__(self, protocol: Protocol, kind: str, images: int, folder: Path):
        self.task: Task = getattr(protocol, kind)
        self.judge: ClassTask = protocol.c2i  # whose features are compared
        self.images, self.folder = images, folder
        folder.mkdir(parents=True, exist_ok=True)

    def cell(self, cache: dict[str, Any] | None, seed: int) -> Cell:
        """The cell, made if it isn't there.

        Raises:
            EvaluationError, OptionError: it can't be made; or the file is of other models, images or references.
        """
        path = self.folder / f"{cell_name(cache)}-seed{seed}.json"
        identity = identity_of(self.task, cache, seed, self.images)
        for key in ("device", "model.cuda_graphs"):  # which round otherwise, as other batch sizes do
            del identity[key]
        if path.exists():
            try:
                content = json.loads(path.read_text())
                there = content.pop("identity")
                found = Cell(**content)
                found.images["kind"]  # which text cells of older versions lack
            except (ValueError, KeyError, TypeError) as error:
                raise OptionError(f"{path}: no readable cell ({error!r}); delete it to make it again") from error
            if other := differing(there, identity):
                raise OptionError(
                    f"{path}: made with other {', '.join(sorted(other))}; give another --output, without --cells, or "
                    f"delete it"
                )
            return found
        made = self._make(cache, seed)
        write_json(path, {"identity": identity, **asdict(made)})
        return made

    def _make(self, cache: dict[str, Any] | None, seed: int) -> Cell:
        run = sampled(self.task, cache, seed, self.images, judged=True)
        features = features_of(open_set(run, self.judge.feature_extractor)[0], self.judge).features
        if isinstance(self.task, ClassTask):
            reference = features_of(reference_set(self.task)[0], self.task).features
            sums = kernel_sums(features, reference, start_processes(self.task.cpu).device)
            result = evaluated(run, self.task)
            judged = {key: result[key] for key in ("fid", "kid", "precision", "recall")}
            images = {
                "own": [float(f"{value:.8g}") for value in sums.own],
                "cross": [float(f"{value:.8g}") for value in sums.cross],
                "kind": np.load(run / "labels.npy").tolist(),
            }
        else:
            result, reference = scored(run, self.task), ()
            lines = map(json.loads, (run / result["scores"]).read_text(encoding="utf-8").splitlines())
            images = {"clip_score": [round(line["clip_score"], DIGITS) for line in lines]}
            images["kind"] = captions(run, self.task)
            judged = {key: result[key] for key in ("clip_score", "r_precision")}
        against = {}
        if cache is not None:
            dense = sampled(self.task, None, seed, self.images)
            theirs = features_of(open_set(dense, self.judge.feature_extractor)[0], self.judge).features
            same = (tokens_of(run, self.images) == tokens_of(dense, self.images)).mean(1)
            against = {
                "fid": frechet_distance(moments(features), moments(theirs)),
                "likeness": np.round(cosine(features, theirs), DIGITS).tolist(),
                "same_tokens": np.round(same, DIGITS).tolist(),
            }
        return Cell(cache, judged, Cost.of(cache, [run]).numbers(), against, images, len(reference))


def tokens_of(run: Path, images: int) -> np.ndarray:
    """Of a finished run: [images, tokens]."""
    return np.stack([np.load(run / "tokens" / f"{index:06d}.npy") for index in range(images)])


def resolved(policy: str, budget: int, common: bool) -> dict[str, Any]:
    """A cache with its split: the policy's own, or where `common` ADSA's."""
    prefix, local = CacheConfig("adsa" if common else policy, budget).split
    return {"policy": policy, "budget": budget, "prefix": prefix, "local": local}


def setting_of(cache: Mapping[str, Any]) -> Setting:
    """What the loss is measured with."""
    return Setting(CacheConfig(**cache))


def keys_of(config: CacheConfig) -> dict[str, Any]:
    """The keys of a cache that cells tell: budget and split, and what else is not as it is by default."""
    found = {"policy": config.policy}
    if config.budget is not None:
        found |= {"budget": config.budget} | dict(zip(("prefix", "local"), config.split, strict=True))
    plain = CacheConfig(**found)
    same = ["merge"] if config.merges == plain.merges else []
    same += ["renew_every"] if config.renewal == plain.renewal else []
    others = {key.name: getattr(config, key.name) for key in fields(config) if key.name not in (*found, *same)}
    return found | {key: value for key, value in others.items() if value != getattr(plain, key)}


def cell_name(cache: Mapping[str, Any] | None) -> str:
    """'adsa-256-32-128': policy, budget, prefix, local; what else there is as in '-dtype=int8'."""
    if cache is None:
        return "dense"
    return "-".join([cache["policy"], *(str(cache[key]) for key in SPLIT if key in cache), *others_told(cache)])


def others_told(cache: Mapping[str, Any]) -> list[str]:
    """What a cache has besides policy, budget and split: ["dtype=int8"]."""
    return [f"{key}={value}" for key, value in cache.items() if key not in ("policy", *SPLIT)]


@dataclass(frozen=True)
class Row:
    """The cells of one cache, by seed, and those of the dense cache; and whether ADSA's split is that of all."""

    cells: list[Cell]
    dense: list[Cell]
    common: bool

    @property
    def cache(self) -> dict[str, Any]:
        return self.cells[0].cache

    @property
    def budget(self) -> int:
        """Image tokens that it keeps."""
        return self.cache.get("budget") or self.cells[0].cost["tokens"]

    @property
    def mebibytes(self) -> float | None:
        """Of the cache, an image; None: not known."""
        cost = self.cells[0].cost
        return cost["cache_bytes"] / cost["images_per_batch"] / 2**20 if cost["cache_bytes"] else None

    @property
    def name(self) -> str:
        """What makes it differ from others of its budget: 'adsa', 'adsa, 0 + 48', 'adsa, dtype=int8'."""
        told = [self.cache["policy"]]
        if "budget" in self.cache:
            usual = resolved(self.cache["policy"], self.cache["budget"], self.common)
            if any(self.cache[key] != usual[key] for key in SPLIT):
                told.append(f"{self.cache['prefix']} + {self.cache['local']}")
        return ", ".join(told + others_told(self.cache))

    @cached_property
    def means(self) -> dict[str, list[float]]:
        """[mean, low, high] of "likeness" and "same_tokens": mean over seeds of each image, then over images."""
        both = {key: [cell.against_dense[key] for cell in self.cells] for key in ("likeness", "same_tokens")}
        return {key: [*map(float, mean_interval(np.mean(values, axis=0)))] for key, values in both.items()}

    @cached_property
    def less_dense(self) -> Difference | None:
        """KID, or by text CLIP score, less dense, paired by image."""
        if "own" in self.cells[0].images:
            return kid_difference(
                [(mine.sums, theirs.sums) for mine, theirs in zip(self.cells, self.dense, strict=True)]
            )
        mine, theirs = (
            np.mean([cell.images["clip_score"] for cell in cells], axis=0) for cells in (self.cells, self.dense)
        )
        return paired_t(mine, theirs)

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cache": self.cache,
            "judged": [cell.judged for cell in self.cells],
            "less_dense": self.less_dense and self.less_dense.values(),
            "fid_against_dense": [cell.against_dense["fid"] for cell in self.cells],
            **self.means,
            "cost": [cell.cost for cell in self.cells],
        }


def table(rows: Sequence[Row], dense: Sequence[Cell], kind: str, sweep: Sweep | None) -> str:
    """Markdown: a table for each budget, the most like the dense images first."""
    (_, tested, scale, digits), (_, other, _, _) = JUDGES[kind]
    columns = ["policy", "n + K + m", tested, f"{tested}, less dense", other, "likeness to dense", "FID to dense"]
    columns += ["tokens as dense", *["loss x 1000, less dense"] * bool(sweep), "cache MiB per image", "images/s"]
    first, second = _judged(dense, kind)
    parts = [f"Dense: {tested} {first}, {other} {second}."]
    for budget in sorted({row.budget for row in rows}, reverse=True):
        of_budget = [row for row in rows if row.budget == budget]
        lines = []
        for row in sorted(of_budget, key=lambda row: -row.means["likeness"][0]):
            n, m = (row.cache.get(key) for key in ("prefix", "local"))
            first, second = _judged(row.cells, kind)
            mean, *interval = row.means["likeness"]
            rates = [rate for cell in row.cells for rate in cell.cost["images_per_second"] if rate]
            lines.append(
                [
                    row.name,
                    NONE if n is None else f"{n} + {budget - n - m} + {m}",
                    first,
                    told(row.less_dense, digits, scale),
                    second,
                    interval_told(mean, interval),
                    spread([cell.against_dense["fid"] for cell in row.cells], 2),
                    f"{100 * row.means['same_tokens'][0]:.1f} %",
                    *([sweep.told(setting_of(row.cache))] if sweep else []),
                    f"{row.mebibytes:.2f}" if row.mebibytes else NONE,
                    spread(rates, 2),
                ]
            )
        parts += [f"### {budget} of {dense[0].cost['tokens']} tokens", markdown.table(columns, lines)]
    return "\n\n".join(parts)


def _judged(cells: Sequence[Cell], kind: str) -> list[str]:
    """The numbers of JUDGES, over the seeds."""
    return [
        spread([cell.judged[key] for cell in cells if cell.judged[key] is not None], digits, scale)
        for key, _, scale, digits in JUDGES[kind]
    ]


def draw(rows: Sequence[Row], kind: str, path: Path, *, by_bytes: bool = False) -> None:
    """What is judged less dense, and likeness to dense, against the budget: in tokens, or in bytes of the cache."""
    _, judged, scale, _ = JUDGES[kind][0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    size = (lambda row: row.mebibytes) if by_bytes else (lambda row: row.budget)
    rows = [row for row in rows if size(row)]
    for name, style in styles(row.name for row in rows).items():
        mine = sorted((row for row in rows if row.name == name), key=size)
        sizes, tests = [size(row) for row in mine], [row.less_dense for row in mine]
        if all(tests):
            _curve(left, sizes, [[scale * value for value in (t.mean, t.low, t.high)] for t in tests], name, style)
        _curve(right, sizes, [row.means["likeness"] for row in mine], name, style)
    ticks = sorted({row.budget for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        if by_bytes:
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("MiB of cache an image")
        else:
            axes.set_xticks(ticks, ticks)
            axes.set_xlabel("cached image tokens")
        axes.grid(alpha=0.3)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_ylabel(f"{judged}, less dense")
    right.set_ylabel("likeness to the dense image (cosine of features)")
    if rows:
        right.legend(fontsize=8, ncols=2)
    save_plot(path, figure)


def _curve(axes, budgets: Sequence[int], values: Sequence[Sequence[float]], label: str, style: dict[str, Any]) -> None:
    """Of mean, low, high at each budget."""
    mean, low, high = np.array(values).T
    axes.errorbar(budgets, mean, [mean - low, high - mean], capsize=2, label=label, **style)


def failures(rows: Sequence[Row], names: Sequence[str] | None) -> dict[str, Any]:
    """What breaks first: mean likeness to dense by class or prompt, at the smallest budget of each kind of cache.

    Args:
        rows: of one or more kinds.
        names: of the classes; None: what cells tell are prompts.
    """
    found = {}
    smallest = {row.name: row for row in sorted(rows, key=lambda row: -row.budget)}
    for name in dict.fromkeys(row.name for row in rows):
        row, values = smallest[name], {}
        for cell in row.cells:
            for kind, likeness in zip(cell.images["kind"], cell.against_dense["likeness"], strict=True):
                values.setdefault(names[kind] if names else kind, []).append(likeness)
        means = sorted((float(np.mean(of_class)), kind, len(of_class)) for kind, of_class in values.items())
        found[name] = {
            "budget": row.budget,
            "classes": [{"class": kind, "likeness": mean, "images": count} for mean, kind, count in means],
        }
    return found


def broken(row: Row, names: Sequence[str] | None, most: int = 8) -> dict[str, int]:
    """Pictures of what breaks first: {class or prompt: index of an image of the first seed}, worst first.

    Of each class the image with the median likeness to dense.
    """
    cell, of_kind = row.cells[0], {}
    for index in np.argsort(cell.against_dense["likeness"], kind="stable").tolist():
        kind = cell.images["kind"][index]
        of_kind.setdefault(names[kind] if names else kind, []).append(index)
    (found,) = failures([row], names).values()
    classes = [one["class"] for one in found["classes"] if one["class"] in of_kind]
    return {kind: of_kind[kind][len(of_kind[kind]) // 2] for kind in classes[:most]}


def show(
    rows: Sequence[Row], task: Task, names: Sequence[str] | None, seed: int, images: int, folder: Path
) -> dict[str, Any]:
    """Leave broken.png: what breaks first, by dense and by every budget of one policy, ADSA if it is there.

    Returns:
        What it shows. Where table.json says that it did so before, it is left as it is.
    """
    kinds = [row.name for row in rows]
    name = "adsa" if "adsa" in kinds else kinds[0]
    mine = sorted((row for row in rows if row.name == name), key=lambda row: -row.budget)
    caches, chosen = [None, *(row.cache for row in mine)], broken(mine[-1], names)
    shows = {"caches": caches, "seed": seed, "images": chosen}
    path, before = folder / "broken.png", folder / "table.json"
    if path.exists() and before.exists() and json.loads(before.read_text(encoding="utf-8")).get("pictures") == shows:
        return shows
    print("-- sampling pictures of what breaks first", file=sys.stderr)
    pictures = again(task, caches, seed, images, list(chosen.values()))
    titles = ["dense", *(f"{name}: {row.budget} of {row.dense[0].cost['tokens']} tokens" for row in mine)]
    save_image_atomic(path, stacked(dict(zip(titles, pictures, strict=True)), list(chosen)))
    return shows


def failures_told(found: Mapping[str, Any], most: int = 5) -> str:
    """Markdown: the classes or prompts that change most, and least."""
    lines = [
        [policy, str(of_policy["budget"])]
        + [
            ", ".join(f"{one['class']} {one['likeness']:.2f}" for one in part)
            for part in (of_policy["classes"][:most], of_policy["classes"][::-1][:most])
        ]
        for policy, of_policy in found.items()
    ]
    return markdown.table(["policy", "budget", "least like dense", "most like dense"], lines)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line; None: the process's own."""
    known = [name for name in POLICIES if name != "full"]
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_flag(parser)
    add("--task", choices=("c2i", "t2i"), default="c2i", help="images by class (default) or by text")
    add(
        "--policies",
        nargs="*",
        choices=known,
        default=known,
        metavar="NAME",
        help="default: all that there are; none may follow, if --caches are given",
    )
    add("--caches", nargs="+", default=[], metavar="CACHE", help=CACHES)
    add("--budgets", nargs="+", type=positive, metavar="N", help=f"cached image tokens (default: {BUDGETS})")
    add("--seeds", nargs="+", type=int, metavar="N", help="default: the protocol's")
    add("--images", type=positive, metavar="N", help="of each cache and seed (default: the protocol's)")
    add(
        "--split",
        choices=("own", "common"),
        default="own",
        help="first and newest tokens that always stay: each policy's own numbers (default), or ADSA's for all",
    )
    told = "the output folder of another table, whose cells/ and loss/ this one shares (default: --output's own)"
    add("--cells", type=Path, metavar="DIR", help=told)
    args = parser.parse_args(argv)
    if not args.policies and not args.caches:
        parser.error("nothing to compare: give --policies or --caches")
    if args.cells and not (args.cells / "cells").is_dir():
        parser.error(f"--cells {args.cells}: no output folder of another table, as it has no folder cells")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    args = arguments(argv)
    protocol = load_protocol(args.model)
    task: Task = getattr(protocol, args.task)
    name = "headtohead" if args.task == "c2i" else "headtohead_t2i"
    folder = output_folder(args, name, protocol)
    seeds, images = args.seeds or list(task.seeds), args.images or task.images
    budgets = sorted(set(args.budgets or BUDGETS[args.task]), reverse=True)
    common = args.split == "common"
    caches = [resolved(policy, budget, common) for budget in budgets for policy in args.policies]
    for keys in (keys_of(parse_cache(text)) for text in args.caches):
        if keys not in caches:
            caches.append(keys)
    store = args.cells or folder
    experiment = Experiment(protocol, args.task, images, store / "cells")
    wanted = [(cache, seed) for seed in seeds for cache in [None, *caches]]
    cells = {}
    for cache, seed in tqdm(wanted, unit=" cells"):
        cells[cell_name(cache), seed] = experiment.cell(cache, seed)
    dense = [cells["dense", seed] for seed in seeds]
    rows = [Row([cells[cell_name(cache), seed] for seed in seeds], dense, common) for cache in caches]
    sweep = None
    if task.codes is not None:
        compass = compass_of(task, store / "loss", images=LOSS_IMAGES, batch=LOSS_IMAGES)
        sweep = Sweep(compass, [setting_of(cache) for cache in caches])
    draw(rows, args.task, folder / "curves.png")
    draw(rows, args.task, folder / "bytes.png", by_bytes=True)
    names = class_names(task) if isinstance(task, ClassTask) else None
    broke = failures(rows, names)
    devices = sorted({device for cell in cells.values() for device in cell.cost["devices"]})
    text = [
        f"Model {protocol.name}, {images} images of each cache and seed, seeds {', '.join(map(str, seeds))}, "
        f"sampled on {', '.join(devices)}. Likeness: "
        f"cosine of the features of {protocol.c2i.feature_extractor} with those of the dense image of the same noise. "
        "Intervals are 95 %, over images. Less dense: paired by image. Loss: in nats a token, on real images "
        "that are given token by token, mean +- standard error.",
        "![curves](curves.png)\n\n![the same by bytes](bytes.png)",
        table(rows, dense, args.task, sweep),
        f"### What breaks first\n\n{failures_told(broke)}\n\n![pictures](broken.png)",
    ]
    numbers: dict[str, Any] = {
        "seeds": seeds,
        "images": images,
        "split": args.split,
        "rows": [row.numbers() | ({"loss": sweep.more(setting_of(row.cache))} if sweep else {}) for row in rows],
        "failures": broke,
        "pictures": show(rows, task, names, seeds[0], images, folder),
    }
    write_report(folder, name, argv, task, "\n\n".join(text), numbers, script="headtohead")


if __name__ == "__main__":
    guarded(main)
