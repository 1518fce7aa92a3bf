import json

import numpy as np
import pytest

from evaluations.paper import table2


def test_table(protocol_file, launched, tmp_path):
    flags = ["--model", str(protocol_file()), "--output", str(tmp_path / "out")]
    table2.main(flags)
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    assert record["command"] == f"bash scripts/reproduce_table2.sh {' '.join(flags)}"
    assert record["counts"] == {"images": 3, "prompts": 3}
    dense, adsa = record["rows"]
    assert (dense["title"], dense["slots"], adsa["title"], adsa["slots"]) == ("dense", 36, "ADSA-18 of 36", 18)
    (folder,) = [run for run in record["runs"] if "adsa" in run and "seed-1" in run]
    scores = [
        json.loads(line)["clip_score"]
        for line in next((tmp_path / "samples").rglob(f"{folder.rsplit('/', 1)[1]}/clip_scores-*.jsonl"))
        .read_text()
        .splitlines()
    ]
    assert adsa["clip_score"]["by_seed"][1] == pytest.approx(np.mean(scores))
    less = adsa["clip_score"]["less_dense"]
    expected = adsa["clip_score"]["mean"] - dense["clip_score"]["mean"]
    assert less["by_seeds"]["mean"] == pytest.approx(expected)
    assert less["by_prompts"]["mean"] == less["bootstrap"][0] == pytest.approx(expected)
    assert (less["by_seeds"]["count"], less["by_prompts"]["count"]) == (2, 3)
    assert adsa["r_precision"]["mean"] <= 1
    text = (tmp_path / "out" / "table.md").read_text()
    ours, theirs = text.split("## The paper's numbers, not ours")
    assert "| ADSA-18 of 36 | " in ours
    assert "| ADSA-512 | 0.286 |" in theirs
    done = len(launched)
    table2.main(flags)
    assert len(launched) == done


def test_one_prompt_over_and_over(protocol_file, launched, tmp_path):
    """There are no other prompts for R-precision then."""
    path = protocol_file(t2i={"seeds": [0]})
    (tmp_path / "prompts.txt").write_text("a red thing\na red thing\n")
    table2.main(["--model", str(path), "--output", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    assert "r_precision" not in record["rows"][1]
    assert record["rows"][1]["clip_score"]["less_dense"]["by_seeds"] is None
    assert record["counts"] == {"images": 2, "prompts": 1}
