"""From the tokens of a run to its images again, by the tokenizer alone."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.checkpoint import load_model
from autoregressive.sample import decode_tokens, sample_c2i_ddp
from autoregressive.sample.options import ModelOptions
from autoregressive.sample.run_folder import RunError
from autoregressive.sample.sampler import tokenizer_on_meta
from tokenizer.tokenizer_image.images import to_uint8

from .conftest import content

FLAGS = ["--num-fid-samples", "5", "--per-proc-batch-size", "2", "--image-size-eval", "8"]


@pytest.fixture(scope="module")
def sampled(tiny, tmp_path_factory):
    """A run of five images of 12 pixels, scaled down to 8."""
    folder = tmp_path_factory.mktemp("sampled")
    models = ["--gpt-ckpt", str(tiny / "gpt.safetensors"), "--vq-ckpt", str(tiny / "vq.safetensors"), "--cpu"]
    sample_c2i_ddp.main([*models, *FLAGS, "--sample-dir", str(folder)])
    return next(folder.iterdir())


@pytest.fixture
def run(sampled, tmp_path):
    return shutil.copytree(sampled, tmp_path / "run")


def test_the_same_again(run, capsys):
    decode_tokens.main([str(run), "--cpu"])
    path = run.with_name("run-decoded-size-8")
    assert capsys.readouterr().out.endswith(f"{path / 'samples.npz'}\n")
    wanted = {name: data for name, data in content(run).items() if not name.startswith("tokens/")}
    assert content(path) == wanted
    record = json.loads((path / "run.json").read_text())
    assert (record["status"], record["decoded_from"], record["images"]) == ("complete", "run", 5)
    assert (
        record["settings"]["model.gpt_ckpt"] == json.loads((run / "run.json").read_text())["settings"]["model.gpt_ckpt"]
    )


def test_antialias_and_size(run, tiny):
    decode_tokens.main([str(run), "--antialias", "--cpu"])
    decode_tokens.main([str(run), "--image-size-eval", "12", "--cpu"])
    vq = load_model(tokenizer_on_meta(ModelOptions(vq_ckpt=str(tiny / "vq.safetensors"))), tiny / "vq.safetensors")
    tokens = torch.from_numpy(np.stack([np.load(run / f"tokens/00000{i}.npy").astype(int) for i in range(5)]))
    with torch.no_grad():
        full = vq.decode_code(tokens, (5, vq.config.codebook_embed_dim, 6, 6))
    small = F.interpolate(full, (8, 8), mode="bicubic", antialias=True)
    for name, expected in (("size-8-antialias", small), ("size-12", full)):
        images = np.load(run.with_name(f"run-decoded-{name}") / "samples.npz")["arr_0"]
        assert np.abs(images.astype(int) - to_uint8(expected)).max() <= 1
    assert not np.array_equal(np.load(run / "samples.npz")["arr_0"], to_uint8(small))


def test_broken_off_and_started_again(run):
    decode_tokens.main([str(run), "--antialias", "--cpu"])
    path = run.with_name("run-decoded-size-8-antialias")
    whole = content(path)
    (path / "images/000003.png").unlink()
    (path / "samples.npz").unlink()
    decode_tokens.main([str(run), "--antialias", "--cpu"])
    assert content(path) == whole


def test_finished_loads_no_model(run, monkeypatch):
    decode_tokens.main([str(run), "--cpu"])
    monkeypatch.setattr(decode_tokens, "load_model", None)
    decode_tokens.main([str(run), "--cpu"])


def test_other_tokenizers_are_refused(run, tiny, tmp_path):
    moved = shutil.copy(tiny / "vq.safetensors", tmp_path / "moved.safetensors")
    other = tmp_path / "other.safetensors"
    other.write_bytes(moved.read_bytes()[:-1] + b"\1")
    decode_tokens.main([str(run), "--vq-ckpt", str(moved), "--cpu"])
    with pytest.raises(RunError, match=r"other\.safetensors: not the tokenizer of .*run"):
        decode_tokens.main([str(run), "--vq-ckpt", str(other), "--cpu"])


def test_what_cannot_be_decoded(run, tmp_path):
    with pytest.raises(RunError, match=r"run\.json: not readable as a run"):
        decode_tokens.main([str(tmp_path), "--cpu"])
    decode_tokens.main([str(run), "--cpu"])
    with pytest.raises(RunError, match="was decoded from another run's tokens"):
        decode_tokens.main([str(run.with_name("run-decoded-size-8")), "--cpu"])
    (run / "tokens/000002.npy").unlink()
    with pytest.raises(RunError, match=r"000002\.npy: no readable tokens"):
        decode_tokens.main([str(run), "--antialias", "--cpu"])
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "sampling"}))
    with pytest.raises(RunError, match="this run is not complete"):
        decode_tokens.main([str(run), "--cpu"])
