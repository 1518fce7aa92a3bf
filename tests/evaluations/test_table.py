import json

import pytest

from evaluations.extractors import EvaluationError
from evaluations.table import main, write_result


@pytest.fixture
def runs(tmp_path):
    """A function that puts results into runs: name -> list of changes to an ordinary one."""

    def write(**changes):
        for name, results in changes.items():
            (tmp_path / name).mkdir()
            for changed in results:
                write_result(tmp_path / name, result(f"samples/{name}", **changed))
        return [str(tmp_path / name) for name in changes]

    return write


def result(samples, **changed):
    plain = {
        "samples": samples,
        "reference": "ref.npz",
        "reference_id": "r1",
        "extractor": "net",
        "image_size": None,
        "counts": {"samples": 5000, "reference": 100},
        "fid": 12.345,
        "sfid": None,
        "is": 3.25,
        "precision": 0.8126,
        "recall": None,
        "kid": 0.00123,
    }
    return plain | changed


def test_runs_in_one_table(runs, capsys):
    main(runs(dense=[{}], adsa=[{"fid": 13.0, "recall": 0.5}]))
    assert capsys.readouterr().out == (
        "Extractor net, reference ref.npz:\n\n"
        "| run | images | FID | IS | precision | recall | KID x 1000 |\n"
        "|---|---|---|---|---|---|---|\n"
        "| dense | 5000 | 12.35 | 3.25 | 0.813 | - | 1.230 |\n"
        "| adsa | 5000 | 13.00 | 3.25 | 0.813 | 0.500 | 1.230 |\n"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"extractor": "other"}, r"different extractors do not compare: net \(.*dense\), other \(.*adsa\)"),
        ({"reference_id": "r2", "reference": "b.npz"}, "different references do not compare: ref.npz .*b.npz"),
        ({"image_size": 256}, "different image sizes do not compare"),
    ],
)
def test_what_does_not_compare_is_refused(runs, capsys, changed, message):
    with pytest.raises(SystemExit, match=message):
        main(runs(dense=[{}], adsa=[changed]))
    assert capsys.readouterr().out == ""


def score(run, **changed):
    plain = {
        "run": run,
        "clip_model": "demo/clip",
        "clip_weights": "w1",
        "prefix": "",
        "image_size": 256,
        "prompts_sha256": "p1",
        "counts": {"images": 500, "prompts": 490},
        "clip_score": 0.3125,
        "clip_score_interval": [0.31, 0.315],
        "r_precision": None,
        "r_precision_interval": None,
    }
    return plain | changed


def test_clip_scores_in_a_table_of_their_own(runs, tmp_path, capsys):
    paths = runs(dense=[{}], adsa=[{}])
    for path in paths:
        write_result(tmp_path / path, score(path), "clip_score", ("clip_model",))
    main(paths)
    first, second = capsys.readouterr().out.split("\n\nCLIP ")
    assert first.startswith("Extractor net")
    assert second == (
        "demo/clip, prefix '', 95 % intervals over images:\n\n| run | images | CLIP score |\n|---|---|---|\n"
        "| dense | 500 | 0.3125 (0.3100 to 0.3150) |\n| adsa | 500 | 0.3125 (0.3100 to 0.3150) |\n"
    )
    (tmp_path / "text").mkdir()
    write_result(tmp_path / "text", score("text"), "clip_score", ("clip_model",))
    main([str(tmp_path / "text")])
    assert "Extractor" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"has no such result; it has none of fid\.py"):
        main([*paths, str(tmp_path / "text")])


def test_scores_that_do_not_compare_are_refused(tmp_path):
    for name, changed in (("one", {}), ("two", {"prompts_sha256": "p2"})):
        (tmp_path / name).mkdir()
        write_result(tmp_path / name, score(name, **changed), "clip_score", ("clip_model",))
    with pytest.raises(
        SystemExit, match=r"different prompts do not compare: p1 .*one.*p2 .*two.*sample the same prompts"
    ):
        main([str(tmp_path / "one"), str(tmp_path / "two")])
    with pytest.raises(SystemExit, match="has no such result; it has demo/clip"):
        main([str(tmp_path / "one"), "--clip-model", "ViT-B-32/openai"])


def test_one_of_several_results_is_chosen(runs, capsys):
    both = [{}, {"extractor": "other", "fid": 1.0}, {"reference_id": "r2", "reference": "b.npz", "fid": 2.0}]
    paths = runs(dense=both, adsa=both)
    with pytest.raises(SystemExit, match="choose one by --feature-extractor"):
        main(paths)
    with pytest.raises(SystemExit, match="choose one by --reference"):
        main([*paths, "--feature-extractor", "net"])
    main([*paths, "--feature-extractor", "other"])
    assert capsys.readouterr().out.count("| 1.00 |") == 2
    main([*paths, "--reference", "b.npz"])
    assert capsys.readouterr().out.count("| 2.00 |") == 2
    with pytest.raises(SystemExit, match=r"has no such result; it has net against ref.npz; other against"):
        main([*paths, "--feature-extractor", "third"])


def test_different_counts_are_told(runs, capsys):
    main(runs(dense=[{}], adsa=[{"counts": {"samples": 100, "reference": 100}}]))
    assert "different numbers of images" in capsys.readouterr().err


def test_run_without_metrics(tmp_path):
    with pytest.raises(SystemExit, match=r"metrics\.json: no such file; python evaluations/fid\.py .* makes it"):
        main([str(tmp_path)])


def test_other_content_stays_and_damage_is_told(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"clip_score": 0.3}))
    write_result(tmp_path, result("x"))
    write_result(tmp_path, result("x", fid=1.0))
    content = json.loads(path.read_text())
    assert content["clip_score"] == 0.3
    assert [kept["fid"] for kept in content["fid"]] == [1.0]
    path.write_text("{")
    with pytest.raises(EvaluationError, match=r"metrics\.json: not readable"):
        write_result(tmp_path, result("x"))
    assert path.read_text() == "{"
