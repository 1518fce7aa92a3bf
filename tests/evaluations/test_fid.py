import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch_fidelity
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from autoregressive.sample.entry import guarded
from evaluations.extractors import EXTRACTORS, INCEPTION, EvaluationError
from evaluations.fid import main
from tests.evaluations import stand_in as stand_in_script
from tests.evaluations.stand_in import NAME, ForTorchFidelity, StandIn

KEYS = ("fid", "sfid", "is", "is_std", "precision", "recall", "kid", "kid_std")


@pytest.fixture
def fid(stand_in, capsys):
    """A function: arguments of fid.py -> its JSON, and what it prints for people."""

    def call(*arguments, extractor=NAME):
        main([*map(str, arguments), "--feature-extractor", extractor, "--cpu", "--num-workers", "0"])
        out, err = capsys.readouterr()
        return json.loads(out), err

    return call


def test_folder_against_itself(folder, fid):
    path, _ = folder("a", 40)
    found, told = fid(path, path)
    assert abs(found["fid"]) < 1e-6
    assert abs(found["sfid"]) < 1e-6
    assert (found["precision"], found["recall"]) == (1, 1)
    assert found["counts"] == {"samples": 40, "reference": 40}
    assert found["extractor"] == NAME
    assert "FID               0.000" in told.replace("-0.000", "0.000")
    assert "biased upwards" in told


def test_equals_torch_fidelity(folder, fid, monkeypatch):
    (a, _), (b, _) = folder("a", 30), folder("b", 40, shift=15)
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, NAME, ForTorchFidelity)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(a),
        input2=str(b),
        feature_extractor=NAME,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=15,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours, _ = fid(a, b)
    names = {
        "fid": torch_fidelity.KEY_METRIC_FID,
        "is": torch_fidelity.KEY_METRIC_ISC_MEAN,
        "is_std": torch_fidelity.KEY_METRIC_ISC_STD,
        "kid": torch_fidelity.KEY_METRIC_KID_MEAN,
        "kid_std": torch_fidelity.KEY_METRIC_KID_STD,
        "precision": torch_fidelity.KEY_METRIC_PRECISION,
        "recall": torch_fidelity.KEY_METRIC_RECALL,
    }
    for key, name in names.items():
        assert ours[key] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), key
    assert ours["fid"] > 0
    assert ours["is"] > 1.2


def test_batches_do_not_matter(folder, fid):
    (a, _), (b, _) = folder("a"), folder("b", 30)
    first, _ = fid(a, b, "--batch-size", 64)
    for cache in [*a.glob("features*"), *b.glob("features*")]:
        cache.unlink()
    second, _ = fid(a, b, "--batch-size", 7)
    assert [second[key] for key in KEYS] == pytest.approx([first[key] for key in KEYS], rel=1e-5)


def test_run_keeps_its_metrics(folder, run_folder, fid, monkeypatch):
    run, (a, _), (b, _) = run_folder("run"), folder("a", 30), folder("b", 30)
    monkeypatch.setitem(EXTRACTORS, "other", StandIn)
    first, _ = fid(run, a)
    fid(run, a, extractor="other")
    fid(run, b)
    again, _ = fid(run, a, "--fid-infinity")
    kept = json.loads((run / "metrics.json").read_text())["fid"]
    assert [(result["extractor"], result["reference"]) for result in kept] == [
        ("other", str(a)),
        (NAME, str(b)),
        (NAME, str(a)),
    ]
    assert kept[-1] == again
    assert "fid_infinity" in again
    assert {key: again[key] for key in KEYS} == {key: first[key] for key in KEYS}


def test_images_alone_get_no_metrics_file(folder, fid):
    path, _ = folder("a")
    fid(path, path)
    assert not (path / "metrics.json").exists()


def test_features_as_reference(folder, fid):
    (a, _), (b, _) = folder("a"), folder("b", 30, shift=10)
    first, _ = fid(a, b)
    second, _ = fid(a, b / f"features-{NAME}.npz")
    assert {key: second[key] for key in (*KEYS, "reference_id")} == {key: first[key] for key in (*KEYS, "reference_id")}


