"""The trainer on nine tiny images: it learns, and a run that was cut short ends as an unbroken one."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import export
from evaluations import clip, train_clip
from evaluations.retrieval import main as measure
from tests.autoregressive.train.test_trainers import assert_same_checkpoint, interrupted, log_of

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"hf_model_name": clip.MINILM, "context_length": 12},
}
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220)}


@pytest.fixture(autouse=True)
def own_signals():
    """The trainer's signal handlers do not outlive a test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def data(tmp_path):
    """Discs, squares and bars in three colours, with two captions each; and the model's configuration."""
    lines = []
    for color, value in COLORS.items():
        for shape in ("square", "tall bar", "wide bar"):
            array = np.full((40, 40, 3), 255, np.uint8)
            rows = slice(17, 23) if shape == "wide bar" else slice(4, 36)
            array[rows, slice(17, 23) if shape == "tall bar" else slice(4, 36)] = value
            name = f"{color}-{shape.replace(' ', '-')}.png"
            Image.fromarray(array).save(tmp_path / name)
            captions = [f"a {color} {shape}", f"{shape} painted in {color}"]
            lines.append(json.dumps({"image": name, "captions": captions}) + "\n")
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    config(tmp_path, MODEL)
    return tmp_path


def config(folder, model):
    content = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def flags(data, results, *more):
    return [
        *("--config", str(data / "open_clip_config.json"), "--captions", str(data / "captions.jsonl")),
        *("--val-captions", str(data / "captions.jsonl"), "--results-dir", str(results)),
        *("--global-batch-size", "8", "--max-steps", "6", "--log-every", "1", "--eval-every", "3", "--ckpt-every", "2"),
        *("--mixed-precision", "none", "--no-compile", "--num-workers", "0", "--ema", *more),
    ]


def test_learns_and_is_exported(data, tmp_path, capsys):
    """What the shipped folder says of the training images is what the trainer said last."""
    more = ("--max-steps", "60", "--eval-every", "30", "--ckpt-every", "30", "--lr", "3e-3", "--ema-decay", "0.9")
    train_clip.main(flags(data, tmp_path / "run", *more))
    log = log_of(tmp_path / "run")
    losses = [line["loss"] for line in log if "loss" in line]
    assert np.mean(losses[-20:]) < 0.4 * np.mean(losses[:5])
    told = [line for line in log if "val_image_to_text_r1" in line][-1]
    assert told["val_image_to_text_r1"] > 0.7

    weights = data / "open_clip_model.safetensors"
    export.main(["--run", str(tmp_path / "run"), "--out", str(weights), "--dtype", "fp32"])
    capsys.readouterr()
    measure([str(data / "captions.jsonl"), "--clip-model", f"local-dir:{data}", "--cpu", "--num-workers", "0"])
    found = json.loads(capsys.readouterr().out)
    assert {f"val_{key}": found[key] for key in ("image_to_text_r1", "text_to_image_r5", "cosine")} == pytest.approx(
        {key: told[key] for key in ("val_image_to_text_r1", "val_text_to_image_r5", "val_cosine")}, abs=1e-4
    )
    size = weights.stat().st_size
    export.main(["--run", str(tmp_path / "run"), "--out", str(weights)])
    assert weights.stat().st_size < 0.6 * size
    assert clip.load_clip(f"local-dir:{data}").texts(["a red square"]).shape == (1, 24)


def test_resume_is_exact(data, tmp_path, monkeypatch):
    train_clip.main(flags(data, tmp_path / "whole"))
    interrupted(train_clip, flags(data, tmp_path / "broken"), monkeypatch)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    assert_same_checkpoint(tmp_path / "broken", tmp_path / "whole")


