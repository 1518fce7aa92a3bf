import json

import pytest

from adsa import CacheConfig
from evaluations.paper import table3
from evaluations.paper.table3 import combination


@pytest.mark.parametrize(
    ("parts", "cache"),
    [
        ((True, True, True), ("adsa", 256, 32, 128)),
        ((True, True, False), ("adsa", 256, 32, 1)),
        ((False, True, True), ("adsa", 256, 0, 128)),
        ((False, True, False), ("adsa", 256, 0, 1)),
        ((True, False, True), ("streaming", 256, 32, 224)),
        ((False, False, True), ("streaming", 256, 0, 256)),
        ((True, False, False), ("streaming", 256, 255, 1)),
        ((False, False, False), ("random", 256, 0, 1)),
    ],
)
def test_combinations(parts, cache):
    found = combination(256, *parts)
    config = CacheConfig.from_dict(found)
    assert (config.policy, config.budget, *config.split) == cache
    assert ("prefix" in found) == (not all(parts))  # so that all parts are table 1's run


def test_table(protocol_file, launched, tmp_path):
    path = protocol_file(c2i={"budgets": [9], "ablation_seeds": [1], "images": 4})
    table3.main(["--model", str(path), "--output", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    assert record["seeds"] == [1]
    parts = [row["parts"] for row in record["rows"]]
    assert len(set(map(tuple, parts))) == 8
    assert parts[0] == ["prefix", "select", "local"]
    assert [row["slots"] for row in record["rows"]] == [9] * 8
    assert len(record["runs"]) == 9  # with dense
    assert len({json.dumps(row["kid"]) for row in record["rows"]}) > 4  # the combinations do make other images
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| 9 | yes | yes | yes | 1 + 4 + 4 | " in text
    assert "| 9 |  |  |  | 0 + 8 + 1 | " in text
    assert "| 9: prefix + local | " in text
    assert "by seeds" not in text  # there is one
    assert text.index("The paper's numbers, not ours") < text.index("51.07")
