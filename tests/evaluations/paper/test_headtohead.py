import json
import shutil

import numpy as np
import pytest

from autoregressive.sample.options import OptionError
from evaluations.paper import headtohead

POLICIES = ["--policies", "adsa", "streaming", "random"]


def test_by_class(protocol_file, codes, launched, tmp_path, capsys):
    path, out = protocol_file(c2i={"codes": codes}), tmp_path / "out"
    flags = ["--model", str(path), "--output", str(out), *POLICIES, "--budgets", "9", "36"]
    headtohead.main(flags)
    cells = sorted(file.name for file in (out / "cells").iterdir())
    assert len(cells) == 2 * (1 + 3 * 2) and "adsa-9-1-4-seed1.json" in cells and "dense-seed0.json" in cells
    record = json.loads((out / "table.json").read_text())
    assert record["command"].startswith("bash scripts/headtohead.sh --model ")
    rows = {(row["cache"]["policy"], row["cache"]["budget"]): row for row in record["rows"]}
    # With room for all tokens every policy is the dense cache.
    for policy in ("adsa", "streaming", "random"):
        whole = rows[policy, 36]
        assert whole["likeness"] == whole["same_tokens"] == pytest.approx([1, 1, 1])
        assert whole["less_dense"]["mean"] == 0 and whole["less_dense"]["p"] == 1
        assert np.abs(whole["fid_against_dense"]).max() < 1e-6
        assert whole["loss"] == [0, 0]
    small = rows["adsa", 9]
    assert small["same_tokens"][0] < 1 and small["less_dense"]["count"] == 12
    # The first nine tokens are the dense ones.
    assert small["same_tokens"][0] >= 9 / 36
    assert small["loss"][0] != 0 < small["loss"][1]
    text = (out / "table.md").read_text()
    assert (
        "loss x 1000" in text
        and "### 9 of 36 tokens" in text
        and "| adsa | 1 + 4 + 4 |" in text
        and "### What breaks first" in text
    )
    kinds = {one["class"] for one in record["failures"]["adsa"]["classes"]}
    assert sum(one["images"] for one in record["failures"]["adsa"]["classes"]) == 12 and len(kinds) > 1
    assert record["failures"]["adsa"]["budget"] == 9
    # Devices and batch sizes round otherwise; neither makes another cell.
    assert "device" not in json.loads((out / "cells" / "dense-seed0.json").read_text())["identity"]
    assert small["cost"][0]["devices"]
    assert (out / "curves.png").stat().st_size > 1000 < (out / "bytes.png").stat().st_size
    # Pictures of what breaks first: dense and both budgets, a class a column.
    shown = record["pictures"]
    assert [cache and cache["budget"] for cache in shown["caches"]] == [None, 36, 9]
    worst = [one["class"] for one in record["failures"]["adsa"]["classes"]]
    assert sorted(shown["images"], key=worst.index) == list(shown["images"])
    drawn = (out / "broken.png").stat().st_mtime_ns

    # What is there needs no images any more.
    shutil.rmtree(tmp_path / "samples")
    done = len(launched)
    headtohead.main(flags)
    assert len(launched) == done and (out / "broken.png").stat().st_mtime_ns == drawn
    headtohead.main([*flags, "--seeds", "1"])
    assert len(launched) == done and (out / "broken.png").stat().st_mtime_ns > drawn
    assert json.loads((out / "table.json").read_text())["rows"][0]["less_dense"]["count"] == 6
    with pytest.raises(OptionError, match=r"dense-seed0.json: made with other images, .*give another --output"):
        headtohead.main([*flags, "--images", "4"])
    (out / "cells" / "dense-seed0.json").write_text("{")
    with pytest.raises(OptionError, match=r"dense-seed0.json: no readable cell"):
        headtohead.main(flags)


def test_common_split():
    assert headtohead.resolved("random", 64, common=False) == {
        "policy": "random",
        "budget": 64,
        "prefix": 0,
        "local": 1,
    }
    common = {name: headtohead.resolved(name, 64, common=True) for name in ("random", "h2o", "adsa")}
    assert {(cache["prefix"], cache["local"]) for cache in common.values()} == {(8, 32)}
    assert headtohead.cell_name(common["h2o"]) == "h2o-64-8-32"


def test_other_caches(protocol_file, codes, launched, tmp_path):
    path, out = protocol_file(c2i={"codes": codes}), tmp_path / "out"
    caches = ["streaming-9:merge=true", "adsa-9:prefix=1,local=4", "full:dtype=int8"]
    flags = ["--model", str(path), "--output", str(out), "--seeds", "0", "--policies"]
    headtohead.main([*flags, "--caches", *caches])
    there = {file.stem for file in (out / "cells").iterdir()}
    assert there == {"dense-seed0", "streaming-9-1-8-merge=True-seed0", "adsa-9-1-4-seed0", "full-dtype=int8-seed0"}
    text = (out / "table.md").read_text()
    assert "| streaming, merge=True | 1 + 0 + 8 |" in text and "| adsa | 1 + 4 + 4 |" in text
    whole = text[text.index("### 36 of 36 tokens") : text.index("### 9 of 36 tokens")]
    assert "| full, dtype=int8 | - |" in whole
    failures = json.loads((out / "table.json").read_text())["failures"]
    assert {name: found["budget"] for name, found in failures.items()} == {
        "streaming, merge=True": 9,
        "adsa": 9,
        "full, dtype=int8": 36,
    }
    # Another table of the same cells.
    done, other = len(launched), tmp_path / "other"
    headtohead.main([*flags, "--caches", "adsa-9:prefix=1,local=4", "--cells", str(out), "--output", str(other)])
    assert len(launched) == done and {file.name for file in other.iterdir()} >= {"table.md", "curves.png"}
    assert not (other / "cells").exists() and not (other / "loss").exists()
    with pytest.raises(SystemExit):
        headtohead.main([*flags, "random", "--cells", str(other)])
    # A split that is not that of all is told; one that is, is not, so that a policy has one curve.
    headtohead.main([*flags, "random", "--budgets", "9", "18", "--split", "common", "--caches", "random-9"])
    found = {row["cache"]["prefix"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    assert found.keys() == {0, 1, 2}
    failures = json.loads((out / "table.json").read_text())["failures"]
    assert {name: found["budget"] for name, found in failures.items()} == {"random": 9, "random, 0 + 1": 9}
    with pytest.raises(SystemExit):
        headtohead.main(flags)
    with pytest.raises(OptionError, match="cache 'adsa-9:nope=1'"):
        headtohead.main([*flags, "--caches", "adsa-9:nope=1"])


def test_by_text(protocol_file, launched, tmp_path):
    out = tmp_path / "out"
    path = protocol_file()
    headtohead.main(["--model", str(path), "--task", "t2i", "--output", str(out), *POLICIES[:2], "--budgets", "9"])
    record = json.loads((out / "table.json").read_text())
    (row,) = record["rows"]
    assert {"clip_score", "r_precision"} == row["judged"][0].keys() and row["less_dense"]["count"] == 3
    assert "CLIP score, less dense" in (out / "table.md").read_text()
    prompts = {"a red thing": 0, "a blue thing": 1, "a green thing": 2}
    assert {one["class"] for one in record["failures"]["adsa"]["classes"]} == prompts.keys()
    assert record["pictures"]["images"] == prompts and (out / "broken.png").stat().st_size > 1000
