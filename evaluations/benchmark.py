"""Time and memory of decoding: dense, ADSA and other caches, what others do instead, and the hardware's limit.

See --help. What is timed is in decoders.py.
"""

import argparse
import copy
import gc
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Anything slow to import comes after the arguments are read.
from evaluations import markdown  # noqa: E402
from evaluations.flags import positive  # noqa: E402
from tokenizer.files import atomic_file, write_json  # noqa: E402

if TYPE_CHECKING:
    import torch

    from adsa import CacheConfig
    from autoregressive.models.gpt import Transformer
    from evaluations.decoders import Decoder

DESCRIPTION = """\
Time decode steps and memory of several caches, all in one process: for each batch size, rounds in which every cache has
its turn, in alternating order. A turn fills a cache with random keys and values up to the last --steps tokens of an
image, and times these steps (forward, guidance, draw); with --whole-image also the decode of a whole batch.

Each step is told against the roofline: the bytes that it must move (weights once, keys and values once) over the speed
of memory, and its floating-point operations over the speed of a matrix product, both measured in this run; the larger
of the two is the limit."""
EPILOG = """\
A cache is `dense`, or POLICY-BUDGET, as adsa-256, or POLICY-BUDGET-renewN if one ranking serves N steps. With -kvint8
or -kvint4 behind it holds integers with scales. With -ziparW behind, as dense-zipar12, several rows of the image are
decoded at once, each W tokens behind the one above: whole images are timed, and a step is any of their passes. With
--hf caches run under transformers' Llama (adsa/hf.py), beside the library's own, `dynamic` and `static`.

Writes table.json (every number; rewritten after each turn), table.md and plot.png.

examples:
  the demo's shape on the CPU
    python evaluations/benchmark.py --model GPT-Demo --cpu --caches dense adsa-256 --batches 1 8 --upstream --hf
  LlamaGen-XL's shape, random weights; some minutes on a fast GPU
    python evaluations/benchmark.py --model GPT-XL --dtype bf16 --batches 1 16 64 256 --upstream \\
        --caches dense adsa-384 adsa-256 adsa-96 streaming-256 adsa-256-renew8 --output results/performance/xl
  a language model's shape under transformers; --caches without a name leaves this project's own model out
    python evaluations/benchmark.py --model Janus-Pro-1B --dtype bf16 --caches --hf dynamic static adsa-288 adsa-96
  whole images, by the shipped checkpoint
    python evaluations/benchmark.py --gpt-ckpt pretrained_models/demo/gpt_c2i.safetensors --whole-image"""

