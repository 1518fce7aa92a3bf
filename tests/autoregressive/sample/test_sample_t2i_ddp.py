"""The job of many prompts, end to end on a tiny random model and the real text encoder."""

import json
import shutil

import numpy as np
import pytest

from autoregressive.sample import sample_t2i_ddp
from autoregressive.sample.options import OptionError
from autoregressive.sample.run_folder import RunError

from .conftest import content, start

PROMPTS = ["a red apple", "", "one two three four five six seven", "a cat, sleeping", "a dog", "a dog", "é 🍎"]
TABLE = "Prompt\tNote\timage_id\n" + "".join(f"{text}\tx\t{100 + i}\n" for i, text in enumerate(PROMPTS))
FLAGS = ["--cache-policy", "adsa", "--cache-budget", "12", "--seed", "3"]
NAME = (
    "GPT-Demo-gpt_t2i-some_prompts-size-12-size-12-VQ-8-Demo-topk-1000-topp-1.0-temperature-1.0-cfg-7.5-seed-3-adsa-12"
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "Some_Prompts.tsv"
    path.write_text(TABLE)
    return ["--prompt-csv", str(path)]


@pytest.fixture(scope="module")
def unbroken(text_models, prompts, tmp_path_factory):
    """The run folder of one process with batches of 4."""
    samples = tmp_path_factory.mktemp("unbroken")
    sample_t2i_ddp.main([*text_models, *prompts, *FLAGS, "--per-proc-batch-size", "4", "--sample-dir", str(samples)])
    assert [path.name for path in samples.iterdir()] == [NAME]
    return samples / NAME


@pytest.fixture
def copied(unbroken, prompts, tmp_path):
    """A finished run folder to damage, and the flags that go on with it."""
    shutil.copytree(unbroken, tmp_path / NAME)
    return tmp_path / NAME, [*prompts, *FLAGS, "--per-proc-batch-size", "4", "--sample-dir", str(tmp_path)]


def test_run_folder(unbroken):
    images = [f"images/{i:06d}.png" for i in range(7)]
    tokens = [f"tokens/{i:06d}.npy" for i in range(7)]
    others = ["captions.txt", "result.jsonl", "samples.npz", "seeds.npy"]
    assert sorted(content(unbroken)) == sorted([*images, *tokens, *others])
    assert (unbroken / "captions.txt").read_text().split("\n") == [*PROMPTS, ""]
    rows = [json.loads(line) for line in (unbroken / "result.jsonl").read_text().splitlines()]
    assert rows == [
        {"text": text, "image_path": path, "image_id": 100 + i}
        for i, (text, path) in enumerate(zip(PROMPTS, images, strict=True))
    ]
    with np.load(unbroken / "samples.npz") as archive:
        assert archive["arr_0"].shape == (7, 12, 12, 3)
        assert len({image.tobytes() for image in archive["arr_0"]}) == 7

    record = json.loads((unbroken / "run.json").read_text())
    assert (record["status"], record["images"]) == ("complete", 7)
    assert set(record["seconds"]) == {"encode", "load", "gpt", "vq", "io"}
    assert record["settings"]["run.num_fid_samples"] == 7
    assert record["settings"]["text.encoder"]["name"] == "minilm"
    assert "run.class_labels" not in record["settings"]
    empty, fewer = record["notes"]
    assert "1 empty prompt (index 1)" in empty
    assert fewer.endswith("7 prompts, so 7 images and not 30000")
    assert record["prompts"] == {
        "max_length": 8,
        "cut": {"count": 1, "first": [{"index": 2, "left_out": "seven"}]},
        "emptied": {"count": 0, "first": []},
    }
    # k and v, 2 layers, 4 images guided, 2 heads, 1 slot for the text and 12, 8 dimensions, 4 bytes
    assert record["cache"]["condition_slots"] == 1
    assert record["cache"]["kv_bytes"] == 2 * 2 * 8 * 2 * 13 * 8 * 4


def test_two_processes_make_the_same(text_models, prompts, unbroken, tmp_path):
    """And each encodes its own prompts only."""
    features = tmp_path / "features"
    flags = [*prompts, *FLAGS, "--per-proc-batch-size", "2", "--sample-dir", str(tmp_path)]
    job = start("sample_t2i_ddp.py", *text_models, *flags, "--text-feature-dir", str(features), processes=2)
    _, err = job.communicate(timeout=600)
    assert job.returncode == 0, err
    assert content(tmp_path / NAME) == content(unbroken)
    record = json.loads((tmp_path / NAME / "run.json").read_text())
    assert [process["images"] for process in record["processes"]] == [4, 3]
    assert err.count("7 prompts, so 7 images") == 1, "told once"
    assert len(list(features.iterdir())) == len(set(PROMPTS))


def test_damaged_folder_is_mended(text_models, unbroken, copied):
    folder, flags = copied
    (folder / "samples.npz").unlink()
    (folder / "images/000005.png").unlink()
    (folder / "captions.txt").write_text("half")
    sample_t2i_ddp.main([*text_models, *flags])
    assert content(folder) == content(unbroken)
    record = json.loads((folder / "run.json").read_text())
    assert record["images"] == 3, "a batch of four, and the last has three"
    assert record["prompts"]["cut"]["count"] == 1


def test_finished_run_loads_nothing(text_models, copied, monkeypatch, capsys):
    monkeypatch.setattr("autoregressive.sample.sampler.Sampler", None)
    monkeypatch.setattr("tokenizer.tokenizer_text.encoder.TextEncoder._load", None)
    folder, flags = copied
    (folder / "samples.npz").unlink()
    sample_t2i_ddp.main([*text_models, *flags, "--text-feature-dir", str(folder.parent / "other")])
    assert capsys.readouterr().out.endswith(f"{folder / 'samples.npz'}\n")
    assert not (folder.parent / "other").exists()


def test_other_prompts_are_refused(text_models, prompts, copied, tmp_path):
    _, flags = copied
    other = tmp_path / "some_prompts.tsv"
    other.write_text(TABLE.replace("a cat", "a cow"))
    with pytest.raises(RunError, match=r"text\.prompts is '[0-9a-f]{64}' there and"):
        sample_t2i_ddp.main([*text_models, *flags, "--prompts", str(other)])
    with pytest.raises(RunError, match=r"text\.encoder is .*'clean': False"):
        sample_t2i_ddp.main([*text_models, *flags, "--no-clean-prompts"])
    other.write_text(TABLE.replace("\tx\t", "\ty\t"))
    sample_t2i_ddp.main([*text_models, *flags, "--prompts", str(other)])


def test_fewer_than_there_are(text_models, prompts, unbroken, tmp_path, capsys):
    """Captions of what is sampled alone; and guidance can end early."""
    runs = {}
    for interval in ("-1", "2", "36"):
        flags = [*prompts, *FLAGS, "--num-fid-samples", "2", "--cfg-interval", interval]
        sample_t2i_ddp.main([*text_models, *flags, "--sample-dir", str(tmp_path / interval)])
        runs[interval] = content(tmp_path / interval / NAME)
    assert "images and not" not in capsys.readouterr().err
    assert sorted(runs["-1"])[:3] == ["captions.txt", "images/000000.png", "images/000001.png"]
    assert runs["-1"]["captions.txt"] == b"a red apple\n\n"
    assert runs["-1"]["images/000001.png"] == (unbroken / "images/000001.png").read_bytes()
    assert runs["-1"] == runs["36"] != runs["2"]


def test_prompts_one_by_one(text_models, tmp_path, capsys):
    """Nobody needs to be told how many these are."""
    flags = ["--prompt", "a dog", "--prompt", "a cat", "--cfg-scale", "1", "--sample-dir", str(tmp_path)]
    sample_t2i_ddp.main([*text_models, *flags])
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("GPT-Demo-gpt_t2i-prompts-size-12-")
    assert (folder / "captions.txt").read_text() == "a dog\na cat\n"
    assert "images and not" not in capsys.readouterr().err


def test_stdin_is_refused(text_models):
    with pytest.raises(OptionError, match="it can't read stdin: name a file"):
        sample_t2i_ddp.main([*text_models, "--prompts", "-"])
