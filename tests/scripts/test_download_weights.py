"""Fetching released weights, with Hugging Face's two functions replaced and everything else real."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from autoregressive.models.gpt import GPT_models
from tokenizer.tokenizer_image.vq_model import VQ_models

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("download_weights", ROOT / "scripts" / "download_weights.py")
dw = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(dw)


def weights(path: Path, values: int = 6) -> bytes:
    torch.save({"model": {"w": torch.arange(float(values))}}, path)
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face's side: what it serves, what it was asked for, and the error that it meets."""
    hub = SimpleNamespace(files={}, calls=[], error=None)

    def fake_download(repo_id, filename, *, local_dir, force_download=False):
        hub.calls.append((repo_id, filename, force_download))
        if hub.error:
            raise hub.error
        path = Path(local_dir) / filename
        path.write_bytes(hub.files[filename])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake_download)
    content = weights(tmp_path / "served.pt")
    hub.files = {"known.pt": content, "unknown.pt": content}
    digest = hashlib.sha256(content).hexdigest()
    hub.folder = tmp_path / "weights"
    releases = {
        "known": dw.WeightFile("known", "some/repo", 6, "a test", digest),
        "unknown": dw.WeightFile("unknown", "some/repo", 6, "a test"),
    }
    monkeypatch.setattr(dw, "RELEASES", releases)
    hub.run = lambda *argv: dw.main([*argv, "--dir", str(hub.folder)])
    return hub


def test_fetches_checks_and_skips_the_second_time(hub, capsys):
    assert hub.run("known", "unknown.pt") == 0
    out = capsys.readouterr().out
    assert "known.pt is complete, checked by its sha256" in out
    assert "6 values (sha256 is not known)" in out
    assert hub.calls == [("some/repo", "known.pt", False), ("some/repo", "unknown.pt", False)]
    assert hub.run("known", "unknown") == 0
    assert capsys.readouterr().out.count("there already") == 2
    assert len(hub.calls) == 2


@pytest.mark.parametrize("name", ["known", "unknown"])
def test_a_damaged_file_is_fetched_anew(hub, name, capsys):
    hub.folder.mkdir()
    (hub.folder / f"{name}.pt").write_bytes(hub.files["known.pt"][:-200])
    assert hub.run(name) == 0
    assert hub.calls == [("some/repo", f"{name}.pt", True)]
    assert "Fetching it anew" in capsys.readouterr().err
    assert (hub.folder / f"{name}.pt").read_bytes() == hub.files["known.pt"]


def test_wrong_content_from_the_hub(hub, tmp_path, capsys):
    hub.files = {
        "known.pt": weights(tmp_path / "other.pt", values=7),
        "unknown.pt": weights(tmp_path / "o.pt", values=7),
    }
    assert hub.run("known", "unknown") == 1
    err = capsys.readouterr().err
    assert f"expected {dw.RELEASES['known'].sha256}" in err
    assert "holds 7 values, expected 6" in err
    assert err.count("https://huggingface.co/some/repo/resolve/main/") == 2


def test_a_web_page_from_the_hub(hub, capsys):
    hub.files["unknown.pt"] = b"<!DOCTYPE html><html>Log in to this network</html>"
    assert hub.run("unknown") == 1
    assert "HTML page" in capsys.readouterr().err


def test_offline(hub, capsys):
    hub.error = huggingface_hub.errors.LocalEntryNotFoundError("Please check your connection.\nMore.")
    assert hub.run("known") == 1
    err = capsys.readouterr().err
    assert "known could not be fetched" in err and "Please check your connection" in err
    assert "goes on where it stopped" in err and "https://huggingface.co/some/repo/resolve/main/known.pt" in err


def test_one_failure_does_not_stop_the_others(hub, capsys):
    del hub.files["known.pt"]
    assert hub.run("known", "unknown") == 1
    out, err = capsys.readouterr()
    assert "unknown.pt is complete" in out and "known could not be fetched" in err


def test_interrupted(hub, capsys):
    hub.error = KeyboardInterrupt()
    assert hub.run("known", "unknown") == 130
    assert len(hub.calls) == 1 and "goes on from here" in capsys.readouterr().err


