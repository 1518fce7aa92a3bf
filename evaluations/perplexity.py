"""How well a model predicts real images when it sees only what its cache kept. See --help.

The cheapest and least noisy measure of a cache: no sampling, no features, and every image is its own control.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adsa import CacheConfig  # noqa: E402
from autoregressive.models.generate import logits_of, new_cache  # noqa: E402
from autoregressive.models.gpt import Transformer  # noqa: E402
from autoregressive.models.recorded import RecordedSteps  # noqa: E402
from autoregressive.models.sampling import guide  # noqa: E402
from autoregressive.models.schedule import Schedule  # noqa: E402
from autoregressive.sample.entry import guarded  # noqa: E402
from autoregressive.sample.job import device_name, start_processes, versions  # noqa: E402
from autoregressive.sample.options import OptionError, Options, parse_options, shown  # noqa: E402
from autoregressive.sample.sampler import Blueprint  # noqa: E402
from autoregressive.train.gpt_training import CodeDataset  # noqa: E402
from autoregressive.train.train_c2i import ClassDataset  # noqa: E402
from autoregressive.train.train_t2i import CaptionDataset  # noqa: E402
from autoregressive.train.training import TrainingError  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from tokenizer.files import atomic_file, write_json  # noqa: E402

EPILOG = """\
A cache is written as full, or POLICY-BUDGET, with more keys of configs/README.md's section `cache` after a colon:
adsa-256, keydiff-96:prefix=24,local=48, adsa-256:granularity=layer,renew_every=8. Those that are there already, in
--output, are not measured again.

