"""What each choice about a cache costs, by the loss on real images. See --help."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from adsa import CacheConfig  # noqa: E402
from adsa.policies import POLICIES  # noqa: E402
from autoregressive.models.generate import new_cache  # noqa: E402
from autoregressive.models.schedule import Schedule  # noqa: E402
from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.options import shown  # noqa: E402
from autoregressive.sample.sampler import Blueprint  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from evaluations.paper.loss import Setting, Sweep, compass_of  # noqa: E402
from evaluations.paper.protocol import add_model_flag, load_protocol, output_folder  # noqa: E402
from evaluations.paper.report import plt, save_plot, styles, write_report  # noqa: E402
from evaluations.paper.variants import known  # noqa: E402
from evaluations.perplexity import cache_name  # noqa: E402

DESCRIPTION = """\
Give the model real images token by token through a cache, and measure how much worse it predicts them than with the
dense cache, in nats a token: all policies at all budgets, and around ADSA every choice that the paper leaves open. No
sampling, so that a cache takes seconds to minutes.

Each cache is a cell: cells/*.json in the output folder. A cell that is there is not measured again."""
SPLITS = {"prefix": (0, 1, 4, 12, 32), "local": (1, 12, 24, 32, 48, 64)}  # of ADSA, where the budget allows
RENEWALS = (4, 8, 24, 48)
BUDGETS = {"c2i": [384, 256, 192, 128, 96, 64], "t2i": [768, 512, 256, 170]}
DETAIL = {"c2i": [256, 96], "t2i": [512, 170]}
COMMON = (4, 32)  # the split of "common": no policy's own, and good for most


def policies(budgets: Sequence[int], split: tuple[int, int] | None) -> dict[tuple[str, int], Setting]:
    """Every policy at every budget, with its own split or with this one."""
    made = {}
    for name in (name for name in POLICIES if name != "full"):
        for budget in budgets:
            n, m = split or (None, None)
            if split is None or n + m < budget:
                made[name, budget] = Setting(CacheConfig(name, budget, n, m))
    return made


def splits(budget: int) -> dict[tuple[int, int], Setting]:
    """ADSA with first and newest tokens of different numbers, {(n, m): setting}."""
    return {
        (n, m): Setting(CacheConfig("adsa", budget, n, m))
        for n in SPLITS["prefix"]
        for m in SPLITS["local"]
        if n + m < budget
    }


def choices(budget: int, cfg_scale: float) -> dict[str, tuple[Setting, Setting]]:
    """What else may be chosen: {its name: (so, as ADSA is by default)}."""
    plain = CacheConfig("adsa", budget)
    n, m = plain.split
    spare = budget - n - m + 1
    unfolded, guided = Setting(replace(plain, fold_condition=False)), Setting(plain, cfg_scale=cfg_scale)
    found = {
        "heads of a layer choose together": replace(plain, granularity="layer"),
        "choose anew from all tokens (mode select)": replace(plain, mode="select"),
        **{f"rank every {every} steps": replace(plain, renew_every=every) for every in RENEWALS if every <= spare},
        "mean over the previous tokens alone (Eq. 3)": replace(plain, policy="adsa_previous"),
    }
    made = {title: (Setting(cache), Setting(plain)) for title, cache in found.items()}
    with_condition = replace(unfolded.cache, policy="adsa_condition")
    made["condition tokens within the mean (Eq. 3)"] = (Setting(with_condition), unfolded)
    if cfg_scale <= 1:
        return made
    shared = Setting(replace(plain, policy="adsa_shared"), cfg_scale=cfg_scale)
    made[f"guidance's halves choose together (loss at guidance {cfg_scale:g})"] = (shared, guided)
    return made


def numbers_of_bits(budgets: Sequence[int]) -> dict[tuple[str, str, int | None], Setting]:
    """{(dtype or "", policy, budget): setting} of dense and ADSA caches."""
    caches = [CacheConfig("full"), *(CacheConfig("adsa", budget) for budget in budgets)]
    return {
        (dtype or "", cache.policy, cache.budget): Setting(replace(cache, dtype=dtype))
        for dtype in (None, "int8", "int4")
        for cache in caches
    }


def windows(blueprint: Blueprint, budgets: Sequence[int]) -> dict[tuple[int, str], Setting]:
    """ZipAR: {(window, name of a cache): setting}, but for budgets that are too small for the tokens of a pass."""
    made, columns = {}, blueprint.grid
    caches = [CacheConfig("full"), *(CacheConfig(name, budget) for budget in budgets for name in ("adsa", "adsa_plus"))]
    caches.append(CacheConfig("adsa_plus", min(budgets), dtype="int8"))
    for window in sorted({columns, *(columns * part // 6 for part in (1, 2, 3, 4, 5))}, reverse=True):
        for cache in caches:
            try:
                new_cache(blueprint.gpt, 1, blueprint.tokens, cache=cache, zipar_window=window)
            except ValueError:
                continue
            made[window, cache_name(cache)] = Setting(cache, window=None if window == columns else window)
    return made


def policies_told(sweep: Sweep, found: dict[tuple[str, int], Setting]) -> str:
    """Markdown: a policy a row, a budget a column; best on the average over the budgets first."""
    budgets = sorted({budget for _, budget in found}, reverse=True)
    names = {name for name, _ in found}
    rank = {name: np.mean([sweep.more(found[name, b])[0] for b in budgets if (name, b) in found]) for name in names}
    rows = [
        [name, *(sweep.told(found[name, b]) if (name, b) in found else "-" for b in budgets)]
        for name in sorted(names, key=lambda name: rank[name])
    ]
    return markdown.table(["policy", *map(str, budgets)], rows)


def draw_policies(sweep: Sweep, both: dict[str, dict[tuple[str, int], Setting]], path: Path) -> None:
    """Loss more than dense against the budget, on logarithmic axes."""
    figure, panels = plt.subplots(1, len(both), figsize=(6.5 * len(both), 5), sharey=True)
    look = styles(name for found in both.values() for name, _ in found)
    for axes, (title, found) in zip(panels, both.items(), strict=True):
        for name in dict.fromkeys(name for name, _ in found):
            budgets = sorted(budget for policy, budget in found if policy == name)
            means = np.array([sweep.more(found[name, budget]) for budget in budgets])
            axes.errorbar(budgets, means[:, 0], means[:, 1], label=name, capsize=2, **look[name])
        ticks = sorted({budget for _, budget in found})
        axes.set(title=title, xlabel="cached image tokens", xscale="log", yscale="log")
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("nats a token more than dense")
    panels[-1].legend(fontsize=8, ncols=2)
    save_plot(path, figure)


def draw_rows(sweep: Sweep, found: dict[tuple[str, int], Setting], path: Path) -> None:
    """Where in the image a cache costs most: loss more than dense by row of tokens, of ADSA and adsa_plus."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5))
    for axes, policy in zip(panels, ("adsa", "adsa_plus"), strict=True):
        for budget in sorted((budget for name, budget in found if name == policy), reverse=True):
            more = 1000 * sweep.by_row(found[policy, budget])
            axes.plot(range(1, len(more) + 1), more, label=f"{budget} tokens", marker="o", markersize=3)
        axes.set(title=policy, xlabel="row of tokens, from the top")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("thousandths of a nat a token more than dense")
    save_plot(path, figure)


def draw_bits(sweep: Sweep, found: dict[tuple[str, str, int | None], Setting], sizes: dict, path: Path) -> None:
    """Loss more than dense against bytes, a line for each kind of number."""
    figure, axes = plt.subplots(figsize=(7, 5))
    for dtype in dict.fromkeys(dtype for dtype, _, _ in found):
        mine = sorted((sizes[key], *sweep.more(found[key])) for key in found if key[0] == dtype)
        size, mean, error = np.array(mine).T
        axes.errorbar(size / 2**20, mean, error, label=dtype or "the model's numbers", marker="o", capsize=2)
    axes.set(xlabel="keys and values, MiB a row", ylabel="nats a token more than dense", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    save_plot(path, figure)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line; None: the process's own."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_flag(parser)
    add("--task", choices=("c2i", "t2i"), default="c2i", help="images by class (default) or by text")
    add("--images", type=positive, default=64, metavar="N", help="spread evenly over the codes (default: 64)")
    add("--batch-size", type=positive, default=64, metavar="N", help="default: 64")
    add("--budgets", nargs="+", type=positive, metavar="N", help=f"of all policies (default: {BUDGETS})")
    add("--detail", nargs="+", type=positive, metavar="N", help=f"budgets of all else (default: {DETAIL})")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    args = arguments(argv)
    protocol = load_protocol(args.model)
    task = getattr(protocol, args.task)
    name = "sweeps" if args.task == "c2i" else "sweeps_t2i"
    folder = output_folder(args, name, protocol)
    compass = compass_of(task, folder / "cells", images=args.images, batch=args.batch_size)
    blueprint = compass.blueprint

    budgets = sorted(set(args.budgets or BUDGETS[args.task]), reverse=True)
    detail = sorted(set(args.detail or DETAIL[args.task]), reverse=True)
    own, common = policies(budgets, None), policies(budgets, COMMON)
    of_splits = {budget: splits(budget) for budget in detail}
    with known():
        of_choices = {budget: choices(budget, task.options().sampling.cfg_scale) for budget in detail}
    bits, ahead = numbers_of_bits(budgets), windows(blueprint, detail)
    wanted = [setting for found in (own, common, *of_splits.values(), bits, ahead) for setting in found.values()]
    wanted += [setting for found in of_choices.values() for pair in found.values() for setting in pair]
    with known():
        sweep = Sweep(compass, wanted)
    sizes = {key: kv_bytes(blueprint, setting.cache) for key, setting in bits.items()}

    draw_policies(
        sweep,
        {"each policy's own split": own, f"prefix {COMMON[0]}, local {COMMON[1]}": common},
        folder / "policies.png",
    )
    draw_rows(sweep, own, folder / "rows.png")
    draw_bits(sweep, bits, sizes, folder / "bits.png")
    dense = sweep.losses[Setting(CacheConfig("full"))].mean()
    parts = [
        f"Model {protocol.name}, {len(compass.indices)} images of {shown(task.codes)}, {blueprint.tokens} tokens each. "
        f"Dense: {dense:.4f} nats a token. All else is more than dense, in thousandths of a nat a token, mean +- "
        "standard error over images: less is better, and 0 is dense.",
        f"## Policies by cached tokens, each with its own split\n\n{policies_told(sweep, own)}",
        f"## The same with prefix {COMMON[0]} and local {COMMON[1]} for all\n\n{policies_told(sweep, common)}",
        "![curves](policies.png)",
        "## Where in the image\n\n![by row of tokens](rows.png)",
        "## First and newest tokens of ADSA",
    ]
    for budget, found in of_splits.items():
        columns = sorted({m for _, m in found})
        lines = [
            [str(n), *(sweep.told(found[n, m]) if (n, m) in found else "-" for m in columns)]
            for n in sorted({n for n, _ in found})
        ]
        parts.append(f"{budget} tokens; a row for each prefix:")
        parts.append(markdown.table(["prefix", *(f"local {m}" for m in columns)], lines))
    titles = list(dict.fromkeys(title for found in of_choices.values() for title in found))
    lines = [
        [title, *(sweep.told(*of_choices[b][title]) if title in of_choices[b] else "-" for b in detail)]
        for title in titles
    ]
    parts.append(
        "## Other choices, less ADSA as it is by default\n\n" + markdown.table(["choice", *map(str, detail)], lines)
    )
    lines = [
        [
            dtype or "the model's",
            policy if budget is None else f"{policy}-{budget}",
            f"{sizes[key] / 2**20:.3f}",
            sweep.told(bits[key]),
        ]
        for key in sorted(bits, key=sizes.__getitem__, reverse=True)
        for dtype, policy, budget in [key]
    ]
    table = markdown.table(["numbers", "cache", "MiB a row", "more than dense"], lines)
    parts.append(f"## Fewer tokens or fewer bits\n\n{table}\n\n![by bytes](bits.png)")
    columns = list(dict.fromkeys(name for _, name in ahead))
    lines = [
        [
            str(window),
            str(passes(blueprint, window)),
            *(sweep.told(ahead[window, name]) if (window, name) in ahead else "-" for name in columns),
        ]
        for window in sorted({window for window, _ in ahead}, reverse=True)
    ]
    titles = ["window", "passes", *columns]
    parts.append(
        "## Several rows at once (ZipAR)\n\nThe nearer a row follows the row above, the less of that it sees to its "
        f"right; its first token goes on from another row's end.\n\n{markdown.table(titles, lines)}"
    )
    cells = [
        {"cache": cache_name(setting.cache), "window": setting.window, "cfg_scale": setting.cfg_scale}
        | dict(zip(("more", "error"), sweep.more(setting), strict=True))
        for setting in sweep.losses
        if setting.cfg_scale == 1  # others are told against caches with the same guidance, in the table
    ]
    numbers: dict[str, Any] = {"images": len(compass.indices), "dense": dense, "cells": cells}
    write_report(folder, name, argv, task, "\n\n".join(parts), numbers, script="sweeps")


def kv_bytes(blueprint: Blueprint, cache: CacheConfig) -> int:
    """Of keys and values, a row; computed."""
    return new_cache(blueprint.gpt, 1, blueprint.tokens, cache=cache).kv_nbytes()


def passes(blueprint: Blueprint, window: int) -> int:
    """Forward passes of one image."""
    return 1 + len(Schedule(blueprint.tokens, blueprint.grid, window).passes)


if __name__ == "__main__":
    guarded(main)
