"""Put the metrics of several runs into one Markdown table, if they can be compared. See --help."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluations.extractors import EvaluationError  # noqa: E402
from tokenizer.files import write_json  # noqa: E402

NAME = "metrics.json"
# What results must share to stand in one table, or to replace each other in a metrics.json.
SAME = {"extractor": "--feature-extractor", "reference_id": "--reference", "image_size": None}
COLUMNS = {
    "FID": ("fid", 1, 2),
    "FID, extrapolated": ("fid_infinity", 1, 2),
    "sFID": ("sfid", 1, 2),
    "IS": ("is", 1, 2),
    "precision": ("precision", 1, 3),
    "recall": ("recall", 1, 3),
    "KID x 1000": ("kid", 1000, 3),
}


def write_result(run: Path, result: dict[str, Any], script: str = "fid", same: Iterable[str] = SAME) -> None:
    """Put a script's result into a run's metrics.json, in the place of an earlier one that agrees in the keys `same`.

    The file is {"fid": [result, ...], "clip_score": [result, ...]}; of fid.py's there is one for each extractor,
    reference and image size.

    Raises:
        EvaluationError: there is a metrics.json that can't be read.
        OSError: it can't be written.
    """
    path = run / NAME
    content = _read(path) if path.exists() else {}
    kept = [other for other in content.get(script, []) if any(other.get(key) != result[key] for key in same)]
    content[script] = [*kept, result]
    write_json(path, content)


def find_result(run: Path, script: str, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """A script's result in a run's metrics.json that has these values, or None.

    Raises:
        EvaluationError: there is a metrics.json that can't be read.
    """
    results = _read(run / NAME).get(script, []) if (run / NAME).exists() else []
    return next((found for found in results if all(found.get(key) == value for key, value in wanted.items())), None)


def read_results(
    runs: Sequence[Path], feature_extractor: str | None = None, reference: str | None = None
) -> list[dict[str, Any]]:
    """The results of fid.py for some runs, which are all of one extractor, reference and image size.

    Args:
        runs: folders with a metrics.json.
        feature_extractor, reference: those to take, where there are several; the reference as fid.py was told it.

    Raises:
        EvaluationError: a run without such a result, or results that can't be compared.
    """
    found = []
    for run in runs:
        if not (run / NAME).exists():
            raise EvaluationError(f"{run / NAME}: no such file; python evaluations/fid.py {run} REFERENCE makes it")
        results = _read(run / NAME).get("fid", [])
        chosen = [
            result
            for result in results
            if feature_extractor in (None, result["extractor"]) and reference in (None, result["reference"])
        ]
        if not chosen:
            there = "; ".join(f"by {result['extractor']} against {result['reference']}" for result in results)
            raise EvaluationError(f"{run / NAME}: has no such result; it has {there or 'none of fid.py'}")
        found += [(run, result) for result in chosen]
    for key, flag in SAME.items():
        name = key.removesuffix("_id")
        values = {result[key]: f"{result[name]} ({run})" for run, result in found}
        if len(values) > 1:
            what = name.replace("_", " ")
            cure = f"choose one by {flag}" if flag else "evaluate all with the same --image-size"
            raise EvaluationError(f"results of different {what}s do not compare: {', '.join(values.values())}; {cure}")
    return [result for _, result in found]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results that compare, as Markdown: one row each."""
    first = results[0]
    columns = {title: column for title, column in COLUMNS.items() if any(r.get(column[0]) is not None for r in results)}
    cropped = f", images cropped to {first['image_size']} pixels" if first["image_size"] else ""
    lines = [
        f"Extractor {first['extractor']}, reference {first['reference']}{cropped}:",
        "",
        f"| run | images | {' | '.join(columns)} |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for result in results:
        cells = [Path(result["samples"]).name, str(result["counts"]["samples"])]
        for key, scale, digits in columns.values():
            cells.append("-" if result.get(key) is None else f"{scale * result[key]:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: not readable ({error}); delete it and run the evaluation again") from error
    return content


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these arguments; None: the process's own."""
    parser = argparse.ArgumentParser(
        description="Put the metrics of several runs into one Markdown table. Results of different feature extractors, "
        "references or image sizes are refused, since they do not compare."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that evaluations/fid.py has looked at")
    add("--feature-extractor", metavar="NAME", help="where runs have results by several")
    add("--reference", metavar="PATH", help="where runs have results against several; as fid.py was told it")
    args = parser.parse_args(argv)
    try:
        results = read_results(args.runs, args.feature_extractor, args.reference)
    except EvaluationError as error:
        sys.exit(f"error: {error}")
    print(table(results))
    if len({result["counts"]["samples"] for result in results}) > 1:
        print("note: these runs have different numbers of images, and FID falls with it", file=sys.stderr)


if __name__ == "__main__":
    main()
