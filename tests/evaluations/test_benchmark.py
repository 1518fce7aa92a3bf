"""The benchmark on a tiny shape: what it counts and writes, and that what it times is decoding. Never its times."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from adsa import CacheConfig, native
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from autoregressive.models.loops import multiplies
from autoregressive.models.recorded import RecordedSteps
from evaluations import benchmark, decoders
from evaluations.decoders import HF, Decoder, HFModel, Stepper, Upstream
from tests.tape import operations_alone, recorder

TOKENS = 36
SHAPE = {"dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 16, "vocab_size": 64, "num_classes": 5}
CACHES = ["dense", "adsa-12", "streaming-12", "adsa-12-renew3"]


@pytest.fixture
def tiny(monkeypatch):
    """Registered as GPT-Tiny; and measuring the machine takes no time."""
    monkeypatch.setitem(GPT_models, "GPT-Tiny", lambda **given: Transformer(ModelArgs(**SHAPE | given)))
    monkeypatch.setattr(decoders, "machine_limits", lambda *_: {"bytes_per_second": 2e9, "flops_per_second": 1e9})


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**SHAPE, block_size=TOKENS)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight)
    return model


def benched(folder, *flags):
    given = ["--model", "GPT-Tiny", "--cpu", "--tokens", str(TOKENS), "--steps", "4", "--repeats", "2"]
    given += ["--caches", "dense"]
    benchmark.main([*given, *flags, "--output", str(folder)])
    return json.loads((folder / "table.json").read_text())


def test_everything(tiny, tmp_path, capsys):
    flags = ["--batches", "1", "3", "--upstream", "--hf", "--whole-image", "--breakdown"]
    record = benched(tmp_path, "--caches", *CACHES, *flags)
    names = [*CACHES, "upstream", "hf-dynamic", "hf-static"]
    assert [(row["images"], row["cache"]) for row in record["rows"]] == [(n, name) for n in (1, 3) for name in names]
    assert record["command"].startswith("python evaluations/benchmark.py --model GPT-Tiny")
    weights = 2 * (16 * 48 + 16 * 16 + 3 * 16 * 48 + 2 * 16) + 16 + 64 * 16  # layers, last norm, head
    for row in record["rows"]:
        found, rows = row["summary"], 2 * row["images"]
        assert [len(turn["seconds"]) for turn in row["turns"].values()] == [4, 4]
        assert 0 < found["step_ms"]["p50"] <= found["step_ms"]["p95"] <= found["step_ms"]["p99"]
        evicts = row["cache"] in CACHES[1:]
        slots = {"upstream": 40}.get(row["cache"], 1 + (12 if evicts else TOKENS))
        assert found["kv_bytes"] == 2 * 2 * rows * 16 * slots * 4, row["cache"]
        assert found["cache_bytes"] >= found["kv_bytes"]
        need = row["turns"]["0"]["demand"]
        attended = 1 + (12 if evicts else (33 + 36) / 2)  # the last four steps of a dense decode have 33 to 36
        assert need["weight_bytes"] == 4 * weights
        assert need["kv_bytes"] == pytest.approx(2 * 2 * rows * 16 * attended * 4)
        products = weights - 5 * 16
        assert need["flops"] == pytest.approx(2 * rows * products + 4 * 2 * rows * 16 * attended)
        assert row["turns"]["0"]["image_seconds"] > 0
        if row["cache"].startswith("hf"):
            assert "breakdown_ms" not in found
        else:
            parts = found["breakdown_ms"]
            selects = parts.pop("selection")
            assert list(parts) == ["cache writes", "attention", "head and sampling", "projections and FFN"]
            assert min(parts.values()) > 0 and (selects > 0) == (row["cache"] != "upstream")
    text = (tmp_path / "table.md").read_text()
    assert "| 3 | adsa-12-renew3 |" in text and record["command"] in text
    assert text.strip() in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_summary():
    def row(*rounds, image=None):
        turn = {"kv_bytes": 8, "cache_bytes": 9, "peak_bytes": 5, "beyond_weights_bytes": 4, "breakdown": None}
        turn |= {"steps": 100, "demand": {"bytes": 3e6, "flops": 1e6}, "image_seconds": image}
        return {
            "images": 2,
            "cache": "dense",
            "turns": {i: turn | {"seconds": seconds} for i, seconds in enumerate(rounds)},
        }

    dense = row([0.010, 0.010, 0.040], [0.020, 0.020, 0.020], [0.010, 0.010, 0.010])
    mine = row([0.005, 0.005, 0.005], [0.020, 0.020, 0.090], image=4.0)
    found = benchmark.summary(mine, dense, {"bytes_per_second": 1e9, "flops_per_second": 1e9}, 100)
    assert found["against"] == {"base": "dense", "median": 0.75, "min": 0.5, "max": 1.0}
    assert found["step_ms"]["p50"] == pytest.approx(12.5)
    assert found["step_ms"]["mean"] == pytest.approx(145 / 6)
    assert (found["limit_ms"], found["limited_by"]) == (pytest.approx(3.0), "memory")
    assert found["times_limit"] == pytest.approx(12.5 / 3)
    assert found["steady_images_per_second"] == pytest.approx(2 / 1.25)
    assert found["whole_image"] == pytest.approx(
        {"seconds": 4.0, "step_ms": 40.0, "tokens_per_second": 50.0, "images_per_second": 0.5}
    )
    both = benchmark.summary(mine, mine, {"bytes_per_second": 1e9, "flops_per_second": 1e9}, 100)
    assert both["whole_image"]["against"] == {"base": "dense", "median": 1.0, "min": 1.0, "max": 1.0}
    slow = benchmark.summary(mine, None, {"bytes_per_second": 1e9, "flops_per_second": 1e8}, 100)
    assert (slow["limit_ms"], slow["limited_by"]) == (pytest.approx(10.0), "arithmetic")
    assert "against" not in slow


def test_like_is_told_against_like():
    rows = [{"cache": name} for name in ("hf-dynamic", "dense", "dense graphs", "adsa-8 graphs", "adsa-8")]
    bases = [benchmark.base_of(row, rows)["cache"] for row in rows]
    assert bases == ["dense", "dense", "dense graphs", "dense graphs", "dense"]
    assert benchmark.base_of(rows[3], rows[3:]) is None


def test_recorded_steps(model, monkeypatch):
    """On tapes: what is timed is played, and nothing recorded meanwhile, in the last steps and in a whole image."""
    args = ["--cuda-graphs", "--tokens", str(TOKENS), "--steps", "8", "--whole-image", "--caches"]
    args = benchmark.arguments([*args, "dense", "adsa-12", "adsa-20-renew4"])
    tapes, timed = [], []
    operations_alone(monkeypatch)
    monkeypatch.setattr(decoders, "RecordedSteps", partial(RecordedSteps, recorder=recorder(tapes)))
    monkeypatch.setattr(decoders.Clock, "seconds", lambda clock: timed.append(len(tapes)) or [1.0] * 8)
    for decoder in benchmark.decoders(model, args):
        if not decoder.records:
            continue
        tapes.clear()
        timed.clear()
        turn = benchmark.take_turn(decoder, model, 2, args, torch.device("cpu"))
        *_, warm, steps, image = timed
        assert warm == steps > 0 and image > steps
        assert len(turn["seconds"]) == 8 and turn["kv_bytes"] > 0 and not decoder.splits
        kv = decoder.new_cache(4, TOKENS)
        decoders.time_image(decoder, kv, 2, True, TOKENS)
        before = len(tapes)
        assert before == timed[-1] and kv.layers[0].count == TOKENS - 1


def test_turns_alternate():
    order = list(benchmark.turns(2, range(-1, 2)))
    assert order == [(-1, 1), (-1, 0), (0, 0), (0, 1), (1, 1), (1, 0)]


def test_without_guidance(tiny, tmp_path):
    (row,) = benched(tmp_path, "--batches", "3", "--cfg-scale", "1")["rows"]
    assert row["summary"]["kv_bytes"] == 2 * 2 * 3 * 16 * (1 + TOKENS) * 4  # as many rows as images
    assert "1 row for each image" in (tmp_path / "table.md").read_text()


def test_under_transformers(tiny, tmp_path):
    """Without this project's own model; with a budget for all, and one that evicts."""
    flags = ["--caches", "--hf", "dynamic", "adsa-36", "adsa-12", "--batches", "2", "--whole-image", "--trace"]
    record = benched(tmp_path, *flags)
    rows = {row["cache"]: row["summary"] for row in record["rows"]}
    assert list(rows) == ["hf-dynamic", "hf-adsa-36", "hf-adsa-12"]
    slots = {"hf-dynamic": 37, "hf-adsa-36": 37, "hf-adsa-12": 13}
    for name, found in rows.items():
        assert found["kv_bytes"] == 2 * 2 * 4 * 16 * slots[name] * 4, name
        assert found["against"]["base"] == "hf-dynamic"
        trace = json.loads((tmp_path / f"trace-{name}-2.json").read_text())
        assert any("scaled_dot_product" in event["name"] for event in trace["traceEvents"])
    assert "ratios, of median step times or of whole batches, to hf-dynamic." in (tmp_path / "table.md").read_text()
    assert rows["hf-dynamic"]["whole_image"]["against"]["max"] == 1


