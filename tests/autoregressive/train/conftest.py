"""Tiny models under registered names, a tiny folder of images, and scripts run by two processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models import gpt
from tokenizer.tokenizer_image import vq_model

TINY_GPT = {"dim": 32, "n_layer": 2, "n_head": 2, "multiple_of": 32}
TINY_VQ = {"ch": 8, "encoder_ch_mult": [1, 2, 2], "decoder_ch_mult": [1, 2, 2], "num_res_blocks": 1}
TINY_VQ |= {"z_channels": 16, "codebook_size": 32}


@pytest.fixture(autouse=True)
def one_thread_and_own_signals():
    """Sums in one order whatever the machine; and the trainers' signal handlers do not outlive a test."""
    threads, torch_handlers = torch.get_num_threads(), [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), torch_handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def tiny_models(monkeypatch):
    def vq(**kwargs):
        return vq_model.VQModel(vq_model.ModelArgs(**TINY_VQ | kwargs))

    def tiny_gpt(**kwargs):
        return gpt.Transformer(gpt.ModelArgs(**TINY_GPT, **kwargs))

    monkeypatch.setitem(vq_model.VQ_models, "VQ-Tiny", vq)
    monkeypatch.setitem(gpt.GPT_models, "GPT-Tiny", tiny_gpt)


@pytest.fixture
def images(tmp_path):
    """Nine 32 x 40 images in three class folders."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("0_red_a", "1_green_b", "2_blue_a")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(3):
            array = rng.integers(0, 60, (32, 40, 3), dtype=np.uint8)
            array[:, :, label] += 150
            Image.fromarray(array).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def vq_ckpt(tmp_path, tiny_models):
    torch.manual_seed(0)
    path = tmp_path / "vq.pt"
    torch.save({"model": vq_model.VQ_models["VQ-Tiny"]().state_dict()}, path)
    return path


STARTER = f"""
import importlib, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from autoregressive.models import gpt
from tokenizer.tokenizer_image import vq_model

TINY_GPT, TINY_VQ = {TINY_GPT!r}, {TINY_VQ!r}
gpt.GPT_models["GPT-Tiny"] = lambda **kwargs: gpt.Transformer(gpt.ModelArgs(**kwargs, **TINY_GPT))
vq_model.VQ_models["VQ-Tiny"] = lambda **kwargs: vq_model.VQModel(vq_model.ModelArgs(**TINY_VQ | kwargs))
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
"""


@pytest.fixture
def two_processes(tmp_path):
    """Call the `main(flags)` of a module by torchrun, with the tiny models known."""
    starter = tmp_path / "start.py"
    starter.write_text(STARTER)

    def run(module, flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(starter)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, module, *flags], env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run
