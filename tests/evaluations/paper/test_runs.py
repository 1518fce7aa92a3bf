import fnmatch
import json
import sys

import numpy as np
import pytest

from adsa.policies.adsa import Adsa
from autoregressive.sample.run_folder import RunError
from evaluations.extractors import EvaluationError
from evaluations.features import open_set
from evaluations.paper import reference, runs
from evaluations.paper.protocol import load_protocol
from evaluations.paper.runs import again, cache_flags, class_patterns, evaluated, reference_images, sampled, scored

ADSA = {"policy": "adsa", "budget": 9, "fold_condition": False}


@pytest.fixture
def tiny_protocol(protocol_file):
    return load_protocol(str(protocol_file()))


def test_a_run_is_made_once(tiny_protocol, launched):
    task = tiny_protocol.c2i
    run = sampled(task, ADSA, seed=1)
    assert launched == ["sample_c2i_ddp"]
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert (settings["cache.budget"], settings["cache.fold_condition"], settings["run.seed"]) == (9, False, 1)
    assert settings["run.num_fid_samples"] == 6
    assert sampled(task, ADSA, seed=1) == run
    assert launched == ["sample_c2i_ddp"]
    others = {run, sampled(task, None, seed=1), sampled(task, ADSA, seed=0), sampled(task, ADSA, seed=1, images=5)}
    assert len(others) == 4
    assert len(launched) == 4
    (run / "samples.npz").unlink()
    sampled(task, ADSA, seed=1)
    assert (run / "samples.npz").exists()


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_images_of_runs_can_be_had_again(kind, tiny_protocol, launched):
    task, caches = getattr(tiny_protocol, kind), [None, ADSA]
    found = again(task, caches, 1, task.images, [2, 0])
    assert launched == []
    for cache, images in zip(caches, found, strict=True):
        made, _, _ = open_set(sampled(task, cache, seed=1), "")
        assert (images == np.stack([made.read(2), made.read(0)])).all()
    assert (found[0] != found[1]).any()


def test_a_run_of_other_models_is_no_such_run(tiny_protocol, tiny, launched, tmp_path):
    """It is left alone, and the error says so."""
    run = sampled(tiny_protocol.c2i)
    record = json.loads((run / "run.json").read_text())
    record["settings"]["model.gpt_ckpt"]["sha256_of_blocks"] = "other"
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="holds a run with other settings"):
        sampled(tiny_protocol.c2i)


def test_a_run_of_a_policy_as_it_was_is_no_such_run(tiny_protocol, launched, monkeypatch):
    sampled(tiny_protocol.c2i, ADSA)
    monkeypatch.setattr(Adsa, "revision", 2)
    with pytest.raises(RunError, match=r"cache\.revision is None there and 2 here"):
        sampled(tiny_protocol.c2i, ADSA)
    sampled(tiny_protocol.c2i, {"policy": "window", "budget": 9})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c2i": {"reference": "gone"}}, "gone: no such file or folder"),
        ({"c2i": {"reference": "gone.features-x.npz", "reference_images": "pictures"}}, "reference.py --model NAME"),
        ({"c2i": {"feature_extractor": "stand-out"}}, "'stand-out': no such one"),
        ({"t2i": {"clip_model": "local-dir:gone"}}, "gone"),
    ],
)
def test_what_judges_images_is_looked_for_first(changes, message, protocol_file, launched):
    """Sampling takes hours."""
    ((section, _),) = changes.items()
    task = getattr(load_protocol(str(protocol_file(**changes))), section)
    with pytest.raises(EvaluationError, match=message):
        sampled(task, judged=True)
    assert not launched
    sampled(task)  # to be looked at only
    assert launched
    assert sampled(task, judged=True).exists()  # what is there needs no judge yet


def test_names_of_classes_are_no_patterns(tiny_protocol, monkeypatch):
    monkeypatch.setattr(runs, "class_names", lambda task: ["a [new] *"])
    (pattern,) = class_patterns(tiny_protocol.c2i)
    assert fnmatch.fnmatch("00_a [new] *_set", pattern)
    assert not fnmatch.fnmatch("00_a n b_set", pattern)


def test_an_evaluation_is_made_once(tiny_protocol, launched):
    task = tiny_protocol.c2i
    run = sampled(task)
    found = evaluated(run, task)
    assert launched[1:] == ["fid"]
    assert found["counts"] == {"samples": 6, "reference": 6}  # two classes of three; the black picture is of none
    assert evaluated(run, task) == found
    assert launched[1:] == ["fid"]
    (next(task.reference.iterdir()) / "0.png").unlink()
    assert evaluated(run, task)["counts"]["reference"] == 5


def test_a_folder_of_images_is_evaluated_once(tiny_protocol, launched):
    task = tiny_protocol.c2i
    folder = task.reference / "99_else_set"
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    found = evaluated(folder, task)
    assert evaluated(folder, task) == found
    assert launched == ["fid"]


def test_a_score_is_made_once(tiny_protocol, launched, tiny_clip):
    task = tiny_protocol.t2i
    run = sampled(task)
    found = scored(run, task)
    assert launched == ["sample_t2i_ddp", "clip_score"]
    assert found["counts"] == {"images": 3, "prompts": 3}
    assert scored(run, task) == found
    assert len(launched) == 2
    (run / found["scores"]).unlink()
    scored(run, task)
    assert (run / found["scores"]).exists()


def test_reference_as_features(protocol_file, launched, tmp_path, capsys):
    images = {"reference_images": "pictures", "reference": "kept.features-stand-in.npz"}
    path = protocol_file(c2i=images)
    reference.main(["--model", str(path)])
    assert "6 images" in capsys.readouterr().out
    with_features, with_images = (load_protocol(str(p)).c2i for p in (path, protocol_file()))
    run = sampled(with_images)
    a, b = evaluated(run, with_features), evaluated(run, with_images)
    assert a["kid"] == b["kid"]
    assert launched == ["sample_c2i_ddp", "fid"]  # one identity, one evaluation
    with pytest.raises(EvaluationError, match=r"a file of features is called \*.features-stand-in.npz"):
        reference.main(["--model", str(protocol_file(c2i=images | {"reference": "kept.npz"}))])


def test_images_of_the_reference(tiny_protocol, protocol_file):
    assert class_patterns(tiny_protocol.c2i)[:2] == ["*_thing a_set", "*_thing b_set"]
    assert len(reference_images(tiny_protocol.c2i)) == 6
    task = load_protocol(str(protocol_file(c2i={"reference_images": "nowhere"}))).c2i
    with pytest.raises(EvaluationError, match="nowhere: no folder of the reference's images"):
        reference_images(task)


def test_flags_of_caches():
    assert cache_flags(None) == ["--cache-policy", "full"]
    assert cache_flags(ADSA) == ["--cache-policy", "adsa", "--cache-budget", "9", "--no-cache-fold-condition"]


def test_launch(tmp_path, monkeypatch, capfd):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('told', *sys.argv[1:]); sys.stderr.write('seen'); sys.exit('b' in sys.argv)")
    assert runs.launch(script, ["a"]) == "told a\n"
    assert "seen" in capfd.readouterr().err
    with pytest.raises(EvaluationError, match=r"this has failed, see its message above: .*script.py b"):
        runs.launch(script, ["b"])
    commands = []
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(
        runs.subprocess,
        "run",
        lambda command, **_: commands.append(command) or runs.subprocess.CompletedProcess(command, 0, ""),
    )
    runs.launch(script, ["a"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert commands == [[sys.executable, *torchrun, str(script), "a"]]
