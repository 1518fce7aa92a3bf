"""Text conditions: what fits the GPT, what of a prompt is lost, and what the encoder costs."""

import pytest
import torch

from autoregressive.sample.options import ModelOptions, OptionError, Options, TextOptions
from autoregressive.sample.prompts import read_prompts
from autoregressive.sample.sampler import Blueprint, Sampler
from autoregressive.sample.text import TextConditions, told_left_out

CPU = torch.device("cpu")
LONG = "one two three four five six seven eight"


@pytest.fixture
def conditions(tiny, tmp_path):
    def make(*prompts, model=None, **text):
        files = {"gpt_ckpt": str(tiny / "gpt_t2i.safetensors"), "vq_ckpt": str(tiny / "vq.safetensors")}
        options = Options(
            ModelOptions(gpt_type="t2i", **files, **(model or {})),
            TextOptions(prompts=prompts or ["a cat"], **{"feature_dir": str(tmp_path)} | text),
        )
        blueprint = Blueprint(options.model, CPU)
        made = TextConditions(options, read_prompts(options.text), CPU)
        made.options, made.blueprint = options, blueprint
        return made

    return make


def test_features_by_index(conditions):
    made = conditions("a cat", "", LONG)
    assert (made.encoder.name, made.encoder.dim, made.encoder.max_length) == ("minilm", 384, 8)
    features, masks = made([2, 0, 1])
    assert features.shape == (3, 8, 384)
    assert masks.tolist() == [[1] * 8, [0] * 4 + [1] * 4, [0] * 6 + [1] * 2]
    assert torch.equal(features[1:2], made([0])[0])
    right = conditions("a cat", left_padding=False)([0])
    assert right[1].tolist() == [[1] * 4 + [0] * 4]
    assert torch.equal(right[0][:, :4], made([0])[0][:, 4:])


@pytest.mark.parametrize("keep", [False, True])
def test_encoder_leaves_before_sampling(conditions, keep, monkeypatch):
    made = conditions("a cat", "a dog", "a cow", keep_encoder=keep)
    made.encode([0, 2])
    assert (made.encoder._model is not None) == keep
    monkeypatch.setattr(made.encoder, "rows", None)
    assert made([0, 2])[0].shape == (2, 8, 384), "from disk"
    with pytest.raises(TypeError):
        made([1])


def test_what_is_left_out_is_told(conditions):
    made = conditions("a cat", *[LONG] * 12, "红苹果", "")
    found = made.left_out()
    assert (found["max_length"], found["cut"]["count"], len(found["cut"]["first"])) == (8, 12, 10)
    assert found["cut"]["first"][0] == {"index": 1, "left_out": "seven eight"}
    assert found["emptied"] == {"count": 1, "first": [13]}
    cut, emptied = told_left_out(found)
    before = "before 'seven eight'"
    assert cut == f"12 prompts cut to 8 tokens: index 1 {before}; index 2 {before}; index 3 {before}; ..."
    assert emptied.startswith("1 prompt of which cleaning leaves nothing (index 13)")
    raw = conditions("红苹果", clean=False).left_out()
    assert (raw["cut"]["count"], raw["emptied"]["count"]) == (0, 0)
    assert told_left_out(raw) == []


def test_what_does_not_fit_is_refused(conditions, tmp_path):
    with pytest.raises(OptionError, match=r"text\.max_length is 9, but the GPT takes 8 text tokens"):
        conditions(max_length=9)
    with pytest.raises(OptionError, match=r"minilm makes features of 384 numbers, and .*gpt_t2i.* takes 385"):
        conditions(model={"caption_dim": 385}, encoder="minilm")
    assert conditions(max_length=8).encoder.max_length == 8


def test_half_precision_gpt_takes_any_features(conditions):
    made = conditions("a cat", "a dog", model={"precision": "bf16"}, precision="none")
    features, masks = made([0, 1])
    assert features.dtype == torch.float32
    sampler = Sampler(made.blueprint, made.options, CPU)
    assert sampler.tokens(features, torch.arange(2), masks, count=4).shape == (2, 4)


def test_a_prompt_does_not_depend_on_its_batch(conditions):
    prompts = ["", "a cat", LONG, "the flag of Japan"]
    made = conditions(*prompts)
    made.options.sampling.cfg_scale = 7.5
    sampler = Sampler(made.blueprint, made.options, CPU)
    together = sampler.tokens(made(range(4))[0], torch.arange(4), made(range(4))[1])
    assert len({tuple(row) for row in together.tolist()}) == 4
    for index in range(4):
        features, masks = made([index])
        assert torch.equal(sampler.tokens(features, torch.tensor([index]), masks), together[index : index + 1])
    other = sampler.tokens(made([1])[0], torch.tensor([0]), made([1])[1])
    assert not torch.equal(other, together[:1]), "the same noise, another prompt"
