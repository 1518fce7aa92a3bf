"""A few images in one captioned grid, by one cache or by several on the same noise."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from autoregressive.sample.job import start_processes
from autoregressive.sample.options import OptionError, Options
from autoregressive.sample.prompts import number
from autoregressive.sample.sampler import Blueprint, Sampler, cache_title, image_seeds
from tokenizer.tokenizer_image.images import image_grid, save_image_atomic


def start_grid(options: Options) -> tuple[list[Options], PartialState]:
    """What can be checked before any file is read: the options of each cache to compare, and the device.

    Raises:
        OptionError: the output can't be written, a cache is impossible, or there are several processes.
    """
    output = Path(options.run.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise OptionError(f"run.output: {output.parent} can't be written to; give --output FILE.png")
    variants = compared(options)
    state = start_processes(options.run.cpu)
    if state.num_processes > 1:
        raise OptionError("a grid is for one process; the script of this name with _ddp is for many")
    return variants, state


def sample_grid(
    variants: Sequence[Options],
    blueprint: Blueprint,
    device: torch.device,
    captions: Sequence[str],
    cond: Tensor,
    masks: Tensor | None = None,
) -> None:
    """Sample one image for each condition, by each cache; print what it cost.

    The grid in run.output has one cache more each time that all images of one are there.

    Args:
        variants: from :func:`start_grid`.
        blueprint: the models.
        device: where.
        captions: one for each image.
        cond, masks: as :meth:`Sampler.tokens` takes them.
    """
    options = variants[0]
    count, size = len(captions), options.model.image_size
    seeds = torch.from_numpy(image_seeds(options.run.seed, count))
    columns = min(count, options.run.columns or max(4, math.isqrt(count)))
    print(f"{number(count, 'image')} of {size} px, {blueprint.tokens} tokens each, on {device}")
    sampler = Sampler(blueprint, options, device)
    panels, rows = [], []
    for variant in variants:
        sampler.cache = variant.cache_config()
        title = cache_title(sampler.cache, blueprint.tokens)
        print(f"sampling: {title}", file=sys.stderr, flush=True)
        whole = options.model.compile or options.model.cuda_graphs  # all graphs are made within one image, or two
        for _ in range(1 + options.model.cuda_graphs):
            sampler.tokens(cond, seeds, masks, count=blueprint.tokens if whole else blueprint.grid)
        sampler.images(torch.zeros(1, blueprint.tokens, dtype=torch.long), size)
        sampler.reset()
        images = sampler.images(sampler.tokens(cond, seeds, masks), size)
        panels.append(image_grid(images, columns, captions))
        rows.append((title, sampler.cache_report, dict(sampler.seconds)))  # a copy: the next warm-up is timed as well

        save_image_atomic(options.run.output, side_by_side(panels, [row[0] for row in rows]))  # to be looked at by now

    print(table(rows, count))
    print(options.run.output)


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
