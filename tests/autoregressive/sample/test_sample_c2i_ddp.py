"""The job that fills a run folder, end to end on tiny random models: any split, any interruption, the same bytes."""

import json
import os
import re
import resource
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.run_folder import RunError

from .conftest import content, start

TOTAL = 24
FLAGS = ["--num-fid-samples", str(TOTAL), "--cache-policy", "adsa", "--cache-budget", "12", "--seed", "3"]
NAME = "GPT-Demo-gpt-size-12-size-12-VQ-8-Demo-topk-0-topp-1.0-temperature-1.0-cfg-1.5-seed-3-adsa-12"


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """The run folder of one process with batches of 4."""
    samples = tmp_path_factory.mktemp("unbroken")
    models = ["--gpt-ckpt", str(tiny / "gpt.safetensors"), "--vq-ckpt", str(tiny / "vq.safetensors"), "--cpu"]
    sample_c2i_ddp.main([*models, *FLAGS, "--per-proc-batch-size", "4", "--sample-dir", str(samples)])
    assert [path.name for path in samples.iterdir()] == [NAME]
    return samples / NAME


@pytest.fixture
def copied(unbroken, tmp_path):
    """A finished run folder to damage, and the flags that go on with it."""
    shutil.copytree(unbroken, tmp_path / NAME)
    return tmp_path / NAME, [*FLAGS, "--per-proc-batch-size", "4", "--sample-dir", str(tmp_path)]


