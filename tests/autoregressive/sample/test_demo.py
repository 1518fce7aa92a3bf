"""The weights that ship with the project, by the configuration that ships with them."""

import json

import torch

from autoregressive.sample.labels import Classes
from autoregressive.sample.options import ROOT, Options, SamplingOptions, parse_options
from autoregressive.sample.sampler import Blueprint, Sampler


def test_the_shipped_demo_loads_and_samples():
    config = ROOT / "configs" / "demo.yaml"
    options = parse_options(
        Options(sampling=SamplingOptions()), ["--config", str(config)], script="grid", description="", examples=""
    )
    blueprint = Blueprint(options.model, torch.device("cpu"))
    assert blueprint.tokens == 576 and options.cache_config().slots(576) == 256
    classes = Classes(options.model, options.run)
    names = json.loads((ROOT / "pretrained_models" / "demo" / "classes.json").read_text())["classes"]
    assert len(set(names)) == blueprint.gpt.config.num_classes == 47
    labels = classes.ids(options.run.grid_labels, "run.grid_labels")
    assert len(labels) == 16

    sampler = Sampler(blueprint, options, torch.device("cpu"))
    tokens = sampler.tokens(torch.tensor(labels[:2]), torch.tensor([0, 1]), count=6)
    assert tokens.shape == (2, 6) and tokens.max() < blueprint.vq.config.codebook_size
    # The first row of an emoji is background, which the tokenizer decodes to white.
    blank = tokens[:, :1].expand(2, 576)
    images = sampler.images(blank, options.model.image_size)
    assert images.shape == (2, 192, 192, 3) and images.mean() > 220