def test_several_rows_at_once(tiny, tmp_path):
    """Whole images, by their passes."""
    flags = ["--caches", "dense", "dense-zipar2", "adsa-24-zipar3", "--batches", "2", "--whole-image"]
    dense, two, three = benched(tmp_path, *flags)["rows"]
    assert dense["turns"]["0"]["steps"] == 36
    for row, window in ((two, 2), (three, 3)):
        turn, found = row["turns"]["1"], row["summary"]
        assert turn["steps"] == len(turn["seconds"]) == 6 + 4 * window + 6 - 1
        assert found["whole_image"]["step_ms"] == pytest.approx(1000 * found["whole_image"]["seconds"] / turn["steps"])
        assert "limit_ms" not in found and "against" not in found and found["whole_image"]["against"]["median"] > 0
    assert two["summary"]["kv_bytes"] > three["summary"]["kv_bytes"]
    assert "| 2 | adsa-24-zipar3 |" in (tmp_path / "table.md").read_text()


def test_a_language_models_shape():
    args = benchmark.arguments(["--model", "Janus-Pro-1B"])
    with torch.device("meta"):
        model = Transformer(ModelArgs(**benchmark.SHAPES[args.model]))
    # By its configuration on the hub: intermediate_size 5632, and 16384 codes.
    assert (model.config.ffn_dim, model.config.head_dim, model.output.out_features) == (5632, 128, 16384)


