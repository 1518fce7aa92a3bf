import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adsa import CacheConfig
from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.rope import apply_rope
from autoregressive.sample.options import SamplingOptions
from evaluations.paper import figure2
from evaluations.paper.figure2 import Attention
from tests.golden import fill_weights

TOKENS, GRID = 36, 6
SHAPE = {"dim": 64, "n_layer": 2, "n_head": 4, "block_size": TOKENS, "vocab_size": 64}
MODELS = {
    "classes": ModelArgs(**SHAPE, num_classes=10),
    "classes, two heads of keys": ModelArgs(**SHAPE, num_classes=10, n_kv_head=2),
    "text": ModelArgs(**SHAPE, model_type="t2i", caption_dim=8, cls_token_num=5),
}


def by_hand(model, cond, tokens, masks):
    """Attention of a whole sequence at once: condition share and weights [L, B, H, Q, T - 1] of image on image."""
    outputs = []
    hooks = [
        layer.attention.wqkv.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in model.layers
    ]
    text = model.config.cls_token_num
    length = text + TOKENS - 1
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(len(tokens), 1, length, length).clone()
    if masks is not None:
        seen[..., :text] &= masks.bool()[:, None, None, :]
        seen |= torch.eye(length, dtype=torch.bool)
    with torch.no_grad():
        model(idx=tokens[:, :-1], cond_idx=cond, mask=seen)
    for hook in hooks:
        hook.remove()
    args, found = model.config, []
    for output in outputs:
        q, k, _ = output.split([heads * args.head_dim for heads in (args.n_head, args.kv_heads, args.kv_heads)], -1)
        q, k = (apply_rope(x.unflatten(-1, (-1, args.head_dim)), model.freqs_cis[:length]) for x in (q, k))
        k = k.repeat_interleave(args.n_head // args.kv_heads, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / args.head_dim**0.5
        found.append(scores.masked_fill(~seen, -torch.inf).softmax(-1)[:, :, text:])
    weights = torch.stack(found).double().numpy()
    return weights[..., :text].sum(-1), weights[..., text:]


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
def test_equals_attention_of_whole_sequences(args):
    """What is noted step by step, of the conditional half and in uneven batches, is the attention of these images."""
    model = fill_weights(Transformer(args), 7).eval()
    seeds, masks = np.array([11, 5, 2**40]), None
    cond = torch.tensor([3, 0, 9])
    if args.model_type == "t2i":
        cond, masks = torch.randn(3, 5, 8), torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 0, 0, 0, 1]])
    sampling = SamplingOptions(cfg_scale=2.0, top_k=40)
    sampler = SimpleNamespace(gpt=model, tokens_per_image=TOKENS, device=torch.device("cpu"), sampling=sampling)
    found = figure2.measure(sampler, lambda i: (cond[i], None if masks is None else masks[i]), seeds, batch=2)

    tokens = generate(model, cond, TOKENS, masks, cfg_scale=2.0, top_k=40, seeds=torch.from_numpy(seeds))
    condition, weights = by_hand(model, cond, tokens, masks)
    assert found.weights.shape == (2, TOKENS - 1, 1 + TOKENS)
    np.testing.assert_allclose(found.weights[..., 0], condition.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.weights[..., 1:-1], weights.mean((1, 2)), atol=1e-5)
    assert not found.weights[..., -1].any()
    np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-5)
    assert found.weights.std() > 0.01, "something to tell apart"

    share = weights / weights.sum(-1, keepdims=True)
    entropy = -(share * np.log(share, out=np.zeros_like(share), where=share > 0)).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy.mean((1, 2)), atol=1e-4)
    sums = np.sort(share)[..., ::-1].cumsum(-1)
    needed = (sums < 0.9 - 1e-6).sum(-1) + 1
    np.testing.assert_allclose(found.needed, needed.mean((1, 2)), atol=0.2)  # a sum may be 0.9 but for rounding


@pytest.fixture
def attention():
    """Two layers, of random weights that sum to one over the condition and what is cached."""
    rng = np.random.default_rng(0)
    weights = np.tri(TOKENS - 1, TOKENS + 1, 1) * rng.random((2, TOKENS - 1, TOKENS + 1))
    weights /= weights.sum(-1, keepdims=True)
    return Attention(weights, rng.random((2, TOKENS - 1)), rng.random((2, TOKENS - 1)))


def kind(query, key):
    """Of a key, told one by one."""
    if key == query:
        return "self"
    if key // GRID == query // GRID - 1 and -1 <= key % GRID - query % GRID <= 2:
        return "above"
    if query - key < GRID:
        return "recent"
    return "first" if key < 2 else "rest"  # 5 % of 36 is 1.8


