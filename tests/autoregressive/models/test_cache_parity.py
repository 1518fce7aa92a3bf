"""Decoding through a budgeted cache, token for token against the literal decoder of tests/reference.py."""

import pytest
import torch

from adsa import CacheConfig
from adsa.policies import POLICIES
from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.sampling import uniform_noise
from tests.golden import fill_weights
from tests.reference import decode

GRID = 6
TOKENS = GRID * GRID
LABELS = [3, 7, 1]


def tiny(seed=5, **kwargs) -> Transformer:
    args = {"dim": 32, "n_layer": 3, "n_head": 4, "block_size": TOKENS, "vocab_size": 24, "num_classes": 10}
    model = fill_weights(Transformer(ModelArgs(**args | kwargs)), seed).double()
    with torch.no_grad():
        model.output.weight.mul_(0.3)  # flat enough that images differ from each other
    return model


def literal(model):
    """What the literal decoders take of a model."""
    return {
        "state": {name: tensor.numpy() for name, tensor in model.state_dict().items()},
        "steps": TOKENS,
        "n_head": model.config.n_head,
        "n_kv_head": model.config.kv_heads,
        "grid": GRID,
    }


def expected(model, choice, granularity, cfg_scale=1.0, noise=None, window=None):
    options = literal(model) | {"choice": choice, "granularity": granularity, "cfg_scale": cfg_scale, "window": window}
    return [
        decode(label=label, uniform=None if noise is None else noise[row].numpy(), **options)
        for row, label in enumerate(LABELS)
    ]


SPLITS = [(12, 3, 4), (20, 0, 5), (9, 4, 5), (16, 2, 1)]


@pytest.mark.parametrize(("cfg_scale", "sampled"), [(1.0, False), (2.5, False), (2.5, True)])
@pytest.mark.parametrize("mode", ["evict", "select"])
@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_adsa_equals_brute_force(split, granularity, mode, cfg_scale, sampled):
    budget, prefix, local = split
    model, seeds = tiny(), torch.arange(len(LABELS))
    cache = CacheConfig("adsa", budget, prefix, local, granularity, mode)
    tokens = generate(
        model,
        torch.tensor(LABELS),
        TOKENS,
        cfg_scale=cfg_scale,
        sample_logits=sampled,
        cache=cache,
        seeds=seeds,
    )
    choice = {"policy": "adsa", "budget": budget, "prefix": prefix, "local": local, "mode": mode, "renew_every": 1}
    noise = uniform_noise(seeds, TOKENS) if sampled else None
    assert tokens.tolist() == expected(model, choice, granularity, cfg_scale, noise)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("mode", "granularity", "renew_every", "n_kv_head"),
    [("evict", "head", 1, 2), ("evict", "layer", 3, None), ("select", "head", 4, None), ("select", "layer", 1, 2)],
)
def test_policies_equal_brute_force(policy, mode, granularity, renew_every, n_kv_head):
    """Every policy, with renewal, with grouped queries."""
    budget = 14
    model, seeds = tiny(n_kv_head=n_kv_head), torch.tensor([5, 6, 7])
    if policy == "full":
        cache = CacheConfig("full")
        prefix = local = 0
    else:
        prefix, local = {"window": (0, 14 - 3), "streaming": (4, 14 - 4 - 3)}.get(policy, (3, 5))
        cache = CacheConfig(policy, budget, prefix, local, granularity, mode, renew_every)
    choice = {"policy": policy, "budget": budget, "prefix": prefix, "local": local}
    choice |= {"mode": mode, "renew_every": renew_every, "merge": mode == "evict" and POLICIES[policy].merges}
    noise = uniform_noise(seeds, TOKENS)
    tokens = generate(model, torch.tensor(LABELS), TOKENS, cfg_scale=1.5, cache=cache, seeds=seeds)
    assert tokens.tolist() == expected(model, choice, granularity, 1.5, noise)


def test_the_parity_models_are_no_trivial_case():
    """Budgets change the tokens, and images differ: otherwise the tests above could not fail."""
    model, seeds = tiny(), torch.arange(3)
    dense = generate(model, torch.tensor(LABELS), TOKENS, seeds=seeds)
    sparse = generate(model, torch.tensor(LABELS), TOKENS, seeds=seeds, cache=CacheConfig("adsa", 12, 3, 4))
    by_layer = generate(model, torch.tensor(LABELS), TOKENS, seeds=seeds, cache=CacheConfig("adsa", 12, 3, 4, "layer"))
    assert len({tuple(row) for row in dense.tolist()}) == 3
    assert not torch.equal(dense, sparse) and not torch.equal(sparse, by_layer)
    assert all(len(set(row)) > 8 for row in sparse.tolist())