def test_caches_of_integers(tiny, tmp_path):
    flags = ["--caches", "adsa-12", "adsa-12-kvint8", "--hf", "adsa-12-kvint8", "--batches", "1", "--breakdown"]
    plain, ours, theirs = benched(tmp_path, *flags)["rows"]
    floats = plain["summary"]["kv_bytes"] / 4
    vectors = floats / (SHAPE["dim"] // SHAPE["n_head"])
    for row in (ours, theirs):
        assert row["summary"]["kv_bytes"] == floats + 2 * vectors, row["cache"]
        ratio = row["turns"]["0"]["demand"]["kv_bytes"] / plain["turns"]["0"]["demand"]["kv_bytes"]
        assert ratio == pytest.approx(row["summary"]["kv_bytes"] / plain["summary"]["kv_bytes"])
    assert min(ours["summary"]["breakdown_ms"].values()) > 0


def test_parts_of_loops(tiny, tmp_path, monkeypatch):
    """Which write to the cache as they attend."""
    if not native.wanted():
        pytest.skip("no C++ here")
    monkeypatch.setitem(SHAPE, "dim", 64)
    (row,) = benched(tmp_path, "--caches", "adsa-12", "--batches", "1", "--breakdown")["rows"]
    parts = row["summary"]["breakdown_ms"]
    assert parts.pop("cache writes") == 0 and min(parts.values()) > 0


def test_quantised(tiny, tmp_path):
    flags = ["--caches", "dense", "adsa-12", "--quantize", "int8", "--batches", "1", "--upstream", "--hf"]
    record = benched(tmp_path, *flags, "--whole-image")
    names = ["dense", "dense int8", "adsa-12 int8", "upstream", "hf-dynamic", "hf-static"]
    assert [row["cache"] for row in record["rows"]] == names
    assert record["settings"]["dtype"] == "bf16"
    products, norms = 2 * (16 * 48 + 16 * 16 + 3 * 16 * 48) + 64 * 16, 5 * 16
    scales = 2 * (48 + 16 + 2 * 48 + 16) + 64
    for row in record["rows"]:
        need = row["turns"]["0"]["demand"]
        int8 = row["cache"].endswith("int8")
        size = 2 if multiplies(torch.int8) is None else 4  # of a scale
        assert need["weight_bytes"] == (products + size * scales + 2 * norms if int8 else 2 * (products + norms))
        attended = 13 if "adsa" in row["cache"] else 1 + (33 + 36) / 2
        assert need["kv_bytes"] == pytest.approx(2 * 2 * 2 * 16 * attended * 2)
        assert need["flops"] == pytest.approx(2 * 2 * products + 4 * 2 * 2 * 16 * attended)
        assert row["summary"]["against"]["median"] > 0
    assert record["rows"][0]["summary"]["against"]["max"] == 1


def test_out_of_memory_loses_one_cache(tiny, tmp_path, monkeypatch):
    class Hungry(Decoder):
        def fill(self, kv, count):
            if self.name == "adsa-12":
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().fill(kv, count)

    monkeypatch.setattr(decoders, "Decoder", Hungry)
    record = benched(tmp_path, "--caches", "dense", "adsa-12", "--batches", "1")
    dense, hungry = record["rows"]
    assert (dense["status"], len(dense["turns"])) == ("", 2)
    assert (hungry["status"], hungry["turns"]) == ("out of memory", {})
    assert "| 1 | adsa-12 | out of memory |" in (tmp_path / "table.md").read_text()


def test_other_errors_are_not_hidden(tiny, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes don't fit")

    monkeypatch.setattr(Decoder, "fill", broken)
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        benched(tmp_path, "--caches", "dense", "--batches", "1")


def test_upstream_decodes_the_same(model):
    cond, seeds, upstream = torch.tensor([1, 4]), torch.tensor([5, 6]), Upstream("upstream", model)
    kv = upstream.new_cache(4, TOKENS)
    found = generate(upstream.model, cond, TOKENS, cfg_scale=2.0, seeds=seeds, kv=kv)
    assert found.equal(generate(model, cond, TOKENS, cfg_scale=2.0, seeds=seeds))
    assert found.unique().numel() > 10


def test_llama_computes_with_our_weights(model):
    """With each cache that has room for all it gives what it gives without; its weights are ours, at no more memory."""
    llama = HFModel(model)
    cond, seeds = torch.tensor([1, 4]), torch.tensor([5, 6])
    tokens = []
    for cache in ("dynamic", "static", CacheConfig("adsa", TOKENS)):
        kv = HF("hf", llama, cache).new_cache(2, TOKENS)
        tokens.append(generate(llama, cond, TOKENS, seeds=seeds, kv=kv))
    assert tokens[0].equal(tokens[1]) and tokens[0].equal(tokens[2])
    whole = llama.llama(torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens[0][:, :-1]], dim=1)).logits
    greedy = HF("hf", llama, "static").new_cache(2, TOKENS)
    first = llama(cond_idx=cond, cache=greedy)[0]
    torch.testing.assert_close(first[:, 0], whole[:, 0].float())
    step = llama(idx=tokens[0][:, :1], input_pos=torch.tensor([1]), cache=greedy)[0]
    torch.testing.assert_close(step[:, 0], whole[:, 1].float())
    ours = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert {weight.untyped_storage().data_ptr() for weight in llama.llama.parameters()} <= ours