WARM_UP = 4  # steps before those that are timed
BREAKDOWN = 8  # steps, with --breakdown
TRACED = 3  # steps, with --trace
# Beside the registered sizes: deepseek-ai/Janus-Pro-1B's language model, with its head for codes of images.
SHAPES = {"Janus-Pro-1B": {"dim": 2048, "n_layer": 24, "n_head": 16}}
ZIPAR = "-zipar"
GRAPHS = " graphs"
BASES = ("dense", "full", "hf-dynamic")  # what times are told against, like with like: the first of these that is there
MIB = 2**20


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line; None: the process's own."""

    def at_least_two(text: str) -> int:
        if positive(text) < 2:
            raise argparse.ArgumentTypeError("1 step has no percentiles: give 2 or more")
        return int(text)

    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    told = f"a registered size, on random weights (default: GPT-Demo), or {', '.join(SHAPES)}"
    add("--model", metavar="NAME", help=told)
    add("--gpt-ckpt", metavar="FILE", help="a checkpoint; one that doesn't tell its sizes needs --model too")
    caches = ["dense", "adsa-384", "adsa-256", "adsa-96"]
    add("--caches", nargs="*", default=caches, metavar="CACHE", help=f"see below (default: {' '.join(caches)})")
    add("--batches", nargs="+", type=positive, default=[1, 16], metavar="N", help="images (default: 1 16)")
    add("--cfg-scale", type=float, default=3.0, metavar="S", help="above 1, guidance doubles the rows (%(default)s)")
    add("--tokens", type=positive, default=576, metavar="N", help="of an image, a perfect square (%(default)s)")
    told = "of weights and cache (default: bf16 on a GPU and with --quantize, else fp32)"
    add("--dtype", choices=("bf16", "fp16", "fp32"), help=told)
    told = "weights of int8 under the --caches; dense without them comes as well, to be compared with"
    add("--quantize", choices=("int8",), help=told)
    told = "torch.compile the models, on a GPU; a first round is not timed"
    add("--compile", action=switch, default=False, help=told)
    add("--cuda-graphs", action="store_true", help="each of --caches but ZipAR's also by CUDA graphs, recorded before")
    add("--repeats", type=positive, default=3, metavar="N", help="rounds (%(default)s)")
    add("--steps", type=at_least_two, default=40, metavar="N", help="timed steps of each turn (%(default)s)")
    add("--whole-image", action=switch, default=False, help="time whole decodes as well, one in each turn")
    add("--breakdown", action="store_true", help="time the parts of a step as well, in other steps")
    told = "also LlamaGen's own way: the whole length allocated, under a mask; and linear layers that are PyTorch's"
    add("--upstream", action="store_true", help=told)
    told = "also transformers' Llama with these caches, see below (default, if none follows: dynamic static)"
    add("--hf", nargs="*", metavar="CACHE", help=told)
    add("--trace", action="store_true", help=f"leave torch.profiler's trace of {TRACED} steps of each, in --output")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add("--seed", type=int, default=0, metavar="N", help="of weights, keys and values (%(default)s)")
    told = "results/performance/benchmark"
    add("--output", type=Path, default=Path(told), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    args.hf = ["dynamic", "static"] if args.hf == [] else args.hf or []
    if not args.caches and not args.hf and not args.upstream:
        parser.error("nothing to time: give --caches, --hf or --upstream")
    args.command = shlex.join(["python", "evaluations/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    if args.cuda_graphs and args.compile:
        parser.error("--cuda-graphs records what --compile has compiled otherwise: give one of them")
    if args.breakdown and args.compile:
        parser.error("--breakdown looks between the parts of a step, and --compile fuses them: give one of them")
    if math.isqrt(args.tokens) ** 2 != args.tokens:
        parser.error(f"--tokens must be a perfect square, as the images are square, not {args.tokens}")
    if first_timed(args) < 1:
        parser.error(f"--steps {args.steps} leave no room to fill a cache, with --tokens {args.tokens}: give fewer")
    return args


def first_timed(args: argparse.Namespace) -> int:
    """How many image tokens a cache is filled with before the first step of a turn."""
    return args.tokens - args.steps - WARM_UP - BREAKDOWN * args.breakdown - TRACED * args.trace


# What is timed


def cache_config(name: str, room: int, tokens: int) -> "CacheConfig":
    """The cache that a name stands for.

    Args:
        name: "dense", or as "adsa-256" or "adsa-256-renew8"; "-kvint8" or "-kvint4" and what :func:`zipar_window` reads
            may follow.
        room: the largest budget that is full when it is timed.
        tokens: of an image; a budget for all of them is never full, and evicts nothing.

    Raises:
        OptionError: there is none.
    """
    from adsa import CacheConfig
    from adsa.policies import POLICIES
    from adsa.storage import CODECS
    from autoregressive.sample.options import OptionError

    name = name.partition(ZIPAR)[0]
    integers = f"(?:-kv({'|'.join(CODECS)}))?"
    if dense := re.fullmatch(f"(?:dense|full){integers}", name):
        return CacheConfig("full", dtype=dense[1])
    parts = re.fullmatch(rf"(.+?)-(\d+)(?:-renew(\d+))?{integers}", name)
    if not parts or parts[1] not in POLICIES or parts[1] == "full":
        raise OptionError(
            f"{name!r} is neither dense nor POLICY-BUDGET or POLICY-BUDGET-renewN, with or without "
            f"{' or '.join(f'-kv{codec}' for codec in CODECS)} behind; policies: "
            f"{', '.join(policy for policy in POLICIES if policy != 'full')}"
        )
    if room < int(parts[2]) < tokens:
        raise OptionError(
            f"{name} would not be full when it is timed, with these --tokens and --steps: the largest "
            f"budget is {room}, but for those of {tokens} and more"
        )
    try:
        every = int(parts[3]) if parts[3] else None
        return CacheConfig(parts[1], int(parts[2]), renew_every=every, dtype=parts[4])
    except ValueError as error:
        raise OptionError(f"{name}: {error}") from None


def zipar_window(name: str, tokens: int) -> int | None:
    """Of "dense-zipar12": 12. None: raster order.

    Raises:
        OptionError: it is not below the tokens of a row.
    """
    from autoregressive.sample.options import OptionError

    _, zipar, window = name.partition(ZIPAR)
    if not zipar:
        return None
    columns = math.isqrt(tokens)
    if not window.isdecimal() or not 1 <= int(window) < columns:
        raise OptionError(f"{name}: the window must be 1 to {columns - 1}, as a row has {columns} tokens")
    return int(window)


def build_model(args: argparse.Namespace, device: "torch.device", dtype: "torch.dtype") -> "Transformer":
    """The checkpoint, or a registered size with random weights.

    Raises:
        OptionError: there is no such size, or none is told.
        CheckpointError: the file can't be read, or is another model's.
    """
    import torch
    from safetensors import safe_open

    from autoregressive.models.checkpoint import load_model, read_state_dict
    from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
    from autoregressive.sample.options import OptionError, near

    path, told = args.gpt_ckpt, {}
    if path:
        read_state_dict(path)  # a missing or damaged file is told first
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                told = json.loads((file.metadata() or {}).get("args", "{}"))
    if args.model is None and path and "dim" not in told:
        raise OptionError(f"--gpt-ckpt {path} doesn't tell its sizes: give --model too, one of {', '.join(GPT_models)}")
    name, known = args.model or "GPT-Demo", [*GPT_models, *SHAPES]
    if name not in known:
        raise OptionError(f"--model {name!r} is not registered{near(name, known)}: {', '.join(known)}")
    told = SHAPES.get(name, {}) | told | {"block_size": args.tokens}
    with torch.device("meta"):
        model = Transformer(ModelArgs(**told)) if "dim" in told else GPT_models[name](**told)
    model = model.eval().requires_grad_(False)
    if path:
        return load_model(model, path, device=device, dtype=dtype)
    model = model.to(dtype).to_empty(device=device)
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.02)
    return model


def decoders(model: "Transformer", args: argparse.Namespace) -> "list[Decoder]":
    """All that are timed, in the order of the table."""
    from adsa import CacheConfig
    from autoregressive.models.gpt import compiled
    from autoregressive.models.packed import pack
    from autoregressive.models.quantize import quantize
    from autoregressive.sample.options import OptionError
    from evaluations.decoders import HF, Decoder, HFModel, Upstream, ZipAR

    models: list[Any] = [model]
    if model.output.weight.is_cpu:
        others = args.upstream or args.hf or args.quantize  # who take the weights as they are
        models.append(pack(copy.deepcopy(model) if others else model))
    found: list[Decoder] = []
    if args.quantize:
        found.append(Decoder("dense", models[-1], CacheConfig("full")))
        models.append(pack(quantize(copy.deepcopy(model))))
    for name in args.caches:
        told = f"{name} {args.quantize}" if args.quantize else name
        if window := zipar_window(name, args.tokens):
            found.append(ZipAR(told, models[-1], cache_config(name, args.tokens, args.tokens), window))
            try:
                found[-1].new_cache(1, args.tokens)
            except ValueError as error:
                raise OptionError(f"{name}: {error}") from None
        else:
            config = cache_config(name, first_timed(args), args.tokens)
            found.append(Decoder(told, models[-1], config))
            if args.cuda_graphs:
                found.append(Decoder(told + GRAPHS, models[-1], config, records=True))
    if args.upstream:
        found.append(Upstream("upstream", model))
    if args.hf:
        models.append(HFModel(model))
        for name in args.hf:
            if ZIPAR in name:
                raise OptionError(f"--hf {name}: transformers decodes one token after the other")
            own = name in ("dynamic", "static")
            cache = name if own else cache_config(name, first_timed(args), args.tokens)
            found.append(HF(f"hf-{name}", models[-1], cache))
            try:
                found[-1].new_cache(1, args.tokens)
            except ValueError as error:
                raise OptionError(f"--hf {name}: {error}") from None
    if args.compile:
        for each in models:
            each.forward = compiled(each.forward)
    return found


# Timing


def turns(count: int, rounds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(round, which) in the order of time: A B C, C B A, A B C."""
    for number in rounds:
        yield from ((number, which) for which in range(count)[:: -1 if number % 2 else 1])


def take_turn(
    decoder: "Decoder", model: "Transformer", images: int, args: argparse.Namespace, device: "torch.device"
) -> dict[str, Any]:
    """One turn of one cache.

    Args:
        decoder: whose.
        model: ours, of the decoder's shape, which says what a step can't do without.
        images: in the batch.
        args: from :func:`arguments`.
        device: where.

    Returns:
        "seconds" of each step, "steps" of an image, "image_seconds", "breakdown" and "demand" or None for these, bytes
        of the cache, and memory.
    """
    from evaluations.decoders import RecordedSteps, Stepper, ZipAR, bytes_in_use, demand, forget, time_image

    guided = args.cfg_scale > 1
    rows = images * (2 if guided else 1)
    forget(device)
    before = bytes_in_use(device)
    kv = decoder.new_cache(rows, args.tokens)
    if isinstance(decoder, ZipAR):
        with decoder.passes(device) as passes:
            whole = time_image(decoder, kv, images, guided, args.tokens)
        peak = bytes_in_use(device, peak=True)
        return {
            "seconds": passes,
            "steps": len(passes),
            "image_seconds": whole,
            "breakdown": None,
            "demand": None,
            "kv_bytes": kv.kv_nbytes(),
            "cache_bytes": kv.nbytes(),
            "peak_bytes": peak,
            "beyond_weights_bytes": peak - before,
        }
    forward = RecordedSteps(decoder.model, kv) if decoder.records else decoder.model
    # A kind of step is recorded when it comes again, so that all are once there have been two turns.
    for untimed in (True, True, False) if decoder.records else (False,):
        decoder.fill(kv, first_timed(args))
        forget(device)  # what filling took
        stepper = Stepper(decoder, kv, images, guided, first_timed(args), forward)
        stepper.time(WARM_UP)
        if untimed:
            stepper.time(args.steps)
            kv.reset()
    split = None
    if args.breakdown and decoder.splits:
        split = stepper.breakdown(BREAKDOWN)
    elif args.breakdown:
        stepper.time(BREAKDOWN)  # so that the steps that are timed are the same ones
    seconds = stepper.time(args.steps)
    peak = bytes_in_use(device, peak=True)
    if args.trace:
        stepper.trace(TRACED, args.output / f"trace-{decoder.name.replace(' ', '-')}-{images}.json")
    attended = decoder.attended(kv, args.tokens, args.steps)
    turn = {
        "seconds": seconds,
        "steps": args.tokens,
        "image_seconds": None,
        "breakdown": split,
        "kv_bytes": kv.kv_nbytes(),
        "cache_bytes": kv.nbytes(),
        "peak_bytes": peak,
        "beyond_weights_bytes": peak - before,
        "attended": attended,
        "demand": demand(model, rows, attended, decoder.vector_bytes()),
    }
    if args.whole_image:
        del kv, stepper
        forget(device)
        turn["image_seconds"] = time_image(decoder, decoder.new_cache(rows, args.tokens), images, guided, args.tokens)
    return turn


def base_of(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What a row's times are told against: one of BASES among the rows of its batch size; by graphs, if it is."""
    end = GRAPHS * row["cache"].endswith(GRAPHS)
    found = {each["cache"]: each for each in rows}
    return next((found[base + end] for base in BASES if base + end in found), None)


def summarise(record: dict[str, Any]) -> None:
    """Give each row of a record its :func:`summary`."""
    for row in record["rows"]:
        rows = [each for each in record["rows"] if each["images"] == row["images"]]
        row["summary"] = summary(row, base_of(row, rows), record["limits"], record["settings"]["tokens"])


def summary(row: dict[str, Any], base: dict[str, Any] | None, limits: dict[str, float], tokens: int) -> dict[str, Any]:
    """What the table says of a row.

    Args:
        row: with "turns", by round; see :func:`take_turn`.
        base: the row that it is told against, one of BASES at this batch size, or None.
        limits: "bytes_per_second" and "flops_per_second".
        tokens: of an image.
    """
    done = list(row["turns"].values())
    if not done:
        return {}
    steps = sorted(second for turn in done for second in turn["seconds"])
    centiles = statistics.quantiles(steps, n=100, method="inclusive")
    median = statistics.median(steps)
    found = {
        "step_ms": {
            "mean": 1000 * statistics.mean(steps),
            "p50": 1000 * median,
            "p95": 1000 * centiles[94],
            "p99": 1000 * centiles[98],
        },
        # As fast as that all along: pessimistic for a cache that grows, whose last steps are its slowest.
        "steady_images_per_second": row["images"] / (median * done[0]["steps"]),
        **{key: max(turn[key] for turn in done) for key in ("kv_bytes", "cache_bytes", "peak_bytes")},
        "beyond_weights_bytes": max(turn["beyond_weights_bytes"] for turn in done),
    }
    if need := done[0]["demand"]:
        by_bytes, by_flops = need["bytes"] / limits["bytes_per_second"], need["flops"] / limits["flops_per_second"]
        found |= {
            "limit_ms": 1000 * max(by_bytes, by_flops),
            "limited_by": "memory" if by_bytes >= by_flops else "arithmetic",
            "times_limit": median / max(by_bytes, by_flops),
        }
    images = [turn["image_seconds"] for turn in done if turn["image_seconds"] is not None]
    if images:
        second = statistics.median(images)
        found["whole_image"] = {
            "seconds": second,
            "step_ms": 1000 * second / done[0]["steps"],
            "tokens_per_second": row["images"] * tokens / second,
            "images_per_second": row["images"] / second,
        }
    splits = [turn["breakdown"] for turn in done if turn["breakdown"]]
    if splits:
        found["breakdown_ms"] = {key: 1000 * statistics.median(split[key] for split in splits) for key in splits[0]}
    if base is not None:
        common = [(turn, base["turns"][number]) for number, turn in row["turns"].items() if number in base["turns"]]
        if need and common:  # what has no limit has other steps than the base
            steps = [[statistics.median(turn["seconds"]) for turn in pair] for pair in common]
            found["against"] = ratio_to(base, steps)
        if images and common and common[0][1]["image_seconds"] is not None:
            found["whole_image"]["against"] = ratio_to(
                base, [[turn["image_seconds"] for turn in pair] for pair in common]
            )
    return found


def ratio_to(base: dict[str, Any], pairs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of times of both sides in some rounds."""
    ratios = [mine / theirs for mine, theirs in pairs]
    return {"base": base["cache"], "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


# Results


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    rows, limits, settings = record["rows"], record["limits"], record["settings"]
    whole = any("whole_image" in row.get("summary", {}) for row in rows)
    bases = dict.fromkeys(row["summary"]["against"]["base"] for row in rows if "against" in row.get("summary", {}))
    head = ["images", "cache", "step ms p50", "mean", "p95", "p99", "/ base (min to max)", "limit ms", "/ limit"]
    head += ["images/s, steady", "KV MiB", "cache MiB", "peak MiB", "beyond weights MiB"]
    head += ["whole batch s", "/ base (min to max)", "images/s, whole"] if whole else []
    lines = []
    for row in rows:
        found = row.get("summary")
        cells = [str(row["images"]), row["cache"] + (f" (then {row['status']})" if found and row["status"] else "")]
        if not found:
            lines.append([*cells, row["status"], *[""] * (len(head) - 3)])
            continue
        cells += [f"{found['step_ms'][key]:.3f}" for key in ("p50", "mean", "p95", "p99")]
        cells.append(told_ratio(found))
        limit = ["", ""]
        if "limit_ms" in found:
            limit = [f"{found['limit_ms']:.3f} ({found['limited_by']})", f"{found['times_limit']:.2f}"]
        cells += [*limit, f"{found['steady_images_per_second']:.3f}"]
        sizes = ("kv_bytes", "cache_bytes", "peak_bytes", "beyond_weights_bytes")
        cells += [f"{found[key] / MIB:.1f}" for key in sizes]
        if whole:
            cells += ["", "", ""]
            if image := found.get("whole_image"):
                cells[-3:] = [f"{image['seconds']:.2f}", told_ratio(image), f"{image['images_per_second']:.3f}"]
        lines.append(cells)
    rows_told = "2 rows for each image (guidance)" if settings["cfg_scale"] > 1 else "1 row for each image"
    memory = "torch's allocator" if record["device"] == "cuda" else "the process' resident memory"
    text = [
        markdown.table(head, lines, right=len(head) - 2),
        *breakdown_table(rows),
        "",
        f"`{record['command']}` on {record['machine']}, torch {record['versions']['torch']}.",
        "",
        f"{record['model']}, {settings['dtype']}{', compiled' if settings['compile'] else ''}, {settings['tokens']} "
        f"tokens, {rows_told}. The last {settings['steps']} steps of an image, {settings['repeats']} round(s); "
        f"`/ base`: median of the rounds' ratios, of median step times or of whole batches, to {' or '.join(bases)}. "
        "Limit, by medians of what was measured before and after each batch size: memory moves "
        f"{limits['bytes_per_second'] / 1e9:.1f} GB/s, a matrix product makes "
        f"{limits['flops_per_second'] / 1e12:.3f} TFLOP/s. Steady images/s: if all steps were as these. Peak: "
        f"{memory}.",
    ]
    return "\n".join(text)


def told_ratio(found: dict[str, Any]) -> str:
    """Of what has one."""
    ratio = found.get("against")
    return f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})" if ratio else ""


def breakdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: the parts of a step; none if they were not measured."""
    found = [(row, row["summary"]["breakdown_ms"]) for row in rows if "breakdown_ms" in row.get("summary", {})]
    if not found:
        return []
    columns = ["images", "cache", *found[0][1], "sum"]
    lines = [
        [str(row["images"]), row["cache"], *(f"{ms:.3f}" for ms in (*split.values(), sum(split.values())))]
        for row, split in found
    ]
    return [
        "",
        "Parts of a step in ms; they sum to the step, which the measuring makes longer. A CPU's loops write to the "
        "cache, and compare, as they attend: that is attention.",
        "",
        markdown.table(columns, lines, right=len(columns) - 2),
    ]


def draw(record: dict[str, Any], path: Path) -> None:
    """Step latency and images/s against the batch size, a line for each cache."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    class Minor(LogFormatter):  # where it has a label, the plain number: 0.006 and not 6e-03
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    done = [row for row in record["rows"] if row.get("summary")]
    whole = bool(done) and all("whole_image" in row["summary"] for row in done)
    for name in dict.fromkeys(row["cache"] for row in done):
        mine = sorted((row for row in done if row["cache"] == name), key=lambda row: row["images"])
        sizes, told = [row["images"] for row in mine], [row["summary"] for row in mine]
        left.plot(sizes, [each["step_ms"]["p50"] for each in told], "o-", label=name)
        rates = [
            each["whole_image"]["images_per_second"] if whole else each["steady_images_per_second"] for each in told
        ]
        right.plot(sizes, rates, "o-", label=name)
    sizes = sorted({row["images"] for row in done})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(Minor(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axes.set_xticks(sizes, sizes)
        axes.set_xlabel("images in a batch")
        axes.grid(alpha=0.3, which="both")
    left.set(ylabel="step latency, median (ms)", title=f"{record['model']}, {record['settings']['dtype']}")
    right.set(ylabel="images/s", title="whole images" if whole else "if all steps were as the last")
    right.legend(fontsize=8)
    figure.tight_layout()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def machine(device: "torch.device") -> str:
    """Device, and on a CPU how many threads."""
    import torch

    from autoregressive.sample.job import device_name

    return device_name(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")


def installed(name: str) -> str | None:
    """The version of a package; None: it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time everything and write the results, which are returned as in table.json.

    Raises:
        OptionError, CheckpointError: what is asked for can't be.
    """
    import torch
    from tqdm import tqdm

    from adsa.config import DTYPES
    from autoregressive.sample.job import versions
    from autoregressive.sample.options import OptionError
    from evaluations.decoders import machine_limits, out_of_memory

    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    if (args.cuda_graphs or args.compile) and device.type != "cuda":
        raise OptionError(f"--{'cuda-graphs' if args.cuda_graphs else 'compile'} is for a GPU, and this times the CPU")
    if device.type == "cpu" and not args.cpu:
        print("torch sees no GPU: this times the CPU", file=sys.stderr)
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" or args.quantize else "fp32")
    dtype = DTYPES[args.dtype]
    for name in [
        *args.caches,
        *(name for name in args.hf if name not in ("dynamic", "static")),
    ]:  # before anything slow
        cache_config(name, args.tokens if zipar_window(name, args.tokens) else first_timed(args), args.tokens)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32, and no attention of cuDNN's, as sampling does
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.no_grad():
        measured = [machine_limits(device, dtype)]
        model = build_model(args, device, dtype)
        sides = decoders(model, args)
        gc.freeze()  # collecting before each turn need not look at all that is imported
        settings = {name: value for name, value in vars(args).items() if name not in ("command", "output")}
        record: dict[str, Any] = {
            "command": args.command,
            "machine": machine(device),
            "device": device.type,
            "versions": versions() | {name: installed(name) for name in ("triton", "transformers")},
            "model": args.model or (Path(args.gpt_ckpt).name if args.gpt_ckpt else "GPT-Demo"),
            "settings": settings,
            "limits": measured[0],
            "rows": [],
        }
        rounds, batches = range(-1 if args.compile else 0, args.repeats), list(dict.fromkeys(args.batches))
        bar = tqdm(total=len(batches) * len(rounds) * len(sides), unit=" turns", smoothing=0)
        for images in batches:
            rows = [{"images": images, "cache": side.name, "status": "", "turns": {}} for side in sides]
            record["rows"] += rows
            for number, which in turns(len(sides), rounds):
                row = rows[which]
                bar.set_description(f"{images} images, {row['cache']}")
                if not row["status"]:
                    try:
                        side = sides[which]
                        turn = take_turn(side, side.model if side.config else model, images, args, device)
                        if number >= 0:
                            row["turns"][number] = turn
                    except (RuntimeError, MemoryError) as error:
                        if not out_of_memory(error):
                            raise
                        row["status"] = "out of memory"
                    summarise(record)
                    write_json(args.output / "table.json", record)
                bar.update()
            measured.append(machine_limits(device, dtype))  # a shared machine has more to give at times than at others
            record["limits"] = {name: statistics.median(each[name] for each in measured) for name in measured[0]}
            summarise(record)
            write_json(args.output / "table.json", record)
        bar.close()
    draw(record, args.output / "plot.png")
    text = table(record)
    with atomic_file(args.output / "table.md") as file:
        file.write(f"{text}\n".encode())
    print(text)
    print(args.output / "table.md")
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    args = arguments(argv)
    from autoregressive.models.checkpoint import CheckpointError
    from autoregressive.sample.options import OptionError

    try:
        run(args)
    except (OptionError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
