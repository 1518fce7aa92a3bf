import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluations.clip import MINILM, Squares, load_clip, minilm_clip
from evaluations.extractors import EvaluationError, load_extractor
from evaluations.features import open_set
from tests.evaluations.conftest import TINY, pictures
from tokenizer.tokenizer_text import encoder

DEMO = {"model_cfg": TINY | {"text_cfg": {"hf_model_name": MINILM, "context_length": 12}}, "preprocess_cfg": {}}


def batch(images):
    return torch.tensor(images).permute(0, 3, 1, 2)


@pytest.fixture
def named(monkeypatch, tiny_clip, tmp_path):
    """The tiny CLIP under a name, with weights for QuickGELU under OpenAI's tag, and in a file."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes((tiny_clip / "open_clip_model.safetensors").read_bytes())
    tag = {"file": str(path), "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", TINY)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-quickgelu", TINY | {"quick_gelu": True})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", {"openai": tag})
    return path


@torch.inference_mode()
def test_activation_follows_the_weights(named, tiny_clip):
    """A tag knows its weights' activation and colours; of a file, the model's name tells the activation."""
    model = open_clip.CLIP(**TINY, quick_gelu=True).eval()
    model.load_state_dict(load_file(named))
    images, tokens = batch(pictures(2, 0, size=32)), open_clip.SimpleTokenizer(context_length=16)(["a red apple"])
    expected = torch.nn.functional.normalize(model.encode_text(tokens)).numpy()
    tagged = load_clip("Tiny")
    assert tagged.name == "Tiny/openai"
    assert np.allclose(tagged.texts(["a red apple"]), expected, atol=1e-6)
    features = tagged.images(images)["features"]
    assert torch.allclose(features, model.encode_image((images / 255 - 0.5) / 0.2), atol=1e-5)
    assert torch.equal(load_extractor("open_clip/Tiny/openai")(images)["features"], features)

    plain, quick = load_clip("Tiny", str(named)), load_clip("Tiny-quickgelu", str(named))
    assert plain.name == "Tiny/weights.safetensors"
    assert np.allclose(quick.texts(["a red apple"]), expected, atol=1e-6)
    assert not np.allclose(plain.texts(["a red apple"]), expected, atol=1e-4)
    folder = load_clip(f"local-dir:{tiny_clip}")
    assert np.array_equal(folder.texts(["a red apple"]), plain.texts(["a red apple"]))
    assert folder.weights == plain.weights


def test_weights_are_told_apart(named):
    before = load_clip("Tiny", str(named)).weights
    changed = load_file(named)
    changed["ln_final.bias"][3] += 1e-3
    save_file(changed, named)
    assert load_clip("Tiny", str(named)).weights != before


@torch.inference_mode()
def test_squares_are_what_open_clip_prepares(tiny_clip, folder):
    """Up to 8 bits: crop, Lanczos to 48 pixels, then open_clip's own preprocessing."""
    path, _ = folder("a", 3, size=90)
    Image.fromarray(pictures(1, 5, size=91)[0, :60]).save(path / "wide.png")
    clip = load_clip(f"local-dir:{tiny_clip}")
    squares = Squares(open_set(path, "")[0], clip.images.size, clip.images.interpolation, 48)
    preprocess = open_clip.image_transform(32, is_train=False)
    network = clip.model.encode_image
    for index, name in enumerate(("0000.png", "0001.png", "0002.png", "wide.png")):
        with Image.open(path / name) as image:
            if name == "wide.png":
                image = image.crop((16, 0, 76, 60))
            expected = network(preprocess(image.resize((48, 48), Image.Resampling.LANCZOS))[None])
        found = clip.images(batch(squares.read(index)[None]))["features"]
        assert torch.allclose(found, expected, atol=1e-4), name


def test_long_texts_are_cut(tiny_clip):
    clip = load_clip(f"local-dir:{tiny_clip}")
    long = clip.texts(["one two three " * 20, "one two three " * 20 + "four", "one two three"])
    assert np.array_equal(long[0], long[1])
    assert not np.allclose(long[0], long[2], atol=1e-3)
    assert np.linalg.norm(long, axis=1) == pytest.approx(np.ones(3), abs=1e-5)