@pytest.mark.parametrize("name, held", [("dense", 32), ("adsa-12", 12)])
def test_full_when_timed(model, name, held):
    """Else an evicting cache would be timed while it doesn't evict, and a dense one while it is short."""
    decoder = Decoder(name, model, benchmark.cache_config(name, 32, TOKENS))
    kv = decoder.new_cache(2, TOKENS)
    decoder.fill(kv, 32)
    assert kv.layers[0].slots.filled == held
    seconds = Stepper(decoder, kv, 1, True, 32).time(4)
    assert len(seconds) == 4 and kv.layers[0].count == held + 4


def test_cache_names():
    assert benchmark.cache_config("adsa-256-renew8", 500, 576) == CacheConfig("adsa", 256, renew_every=8)
    assert benchmark.cache_config("adsa_inverse-64", 500, 576) == CacheConfig("adsa_inverse", 64)
    assert benchmark.cache_config("dense", 500, 576) == CacheConfig("full")
    assert benchmark.cache_config("dense-kvint4-zipar12", 500, 576) == CacheConfig("full", dtype="int4")
    renewed = CacheConfig("adsa", 256, renew_every=8, dtype="int8")
    assert benchmark.cache_config("adsa-256-renew8-kvint8", 500, 576) == renewed


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ["--caches", "adsaa-12"],
            "'adsaa-12' is neither dense nor POLICY-BUDGET or POLICY-BUDGET-renewN, with or without -kvint8 or -kvint4 "
            "behind; policies: adsa",
        ),
        (["--hf", "h2o-12"], "--hf h2o-12: cache policy 'h2o'"),
        (["--hf", "statics"], "'statics' is neither"),
        (["--hf", "adsa-12-zipar2"], "--hf adsa-12-zipar2: transformers decodes one token after the other"),
        (["--cuda-graphs"], "--cuda-graphs is for a GPU"),
        (["--compile"], "--compile is for a GPU"),
        (["--compile", "--breakdown"], "give one of them"),
        (["--caches"], "nothing to time"),
        (["--caches", "dense-zipar6"], "dense-zipar6: the window must be 1 to 5"),
        (["--caches", "adsa-6-zipar1"], "adsa-6-zipar1: cache budget 6 is too small"),
        (["--quantize", "int4"], "invalid choice: 'int4'"),
        (["--caches", "adsa-30"], "the largest budget is 28"),
        (["--caches", "adsa-12-renew12"], "renew_every 12 is too large"),
        (["--caches", "adsa-12-kv"], "'adsa-12-kv' is neither"),
        (["--caches", "dense-kvint2"], "'dense-kvint2' is neither"),
        (["--model", "GPT-Tin"], "did you mean GPT-Tiny"),
        (["--gpt-ckpt", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--tokens", "35"], "a perfect square"),
        (["--steps", "33"], "leave no room"),
        (["--steps", "1"], "no percentiles"),
    ],
)
def test_refused(tiny, tmp_path, capsys, flags, told):
    with pytest.raises(SystemExit) as stop:
        benched(tmp_path, *flags)
    assert told in f"{stop.value} {capsys.readouterr().err}"


def test_help_imports_nothing_slow():
    script = Path(benchmark.__file__)
    run = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "--caches" in done.stdout
    assert not {"torch", "matplotlib", "numpy"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