def test_too_little_space_is_told_before(hub, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    assert hub.run("known") == 1
    assert not hub.calls and "GB free" in capsys.readouterr().err
    # what a stopped run left counts as done
    partial = hub.folder / ".cache" / "huggingface" / "download" / "known.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(14))
    assert hub.run("known") == 0


def test_a_disk_that_fills_up_and_a_folder_that_is_a_file(hub, capsys):
    hub.error = OSError(errno.ENOSPC, "No space left on device")
    assert hub.run("known") == 1
    assert "is full" in capsys.readouterr().err
    hub.folder.rmdir()
    hub.folder.write_text("")
    assert hub.run("known") == 1
    assert "can't be written" in capsys.readouterr().err


def test_names(hub, capsys):
    for argv, told in ((["Knwon"], "did you mean known?"), ([], "name what to fetch: known, unknown")):
        with pytest.raises(SystemExit) as caught:
            hub.run(*argv)
        assert caught.value.code == 2 and told in capsys.readouterr().err


def test_list(hub, capsys):
    hub.folder.mkdir()
    (hub.folder / "known.pt").touch()
    assert hub.run("--list") == 0
    _, known, unknown = capsys.readouterr().out.strip().splitlines()
    assert known.split()[3] == "yes" and known.endswith("sha256")
    assert unknown.split()[3] == "-" and unknown.endswith("(sha256 is not known)")
    assert not hub.calls


# The text encoder: a folder of shards


@pytest.fixture
def encoder_hub(hub, monkeypatch):
    hub.release = dw.TextEncoder("tiny-t5", "some/t5", 1000, 8, "a test")
    monkeypatch.setattr(dw, "RELEASES", {"tiny-t5": hub.release})
    hub.pickled = False

    def fake_snapshot(repo_id, *, local_dir, allow_patterns, force_download=False):
        hub.calls.append((repo_id, tuple(allow_patterns)))
        if hub.error:
            raise hub.error
        folder = Path(local_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"d_model": 8}))
        (folder / "spiece.model").write_bytes(b"tokenizer")
        stem, suffix = ("pytorch_model", "bin") if hub.pickled else ("model", "safetensors")
        shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
        index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        if hub.pickled and "pytorch_model*.bin" in allow_patterns:
            torch.save({"a": torch.ones(2)}, folder / shards[0])
            torch.save({"b": torch.ones(2), "c": torch.ones(2)}, folder / shards[1])
        if not hub.pickled and "*.safetensors" in allow_patterns:
            save_file({"a": torch.ones(2)}, folder / shards[0])
            save_file({"b": torch.ones(2), "c": torch.ones(2)}, folder / shards[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_snapshot)
    hub.path = hub.folder / "t5-ckpt" / "tiny-t5"
    return hub


@pytest.mark.parametrize("pickled", [False, True])
def test_text_encoder(encoder_hub, capsys, pickled):
    hub = encoder_hub
    hub.pickled = pickled
    assert hub.run("tiny-t5") == 0
    assert "every shard of its index" in capsys.readouterr().out
    assert [call[1][-1] for call in hub.calls] == ["*.safetensors", "pytorch_model*.bin"][: 1 + pickled]
    assert hub.run("tiny-t5") == 0
    assert len(hub.calls) == 1 + pickled, "a valid folder is left alone"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("model-00002-of-00002.safetensors", None, "no file"),
        ("model-00002-of-00002.safetensors", b"\x10\0\0\0\0\0\0\0{", "cut short"),
        ("spiece.model", None, "tokenizer, isn't there"),
        ("config.json", b'{"d_model": 4096}', "d_model 4096, expected 8"),
        ("config.json", b'{"d_model"', "incomplete or damaged"),
        ("model.safetensors.index.json", b'{"weight_map": {"d": "model-00001-of-00002.safetensors"}}', "d among them"),
    ],
)
def test_text_encoder_damaged_then_mended(encoder_hub, name, content, told):
    hub = encoder_hub
    assert hub.run("tiny-t5") == 0
    (hub.path / name).unlink()
    if content is not None:
        (hub.path / name).write_bytes(content)
    assert told in hub.release.problem(hub.folder)
    assert hub.run("tiny-t5") == 0
    assert len(hub.calls) == 2 and hub.release.problem(hub.folder) is None


def test_text_encoder_offline(encoder_hub, capsys):
    encoder_hub.error = ConnectionError("Name or service not known")
    assert encoder_hub.run("tiny-t5") == 1
    assert "https://huggingface.co/some/t5/tree/main" in capsys.readouterr().err


# The table itself


def test_the_table_agrees_with_the_models():
    for name, release in dw.RELEASES.items():
        if name.startswith("vq"):
            build, options = VQ_models["VQ-8" if "ds8" in name else "VQ-16"], {}
        elif name.startswith(("c2i", "t2i")):
            kind, size = name.split("_")[:2]
            build = GPT_models[f"GPT-{size}"]
            options = {"model_type": kind, "cls_token_num": 120 if kind == "t2i" else 1}
        else:
            continue
        with torch.device("meta"):
            state = build(**options).state_dict()
        assert release.values == sum(tensor.numel() for tensor in state.values()), name


def test_known_checksums():
    known = {name: release.sha256[:8] for name, release in dw.RELEASES.items() if getattr(release, "sha256", None)}
    assert known == {"c2i_XL_384": "736cb92b", "c2i_XXL_384": "cba5a780", "vq_ds8_c2i": "c70d2966"}
    assert all(len(dw.RELEASES[name].sha256) == 64 for name in known)


def test_shell_script_runs_from_anywhere(tmp_path):
    script = ROOT / "scripts" / "download_weights.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    run = subprocess.run(["bash", str(script), "--list"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "flan-t5-xl" in run.stdout
