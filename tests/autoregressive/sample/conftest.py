"""Tiny random models as checkpoint files, and what the command-line tests share."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from autoregressive.models.checkpoint import save_safetensors
from autoregressive.models.gpt import ModelArgs, Transformer
from tokenizer.tokenizer_image.vq_model import VQ_models

ROOT = Path(__file__).resolve().parents[3]
CLASSES = [f"thing {letter}" for letter in "abcdefghij"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with gpt.safetensors (10 classes, 6 x 6 tokens, 64 codes), vq.safetensors and classes.json.

    And with gpt_t2i.safetensors, which takes eight text tokens of MiniLM.
    """
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = {"dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 16, "vocab_size": 64, "block_size": 36}
    text = {"model_type": "t2i", "caption_dim": 384, "cls_token_num": 8}
    for name, args in (("gpt", {"num_classes": 10}), ("gpt_t2i", text)):
        gpt = Transformer(ModelArgs(**shape, **args))
        torch.nn.init.normal_(gpt.output.weight)  # zero by default, which would make all images alike
        metadata = {"model": "GPT-Demo", "args": json.dumps(asdict(gpt.config))}
        save_safetensors(folder / f"{name}.safetensors", gpt.state_dict(), metadata)
    vq = VQ_models["VQ-8-Demo"](
        codebook_size=64, ch=8, z_channels=16, encoder_ch_mult=[1, 2], decoder_ch_mult=[1, 2], num_res_blocks=1
    )
    metadata = {"model": "VQ-8-Demo", "args": json.dumps(asdict(vq.config))}
    save_safetensors(folder / "vq.safetensors", vq.state_dict(), metadata)
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    return folder


@pytest.fixture
def models(tiny) -> list[str]:
    """The flags that name the tiny models."""
    return ["--gpt-ckpt", str(tiny / "gpt.safetensors"), "--vq-ckpt", str(tiny / "vq.safetensors"), "--cpu"]


@pytest.fixture(scope="session")
def text_models(tiny) -> list[str]:
    """The flags that name the tiny text-conditional models, and a folder of text features that the tests share."""
    flags = ["--gpt-ckpt", str(tiny / "gpt_t2i.safetensors"), "--vq-ckpt", str(tiny / "vq.safetensors"), "--cpu"]
    return [*flags, "--text-feature-dir", str(tiny / "text_features")]


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that the tests start, so that both round alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a run folder but run.json, which tells times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def start(script: str, *arguments: str, processes: int = 1, stdin: str | None = None) -> subprocess.Popen:
    """Start a script of autoregressive/sample, which can read `stdin`, in a folder that is not the project's."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    job = subprocess.Popen(
        [*command, str(ROOT / "autoregressive" / "sample" / script), *arguments],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if stdin is not None:
        job.stdin.write(stdin)
        job.stdin.flush()
    return job
