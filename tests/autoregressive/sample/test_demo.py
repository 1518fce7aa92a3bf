"""The weights that ship with the project, by the configuration that ships with them."""

import json

import torch

from autoregressive.sample.labels import Classes
from autoregressive.sample.options import ROOT, Options, SamplingOptions, parse_options
from autoregressive.sample.prompts import read_prompts
from autoregressive.sample.sampler import Blueprint, Sampler
from autoregressive.sample.text import TextConditions


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


def test_the_shipped_text_model_draws_what_is_asked_for(tmp_path):
    """The upper half of a red apple is red, and that of a green one green: half an image will do."""
    config = ROOT / "configs" / "demo_t2i.yaml"
    prompts = ["a green apple", "noto: red apple"]
    argv = ["--config", str(config), "--text-feature-dir", str(tmp_path), "--prompt", *prompts]
    options = parse_options(Options.text_to_image(), argv, script="grid", description="", examples="")
    blueprint = Blueprint(options.model, torch.device("cpu"))
    assert blueprint.tokens == 1024 and options.cache_config().slots(1024) == 512
    conditions = TextConditions(options, read_prompts(options.text), torch.device("cpu"))
    cond, masks = conditions([0, 1])

    sampler = Sampler(blueprint, options, torch.device("cpu"))
    half = sampler.tokens(cond, torch.tensor([0, 1]), masks, count=512)
    images = sampler.images(torch.cat([half, half[:, :1].expand(2, 512)], 1), options.model.image_size)
    assert images.shape == (2, 256, 256, 3)
    green, red = images[:, 64:128, 96:160].astype(float).mean((1, 2))
    assert green[1] > green[0] + 10 and red[0] > red[1] + 60
