import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file

from evaluations.extractors import EXTRACTORS
from tests.evaluations.stand_in import NAME, StandIn


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that the tests start, so that both round alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stand_in(monkeypatch) -> str:
    """The name under which the stand-in extractor can be had in this test."""
    monkeypatch.setitem(EXTRACTORS, NAME, StandIn)
    return NAME


@pytest.fixture
def state() -> PartialState:
    return PartialState(cpu=True)


def pictures(count, seed, size=8, shift=0):
    """uint8 [count, size, size, 3]: noise around a random colour each."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(40, 160, (count, 1, 1, 3)) + shift
    return (colours + rng.integers(0, 60, (count, size, size, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A function that writes such pictures as 0000.png, ... and returns them with their folder."""

    def write(name, count=20, **kwargs):
        images = pictures(count, seed=sum(name.encode()), **kwargs)
        (tmp_path / name).mkdir(parents=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{index:04d}.png")
        return tmp_path / name, images

    return write


@pytest.fixture
def run_folder(tmp_path):
    """A function that writes a complete sampling run."""

    def write(name, count=20, status="complete", **kwargs):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "samples.npz", arr_0=pictures(count, seed=sum(name.encode()), **kwargs))
        (tmp_path / name / "run.json").write_text(json.dumps({"status": status}))
        return tmp_path / name

    return write


TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A folder with a CLIP of 32 pixels and 16 tokens, as open_clip reads it."""
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY).state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": TINY, "preprocess_cfg": {"interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