def test_run_folder(unbroken):
    assert sorted(content(unbroken)) == sorted(
        [
            *(f"images/{i:06d}.png" for i in range(TOTAL)),
            *(f"tokens/{i:06d}.npy" for i in range(TOTAL)),
            *("labels.npy", "samples.npz", "seeds.npy"),
        ]
    )
    tokens = np.load(unbroken / "tokens/000007.npy")
    assert (tokens.dtype, tokens.shape) == (np.uint8, (36,))  # 64 codes
    with np.load(unbroken / "samples.npz") as archive:
        images = archive["arr_0"]
    assert images.shape == (TOTAL, 12, 12, 3)
    with Image.open(unbroken / "images/000007.png") as image:
        assert np.array_equal(np.asarray(image), images[7])
    assert np.load(unbroken / "labels.npy").tolist() == [i % 10 for i in range(TOTAL)]
    assert len({image.tobytes() for image in images}) == TOTAL

    record = json.loads((unbroken / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["config"]["cache"]["budget"] == 12
    assert record["images"] == TOTAL
    assert record["images_per_second"] == pytest.approx(TOTAL / record["wall_seconds"], rel=1e-3)
    assert set(record["seconds"]) == {"load", "gpt", "vq", "io"}
    assert record["peak_memory_bytes"] > 1 << 20
    assert record["cache"]["slots"] == 12
    # k and v, 2 layers, 4 images guided, 2 heads, 1 condition token and 12 slots, 8 dimensions, 4 bytes
    assert record["cache"]["kv_bytes"] == 2 * 2 * 8 * 2 * 13 * 8 * 4
    assert {"python", "torch", "project"} <= set(record["versions"])


def test_two_processes_make_the_same(models, unbroken, tmp_path):
    flags = [*FLAGS, "--per-proc-batch-size", "2", "--sample-dir", str(tmp_path)]
    job = start("sample_c2i_ddp.py", *models, *flags, processes=2)
    _, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    told = re.findall(r"24/24 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(?: images/s|s/ images)\]", err)
    assert len(told) == 1, "one bar, of the first process"
    assert content(tmp_path / NAME) == content(unbroken)
    record = json.loads((tmp_path / NAME / "run.json").read_text())
    assert record["world_size"] == 2
    assert [process["images"] for process in record["processes"]] == [TOTAL // 2] * 2
    assert record["cache"]["images_per_batch"] == 2


def test_killed_and_started_again(models, unbroken, tmp_path):
    """kill -9 in the middle: only the batch in hand is lost, and the end is the same, byte for byte."""
    flags = [*models, *FLAGS, "--per-proc-batch-size", "1", "--sample-dir", str(tmp_path)]
    images = tmp_path / NAME / "images"
    job = start("sample_c2i_ddp.py", *flags)
    deadline = time.monotonic() + 240
    while len(list(images.glob("*.png"))) < 3 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in images.glob("*.png")}
    assert 3 <= len(before) < TOTAL, "killed too late to show anything"
    assert not (tmp_path / NAME / "samples.npz").exists()

    sample_c2i_ddp.main(flags)
    assert content(tmp_path / NAME) == content(unbroken)
    after = {path.name: path.stat().st_mtime_ns for path in images.glob("*.png")}
    assert {name: after[name] for name in before} == before, "nothing whole was made again"
    record = json.loads((tmp_path / NAME / "run.json").read_text())
    assert record["images"] == TOTAL - len(before)
    assert record["earlier_sessions"][0]["images"] == len(before)


def test_damaged_folder_is_mended(models, unbroken, copied):
    folder, flags = copied
    (folder / "samples.npz").unlink()
    (folder / "images/000001.png").unlink()
    (folder / "images/000009.png").write_bytes((folder / "images/000009.png").read_bytes()[:-1])
    (folder / "images/.000009.png.x.part").write_bytes(b"half")
    untouched = (folder / "images/000005.png").stat().st_mtime_ns
    sample_c2i_ddp.main([*models, *flags])
    assert content(folder) == content(unbroken)
    assert (folder / "images/000005.png").stat().st_mtime_ns == untouched
    assert json.loads((folder / "run.json").read_text())["images"] == 8, "two batches of four"


def test_finished_run_loads_no_model(models, copied, monkeypatch, capsys):
    monkeypatch.setattr("autoregressive.sample.sampler.Sampler", None)
    folder, flags = copied
    (folder / "samples.npz").unlink()
    sample_c2i_ddp.main([*models, *flags])
    assert capsys.readouterr().out.endswith(f"{folder / 'samples.npz'}\n")
    assert (folder / "samples.npz").exists()


def test_other_settings_are_refused(models, copied):
    _, flags = copied
    with pytest.raises(RunError, match=r"sampling\.cfg_interval is -1\.0 there and 9\.0 here"):
        sample_c2i_ddp.main([*models, *flags, "--cfg-interval", "9"])
    with pytest.raises(RunError, match=r"run\.num_fid_samples is 24 there and 25 here"):
        sample_c2i_ddp.main([*models, *flags, "--num-fid-samples", "25"])


def test_rows_decoded_at_once(models, unbroken, tmp_path):
    flags = [*models, *FLAGS, "--per-proc-batch-size", "8", "--sample-dir", str(tmp_path), "--zipar-window"]
    for window in (5, 6):  # 6 is a whole row, which is raster order
        sample_c2i_ddp.main([*flags, str(window)])
    ahead, raster = (tmp_path / NAME.replace("seed", f"zipar-{window}-seed") for window in (5, 6))
    made = [np.load(folder / "samples.npz")["arr_0"] for folder in (unbroken, raster, ahead)]
    assert np.array_equal(made[0], made[1])
    assert (made[0] != made[2]).any((1, 2, 3)).all()


def test_quantised_weights_make_another_run(models, copied):
    folder, flags = copied
    sample_c2i_ddp.main([*models, *flags, "--precision", "none", "--quantize", "int8"])
    quantised = folder.with_name(NAME.replace("seed", "int8-seed"))
    made = [np.load(each / "samples.npz")["arr_0"] for each in (folder, quantised)]
    assert (made[0] != made[1]).any()
    shutil.rmtree(folder)
    quantised.rename(folder)
    with pytest.raises(RunError, match=r"model\.quantize is 'int8' there and None here"):
        sample_c2i_ddp.main([*models, *flags])


def test_rows_that_wait_for_the_batch(models, tmp_path):
    """Images depend on their batch, whose size is one of the run's settings; what is made again is the same."""
    flags = [*models, "--num-fid-samples", "8", "--cfg-scale", "4", "--zipar-window", "1", "--zipar-adaptive"]
    flags += ["--sample-dir", str(tmp_path), "--per-proc-batch-size"]
    sample_c2i_ddp.main([*flags, "4"])
    (folder,) = tmp_path.iterdir()
    assert "-zipar-1-adaptive-seed-0" in folder.name
    made = content(folder)
    for name in ("images/000002.png", "samples.npz"):
        (folder / name).unlink()
    with pytest.raises(RunError, match=r"run\.per_proc_batch_size is 4 there and 1 here"):
        sample_c2i_ddp.main([*flags, "1"])
    sample_c2i_ddp.main([*flags, "4"])
    assert content(folder) == made
    shutil.rmtree(folder)
    sample_c2i_ddp.main([*flags, "1"])
    assert content(folder)["samples.npz"] != made["samples.npz"]


def test_the_split_is_recorded_as_it_is(models, tmp_path):
    flags = [*models, "--num-fid-samples", "2", "--zipar-window", "2", "--cache-policy", "window", "--cache-budget"]
    sample_c2i_ddp.main([*flags, "20", "--sample-dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "run.json").read_text())["settings"]["cache.local"] == 12


def test_a_run_made_before_there_was_an_option_goes_on(models, copied, capsys):
    folder, flags = copied
    record = json.loads((folder / "run.json").read_text())
    for option in ("sampling.zipar_window", "sampling.zipar_adaptive", "model.quantize"):
        del record["settings"][option]
    (folder / "run.json").write_text(json.dumps(record))
    sample_c2i_ddp.main([*models, *flags])
    assert capsys.readouterr().out.endswith(f"{folder / 'samples.npz'}\n")
    with pytest.raises(RunError, match=r"sampling\.zipar_window is None there and 2 here"):
        shutil.move(folder, folder.with_name(NAME.replace("seed", "zipar-2-seed")))
        sample_c2i_ddp.main([*models, *flags, "--zipar-window", "2"])


def test_uniform_labels_and_classes(models, tmp_path):
    flags = [*models, "--num-fid-samples", "6", "--label-distribution", "uniform", "--class-labels", "thing b", "7"]
    sample_c2i_ddp.main([*flags, "--sample-dir", str(tmp_path), "--cfg-scale", "1"])
    (labels,) = tmp_path.glob("*/labels.npy")
    assert set(np.load(labels).tolist()) == {1, 7}


def test_full_disk(models, tmp_path):
    """A limit on file sizes stands for it: 8 KiB are enough for run.json, but not for a PNG of noise at 128 pixels."""
    flags = [*models, *FLAGS, "--image-size-eval", "128", "--sample-dir", str(tmp_path)]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    try:
        with pytest.raises(RunError, match=r"images: File too large\. Make room or choose another folder"):
            sample_c2i_ddp.main(flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (folder,) = tmp_path.iterdir()
    assert not any(name.endswith(".png") for name in content(folder))
    sample_c2i_ddp.main(flags)
    assert len(list((folder / "images").iterdir())) == TOTAL


def test_unwritable(models, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*: Not a directory\. Make room or choose another folder"):
        sample_c2i_ddp.main([*models, *FLAGS, "--sample-dir", str(tmp_path / "file")])


def test_failing_process_stops_all(models, copied):
    """Process 1 can't write image 12; process 0, at work or waiting at the end, must not go on for long."""
    folder, flags = copied
    for image in (0, 4, 8, 12):  # a batch each: processes 0, 1, 0 and 1
        (folder / f"images/{image:06d}.png").unlink()
    (folder / "images/000012.png").mkdir()
    (folder / "images/000012.png/in the way").touch()
    job = start("sample_c2i_ddp.py", *models, *flags, processes=2)
    _, err = job.communicate(timeout=300)
    assert job.returncode != 0
    assert "[process 1] error: cannot write" in err
    assert (folder / "images/000004.png").exists(), "what process 1 made before"
