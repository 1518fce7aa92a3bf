"""A protocol of tiny models, and scripts that run in this process, where the stand-in extractor is known."""

import contextlib
import importlib
import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from evaluations.paper import runs
from tests.autoregressive.sample.conftest import CLASSES, tiny  # noqa: F401
from tests.evaluations.conftest import pictures


@pytest.fixture
def codes(tmp_path):
    """A folder of five images' codes beside the protocol, and its name there."""
    folder = tmp_path / "codes"
    folder.mkdir()
    np.save(folder / "codes.npy", np.random.default_rng(0).integers(0, 64, (5, 1, 36)).astype(np.uint16))
    np.save(folder / "labels.npy", np.arange(5))
    (folder / "meta.json").write_text(json.dumps({"classes": CLASSES, "codebook_size": 64}))
    return "codes"


@pytest.fixture
def protocol_file(tmp_path, tiny, stand_in, tiny_clip):  # noqa: F811
    """A function that writes a protocol of the tiny models, with changes in its sections, and returns its path.

    Six images of each run, 36 tokens each; the reference is six pictures of two of the ten classes.
    """
    for name in CLASSES[:2]:
        folder = tmp_path / "pictures" / f"00_{name}_set"
        folder.mkdir(parents=True)
        for index, image in enumerate(pictures(3, seed=len(str(folder)), size=12)):
            Image.fromarray(image).save(folder / f"{index}.png")
    (tmp_path / "pictures" / "99_else_set").mkdir()
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(tmp_path / "pictures" / "99_else_set" / "0.png")
    (tmp_path / "prompts.txt").write_text("a red thing\na blue thing\na green thing\n")
    for name, text in (("c2i", {}), ("t2i", {"feature_dir": str(tiny / "text_features")})):
        gpt = "gpt" if name == "c2i" else "gpt_t2i"
        model = {"gpt_ckpt": str(tiny / f"{gpt}.safetensors"), "vq_ckpt": str(tiny / "vq.safetensors")}
        config = {"model": model, "run": {"per_proc_batch_size": 4, "cpu": True}} | ({"text": text} if text else {})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))

    def write(c2i=None, t2i=None):
        both = {"seeds": [0, 1], "sample_dir": "samples", "flags": ["--cpu"]}
        content = {
            "c2i": {
                "config": "c2i.yaml",
                "budgets": [18, 9],
                "images": 6,
                **both,
                "reference": "pictures",
                "reference_classes": ["*_{class}_set"],
                "feature_extractor": stand_in,
                **(c2i or {}),
            },
            "t2i": {
                "config": "t2i.yaml",
                "budgets": [18],
                "images": 3,
                **both,
                "prompts": "prompts.txt",
                "clip_model": f"local-dir:{tiny_clip}",
                **(t2i or {}),
            },
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def launched(monkeypatch):
    """The scripts that were started, by name, each run in this process."""
    started = []

    def launch(script, argv):
        started.append(script.stem)
        module = ".".join(script.resolve().relative_to(runs.ROOT).with_suffix("").parts)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            importlib.import_module(module).main(argv)
        return out.getvalue()

    monkeypatch.setattr(runs, "launch", launch)
    return started
