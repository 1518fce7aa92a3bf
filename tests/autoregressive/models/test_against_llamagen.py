"""The numbers of the original code (tests/data/llamagen_golden.json): logits, caches, tokens, losses."""

import numpy as np
import pytest
import torch

from adsa import CacheConfig
from autoregressive.models.generate import generate, new_cache
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.sampling import filter_top_k, filter_top_p
from tests.golden import GOLDEN, fill_weights

SHAPE = {"dim": 64, "n_layer": 2, "n_head": 4, "block_size": 16, "vocab_size": 32}


def close(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual.detach().float(), torch.tensor(expected), atol=atol, rtol=0)


@pytest.fixture(scope="module")
def c2i():
    return fill_weights(Transformer(ModelArgs(num_classes=10, **SHAPE)), 1234)


@pytest.fixture(scope="module")
def t2i():
    args = ModelArgs(model_type="t2i", caption_dim=16, cls_token_num=120, **SHAPE)
    return fill_weights(Transformer(args), 4321)


@pytest.fixture(scope="module")
def captions():
    """Left-padded features with zeroed padding, and their masks."""
    features = torch.from_numpy(np.random.RandomState(99).standard_normal((2, 120, 16)).astype(np.float32))
    masks = torch.zeros(2, 120)
    for row, length in enumerate(GOLDEN["t2i_tiny"]["caption_lengths"]):
        masks[row, -length:] = 1
    return features * masks[..., None], masks


@pytest.mark.parametrize(("model", "name"), [("c2i", "c2i_tiny"), ("t2i", "t2i_tiny")])
def test_weights(model, name, request):
    state = request.getfixturevalue(model).state_dict()
    for key, first in GOLDEN[name]["param_checks"].items():
        close(state[key].flatten()[:3], first, atol=1e-6)


@torch.no_grad()
def test_forced_decode(c2i):
    golden = GOLDEN["c2i_tiny"]
    kv = new_cache(c2i, 2, 16)
    logits, _ = c2i(cond_idx=torch.tensor([3, 7]), cache=kv)
    close(logits[0, -1, :8], golden["prefill_logits_class3_first8"])
    close(logits[1, -1, :8], golden["prefill_logits_class7_first8"])
    for step, token in enumerate(golden["forced_tokens"]):
        logits, _ = c2i(idx=torch.full((2, 1), token), input_pos=torch.tensor([step + 1]), cache=kv)
        if step == 0:
            close(logits[0, -1, :8], golden["forced_decode_logits_step1_first8"])
    close(logits[0, -1, :8], golden["forced_decode_logits_step15_first8"])
    close(logits[0, -1].sum(), golden["forced_decode_logits_step15_sum"], atol=2e-4)
    first = kv.layers[0]
    close(first.k[0, 0, 0], golden["k_cache_L0_row0_head0_pos1"])
    close(first.k[0, 0, 5], golden["k_cache_L0_row0_head0_pos6"])
    keys, values, _ = first.held()
    close(values[0, 0, 0], golden["v_cache_L0_row0_head0_pos0"])
    assert keys[:, :, 0].abs().max() == golden["k_cache_all_layers_pos0_absmax"]


@pytest.mark.parametrize(
    ("key", "scale", "interval"),
    [("greedy_cfg1", 1, -1), ("greedy_cfg3", 3, -1), ("greedy_cfg3_interval5", 3, 5)],
)
def test_c2i_greedy(c2i, key, scale, interval):
    cond = torch.tensor([3, 7])
    tokens = generate(c2i, cond, 16, cfg_scale=scale, cfg_interval=interval, sample_logits=False)
    assert tokens.tolist() == GOLDEN["c2i_tiny"][key]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("key", "scale", "masked"),
    [("greedy_cfg1", 1, True), ("greedy_cfg7.5", 7.5, True), ("greedy_cfg7.5_no_mask", 7.5, False)],
)
def test_t2i_greedy(t2i, captions, key, scale, masked, fold):
    features, masks = captions
    cache = CacheConfig("full", fold_condition=fold)
    masks = masks if masked else None
    tokens = generate(t2i, features, 16, masks, cfg_scale=scale, sample_logits=False, cache=cache)
    assert tokens.tolist() == GOLDEN["t2i_tiny"][key]