@pytest.mark.parametrize("start", [0, 18])
def test_shares(attention, start):
    for layer, row in enumerate(figure2.shares(attention, slice(start, None))):
        expected = dict.fromkeys(figure2.TITLES, 0.0)
        for query in range(start, TOKENS - 1):
            expected["condition"] += attention.weights[layer, query, 0]
            for key in range(query + 1):
                expected[kind(query, key)] += attention.weights[layer, query, 1 + key]
        for name, value in expected.items():
            assert row[name] == pytest.approx(value / (TOKENS - 1 - start)), name
        assert sum(row[name] for name in figure2.TITLES) == pytest.approx(1)
        assert row["entropy"] == pytest.approx(attention.entropy[layer, start:].mean())


def test_offsets_and_distances(attention):
    weights = attention.weights[0, :, 1:]
    plane, line = {}, {}
    for query in range(TOKENS - 1):
        for key in range(query + 1):
            offset = (query // GRID - key // GRID, key % GRID - query % GRID + GRID - 1)
            plane.setdefault(offset, []).append(weights[query, key])
            line.setdefault(query - key, []).append(weights[query, key])
    mean, share = figure2.by_offset(weights)
    assert mean.shape == (GRID, 2 * GRID - 1)
    for offset in np.ndindex(mean.shape):
        found = plane.get(offset, [])
        assert mean[offset] == pytest.approx(np.mean(found)) if found else math.isnan(mean[offset])
        assert share[offset] == pytest.approx(sum(found) / (TOKENS - 1))
    assert share.sum() + attention.weights[0, :, 0].mean() == pytest.approx(1)
    curve = figure2.by_distance(weights)
    assert curve == pytest.approx([np.mean(line[distance]) for distance in range(TOKENS - 1)])


def test_peaks():
    curve = np.ones(35)
    curve[[5, 13]] = 3, 2  # beside 6, and beside 12
    assert figure2.peaks(curve, 6) == [
        {"distance": 5, "times_surroundings": 3},
        {"distance": 13, "times_surroundings": 2},
        {"distance": 16, "times_surroundings": 1},
    ]


def test_what_a_budget_leaves_to_the_choice(attention):
    row = figure2.by_budget(attention, 16)
    prefix, local = CacheConfig("adsa", 16).split
    kept, counts = {"prefix": 0.0, "local": 0.0, "between": 0.0}, []
    for query in range(16, TOKENS - 1):
        between = [key for key in range(prefix, query + 1) if query - key >= local]
        counts.append(len(between))
        for key in range(query + 1):
            name = "between" if key in between else "prefix" if key < prefix else "local"
            kept[name] += attention.weights[:, query, 1 + key].mean() / (TOKENS - 1 - 16)
    for name, value in kept.items():
        assert row[name] == pytest.approx(value)
    assert row["tokens_between"] == np.mean(counts)
    assert row["chosen_tokens"] == 16 - prefix - local > 0


def test_uniform():
    (row,) = figure2.shares(Attention.uniform(TOKENS), slice(None))
    assert row["condition"] == pytest.approx(np.mean([1 / (2 + query) for query in range(TOKENS - 1)]))
    assert sum(row[name] for name in figure2.TITLES) == pytest.approx(1)


@pytest.mark.parametrize("task", ["c2i", "t2i"])
def test_results(protocol_file, tmp_path, monkeypatch, capsys, task):
    out = tmp_path / "figure2"
    flags = ["--model", str(protocol_file()), "--task", task, "--images", "3", "--output", str(out)]
    figure2.main(flags)
    record = json.loads((out / "table.json").read_text())
    assert (record["images"], record["seeds"], record["tokens"], record["first_tokens"]) == (3, [0], TOKENS, 2)
    assert record["settings"]["cache.policy"] == "full"
    assert [row["budget"] for row in record["by_budget"]] == ([18, 9] if task == "c2i" else [18])
    assert len(record["shares"]["layers"]) == 2
    layers = [np.mean([layer[key] for layer in record["shares"]["layers"]]) for key in figure2.TITLES]
    assert [record["shares"]["all"][key] for key in figure2.TITLES] == pytest.approx(layers, abs=1e-5)
    assert np.nansum(np.array(record["offsets"]["share"])) == pytest.approx(1 - layers[0], abs=1e-4)
    told = (out / "table.md").read_text()
    assert told.startswith("`bash scripts/reproduce_figure2.sh --model ")
    assert f"| **all layers** | {100 * layers[0]:.1f} |" in told
    assert told in capsys.readouterr().out
    for name in ("offsets", "distance", "layers"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    def sample(*args, **kwargs):
        raise AssertionError("sampled anew")

    monkeypatch.setattr(figure2, "measure", sample)
    (out / "layers.png").unlink()
    figure2.main(flags)
    assert (out / "layers.png").exists(), "drawn anew from the numbers"
    assert json.loads((out / "table.json").read_text()) == record
    for other in (["--seed", "1"], ["--images", "2"]):
        with pytest.raises(AssertionError, match="sampled anew"):
            figure2.main([*flags, *other])