def test_adm_reference(folder, fid, monkeypatch, tmp_path):
    """FID and sFID against its mu and sigma, the rest against its images."""
    monkeypatch.setitem(EXTRACTORS, INCEPTION, StandIn)
    (a, _), (b, images) = folder("a", 30), folder("b", 40, shift=10)
    plain, _ = fid(a, b, extractor=INCEPTION)
    with np.load(b / f"features-{INCEPTION}.npz") as file:
        mu, sigma = file["features"].mean(0), np.cov(file["features"], rowvar=False)
        mu_s, sigma_s = file["spatial"].mean(0), np.cov(file["spatial"], rowvar=False)
    np.savez(tmp_path / "adm.npz", arr_0=images[:20], mu=mu + 1, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found, told = fid(a, tmp_path / "adm.npz", extractor=INCEPTION)
    assert found["counts"] == {"samples": 30, "reference": 20}
    shift = (mu + 1 - plain_mu(a)) ** 2 - (mu - plain_mu(a)) ** 2
    assert found["fid"] == pytest.approx(plain["fid"] + shift.sum(), rel=1e-4)
    assert found["sfid"] == pytest.approx(plain["sfid"], rel=1e-4)
    assert found["recall"] != plain["recall"]
    np.savez(tmp_path / "only.npz", mu=mu + 1, sigma=sigma)
    alone, told = fid(a, tmp_path / "only.npz", extractor=INCEPTION)
    assert alone["fid"] == pytest.approx(found["fid"])
    assert [alone[key] for key in ("sfid", "precision", "recall", "kid")] == [None] * 4
    assert "sFID              -" in told
    with pytest.raises(EvaluationError, match="holds statistics but no images to judge"):
        fid(tmp_path / "only.npz", a, extractor=INCEPTION)


def plain_mu(path):
    with np.load(path / f"features-{INCEPTION}.npz") as file:
        return file["features"].mean(0)


def test_sizes_that_differ_are_told(folder, fid):
    (a, _), (b, _) = folder("a", size=8), folder("b", size=12)
    found, told = fid(a, b)
    assert "in pixels the samples are 8 x 8 and the reference 12 x 12" in told
    found, told = fid(a, b, "--image-size", 8)
    assert "in pixels" not in told
    assert found["image_size"] == 8


def test_classes_are_of_folders_only(folder, run_folder, fid):
    path, _ = folder("set/x_a")
    folder("set/x_b")
    found, _ = fid(path, path.parent, "--reference-classes", "*_b", "*_c")
    assert found["counts"]["reference"] == 20
    assert found["reference"] == f"{path.parent} *_b *_c"
    with pytest.raises(EvaluationError, match="in a folder of images only"):
        fid(path, run_folder("run"), "--reference-classes", "*_b")


def test_too_small_batches_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["a", "b", "--batch-size", "0"])
    assert "0 is not a positive number" in capsys.readouterr().err


def test_processes_share_the_work(folder, fid):
    """Two processes give what one gives; the second set has fewer batches than there are processes."""
    (a, _), (b, _) = folder("a", 21), folder("b", 5, shift=10)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, stand_in_script.__file__, a, b, "--batch-size", "6", "--feature-extractor", NAME, "--cpu"],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    shared = json.loads(result.stdout)
    with np.load(a / f"features-{NAME}.npz") as file:
        features = file["features"]
    Path(a / f"features-{NAME}.npz").unlink()
    Path(b / f"features-{NAME}.npz").unlink()
    alone, _ = fid(a, b, "--batch-size", "6")
    assert shared == alone
    with np.load(a / f"features-{NAME}.npz") as file:
        assert np.array_equal(file["features"], features)


def test_error_on_the_command_line(stand_in, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: main([str(tmp_path / "none"), str(tmp_path), "--feature-extractor", stand_in, "--cpu"]))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'none'}: no such file or folder")
