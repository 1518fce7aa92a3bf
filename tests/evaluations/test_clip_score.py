import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from evaluations.clip import load_clip
from evaluations.clip_score import main
from evaluations.extractors import EvaluationError

PROMPTS = [f"a {color} {thing}" for color in ("red", "green", "blue") for thing in ("apple", "car", "cat", "house")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def text_run(run_folder, tmp_path):
    """A function that writes a complete run of prompts, an image of `size` pixels each."""

    def write(name, prompts=PROMPTS, size=40, **kwargs):
        run = run_folder(name, len(prompts), size=size, **kwargs)
        (run / "captions.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        return run

    return write


@pytest.fixture
def score(tiny_clip, capsys):
    """A function: a run and flags -> the JSON of clip_score.py, the scores of its file, and what it tells people."""

    def call(run, *flags):
        main([str(run), "--clip-model", f"local-dir:{tiny_clip}", "--cpu", "--num-workers", "0", *flags])
        out, err = capsys.readouterr()
        result = json.loads(out)
        lines = [json.loads(line) for line in (run / result["scores"]).read_text().split("\n")[:-1]]
        return result, lines, err

    return call


@torch.inference_mode()
def by_hand(folder, images, prompts, resolution, prefix=True):
    """Cosines as GigaGAN's evaluation has them: the preface's tokens go behind the start, what is too long is cut."""
    clip, tokenize = load_clip(f"local-dir:{folder}").model, open_clip.SimpleTokenizer(context_length=16)
    preprocess = open_clip.image_transform(32, is_train=False)
    cosines = []
    for image, prompt in zip(images, prompts, strict=True):
        scaled = Image.fromarray(image).resize((resolution, resolution), Image.Resampling.LANCZOS)
        tokens = tokenize([prompt])
        if prefix:
            tokens = torch.cat([tokens[:, :1], tokenize(["A photo depicts"])[:, 1:4], tokens[:, 1:]], 1)[:, :16]
            tokens[:, -1:][tokens[:, -1:] > 0] = tokenize.eot_token_id
        pair = clip.encode_image(preprocess(scaled)[None]), clip.encode_text(tokens)
        cosines.append(torch.nn.functional.cosine_similarity(*pair).item())
    return np.array(cosines)


def test_protocol(text_run, score, tiny_clip):
    long = "a very large red barn " * 5
    prompts = [long, *PROMPTS[1:]]
    run = text_run("run", prompts)
    with np.load(run / "samples.npz") as file:
        images = file["arr_0"]
    result, lines, told = score(run, "--image-size", "64")
    expected = by_hand(tiny_clip, images, prompts, 64)
    assert [line["clip_score"] for line in lines] == pytest.approx(expected, abs=2e-5)
    assert [line["text"] for line in lines] == prompts
    assert result["clip_score"] == pytest.approx(expected.mean(), abs=1e-5)
    assert result["counts"] == {"images": 12, "prompts": 12}
    assert result["clip_model"] == "clip0/tiny"
    assert f"{result['clip_score']:.4f}" in told

    default, _, _ = score(run)
    assert default["clip_score"] == pytest.approx(by_hand(tiny_clip, images, prompts, 256).mean(), abs=1e-5)
    plain, _, _ = score(run, "--prefix", "")
    assert plain["clip_score"] == pytest.approx(by_hand(tiny_clip, images, prompts, 256, False).mean(), abs=1e-5)
    assert len({result["clip_score"], default["clip_score"], plain["clip_score"]}) == 3


def test_r_precision_of_images_that_fit(text_run, score, tiny_clip, monkeypatch):
    """Where images have the embeddings of their prompts, but two of them each other's."""
    run = text_run("run")
    clip = load_clip(f"local-dir:{tiny_clip}")
    wanted = torch.from_numpy(clip.texts([f"A photo depicts {prompt}" for prompt in PROMPTS]))
    wanted[[3, 7]] = wanted[[7, 3]]
    monkeypatch.setattr(open_clip.CLIP, "encode_image", lambda self, x: 5 * wanted)
    result, lines, _ = score(run)
    assert [line["r_precision"] for line in lines] == [index not in (3, 7) for index in range(12)]
    assert result["r_precision"] == pytest.approx(10 / 12)
    low, high = result["r_precision_interval"]
    assert low == pytest.approx(7 / 12, abs=0.1) and high == 1  # of a binomial of 12
    assert lines[0]["clip_score"] == pytest.approx(1, abs=1e-5)


def test_interval(text_run, score):
    """For many scores it is that of a normal distribution."""
    run = text_run("run", PROMPTS * 10)
    result, lines, _ = score(run)
    scores = np.array([line["clip_score"] for line in lines])
    error = scores.std() / np.sqrt(len(scores))
    low, high = result["clip_score_interval"]
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.15 * error)
    assert result["counts"] == {"images": 120, "prompts": 12}
    assert score(run)[0] == result


def test_run_keeps_its_scores(text_run, score, tmp_path):
    run = text_run("run")
    (run / "metrics.json").write_text(json.dumps({"fid": [{"fid": 1.0}]}))
    score(run)
    result, _, _ = score(run, "--prefix", "an emoji of")
    kept = json.loads((run / "metrics.json").read_text())
    assert kept == {"fid": [{"fid": 1.0}], "clip_score": [result]}
    caches = [path.stat().st_mtime_ns for path in run.glob("samples.features-clip-*-256px.npz")]
    score(run)
    assert [path.stat().st_mtime_ns for path in run.glob("samples.features-clip-*.npz")] == caches != []


def test_folder_as_llamagen_leaves_it(text_run, score, tmp_path):
    """Images in the order of their numbers, padded or not; prompts of images that were not sampled."""
    run = text_run("run")
    with np.load(run / "samples.npz") as file:
        images = file["arr_0"]
    other = tmp_path / "llamagen"
    (other / "images").mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(other / "images" / f"{index}.png")
    (other / "captions.txt").write_text("".join(f"{prompt}\n" for prompt in [*PROMPTS, "one", "more"]))
    expected, lines, _ = score(run)
    found, their_lines, told = score(other)
    assert their_lines == lines
    assert found["clip_score_interval"] == expected["clip_score_interval"]
    assert found["prompts_sha256"] == expected["prompts_sha256"]
    assert "14 prompts, of which the first 12 have an image" in told


def test_one_prompt_has_no_r_precision(text_run, score):
    result, lines, told = score(text_run("run", ["a red apple"] * 4))
    assert result["r_precision"] is None
    assert lines[0]["r_precision"] is None
    assert result["clip_score_interval"][0] <= result["clip_score"] <= result["clip_score_interval"][1]
    assert "R-precision  -" in told


def test_empty_prompts_and_odd_letters_stay_in_their_lines(text_run, score):
    prompts = ["", "naïve café \u2028 menu", "", "a cat"]
    result, lines, _ = score(text_run("run", prompts))
    assert [line["text"] for line in lines] == prompts
    assert result["counts"] == {"images": 4, "prompts": 3}


def test_runs_that_cannot_be_scored(run_folder, text_run, score):
    with pytest.raises(EvaluationError, match=r"captions\.txt: no readable prompts.*sample_t2i_ddp\.py"):
        score(run_folder("classes"))
    run = text_run("short")
    (run / "captions.txt").write_text("one\ntwo\n")
    with pytest.raises(EvaluationError, match="12 images and 2 prompts"):
        score(run)
    with pytest.raises(EvaluationError, match="this run is not complete"):
        score(text_run("broken", status="sampling"))


def test_processes_share_the_work(text_run, score, tiny_clip):
    run = text_run("run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--clip-model", f"local-dir:{tiny_clip}", "--batch-size", "5", "--num-workers", "0", "--cpu"]
    done = subprocess.run(
        [*torchrun, ROOT / "evaluations" / "clip_score.py", run, *flags],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for cache in run.glob("samples.features-*"):
        cache.unlink()
    assert score(run, "--batch-size", "5")[0] == json.loads(done.stdout)
