"""save_pretrained and from_pretrained of both models, and the conversion of checkpoints."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from autoregressive.models.checkpoint import CheckpointError, read_state_dict
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.models.pretrained import Pretrained
from autoregressive.sample.options import ModelOptions
from autoregressive.sample.sampler import Blueprint
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel

from .test_checkpoint import assert_same, gpt, gpt_t2i, vq

ROOT = Path(__file__).resolve().parents[3]
SPEC = importlib.util.spec_from_file_location("convert_weights", ROOT / "scripts" / "convert_weights.py")
conversion = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(conversion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [gpt, gpt_t2i, vq])
def test_round_trip_is_exact(build, dtype, tmp_path):
    model = build().to(dtype)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    back = type(model).from_pretrained(str(tmp_path))
    assert back.config == model.config and not back.training
    assert_same(back.state_dict(), model.state_dict())
    assert {t.dtype for t in back.parameters()} == {dtype}
    wide = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert {t.dtype for t in wide.parameters()} == {torch.float64}
    if build is gpt:
        ids, labels = torch.tensor([[1, 2, 3]]), torch.tensor([2])
        assert torch.equal(back(ids, labels)[0], model.eval()(ids, labels)[0])


def test_loading_is_strict(tmp_path):
    gpt().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_classes": 7}))
    with pytest.raises(CheckpointError, match=r"Pass --num-classes 5 \(this is 7 now\)"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Transformer.from_pretrained(tmp_path)
    vq().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"There is no file .*model\.safetensors"):
        VQModel.from_pretrained(tmp_path)


def test_models_are_what_they_were():
    """The mixin changes neither the weights' names nor copies."""
    model = gpt()
    assert isinstance(model, Pretrained)
    assert_same(copy.deepcopy(model).state_dict(), model.state_dict())
    assert not any("hub" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_a_released_checkpoint_is_converted(dtype, tmp_path, capsys):
    """What it becomes is told by its weights and its name, and samplers take it without any flag."""
    torch.manual_seed(0)
    built = GPT_models["GPT-Demo"](num_classes=5, vocab_size=24, block_size=576)
    tokenizer = VQ_models["VQ-8-Demo"](codebook_size=24, codebook_embed_dim=4)
    torch.save({"model": built.state_dict()}, tmp_path / "c2i_Demo_384.pt")
    torch.save({"ema": tokenizer.state_dict()}, tmp_path / "vq_demo.pt")
    flags = ["--dtype", dtype] if dtype else []
    conversion.main([str(tmp_path / "c2i_Demo_384.pt"), str(tmp_path / "gpt"), *flags])
    conversion.main([str(tmp_path / "vq_demo.pt"), str(tmp_path / "vq"), *flags])
    printed = capsys.readouterr().out
    assert "GPT-Demo, vocab_size 24, model_type c2i, num_classes 5, block_size 576" in printed
    assert "VQ-8-Demo, codebook_size 24, codebook_embed_dim 4" in printed
    kind = {None: torch.float32, "fp16": torch.float16}[dtype]
    for model, folder in ((built, "gpt"), (tokenizer, "vq")):
        back = type(model).from_pretrained(tmp_path / folder)
        assert back.config == model.config
        assert_same(back.state_dict(), model.to(kind).state_dict())
    files = {f"{name}_ckpt": str(tmp_path / name / "model.safetensors") for name in ("gpt", "vq")}
    blueprint = Blueprint(ModelOptions(**files), torch.device("cpu"))
    assert blueprint.gpt.config == built.config


def test_what_cannot_be_converted(tmp_path):
    torch.save({"model": gpt().state_dict()}, tmp_path / "small_384.pt")
    with pytest.raises(SystemExit, match="is of no registered model"):
        conversion.main([str(tmp_path / "small_384.pt"), str(tmp_path / "out")])
    with torch.device("meta"):
        names = GPT_models["GPT-Demo"]().state_dict()
    torch.save({name: torch.zeros(t.shape, dtype=torch.float16) for name, t in names.items()}, tmp_path / "mine.pt")
    with pytest.raises(SystemExit, match="pass --image-size PIXELS"):
        conversion.main([str(tmp_path / "mine.pt"), str(tmp_path / "out")])
    conversion.main([str(tmp_path / "mine.pt"), str(tmp_path / "out"), "--image-size", "256"])
    assert Transformer.from_pretrained(tmp_path / "out").config.block_size == 256
    assert_same(read_state_dict(tmp_path / "out" / "model.safetensors"), read_state_dict(tmp_path / "mine.pt"))