example: all policies at a sixth of the demo's 576 tokens, with one split
  python evaluations/perplexity.py --config configs/demo_dense.yaml --code-path codes/val --output results/compass \\
      --caches {adsa,keydiff,h2o,random,streaming}-96:prefix=12,local=48"""


@torch.no_grad()
def token_losses(
    model: Transformer,
    tokens: Tensor,
    cond: Tensor,
    emb_masks: Tensor | None = None,
    cache: CacheConfig | None = None,
    zipar_window: int | None = None,
    cfg_scale: float = 1.0,
) -> Tensor:
    """The model's loss on each token of images that are given to it token by token, through a KV cache.

    Args:
        model: in eval mode.
        tokens: int64 ``[B, N]``, of real images.
        cond, emb_masks: as :func:`~autoregressive.models.generate.generate` takes them.
        cache: what to keep; None: everything.
        zipar_window: of a ZipAR schedule; None: raster order.
        cfg_scale: guidance: the loss is that of the guided logits. At 1 there is none.

    On a CUDA device steps are recorded and played (:class:`~autoregressive.models.recorded.RecordedSteps`) where the
    cache allows it.

    Returns:
        ``[B, N]``, nats, at least float32.
    """
    batch, count = tokens.shape
    records = _plays(tokens.device) and zipar_window is None and (cache is None or cache.mode == "evict")
    kv = new_cache(model, batch, count, emb_masks, cfg_scale, cache, zipar_window, fixed=records)
    steps = RecordedSteps(model, kv) if records else None
    schedule = Schedule(count, model.config.grid_size, zipar_window)
    guided = cfg_scale > 1.0
    if guided:
        cond = torch.cat([cond, model.null_condition(cond)])
    wide = torch.promote_types(model.tok_embeddings.weight.dtype, torch.float32)
    losses = torch.empty(batch, count, dtype=wide, device=tokens.device)
    for logits, step in logits_of(model, cond, kv, schedule, tokens, steps=steps):
        logits = guide(logits, cfg_scale) if guided else logits
        for index, position in enumerate(step.draws):
            losses[:, position] = F.cross_entropy(logits[:, index], tokens[:, position], reduction="none")
    return losses


def _plays(device: torch.device) -> bool:
    """Whether steps can be recorded there."""
    return device.type == "cuda"


def open_data(options: Options, blueprint: Blueprint, codes: Path, text: Path | None) -> CodeDataset:
    """Images as codes, checked to be what the model predicts.

    Args:
        options: which model.
        codes: folder made by extract_codes_c2i.py.
        text: their captions, by extract_text_features.py; None: classes.

    Raises:
        OptionError: they are not there, or of another kind.
    """
    try:
        if text is None:
            data: CodeDataset = ClassDataset(codes, 0, options.model.num_classes)
        else:
            data = CaptionDataset(codes, text, 0, options.model.cls_token_num)
    except TrainingError as error:
        raise OptionError(str(error)) from error
    if data.tokens != blueprint.tokens:
        raise OptionError(f"{codes}: images of {data.tokens} tokens; the model's have {blueprint.tokens}")
    size, known = data.meta["codebook_size"], blueprint.gpt.config.vocab_size
    if size > known:
        raise OptionError(f"{codes}: codes of a tokenizer that has {size}; the model knows {known}")
    return data


def parse_cache(text: str) -> CacheConfig:
    """ "adsa-256:prefix=32" -> CacheConfig. Raises OptionError."""
    name, _, rest = text.partition(":")
    policy, _, budget = name.rpartition("-")
    values: dict[str, Any] = {"policy": name}
    if policy and budget.isdecimal():
        values = {"policy": policy, "budget": int(budget)}
    try:
        for pair in filter(None, rest.split(",")):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"{pair!r} is not KEY=VALUE")
            if key in values:
                raise ValueError(f"{key} is given twice")
            values[key] = yaml.safe_load(value)
        return CacheConfig.from_dict(values)
    except (ValueError, yaml.YAMLError) as error:
        raise OptionError(f"cache {text!r}: {error}") from error


def cache_name(cache: CacheConfig) -> str:
    """What :func:`parse_cache` reads, with the keys in order and those at their defaults left out."""
    name = cache.policy if cache.budget is None else f"{cache.policy}-{cache.budget}"
    told = [
        f"{key.name}={str(value).lower() if isinstance(value, bool) else value}"
        for key in fields(cache)
        if key.name not in ("policy", "budget") and (value := getattr(cache, key.name)) != key.default
    ]
    return ":".join(filter(None, (name, ",".join(told))))


class Compass:
    """Measures caches on some images, and keeps what it found: one JSON file for each cache.

    Args:
        blueprint: which model.
        data: of its kind, from :func:`open_data`.
        folder: where the files are.
        device: where the model goes, once there is something to measure.
        images: how many images, spread evenly over the data.
        batch: images at a time.

    Raises:
        OptionError: the folder's files can't be read, or are of another model or other images.
    """

    def __init__(
        self, blueprint: Blueprint, data: CodeDataset, folder: Path, device: torch.device, *, images: int, batch: int
    ):
        self.blueprint, self.data, self.folder, self.device, self.batch = blueprint, data, folder, device, batch
        self.indices = np.linspace(0, len(data) - 1, min(images, len(data))).astype(int).tolist()
        identity = {
            "model": blueprint.fingerprints()["model.gpt_ckpt"],
            "precision": blueprint.options.precision,
            **data.identity,
            "images": len(self.indices),
        }
        if blueprint.options.quantize:  # otherwise not told, as it was not before there was the option
            identity["quantize"] = blueprint.options.quantize
        self.identity = json.loads(json.dumps(identity))
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def model(self) -> Transformer:
        return self.blueprint.load_gpt(self.device)

    def measure(self, cache: CacheConfig, window: int | None = None, cfg_scale: float = 1.0) -> dict[str, Any]:
        """What is known of a cache; measured if need be.

        Args:
            cache, window, cfg_scale: as :func:`token_losses` takes them.

        Returns:
            "losses", nats a token for each image; "by_row", those of each row of tokens, over all images, which
            results older than it lack; and the settings.
        """
        name = cache_name(cache).replace(":", "-").replace(",", "-")
        name += f"-zipar{window}" * (window is not None) + f"-cfg{cfg_scale}" * (cfg_scale > 1)
        path = self.folder / f"{name}.json"
        order = Schedule(self.blueprint.tokens, self.blueprint.grid, window).order
        cache = cache if order is None else cache.fitted(order)
        prefix, local = cache.split
        settings = {
            "cache": asdict(cache)
            | {"prefix": prefix, "local": local, "renew_every": cache.renewal, "merge": cache.merges}
            | {"revision": cache.rule.revision},
            "window": window,
            "cfg_scale": cfg_scale,
            "identity": self.identity,
        }
        if path.exists():
            try:
                found = json.loads(path.read_text())
                there = {key: found[key] for key in settings}
                measured = [float(loss) for loss in found["losses"]], float(found["seconds"])
            except (ValueError, KeyError, TypeError) as error:
                raise OptionError(f"{path}: no readable result ({error!r}); delete it to measure again") from error
            if there != settings or len(measured[0]) != len(self.indices):
                raise OptionError(
                    f"{path}: of another model, other images, another number of them or another default split; give "
                    f"another --output, or delete it"
                )
            return found
        start, parts = time.perf_counter(), []
        for first in tqdm(range(0, len(self.indices), self.batch), desc=name, unit=" batches"):
            items = [self.data.item(index) for index in self.indices[first : first + self.batch]]
            tokens, cond, *masks = (part.to(self.device) for part in default_collate(items))
            if cond.is_floating_point():
                cond = cond.to(self.model.tok_embeddings.weight.dtype)
            made = token_losses(self.model, tokens, cond, *masks, cache=cache, zipar_window=window, cfg_scale=cfg_scale)
            parts.append(made.cpu())
        losses = torch.cat(parts)
        by_row = losses.unflatten(1, (self.blueprint.grid, -1)).mean((0, 2))
        found = settings | {"losses": losses.mean(1).tolist(), "by_row": by_row.tolist()}
        found["seconds"] = round(time.perf_counter() - start, 3)
        write_json(path, found)
        return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: mean loss of each cache, and its mean difference to the dense one with its standard error."""
    dense = np.array(results["full"]["losses"])
    rows = []
    for name, found in results.items():
        losses, cache = np.array(found["losses"]), found["cache"]
        more = losses - dense
        error = more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else float("nan")
        parts = "-" if cache["budget"] is None else f"{cache['prefix']} + {cache['local']}"
        told = "" if name == "full" else f"{more.mean():+.4f} +- {error:.4f}"
        rows.append([name, parts, f"{losses.mean():.4f}", told, f"{found['seconds']:.0f}"])
    return markdown.table(["cache", "prefix + local", "nats a token", "more than dense", "s"], rows)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Loss on real images, given token by token through a KV cache: how much worse is the prediction\n"
        "when the cache keeps only a part? The dense cache is measured too. Without guidance.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="sampling configuration; only its model counts")
    add("--code-path", type=Path, required=True, metavar="DIR", help="images as made by extract_codes_c2i.py")
    add("--text-path", type=Path, metavar="DIR", help="their captions, by extract_text_features.py; for text models")
    add("--caches", nargs="+", default=[], metavar="CACHE", help="see below")
    add("--images", type=positive, default=64, metavar="N", help="spread evenly over the data (default: 64)")
    add("--batch-size", type=positive, default=32, metavar="N", help="default: 32")
    add("--output", type=Path, required=True, metavar="DIR", help="cells/*.json; table.md, table.json: these caches'")
    add("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    args = parse_args(argv)
    caches = [CacheConfig("full"), *map(parse_cache, args.caches)]
    state = start_processes(args.cpu)
    if state.num_processes > 1:
        raise OptionError("this is for one process")
    defaults = Options() if args.text_path is None else Options.text_to_image()
    options = parse_options(defaults, ["--config", args.config], script="job", description="", examples="")
    blueprint = Blueprint(options.model, state.device)
    data = open_data(options, blueprint, args.code_path, args.text_path)
    compass = Compass(blueprint, data, args.output / "cells", state.device, images=args.images, batch=args.batch_size)
    results = {cache_name(cache): compass.measure(cache) for cache in caches}

    command = " ".join(["python evaluations/perplexity.py", *(sys.argv[1:] if argv is None else argv)])
    machine = device_name(state.device)
    text = f"`{command}` on {machine}; {len(compass.indices)} images of {shown(args.code_path)}\n\n{table(results)}\n"
    print(text)
    with atomic_file(args.output / "table.md") as file:
        file.write(text.encode())
    about = {"command": command, "machine": machine, "versions": versions()}
    write_json(args.output / "table.json", about | {"results": results})


if __name__ == "__main__":
    guarded(main)
