"""Put the metrics of several runs into Markdown tables, if they can be compared. See --help."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluations import markdown  # noqa: E402
from evaluations.extractors import EvaluationError  # noqa: E402
from tokenizer.files import write_json  # noqa: E402

NAME = "metrics.json"
# What results must share to stand in one table: what it is called, and what to do about it. For fid.py's, also what an
# earlier result shares with the one that replaces it in a metrics.json.
SAME = {
    "extractor": ("extractors", "choose one by --feature-extractor"),
    "reference_id": ("references", "choose one by --reference"),
    "image_size": ("image sizes", "evaluate all with the same --image-size"),
}
SAME_CLIP = {
    "clip_model": ("CLIP models", "choose one by --clip-model"),
    "clip_weights": ("weights", "score all runs anew"),
    "prefix": ("prefixes", "score all with the same --prefix"),
    "image_size": ("image sizes", "score all with the same --image-size"),
    "prompts_sha256": ("prompts", "sample the same prompts"),
}
COLUMNS = {
    "FID": ("fid", 1, 2),
    "FID, extrapolated": ("fid_infinity", 1, 2),
    "sFID": ("sfid", 1, 2),
    "IS": ("is", 1, 2),
    "precision": ("precision", 1, 3),
    "recall": ("recall", 1, 3),
    "KID x 1000": ("kid", 1000, 3),
}
COLUMNS_CLIP = {"CLIP score": ("clip_score", 1, 4), "R-precision": ("r_precision", 1, 4)}


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
    runs: Sequence[Path], script: str, same: Mapping[str, tuple[str, str]], **chosen: str | None
) -> list[tuple[Path, dict[str, Any]]]:
    """The results of a script for some runs, each with its run, which agree in what they must.

    Args:
        runs: folders with a metrics.json.
        script: "fid" or "clip_score".
        same: keys in which they agree, as SAME or SAME_CLIP.
        chosen: take only results with these values, by key; None: any.

    Raises:
        EvaluationError: a run without such a result, or results that can't be compared.
    """
    found = []
    for run in runs:
        results = _read(run / NAME).get(script, [])
        fitting = [result for result in results if all(value in (None, result[key]) for key, value in chosen.items())]
        if not fitting:
            there = "; ".join(" against ".join(str(result[key]) for key in chosen) for result in results)
            raise EvaluationError(f"{run / NAME}: has no such result; it has {there or f'none of {script}.py'}")
        found += [(run, result) for result in fitting]
    for key, (what, cure) in same.items():
        name = key.removesuffix("_id")
        values = {result[key]: f"{result[name]} ({run})" for run, result in found}
        if len(values) > 1:
            raise EvaluationError(f"results of different {what} do not compare: {', '.join(values.values())}; {cure}")
    return found


def table(results: Sequence[tuple[Path, dict[str, Any]]], heading: str, columns: Mapping[str, tuple]) -> str:
    """Results that compare, as Markdown: one row each.

    Args:
        results: from :func:`read_results`.
        heading: a line above.
        columns: COLUMNS or COLUMNS_CLIP; those that no result has are left out. One with an interval tells it.
    """
    columns = {
        title: column for title, column in columns.items() if any(r.get(column[0]) is not None for _, r in results)
    }
    rows = []
    for run, result in results:
        cells = [run.resolve().name, str(_count(result))]
        for key, scale, digits in columns.values():
            low_high = result.get(f"{key}_interval")
            interval = f" ({' to '.join(f'{scale * end:.{digits}f}' for end in low_high)})" if low_high else ""
            cells.append("-" if result.get(key) is None else f"{scale * result[key]:.{digits}f}{interval}")
        rows.append(cells)
    return f"{heading}\n\n{markdown.table(['run', 'images', *columns], rows)}"


def _count(result: dict[str, Any]) -> int:
    return result["counts"].get("samples") or result["counts"]["images"]


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
        description="Put the metrics of several runs into Markdown tables, those of fid.py and those of clip_score.py. "
        "Results of different feature extractors, references, image sizes, CLIP models or prompts are refused, since "
        "they do not compare."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that has been evaluated")
    add("--feature-extractor", metavar="NAME", help="where runs have results by several")
    add("--reference", metavar="PATH", help="where runs have results against several; as fid.py was told it")
    add("--clip-model", metavar="NAME", help="where runs have scores by several; as results call it")
    args = parser.parse_args(argv)
    tables = []
    try:
        for run in args.runs:
            if not (run / NAME).exists():
                raise EvaluationError(f"{run / NAME}: no such file; python evaluations/fid.py {run} REFERENCE makes it")
        there = {script for run in args.runs for script, results in _read(run / NAME).items() if results}
        if "fid" in there or "clip_score" not in there:
            chosen = {"extractor": args.feature_extractor, "reference": args.reference}
            results = read_results(args.runs, "fid", SAME, **chosen)
            first = results[0][1]
            cropped = f", images cropped to {first['image_size']} pixels" if first["image_size"] else ""
            heading = f"Extractor {first['extractor']}, reference {first['reference']}{cropped}:"
            tables.append(table(results, heading, COLUMNS))
            if len({_count(result) for _, result in results}) > 1:
                print("note: these runs have different numbers of images, and FID falls with it", file=sys.stderr)
        if "clip_score" in there:
            results = read_results(args.runs, "clip_score", SAME_CLIP, clip_model=args.clip_model)
            first = results[0][1]
            heading = f"CLIP {first['clip_model']}, prefix {first['prefix']!r}, 95 % intervals over images:"
            tables.append(table(results, heading, COLUMNS_CLIP))
    except EvaluationError as error:
        sys.exit(f"error: {error}")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
