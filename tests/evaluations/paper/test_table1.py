import json

import numpy as np
import pytest

from evaluations.paired import Difference
from evaluations.paper import table1
from evaluations.paper.floor import reconstructed
from evaluations.paper.protocol import load_protocol
from evaluations.paper.rows import Cost, spread, told, told_times
from tokenizer.tokenizer_image.images import load_rgb


def test_table(protocol_file, launched, tmp_path, capsys):
    flags = ["--model", str(protocol_file(c2i={"budgets": [9]})), "--output", str(tmp_path / "out")]
    table1.main(flags)
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    assert record["command"] == f"bash scripts/reproduce_table1.sh {' '.join(flags)}"
    assert (record["seeds"], record["images"], record["extractor"]) == ([0, 1], 6, "stand-in")
    assert len(record["runs"]) == 4
    (section,) = record["sections"]
    assert [row["title"] for row in section["rows"]] == ["dense", "ADSA-9 of 36"]
    assert [row["slots"] for row in section["rows"]] == [36, 9]
    dense, adsa = section["rows"]
    assert adsa["kv_bytes"] == dense["kv_bytes"] * 10 // 37  # with the class token
    assert len(dense["fid"]) == len(adsa["images_per_second"]) == 2
    assert min(dense["step_ms"] + dense["peak_memory_bytes"]) > 0 and dense["cache_bytes"] >= dense["kv_bytes"]
    assert adsa["cache_bytes"] > adsa["kv_bytes"]
    less = adsa["less_dense"]
    assert less["fid"]["mean"] == pytest.approx(np.mean(np.subtract(adsa["fid"], dense["fid"])))
    assert (less["fid"]["count"], less["kid_images"]["count"]) == (2, 12)
    assert section["vq_reconstructions"]["counts"]["samples"] == 6
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.startswith(f"`{record['command']}` on {record['machine']}")
    assert "| ADSA-9 of 36 | " in text
    assert "| 9 (-75.0 %) | 9 |" in text
    ours, theirs = text.split("## The paper's numbers, not ours")
    assert "| ADSA-384 | 2.58 | 245.50 |" in theirs
    assert "ADSA-384" not in ours
    done = len(launched)
    table1.main(flags)
    assert len(launched) == done


def test_without_the_reference_images(protocol_file, launched, tmp_path):
    """The row of reconstructions says why it isn't measured."""
    path = protocol_file(c2i={"reference_images": "gone", "seeds": [0], "budgets": [9]})
    table1.main(["--model", str(path), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| VQ reconstructions of the reference | not measured |" in text
    assert "gone: no folder of the reference's images" in text
    assert json.loads((tmp_path / "out" / "table.json").read_text())["sections"][0]["vq_reconstructions"] is None


def test_both_ways_of_scaling_down(protocol_file, launched, tmp_path):
    """From one sampling, by its tokens."""
    small = {"flags": ["--cpu", "--image-size-eval", "8"], "resizes": ["llamagen", "antialias"]}
    path = protocol_file(c2i=small | {"seeds": [0], "budgets": [9]})
    flags = ["--model", str(path), "--output", str(tmp_path / "out")]
    table1.main(flags)
    assert launched.count("sample_c2i_ddp") == launched.count("decode_tokens") == 2
    sections = json.loads((tmp_path / "out" / "table.json").read_text())["sections"]
    assert [section["resize"] for section in sections] == ["llamagen", "antialias"]
    for ours, theirs in zip(*(section["rows"] for section in sections), strict=True):
        assert ours["kid"] != theirs["kid"]
        assert ours["images_per_second"] == theirs["images_per_second"]
    assert sections[0]["vq_reconstructions"]["kid"] != sections[1]["vq_reconstructions"]["kid"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.index("### Resized as LlamaGen does") < text.index("### Resized with antialiasing")
    done = len(launched)
    table1.main(flags)
    assert len(launched) == done


def test_reconstructions(protocol_file, tiny):
    import torch

    from autoregressive.models.checkpoint import load_model
    from autoregressive.sample.options import ModelOptions
    from autoregressive.sample.sampler import Blueprint
    from evaluations.paper.runs import reference_images
    from tokenizer.tokenizer_image.images import center_crop
    from tokenizer.tokenizer_image.reconstruction import reconstruct

    task = load_protocol(str(protocol_file())).c2i
    folder = reconstructed(task)
    files = sorted(folder.glob("*.png"))
    paths = {"gpt_ckpt": str(tiny / "gpt.safetensors"), "vq_ckpt": str(tiny / "vq.safetensors")}
    blueprint = Blueprint(ModelOptions(**paths), torch.device("cpu"))
    vq = load_model(blueprint.vq, paths["vq_ckpt"], device="cpu", dtype=torch.float32)
    originals = [np.asarray(center_crop(load_rgb(file), 12)) for file in reference_images(task).files]
    _, expected = reconstruct(vq, originals, torch.device("cpu"))
    assert len(files) == 6
    for file, image in zip(files, expected, strict=True):
        assert np.abs(np.asarray(load_rgb(file)).astype(int) - image).max() <= 1
    times = [file.stat().st_mtime_ns for file in files[1:]]
    files[0].unlink()
    assert reconstructed(task) == folder
    assert files[0].exists()
    assert [file.stat().st_mtime_ns for file in files[1:]] == times


def test_interrupted_runs_are_told(tmp_path):
    record = {
        "settings": {"model.image_size": 12, "model.downsample_size": 2},
        "earlier_sessions": [],
        "device": "a machine",
        "world_size": 1,
        "per_proc_batch_size": 4,
        "images_per_second": 2.0,
        "cache": {"slots": 9, "kv_bytes": 2**21, "bytes": 2**22, "images_per_batch": 4},
        # Batches of 4 and 2, and of 4 and 4: 4 times 36 steps in 7.2 s of work.
        "processes": [{"images": 6, "seconds": {"gpt": 3.2}}, {"images": 8, "seconds": {"gpt": 4.0}}],
    }
    broken = record | {"earlier_sessions": [{}], "cache": {}, "images_per_second": None, "processes": []}
    cost = Cost({"policy": "adsa", "budget": 9}, [broken, record])
    assert cost.cells() == ["9 (-75.0 %)", "9", "1.00", "2.00", "50.00"]
    assert "1 of 2 runs were interrupted" in told_times([cost])
    assert "interrupted" not in told_times([Cost(None, [record])])
    assert "2 or 8 process(es)" in told_times([Cost(None, [record | {"world_size": n} for n in (8, 2)])])


def test_numbers_as_people_read_them():
    assert spread([1.0, 2.0], 2) == "1.50 +- 0.71"
    assert spread([0.0015], 3, 1000) == "1.500"
    assert spread([], 2) == told(None, 2) == "-"
    assert told(Difference(0.5, -0.25, 1.25, 0.0004, 3), 2) == "+0.50 (-0.25 to +1.25), p < 0.001"
    assert told(Difference(-0.5, -1.0, 0.0, 0.05, 3), 1, 10) == "-5.0 (-10.0 to +0.0), p = 0.050"
