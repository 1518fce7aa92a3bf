"""Sample a few class-conditional images into one grid, and compare caches on them. See --help."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from autoregressive.sample.job import guarded, start_processes  # noqa: E402
from autoregressive.sample.labels import Classes, require_classes  # noqa: E402
from autoregressive.sample.options import OptionError, Options, SamplingOptions, parse_options  # noqa: E402
from autoregressive.sample.sampler import Blueprint, Sampler, cache_title, image_seeds  # noqa: E402
from tokenizer.tokenizer_image.images import image_grid, save_image_atomic  # noqa: E402

DESCRIPTION = """\
Sample one image for each class label into a captioned grid, and say what it cost. With --compare, the same images
(same seeds, same classes) come from several caches, side by side."""
EXAMPLES = """\
examples:
  the models that ship with the project, dense against 256 of 576 tokens
    python autoregressive/sample/sample_c2i.py --config configs/demo.yaml
  other classes, by number or name, and three budgets of one policy
    python autoregressive/sample/sample_c2i.py --config configs/demo.yaml --class-labels 3 3 animal-bird animal-bird \\
        --compare full adsa-384 adsa-256 adsa-128 --output budgets.png
  LlamaGen's own demo
    python autoregressive/sample/sample_c2i.py --gpt-model GPT-L --gpt-ckpt pretrained_models/c2i_L_384.pt \\
        --vq-ckpt pretrained_models/vq_ds16_c2i.pt --image-size 384"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    defaults = Options(sampling=SamplingOptions(cfg_scale=4.0, top_k=2000))  # LlamaGen's for this script
    options = parse_options(defaults, argv, script="grid", description=DESCRIPTION, examples=EXAMPLES)
    output = Path(options.run.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise OptionError(f"run.output: {output.parent} can't be written to; give --output FILE.png")
    require_classes(options)
    variants = compared(options)
    state = start_processes(options.run.cpu)
    if state.num_processes > 1:
        raise OptionError("sample_c2i.py is for one process; sample_c2i_ddp.py is for many")

    blueprint = Blueprint(options.model, state.device)
    classes = Classes(options.model, options.run)
    given = options.run.grid_labels
    labels = classes.few() if given is None else classes.ids(given, "run.grid_labels")
    cond, seeds = torch.tensor(labels), torch.from_numpy(image_seeds(options.run.seed, len(labels)))
    captions = [classes.names[label] for label in labels]
    columns = min(len(labels), max(4, math.isqrt(len(labels))))

    print(f"{len(labels)} images of {options.model.image_size} px, {blueprint.tokens} tokens each, on {state.device}")
    sampler = Sampler(blueprint, variants[0], state.device)
    panels, rows = [], []
    for variant in variants:
        sampler.cache = variant.cache_config()
        title = cache_title(sampler.cache, blueprint.tokens)
        print(f"sampling: {title}", file=sys.stderr, flush=True)
        warm_up = blueprint.tokens if options.model.compile else 8  # all graphs compile within one image
        sampler.tokens(cond, seeds, count=warm_up)
        sampler.images(torch.zeros(1, blueprint.tokens, dtype=torch.long), options.model.image_size)
        sampler.reset()
        images = sampler.images(sampler.tokens(cond, seeds), options.model.image_size)
        panels.append(image_grid(images, columns, captions))
        rows.append((title, sampler.cache_report, dict(sampler.seconds)))  # a copy: the next warm-up is timed as well

    print(table(rows, len(labels)))
    save_image_atomic(output, side_by_side(panels, [row[0] for row in rows]))
    print(output)


def compared(options: Options) -> list[Options]:
    """One set of options for each entry of run.compare; without any, just the options. Raises OptionError."""
    if not options.run.compare:
        return [options]
    variants = []
    for name in options.run.compare:
        policy, _, budget = name.rpartition("-")
        if name in ("full", "dense"):
            cache = replace(options.cache, policy="full", budget=None, prefix=None, local=None)
        elif policy and budget.isdecimal():
            cache = replace(options.cache, policy=policy, budget=int(budget))
        else:
            raise OptionError(f"run.compare: {name!r} is neither full nor POLICY-BUDGET, as adsa-256 is")
        variants.append(replace(options, cache=cache))
        variants[-1].cache_config()
    return variants


def table(rows: Sequence[tuple[str, dict[str, int], dict[str, float]]], images: int) -> str:
    """Slots and MiB of each cache, and seconds: of the GPT, of the tokenizer's decoder, and images/s over both."""
    lines = [f"{'cache':<22}{'slots':>7}{'KV MiB':>9}{'GPT s':>9}{'VQ s':>8}{'images/s':>10}"]
    for title, cache, seconds in rows:
        rate = images / sum(seconds.values())
        mib = cache["kv_bytes"] / 2**20
        lines.append(
            f"{title:<22}{cache['slots']:>7}{mib:>9.1f}{seconds['gpt']:>9.2f}{seconds['vq']:>8.2f}{rate:>10.2f}"
        )
    return "\n".join(lines)


def side_by_side(panels: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Several grids beside each other with a title under each; one alone stays as it is."""
    if len(panels) == 1:
        return panels[0]
    return image_grid([np.asarray(panel) for panel in panels], len(panels), titles, padding=16, font_size=22)


if __name__ == "__main__":
    guarded(main)
