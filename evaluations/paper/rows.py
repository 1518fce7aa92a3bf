"""What the tables share: runs of a cache, one for each seed; what they cost, and how they differ from dense."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adsa import CacheConfig
from autoregressive.sample.job import start_processes
from autoregressive.sample.run_folder import read_record
from autoregressive.sample.sampler import cache_title
from evaluations import markdown
from evaluations.features import open_set
from evaluations.paired import Difference, KernelSums, kernel_sums, kid_difference, paired_t
from evaluations.paper.protocol import ClassTask
from evaluations.paper.runs import evaluated, features_of, reference_set, resized, sampled

# key of fid.py: its title, what it is multiplied by, digits
METRICS = {
    "fid": ("FID", 1, 2),
    "is": ("IS", 1, 2),
    "precision": ("precision", 1, 3),
    "recall": ("recall", 1, 3),
    "kid": ("KID x 1000", 1000, 3),
}
COSTS = ("KV cache", "context", "cache MiB per image", "images/s", "ms per step")
NONE = "-"  # what can't be had


@dataclass(frozen=True)
class Cost:
    """Memory and time of the runs of one cache, from their run.json.

    Attributes:
        cache: keys of CacheConfig; None: dense.
        records: what run.json says, by seed.
    """

    cache: Mapping[str, Any] | None
    records: list[dict[str, Any]]

    @classmethod
    def of(cls, cache: Mapping[str, Any] | None, runs: Sequence[Path]) -> "Cost":
        return cls(cache, [read_record(run) for run in runs])

    @property
    def tokens(self) -> int:
        """Of an image."""
        settings = self.records[0]["settings"]
        return (settings["model.image_size"] // settings["model.downsample_size"]) ** 2

    @property
    def title(self) -> str:
        return cache_title(_config(self.cache), self.tokens)

    def numbers(self) -> dict[str, Any]:
        """For JSON: slots of image tokens in memory and attended to, bytes of a batch (of keys and values, of the whole
        cache, and the most that a process used), and times by seed."""
        cache = next((record["cache"] for record in self.records if record.get("cache")), {})
        return {
            "slots": cache.get("slots"),
            "context": _config(self.cache).slots(self.tokens),
            "tokens": self.tokens,
            "kv_bytes": cache.get("kv_bytes"),
            "cache_bytes": cache.get("bytes"),
            "peak_memory_bytes": [record.get("peak_memory_bytes") for record in self.records],
            "images_per_batch": cache.get("images_per_batch"),
            "images_per_second": [record.get("images_per_second") for record in self.records],
            "step_ms": [_step_ms(record, self.tokens) for record in self.records],
            "devices": sorted({record["device"] for record in self.records}),
            "interrupted": sum(bool(record["earlier_sessions"]) for record in self.records),
        }

    def cells(self) -> list[str]:
        """The columns COSTS."""
        found = self.numbers()
        slots, size = NONE, NONE
        if found["slots"] is not None:
            less = f" (-{100 * (1 - found['slots'] / self.tokens):.1f} %)" if found["slots"] < self.tokens else ""
            slots = f"{found['slots']}{less}"
            size = f"{found['cache_bytes'] / found['images_per_batch'] / 2**20:.2f}"
        rates, steps = ([value for value in found[key] if value] for key in ("images_per_second", "step_ms"))
        return [slots, str(found["context"]), size, spread(rates, 2), spread(steps, 2)]


def _step_ms(record: Mapping[str, Any], tokens: int) -> float | None:
    """What a decode step of a batch took, on average over all processes of a run; the first step is the condition's."""
    reports = record.get("processes", [])
    batches = sum(math.ceil(report["images"] / record["per_proc_batch_size"]) for report in reports)
    return 1000 * sum(report["seconds"]["gpt"] for report in reports) / (batches * tokens) if batches else None


def _config(cache: Mapping[str, Any] | None) -> CacheConfig:
    return CacheConfig.from_dict(cache or {"policy": "full"})