def test_text_features_are_made_once_and_for_these_texts(data, tmp_path, monkeypatch):
    train_clip.main(flags(data, tmp_path / "run", "--max-steps", "1"))
    made = (tmp_path / "run" / "text_features.npz").read_bytes()
    train_clip.main(flags(data, tmp_path / "run"))
    assert (tmp_path / "run" / "text_features.npz").read_bytes() == made

    captions = (data / "captions.jsonl").read_text()
    (data / "captions.jsonl").write_text(captions.replace("painted", "drawn"))
    with pytest.raises(SystemExit, match=r"train_clip: .*other settings: the captions was of 9 images, sha256 "):
        train_clip.main(flags(data, tmp_path / "run"))
    (data / "captions.jsonl").write_text(captions)
    config(data, MODEL | {"embed_dim": 16})
    with pytest.raises(SystemExit, match="other settings: the model was "):
        train_clip.main(flags(data, tmp_path / "run"))


def test_crops_and_captions_are_drawn_by_epoch_and_image(data):
    captions = train_clip.read_captions(data / "captions.jsonl")
    texts = train_clip.texts_of(captions)
    place = {text: index for index, text in enumerate(texts)}
    model, _ = clip.minilm_clip(json.loads((data / "open_clip_config.json").read_text()))
    features = torch.arange(18.0)[:, None]
    dataset = train_clip.CropDataset(data, captions, features, place, clip.image_extractor(model), seed=0)
    assert len(dataset) == 9
    torch.manual_seed(1)
    first = [dataset[epoch, 4] for epoch in range(8)]
    torch.manual_seed(2)
    again = [dataset[epoch, 4] for epoch in range(8)]
    for (image, text), (same_image, same_text) in zip(first, again, strict=True):
        assert torch.equal(image, same_image) and torch.equal(text, same_text)
    assert {text.item() for _, text in first} == {8.0, 9.0}
    assert not torch.equal(first[0][0], first[1][0])
    assert first[0][0].shape == (3, 32, 32)
    assert first[0][0].min() < 0 < first[0][0].max()


def test_two_processes_make_the_same_steps_as_one(data, tmp_path):
    """Each tells its images from those of both. (A tower without batch norm, which sees its own process's alone.)"""
    config(data, MODEL | {"vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}})
    train_clip.main(flags(data, tmp_path / "one", "--max-steps", "3"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, ROOT / "evaluations" / "train_clip.py", *flags(data, tmp_path / "two", "--max-steps", "3")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        torch.load(tmp_path / name / "checkpoints" / "0000003.pt", weights_only=True)["model"]
        for name in ("one", "two")
    )
    start = train_clip.Trained(clip.minilm_clip(json.loads((data / "open_clip_config.json").read_text()))[0])
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, atol=1e-4), name
    assert set(one) == set(start.state_dict())
    accuracies = [[line for line in log_of(tmp_path / name) if "val_cosine" in line] for name in ("one", "two")]
    assert accuracies[1][-1]["val_cosine"] == pytest.approx(accuracies[0][-1]["val_cosine"], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--gradient-accumulation-steps", "2"], "--gradient-accumulation-steps: images are told from all others"),
        (["--config", "none.json"], r"none\.json: not readable as JSON"),
        (["--captions", "none.jsonl"], r"none\.jsonl: no readable captions file"),
        (["--val-captions", "none.jsonl"], r"none\.jsonl: no readable captions file"),
    ],
)
def test_errors_on_the_command_line(data, tmp_path, more, told):
    with pytest.raises(SystemExit, match=f"train_clip: .*{told}"):
        train_clip.main(flags(data, tmp_path / "run", *more))


def test_compiled_steps_are_the_same(data, tmp_path, monkeypatch):
    """Traced and differentiated ahead as with --compile, but not put into C++, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for name in ("no-compile", "compile"):
        train_clip.main(flags(data, tmp_path / name, f"--{name}", "--max-steps", "3"))
    plain, compiled = (
        [line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("no-compile", "compile")
    )
    assert len(plain) == 3
    assert compiled == pytest.approx(plain, abs=1e-3)
