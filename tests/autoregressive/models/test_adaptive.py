"""ZipAR with an adaptive window: token for token against the literal decoder, which decodes the images together."""

import pytest
import torch

from adsa import CacheConfig
from adsa.policies import POLICIES
from autoregressive.models.generate import generate, new_cache
from autoregressive.models.sampling import uniform_noise
from autoregressive.models.schedule import Schedule
from tests.autoregressive.models.test_cache_parity import GRID, LABELS, TOKENS, literal, tiny
from tests.autoregressive.models.test_schedule import settings
from tests.reference import decode_adaptively


def counted(**kwargs):
    """A model that is sure enough of itself to let first tokens fail, and counts its passes in ``passes``."""
    model = tiny(**kwargs)
    with torch.no_grad():
        model.output.weight.mul_(6)
    forward, model.passes = model.forward, 0

    def counting(*args, **kwargs):
        model.passes += 1
        return forward(*args, **kwargs)

    model.forward = counting
    return model


def expected(model, choice, granularity, cfg_scale, noise, window, labels=LABELS):
    return decode_adaptively(
        **literal(model),
        labels=labels,
        choice=choice,
        granularity=granularity,
        cfg_scale=cfg_scale,
        uniform=None if noise is None else [row.numpy() for row in noise],
        window=window,
    )


def least(window):
    """Passes if every first token stays at its first test: each row one token later than it might."""
    return len(Schedule(TOKENS, GRID, window + 1).passes) + 1


@pytest.mark.parametrize(
    ("policy", "granularity", "n_kv_head", "renew_every"),
    [(policy, "head", 2, 1) for policy in POLICIES]
    + [(policy, "layer", None, 3) for policy in ("full", "adsa", "adsa_plus", "random", "streaming")],
)
def test_equals_brute_force(policy, granularity, n_kv_head, renew_every):
    model, seeds = counted(n_kv_head=n_kv_head), torch.tensor([42, 43, 44])
    cache, choice = settings(policy, granularity, renew_every, budget=24)
    options = {"cfg_scale": 1.5, "cache": cache, "seeds": seeds, "zipar_window": 2, "zipar_adaptive": True}
    tokens = generate(model, torch.tensor(LABELS), TOKENS, **options)
    noise = uniform_noise(seeds, 3 * TOKENS)
    assert (tokens.tolist(), model.passes) == expected(model, choice, granularity, 1.5, noise, 2)
    assert model.passes > least(2)  # some row waited longer


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_greedy_equals_brute_force(cfg_scale):
    model = counted()
    cache, choice = settings("adsa", "head", budget=26)
    options = {"cfg_scale": cfg_scale, "sample_logits": False, "zipar_window": 1, "zipar_adaptive": True}
    tokens = generate(model, torch.tensor(LABELS), TOKENS, cache=cache, **options)
    assert (tokens.tolist(), model.passes) == expected(model, choice, "head", cfg_scale, None, 1)


def test_each_image_alone_waits_for_itself():
    cache, choice = settings("adsa", "head")
    model, made = counted(), []
    for label, seed in zip(LABELS, (5, 6, 7), strict=True):
        seeds, model.passes = torch.tensor([seed]), 0
        tokens = generate(
            model, torch.tensor([label]), TOKENS, cache=cache, seeds=seeds, zipar_window=2, zipar_adaptive=True
        )
        noise = uniform_noise(seeds, 3 * TOKENS)
        made.append(model.passes)
        assert (tokens.tolist(), model.passes) == expected(model, choice, "head", 1.0, noise, 2, [label])
    assert len(set(made)) > 1 and min(made) >= least(2)


@pytest.mark.parametrize("policy", ["full", "adsa", "streaming"])
def test_a_whole_row_ahead_is_raster_order(policy):
    model, seeds = counted(), torch.arange(3)
    cache, _ = settings(policy, "head")
    options = {"cfg_scale": 1.5, "cache": cache, "seeds": seeds}
    raster = generate(model, torch.tensor(LABELS), TOKENS, **options)
    ahead = generate(model, torch.tensor(LABELS), TOKENS, **options, zipar_window=GRID, zipar_adaptive=True)
    assert torch.equal(raster, ahead)


def test_what_more_tokens_do_not_change_passes_at_once():
    """A model that knows of neither class nor tokens: rows begin one token later than they might."""
    model, seeds = counted(), torch.arange(3)
    with torch.no_grad():
        model.tok_embeddings.weight.zero_()
        for layer in model.layers:
            layer.attention.wo.weight.zero_()
    made = generate(model, torch.tensor(LABELS), TOKENS, seeds=seeds, zipar_window=2, zipar_adaptive=True)
    assert model.passes == least(2)
    assert torch.equal(made, generate(model, torch.tensor(LABELS), TOKENS, seeds=seeds))


@pytest.mark.parametrize("policy", ["full", "adsa", "h2o"])
def test_images_go_on_from_their_own_tokens(policy):
    model, seeds = counted(), torch.arange(3)
    cache, _ = settings(policy, "head")
    options = {"seeds": seeds, "cache": cache, "zipar_window": 2, "zipar_adaptive": True, "cfg_scale": 1.5}
    whole = generate(model, torch.tensor(LABELS), TOKENS, **options)
    for n in (1, 13, 25):
        assert torch.equal(generate(model, torch.tensor(LABELS), TOKENS, start=whole[:, :n], **options), whole)


@pytest.mark.parametrize("policy", ["full", "adsa"])
def test_memory_keeps_within_the_budget(policy):
    model = counted()
    cache, _ = settings(policy, "head")
    kv = new_cache(model, 3, TOKENS, cache=cache, zipar_window=1)
    before = kv.nbytes()
    generate(model, torch.tensor(LABELS), TOKENS, kv=kv, zipar_window=1, zipar_adaptive=True)
    layer = kv.layers[0]
    assert kv.nbytes() == before and layer.slots.filled == min(TOKENS - 1, kv.slots)
    for places in layer.positions.flatten(0, 1).tolist():
        assert len(set(places)) == layer.slots.filled


def test_a_window_is_needed():
    with pytest.raises(ValueError, match="zipar_adaptive needs zipar_window"):
        generate(tiny(), torch.tensor(LABELS), TOKENS, cache=CacheConfig("full"), zipar_adaptive=True)
