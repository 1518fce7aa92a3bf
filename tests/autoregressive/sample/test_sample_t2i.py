"""The grid of prompts, end to end on a tiny random model and the real text encoder."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.checkpoint import CheckpointError, save_safetensors
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.sample import sample_t2i
from autoregressive.sample.entry import guarded
from autoregressive.sample.options import OptionError

from .conftest import ROOT, start


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_prompts_make_a_grid(text_models, tmp_path, capsys):
    """By flag or by file, the same; a prompt given twice has two images."""
    prompts = ["a cat", "a cat", "one two three four five six seven", ""]
    (tmp_path / "mine.txt").write_text("\n".join([*prompts[:3], ""]))
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    sample_t2i.main([*text_models, *flags, "--output", str(tmp_path / "flags.png")])
    told = capsys.readouterr()
    assert told.out.endswith(f"{tmp_path / 'flags.png'}\n")
    assert "4 images of 12 px, 36 tokens each" in told.out
    assert "note: text.prompts: 1 empty prompt (index 3), sampled from no words\n" in told.err
    assert "note: 1 prompt cut to 8 tokens: index 2 before 'seven'\n" in told.err
    grid = picture(tmp_path / "flags.png")
    images = [grid[4:16, x : x + 12] for x in (4, 20, 36, 52)]  # four pixels between and around
    assert len({image.tobytes() for image in images}) == 4

    sample_t2i.main([*text_models, "--prompts", str(tmp_path / "mine.txt"), "--output", str(tmp_path / "file.png")])
    grid = picture(tmp_path / "file.png")
    assert all(np.array_equal(grid[4:16, x : x + 12], image) for x, image in zip((4, 20, 36), images[:3], strict=True))


def test_compares_caches_on_the_same_noise(text_models, tmp_path, capsys):
    flags = ["--prompt", "a cat", "a dog", "--compare", "full", "adsa-36", "window-8", "--cache-local", "4"]
    sample_t2i.main([*text_models, *flags, "--output", str(tmp_path / "grid.png")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:5]]
    assert (rows[0][:2], rows[2][:4]) == (["dense", "36"], ["WINDOW-8", "of", "36", "8"])
    grid = picture(tmp_path / "grid.png")
    panel = (grid.shape[1] - 16) // 3
    left, middle, right = (grid[16:28, 16 + i * panel : i * panel + panel] for i in range(3))
    assert np.array_equal(left, middle), "a budget of all tokens is the dense cache"
    assert not np.array_equal(left, right)


def test_demo_configuration(tiny, tmp_path, capsys):
    """Its prompts, encoder and tokenizer, with a random GPT of the demo's interface and 8 x 8 tokens."""
    torch.manual_seed(0)
    shape = {"dim": 16, "n_layer": 1, "n_head": 2, "multiple_of": 16, "vocab_size": 4096, "block_size": 64}
    gpt = Transformer(ModelArgs(**shape, model_type="t2i", caption_dim=384, cls_token_num=24))
    torch.nn.init.normal_(gpt.output.weight)
    metadata = {"model": "GPT-Demo", "args": json.dumps(asdict(gpt.config))}
    save_safetensors(tmp_path / "gpt.safetensors", gpt.state_dict(), metadata)
    flags = ["--gpt-ckpt", str(tmp_path / "gpt.safetensors"), "--output", str(tmp_path / "grid.png"), "--cpu"]
    flags += ["--text-feature-dir", str(tiny / "text_features"), "--compare", "full", "adsa-32"]
    sample_t2i.main(["--config", str(ROOT / "configs" / "demo_t2i.yaml"), *flags])
    told = capsys.readouterr()
    assert "8 images of 64 px, 64 tokens each" in told.out
    assert "ADSA-32 of 64" in told.out
    assert "note:" not in told.err, "no prompt is cut or empty"
    height, width = picture(tmp_path / "grid.png").shape[:2]
    assert 4 * 64 < width < 6 * 64 and height > 4 * 64, "two caches, each with two columns of four"


def test_as_a_command(text_models, tmp_path):
    """From another working directory, with prompts from a pipe."""
    job = start(
        "sample_t2i.py", *text_models, "--prompts", "-", "--output", str(tmp_path / "grid.png"), stdin="a cat\n\n"
    )
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    assert "1 image of 12 px" in out
    assert "note: stdin: 1 empty line skipped" in err
    assert picture(tmp_path / "grid.png").shape[:2] == (38, 20)


@pytest.mark.parametrize(
    "flags, error, told",
    [
        ([], OptionError, "no prompts are given: name a file by --prompts FILE"),
        (["--prompt", "x", "--gpt-type", "c2i"], OptionError, "gpt_type is c2i, and this script samples prompts"),
        (["--prompt", "x", "--compare", "dens"], OptionError, "'dens' is neither full nor POLICY-BUDGET"),
        (["--prompt", "x", "--text-encoder", "flan-t5-xl", "--t5-path", "/nowhere"], RuntimeError, "/nowhere"),
        (["--prompt", "x", "--text-encoder", "minlm"], RuntimeError, "did you mean minilm"),
        (["--prompt", "x", "--t5-feature-dim", "2048", "--text-encoder", "minilm"], OptionError, "takes 2048"),
        (["--prompt", "x", "--t5-feature-max-len", "120"], OptionError, "text.max_length is 120, but the GPT takes 8"),
        (
            ["--prompt", "x", "--gpt-ckpt", "{tiny}/gpt.safetensors"],
            OptionError,
            "a c2i model, and model.gpt_type is t2i",
        ),
        (["--prompt", "x", "--cls-token-num", "9"], CheckpointError, "doesn't fit the model"),
    ],
)
def test_refused_before_sampling(text_models, tiny, tmp_path, flags, error, told):
    flags = [flag.format(tiny=tiny) for flag in flags]
    with pytest.raises(error, match=told):
        sample_t2i.main([*text_models, "--output", str(tmp_path / "grid.png"), *flags])
    assert not (tmp_path / "grid.png").exists()


def test_a_grid_is_for_one_process(text_models, tmp_path, monkeypatch):
    monkeypatch.setattr("autoregressive.sample.grid.start_processes", lambda cpu: SimpleNamespace(num_processes=2))
    with pytest.raises(OptionError, match="a grid is for one process; the script of this name with _ddp"):
        sample_t2i.main([*text_models, "--prompt", "x", "--output", str(tmp_path / "grid.png")])


def test_errors_are_one_line(text_models, capsys):
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: sample_t2i.main([*text_models, "--prompt", "x", "--t5-model-type", "minlm"]))
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is no text encoder 'minlm' (did you mean minilm?)")
