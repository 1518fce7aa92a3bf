import json

import numpy as np
import pytest
import torch

from adsa import CacheConfig
from adsa.policies import POLICIES
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.sample.options import OptionError
from evaluations.paper import sweeps, variants
from tests.golden import fill_weights


def test_every_choice_is_measured(protocol_file, codes, tmp_path, monkeypatch):
    monkeypatch.setitem(sweeps.SPLITS, "prefix", (0, 2))
    monkeypatch.setitem(sweeps.SPLITS, "local", (1, 5))
    monkeypatch.setattr(sweeps, "COMMON", (2, 5))
    monkeypatch.setattr(sweeps, "RENEWALS", (3,))
    path, out = protocol_file(c2i={"codes": codes}), tmp_path / "out"
    flags = ["--model", str(path), "--output", str(out), "--budgets", "18", "36", "--detail", "18", "--images", "3"]
    sweeps.main(flags)
    record = json.loads((out / "table.json").read_text())
    cells = {(cell["cache"], cell["window"], cell["cfg_scale"]): cell for cell in record["cells"]}
    for policy in sorted(set(POLICIES) - {"full"}):
        assert cells[f"{policy}-36", None, 1.0]["more"] == 0  # room for all is dense
        assert cells[f"{policy}-18", None, 1.0]["error"] > 0 or policy == "adsa"
        assert (f"{policy}-18:prefix=2,local=5", None, 1.0) in cells
    assert cells["full:dtype=int4", None, 1.0]["more"] != cells["full:dtype=int8", None, 1.0]["more"] != 0
    assert {window for cache, window, _ in cells if cache == "full"} == {None, 1, 2, 3, 4, 5}
    for variant in ("adsa_previous-18", "adsa_condition-18:fold_condition=false"):
        assert cells[variant, None, 1.0]["more"] != cells["adsa-18", None, 1.0]["more"]
    assert "adsa_shared" not in POLICIES
    text = (out / "table.md").read_text()
    assert (
        "choose together (loss at guidance 1.5)" in text
        and "| rank every 3 steps |" in text
        and "| 6 | 36 |" in text
        and "| 2 | 20 |" in text
    )
    assert (out / "policies.png").stat().st_size > 1000 < (out / "bits.png").stat().st_size
    assert (out / "rows.png").stat().st_size > 1000
    cell = json.loads((out / "cells" / "adsa-18-prefix=2-local=5.json").read_text())
    assert len(cell["by_row"]) == 6 and np.mean(cell["by_row"]) == pytest.approx(np.mean(cell["losses"]))

    before = {file.name: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}
    sweeps.main(flags)
    assert {file.name: file.stat().st_mtime_ns for file in (out / "cells").iterdir()} == before


def test_without_codes_there_is_nothing_to_measure(protocol_file, tmp_path):
    with pytest.raises(OptionError, match="section 'c2i' has no key 'codes'"):
        sweeps.main(["--model", str(protocol_file()), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("mode", ["evict", "select"])
@pytest.mark.parametrize("name", ["adsa_previous", "adsa_condition"])
def test_variants_are_what_they_say(name, mode):
    """By the matrix of similarities of those that count."""
    args = {"dim": 32, "n_layer": 2, "n_head": 2, "block_size": 36, "vocab_size": 24, "num_classes": 5}
    text = {"model_type": "t2i", "caption_dim": 6, "cls_token_num": 4}
    model = fill_weights(Transformer(ModelArgs(**args | text)), 1).double().eval()
    seen = []

    class Watched(type(variants.OfPrevious()) if name == "adsa_previous" else variants.WithCondition):
        def score(self, layer):
            found = super().score(layer)
            v, places = layer.v[0, 0].detach().numpy(), layer.positions[0, 0].tolist()
            newest = layer.count - (mode == "select")
            if name == "adsa_previous":
                counts = [v[i] for i, place in enumerate(places) if 3 <= place <= newest - 5]
            else:
                counts = [*v, *layer.stored_v.read(0, 4)[0, 0, 1:].detach().numpy()]  # the first is padding
            unit = np.array([x / np.linalg.norm(x) for x in counts])
            expected = (v / np.linalg.norm(v, axis=1, keepdims=True) @ unit.T).sum(1) / layer.filled
            np.testing.assert_allclose(found[0, 0].detach().numpy(), -expected, atol=1e-8)
            seen.append(layer.count)
            return found

    with variants.known():
        cache = CacheConfig(name, 14, 3, 5, mode=mode, fold_condition=False)
        kv = model.new_cache(cache, 1, 36, torch.tensor([[False, True, True, True]]))
    for layer in kv.layers:
        layer.slots.policy = Watched()
    cond = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.manual_seed(0))
    model(cond_idx=cond, cache=kv)
    for step in range(30):
        model(idx=torch.tensor([[step % 24]]), input_pos=torch.tensor([4 + step]), cache=kv)
    assert len(seen) == (32 if mode == "select" else 16)  # one ranking for both layers, where that can be


def test_guidance_halves_choose_together():
    args = {"dim": 32, "n_layer": 2, "n_head": 2, "block_size": 36, "vocab_size": 24, "num_classes": 5}
    model = fill_weights(Transformer(ModelArgs(**args)), 1).double().eval()
    with variants.known():
        kv = model.new_cache(CacheConfig("adsa_shared", 14, 3, 5), 4, 36)
    model(cond_idx=torch.tensor([1, 2, 5, 5]), cache=kv)
    tokens = torch.randint(24, (2, 36), generator=torch.manual_seed(0)).repeat(2, 1)
    for step in range(35):
        model(idx=tokens[:, step : step + 1], input_pos=torch.tensor([1 + step]), cache=kv)
    kept = kv.layers[1].positions
    assert torch.equal(kept[:2], kept[2:]) and not torch.equal(kept[0], kept[1])
