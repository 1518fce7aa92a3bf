"""The paper's Table 2: CLIP score and R-precision, cache, memory and time of dense and of each budget. See --help."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from autoregressive.sample.entry import guarded  # noqa: E402
from evaluations import markdown  # noqa: E402
from evaluations.bootstrap import mean_interval  # noqa: E402
from evaluations.paired import Difference, paired_t  # noqa: E402
from evaluations.paper.protocol import TextTask, add_model_flag, load_protocol, output_folder  # noqa: E402
from evaluations.paper.report import interval_told, write_report  # noqa: E402
from evaluations.paper.rows import COSTS, NONE, Cost, spread, told, told_times  # noqa: E402
from evaluations.paper.runs import sampled, scored  # noqa: E402

DESCRIPTION = """\
Table 2 of the paper: images of prompts by the dense cache and by ADSA at each budget, by CLIP score and R-precision
with their intervals, with the slots, memory and time that they cost; deviation over the seeds, and paired tests against
dense.

Samples and scores what is not there yet, in the sample_dir of the protocol; started again, it goes on. Writes table.md
and table.json. The demo's 3072 images take an estimated two hours on two CPU cores, without a network."""

PAPER_COLUMNS = ("model", "CLIP score", "KV cache = context")  # all with 1024 tokens
PAPER = {
    "LlamaGen-XL (dense)": ("0.287", "1024"),
    "ADSA-768": ("0.287", "768 (-25.0 %)"),
    "ADSA-640": ("0.287", "640 (-37.5 %)"),
    "ADSA-512": ("0.286", "512 (-50.0 %)"),
}
PAPER_TITLE = """\
## The paper's numbers, not ours

LlamaGen-XL, 30 000 MS-COCO prompts, CLIP ViT-B/32 (arXiv 2506.18226, Table 2)."""
HOW = """\
Mean +- standard deviation over the seeds; in brackets the 95 % interval of the mean over prompts, by bootstrap, where a
prompt's score is the mean of its images. R-precision: the share of images nearer to their own prompt than to 99 others.
Scores by {model}, prefix {prefix!r}: numbers of other models or prefixes do not compare."""
TESTS = """\
Images of equal seeds and prompts share their noise. Differences from dense and their 95 % intervals: by seeds and by
prompts (a prompt's images averaged over the seeds), Student's t with its p; and by prompts, bootstrap."""
SCORES = {"clip_score": ("CLIP score", 4), "r_precision": ("R-precision", 4)}


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds alone, as they were scored.

    Attributes:
        cost: what they cost.
        runs: their folders.
        results: clip_score.py's, by seed.
        scores: {"clip_score" and "r_precision": float64 [seeds, prompts]}; a score that can't be had is left out.
    """

    cost: Cost
    runs: list[Path]
    results: list[dict[str, Any]]
    scores: dict[str, np.ndarray]

    def cells(self) -> list[str]:
        """The columns of SCORES and COSTS."""
        found = []
        for key, (_, digits) in SCORES.items():
            if key not in self.scores:
                found += [NONE, NONE]
                continue
            mean, *interval = self.means[key]
            found += [spread(list(self.scores[key].mean(1)), digits), interval_told(mean, interval, digits)]
        return found + self.cost.cells()

    @cached_property
    def means(self) -> dict[str, list[float]]:
        """The mean over prompts and its interval, by score. With 30 000 prompts that takes seconds."""
        return {key: [*map(float, mean_interval(values.mean(0)))] for key, values in self.scores.items()}

    def against(self, dense: "Row") -> dict[str, dict[str, Any]]:
        """This less dense, by score: the tests over seeds and over prompts, and the bootstrap's mean and interval."""
        return {
            key: {
                "by_seeds": paired_t(ours.mean(1), dense.scores[key].mean(1)),
                "by_prompts": paired_t(ours.mean(0), dense.scores[key].mean(0)),
                "bootstrap": [*map(float, mean_interval((ours - dense.scores[key]).mean(0)))],
            }
            for key, ours in self.scores.items()
        }

    def numbers(self, less: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
        """For JSON, with what :meth:`against` has said."""
        found: dict[str, Any] = {"title": self.cost.title, "cache": self.cost.cache, **self.cost.numbers()}
        for key, values in self.scores.items():
            mean, *interval = self.means[key]
            found[key] = {"by_seed": values.mean(1).tolist(), "mean": mean, "interval": interval}
            if less is not None:
                found[key]["less_dense"] = {
                    name: test.values() if isinstance(test, Difference) else test for name, test in less[key].items()
                }
        return found


def text_row(task: TextTask, cache: Mapping[str, Any] | None) -> Row:
    """Sample and score what is missing of a row."""
    runs = [sampled(task, cache, seed, judged=True) for seed in task.seeds]
    results = [scored(run, task) for run in runs]
    lines = [
        [json.loads(line) for line in (run / result["scores"]).read_text(encoding="utf-8").splitlines()]
        for run, result in zip(runs, results, strict=True)
    ]
    scores = {}
    for key in SCORES:
        values = [[line[key] for line in of_run] for of_run in lines]
        if not any(None in of_run for of_run in values):
            scores[key] = np.array(values, np.float64)
    return Row(Cost.of(cache, runs), runs, results, scores)


def differences(found: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """What :meth:`Row.against` says of some rows, by title, as Markdown."""
    columns, lines = ["less dense"], [[title] for title in found]
    for key in next(iter(found.values())):
        name, digits = SCORES[key]
        columns += [f"{name}, by seeds", "by prompts, t", "by prompts, bootstrap"]
        for line, tests in zip(lines, found.values(), strict=True):
            mean, *interval = tests[key]["bootstrap"]
            line += [told(tests[key]["by_seeds"], digits), told(tests[key]["by_prompts"], digits)]
            line.append(interval_told(mean, interval, digits))
    return markdown.table(columns, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flag(parser)
    args = parser.parse_args(argv)
    protocol = load_protocol(args.model)
    task, folder = protocol.t2i, output_folder(args, "table2", protocol)
    caches = [None, *({"policy": "adsa", "budget": budget} for budget in task.budgets)]
    dense, *sparse = rows = [text_row(task, cache) for cache in caches]
    less = {row.cost.title: row.against(dense) for row in sparse}
    first, columns = dense.results[0], ["cache"]
    for name, _ in SCORES.values():
        columns += [name, "95 % interval"]
    text = [
        f"## Measured\n\nModel {protocol.name}, {first['counts']['images']} images of each cache and seed, one for "
        f"each prompt of {task.prompts}; seeds {', '.join(map(str, task.seeds))}.\n\n"
        f"{HOW.format(model=first['clip_model'], prefix=task.clip_prefix)}",
        markdown.table([*columns, *COSTS], [[row.cost.title, *row.cells()] for row in rows]),
        TESTS,
        differences(less),
        told_times([row.cost for row in rows]),
        PAPER_TITLE,
        markdown.table(PAPER_COLUMNS, [[name, *cells] for name, cells in PAPER.items()]),
    ]
    kept = ("clip_model", "clip_weights", "prefix", "image_size", "prompts_sha256", "counts")
    numbers = {
        "model": protocol.name,
        "seeds": task.seeds,
        "prompts": str(task.prompts),
        **{key: first[key] for key in kept},
        "rows": [dense.numbers(), *(row.numbers(less[row.cost.title]) for row in sparse)],
        "paper": PAPER,
    }
    write_report(folder, "table2", argv, task, "\n\n".join(text), numbers, [run for row in rows for run in row.runs])


if __name__ == "__main__":
    guarded(main)