@pytest.mark.parametrize("fold", [True, False])
@torch.no_grad()
def test_t2i_prefill(t2i, captions, fold):
    features, masks = captions
    kv = new_cache(t2i, 2, 16, masks, cache=CacheConfig("full", fold_condition=fold))
    logits, _ = t2i(cond_idx=features, cache=kv)
    close(logits[0, -1, :8], GOLDEN["t2i_tiny"]["prefill_logits_lastpos_row0_first8"])
    close(logits[1, -1, :8], GOLDEN["t2i_tiny"]["prefill_logits_lastpos_row1_first8"])
    keys = [layer.held()[0] for layer in kv.layers]
    assert kv.condition_slots == (1 if fold else 120)
    assert max(key.abs().max() for key in keys) == GOLDEN["t2i_tiny"]["k_cache_text_absmax"]


@pytest.mark.parametrize(
    ("name", "key", "options"),
    [
        ("c2i", "sample_seed0_cfg2_topk8", {"cfg_scale": 2, "top_k": 8}),
        ("c2i", "sample_seed0_cfg2_T0.9_topp0.8", {"cfg_scale": 2, "temperature": 0.9, "top_p": 0.8}),
        ("t2i", "sample_seed0_cfg7.5_topk8", {"cfg_scale": 7.5, "top_k": 8}),
    ],
)
def test_sampled_with_llamagens_draw(name, key, options, request, captions, monkeypatch):
    """The draw is our own, so that images don't depend on their batch; with LlamaGen's in its place, its tokens."""
    monkeypatch.setattr("autoregressive.models.generate.draw", lambda probs, _: probs.multinomial(1).squeeze(-1))
    cond, masks = captions if name == "t2i" else (torch.tensor([3, 7]), None)
    model = request.getfixturevalue(name)  # may be made only now, from random numbers
    torch.manual_seed(0)
    tokens = generate(model, cond, 16, masks, seeds=torch.arange(2), **options)
    assert tokens.tolist() == GOLDEN[f"{name}_tiny"][key]


@pytest.mark.parametrize("training", [True, False])
def test_loss(training):
    golden = GOLDEN["c2i_tiny"]
    rates = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0, "class_dropout_prob": 0.1}
    model = fill_weights(Transformer(ModelArgs(num_classes=10, **SHAPE, **rates)), 1234).train(training)
    model.cls_embedding.dropout_prob = 0.0
    tokens = torch.tensor([[*golden["forced_tokens"], 3]])
    logits, loss = model(tokens[:, :-1], torch.tensor([3]), targets=tokens)
    assert list(logits.shape) == golden["train_logits_shape"]
    close(loss, golden["train_loss"])
    close(logits[0, 0, :8], golden["train_logits_pos0_first8"])
    close(logits[0, 15, :8], golden["train_logits_pos15_first8"])


@pytest.mark.parametrize(
    ("key", "top_k", "top_p"),
    [
        ("topk2 (ties kept)", 2, 1.0),
        ("topk3", 3, 1.0),
        ("topp0.5", 0, 0.5),
        ("topp0.6", 0, 0.6),
        ("topk3_topp0.8", 3, 0.8),
        ("topp0.0", 0, 0.0),
        ("topk100", 100, 1.0),
    ],
)
def test_filters(key, top_k, top_p):
    golden = GOLDEN["filter"]
    logits = torch.tensor([golden["logits"]])
    filtered = filter_top_p(filter_top_k(logits, top_k), top_p)
    assert filtered[0].tolist() == [float(x) for x in golden[key]]
    close(logits.softmax(-1)[0], golden["softmax"], atol=1e-6)