@pytest.fixture
def minilm_folder(tmp_path):
    """A folder such as the demo's: without MiniLM's own weights."""
    torch.manual_seed(0)
    model, _ = minilm_clip(DEMO)
    weights = {name: t for name, t in model.state_dict().items() if not name.startswith("text.transformer.")}
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(DEMO))
    return tmp_path


@torch.inference_mode()
def test_minilm_reads_the_text(minilm_folder):
    clip = load_clip(f"local-dir:{minilm_folder}")
    found = clip.texts(["a red apple", "broccoli", "a very long caption of many words that do not fit into twelve"])
    weights = {
        name: tensor.float() for name, tensor in load_file(minilm_folder / "open_clip_model.safetensors").items()
    }
    minilm = encoder.load_text_encoder("minilm", max_length=12, clean=False)
    for row, text in zip(
        found, ("a red apple", "broccoli", "a very long caption of many words that do not"), strict=True
    ):
        pooled = minilm.rows(text).mean(0)
        hidden = torch.nn.functional.gelu(weights["text.proj.0.weight"] @ pooled)
        expected = torch.nn.functional.normalize(weights["text.proj.2.weight"] @ hidden, dim=0)
        assert np.allclose(row, expected, atol=1e-5), text
    images = batch(pictures(2, 0, size=32))
    tower = load_extractor(f"open_clip/local-dir:{minilm_folder}")
    assert torch.equal(tower(images)["features"], clip.images(images)["features"])


def test_minilm_folder_is_read_strictly(minilm_folder, monkeypatch):
    path = minilm_folder / "open_clip_model.safetensors"
    weights = load_file(path)
    for name, tensors in {
        "visual.conv1.weight": {name: t for name, t in weights.items() if name != "visual.conv1.weight"},
        "surplus": weights | {"surplus": torch.zeros(1)},
        "size mismatch": weights | {"visual.proj": torch.zeros(64, 25)},
    }.items():
        save_file(tensors, path)
        with pytest.raises(EvaluationError) as error:
            load_clip(f"local-dir:{minilm_folder}")
        assert str(path) in str(error.value) and name in str(error.value)
    path.unlink()
    with pytest.raises(EvaluationError, match=r"open_clip_model\.safetensors: does not fit"):
        load_clip(f"local-dir:{minilm_folder}")
    monkeypatch.setattr(encoder, "MINILM_PACKAGE", "no-such-package")
    with pytest.raises(encoder.TextEncoderError, match="pip install no-such-package"):
        load_clip(f"local-dir:{minilm_folder}")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"preprocess_cfg": {}}, "KeyError.*model_cfg"),
        (DEMO | {"model_cfg": TINY}, "KeyError.*hf_model_name"),
        (DEMO | {"model_cfg": TINY | {"text_cfg": {"hf_model_name": "other/BERT"}}}, "its hf_model_name is other/BERT"),
        (DEMO | {"model_cfg": DEMO["model_cfg"] | {"depth": 3}}, "depth"),
    ],
)
def test_configurations_that_make_no_model(config, told):
    with pytest.raises(EvaluationError, match=rf"open_clip_config\.json: open_clip can't make a model of it.*{told}"):
        minilm_clip(config)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("ViT-B-33",), "no weights 'openai' of a model 'ViT-B-33'; open_clip.list_pretrained"),
        (("ViT-B-32", "opnai"), "no weights 'opnai' of a model 'ViT-B-32'; the tags of ViT-B-32 are openai, "),
        (("local-dir:nowhere", "openai"), "local-dir:nowhere has its weights with it"),
        (("local-dir:nowhere",), "nowhere could not be loaded"),
    ],
)
def test_names_that_do_not_exist(arguments, told):
    with pytest.raises(EvaluationError) as error:
        load_clip(*arguments)
    assert told in str(error.value)


def test_weights_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EvaluationError) as error:
        load_clip("ViT-B-32")
    assert "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip" in str(error.value)
    assert "--clip-model local-dir:pretrained_models/demo/clip needs no network" in str(error.value)