@dataclass(frozen=True)
class Row:
    """Class-conditional runs that differ in their seeds alone, as they were evaluated.

    Attributes:
        cost: what they cost.
        runs: their folders.
        results: fid.py's, by seed.
        sums: for the paired test over images; None where the reference has no images.
    """

    cost: Cost
    runs: list[Path]
    results: list[dict[str, Any]]
    sums: list[KernelSums] | None

    def values(self, key: str) -> list[float]:
        """A metric by seed; empty if it can't be had."""
        values = [result[key] for result in self.results]
        return [] if None in values else values

    def cells(self) -> list[str]:
        """The columns of METRICS."""
        return [spread(self.values(key), digits, scale) for key, (_, scale, digits) in METRICS.items()]

    def against(self, dense: "Row") -> dict[str, Difference | None]:
        """This less dense: each metric, paired by seed, and `kid_images`, paired by image."""
        found = {key: paired_t(self.values(key), dense.values(key)) for key in METRICS}
        pairs = list(zip(self.sums, dense.sums, strict=True)) if self.sums and dense.sums else None
        return found | {"kid_images": kid_difference(pairs) if pairs else None}

    def numbers(self, dense: "Row | None" = None) -> dict[str, Any]:
        """For JSON."""
        found = {"title": self.cost.title, "cache": self.cost.cache, **self.cost.numbers()}
        found |= {key: self.values(key) or None for key in METRICS}
        found["counts"] = self.results[0]["counts"]
        if dense is not None:
            found["less_dense"] = {key: value and value.values() for key, value in self.against(dense).items()}
        return found


def class_row(task: ClassTask, cache: Mapping[str, Any] | None, seeds: Sequence[int], resize: str = "llamagen") -> Row:
    """Sample and evaluate what is missing of a row; `resize` is one of the task's ways of scaling."""
    runs = [sampled(task, cache, seed, judged=True) for seed in seeds]
    images = [resized(run, task) if resize == "antialias" else run for run in runs]
    results = [evaluated(folder, task) for folder in images]
    sums = [_sums(folder, task) for folder in images]
    return Row(Cost.of(cache, runs), runs, results, None if None in sums else sums)


def _sums(run: Path, task: ClassTask) -> KernelSums | None:
    reference, _ = reference_set(task)
    if reference is None:
        return None
    samples, _, _ = open_set(run, task.feature_extractor)
    device = start_processes(task.cpu).device
    return kernel_sums(features_of(samples, task).features, features_of(reference, task).features, device)


def differences(rows: Mapping[str, Row], dense: Row) -> str:
    """The paired tests of some rows against dense, and what they are, as Markdown."""
    columns = {key: (f"{title}, by seeds", scale, digits) for key, (title, scale, digits) in METRICS.items()}
    columns["kid_images"] = ("KID x 1000, by images", 1000, 3)
    found = {title: row.against(dense) for title, row in rows.items()}
    columns = {key: column for key, column in columns.items() if any(against[key] for against in found.values())}
    lines = [
        [title, *(told(against[key], digits, scale) for key, (_, scale, digits) in columns.items())]
        for title, against in found.items()
    ]
    how = {
        "by seeds": f"Student's t over the {len(dense.runs)} seeds",
        "by images": "a jackknife over all images, which leaves each out of both runs (evaluations/paired.py)",
    }
    tests = "; ".join(f"{name}, {test}" for name, test in how.items() if any(name in c[0] for c in columns.values()))
    text = (
        "Runs of equal seeds share their noise and classes, image by image. Differences from dense, their 95 % "
        f"intervals and p: {tests}."
    )
    titles = ["less dense", *(column[0] for column in columns.values())]
    return f"{text}\n\n{markdown.table(titles, lines)}"


def spread(values: Sequence[float], digits: int, scale: float = 1) -> str:
    """The mean of some runs and their standard deviation: "2.62 +- 0.03"; of one run, its value."""
    if not values:
        return NONE
    mean = f"{scale * np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {scale * np.std(values, ddof=1):.{digits}f}"


def told(difference: Difference | None, digits: int, scale: float = 1) -> str:
    """A difference, its interval and p."""
    if difference is None:
        return NONE
    mean, low, high = (scale * value for value in (difference.mean, difference.low, difference.high))
    p = "p < 0.001" if difference.p < 0.001 else f"p = {difference.p:.3f}"
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}), {p}"


def told_times(costs: Sequence[Cost]) -> str:
    """Where the memory and times of a table come from, and what they are worth."""
    records = [record for cost in costs for record in cost.records]
    interrupted = sum(bool(record["earlier_sessions"]) for record in records)
    devices = ", ".join(sorted({record["device"] for record in records}))
    processes, batches = (
        " or ".join(map(str, sorted({record[key] for record in records})))
        for key in ("world_size", "per_proc_batch_size")
    )
    text = (
        f"Memory and times are those of the sampling runs (run.json) on {devices}, {processes} process(es), "
        f"batches of {batches}: the bytes that the cache has allocated for both halves of guidance, with all that the "
        "policy notes beside keys and values, divided by the images of a batch; images/s from the first token to the "
        "last file, of all processes together; and the mean time of a decode step, by which one process makes a token "
        "for each image of a batch. Other work on the machine counts as well."
    )
    if interrupted:
        text += f" {interrupted} of {len(records)} runs were interrupted; their times are those of the last session."
    return text
