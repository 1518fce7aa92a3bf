"""Images to codes: layout, variants, class selection, interruptions and faults."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from autoregressive.models.checkpoint import load_model
from autoregressive.train.extract_codes_c2i import blank_tokens, main
from tokenizer.files import fingerprint
from tokenizer.tokenizer_image.images import center_crop, image_to_tensor, load_rgb
from tokenizer.tokenizer_image.vq_model import VQ_models

pytestmark = pytest.mark.usefixtures("tiny_models")


def flags_of(images, vq_ckpt, folder, *more):
    return [
        *("--data-path", str(images), "--code-path", str(folder), "--vq-model", "VQ-Tiny", "--vq-ckpt", str(vq_ckpt)),
        *("--image-size", "32", "--num-workers", "0", "--batch-size", "4", *more),
    ]


def read(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return np.load(folder / "codes.npy"), np.load(folder / "labels.npy"), meta


def run(images, vq_ckpt, folder, *more):
    main(flags_of(images, vq_ckpt, folder, *more))
    return read(folder)


@torch.no_grad()
def encode(vq_ckpt, image):
    model = load_model(VQ_models["VQ-Tiny"](), vq_ckpt).eval()
    return model.encode(image_to_tensor(image)[None])[2][2].numpy()


def test_codes_are_the_tokenizers(images, vq_ckpt, tmp_path):
    codes, labels, meta = run(images, vq_ckpt, tmp_path / "codes")
    assert codes.shape == (9, 2, 64) and codes.dtype == np.uint16
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert meta["classes"] == ["0_red_a", "1_green_b", "2_blue_a"]
    assert (meta["images"], meta["variants"], meta["tokens"], meta["codebook_size"]) == (9, 2, 64, 32)
    image = center_crop(load_rgb(images / "1_green_b" / "1.png"), 32)
    assert np.array_equal(codes[4, 0], encode(vq_ckpt, image))
    assert np.array_equal(codes[4, 1], encode(vq_ckpt, ImageOps.mirror(image)))


def test_variants_and_classes(images, vq_ckpt, tmp_path):
    codes, labels, meta = run(images, vq_ckpt, tmp_path / "a", "--jitter", "2", "--no-flip", "--classes", "*_a")
    assert codes.shape == (6, 3, 64)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert meta["classes"] == ["0_red_a", "2_blue_a"]
    assert not np.array_equal(codes[:, 0], codes[:, 1])
    ten, _, _ = run(images, vq_ckpt, tmp_path / "ten", "--ten-crop")
    assert ten.shape == (9, 10, 64)
    with pytest.raises(SystemExit, match="no images in the folders"):
        run(images, vq_ckpt, tmp_path / "none", "--classes", "*_c")


def test_blank_tokens_get_one_code(images, vq_ckpt, tmp_path):
    x = torch.ones(1, 3, 16, 24)
    x[0, 1, 5, 9] = 0.9  # in row 1, column 2 of the 4 x 6 tokens of 4 x 4 pixels
    blank = torch.ones(4, 6, dtype=torch.bool)
    blank[0:3, 1:4] = False
    assert torch.equal(blank_tokens(x, 4).view(4, 6), blank)

    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[:4, :4] = 0
    Image.fromarray(picture).save(images / "0_red_a" / "0.png")
    plain, _, _ = run(images, vq_ckpt, tmp_path / "plain")
    codes, _, meta = run(images, vq_ckpt, tmp_path / "blank", "--blank")
    white = encode(vq_ckpt, Image.new("RGB", (32, 32), (255, 255, 255)))
    assert meta["blank_code"] == np.bincount(white).argmax()
    inked = np.zeros((8, 8), bool)
    inked[:2, :2] = True
    assert np.array_equal(codes[0, 0], np.where(inked.ravel(), plain[0, 0], meta["blank_code"]))
    assert np.array_equal(codes[1:], plain[1:])


def test_a_corrupt_image_is_named_and_the_job_can_go_on(images, vq_ckpt, tmp_path):
    whole, _, _ = run(images, vq_ckpt, tmp_path / "whole")
    victim = images / "2_blue_a" / "1.png"
    good = victim.read_bytes()
    victim.write_bytes(good[:200])
    with pytest.raises(SystemExit, match=r"2_blue_a/1\.png.*--skip-unreadable"):
        run(images, vq_ckpt, tmp_path / "codes")
    assert not (tmp_path / "codes" / "meta.json").exists()

    skipped, labels, meta = run(images, vq_ckpt, tmp_path / "codes", "--skip-unreadable")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, -1, 2]
    assert meta["unreadable"] == ["2_blue_a/1.png"] and meta["images"] == 8
    assert np.array_equal(np.delete(skipped, 7, 0), np.delete(whole, 7, 0))

    victim.write_bytes(good)
    (tmp_path / "codes" / "meta.json").unlink()
    repaired, labels, _ = run(images, vq_ckpt, tmp_path / "codes")
    assert np.array_equal(repaired, whole) and labels[7] == 2


def test_two_processes_make_the_same_codes_as_one(images, vq_ckpt, tmp_path, two_processes):
    codes, labels, meta = run(images, vq_ckpt, tmp_path / "one", "--jitter", "1")
    two_processes(
        "autoregressive.train.extract_codes_c2i", flags_of(images, vq_ckpt, tmp_path / "two", "--jitter", "1")
    )
    found, found_labels, found_meta = read(tmp_path / "two")
    assert np.array_equal(found, codes) and np.array_equal(found_labels, labels) and found_meta == meta


@pytest.mark.parametrize("finished", [True, False])
def test_another_jobs_folder_is_refused(images, vq_ckpt, tmp_path, finished):
    folder = tmp_path / "codes"
    run(images, vq_ckpt, folder)
    assert json.loads((folder / "meta.json").read_text())["tokenizer"] == fingerprint(vq_ckpt)
    if not finished:
        (folder / "meta.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other_vq, other_images = tmp_path / "other.pt", tmp_path / "other"
    torch.save({"model": {**torch.load(vq_ckpt)["model"], "quant_conv.bias": torch.ones(8)}}, other_vq)
    shutil.copytree(images, other_images)
    (other_images / "0_red_a" / "0.png").rename(other_images / "0_red_a" / "5.png")
    cases = [
        (images, vq_ckpt, ("--no-flip", "--jitter", "1"), "--flip was True and is False; --jitter was 0 and is 1"),
        (images, vq_ckpt, ("--image-size", "16"), "job: --image-size was 32 and is 16. Give it the same"),
        (images, vq_ckpt, ("--skip-classes", "*_b"), "was 9 images of 3 classes, sha256 of their names"),
        (images, other_vq, (), "job: --vq-ckpt was"),
        (other_images, vq_ckpt, (), "job: --data-path was 9 images"),
    ]
    for data, ckpt, more, message in cases:
        with pytest.raises(SystemExit, match=re.escape(message)):
            run(data, ckpt, folder, *more)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    # The same images and tokenizer, found elsewhere.
    renamed = images.rename(tmp_path / "renamed")
    run(renamed, shutil.copy(vq_ckpt, tmp_path / "copy.pt"), folder, "--batch-size", "3", "--global-seed", "5")

    (folder / "job.json").unlink()
    with pytest.raises(SystemExit, match=r"codes but no job\.json"):
        run(renamed, vq_ckpt, folder)
    with pytest.raises(SystemExit, match="not a multiple"):
        run(renamed, vq_ckpt, tmp_path / "odd", "--image-size", "30")


def test_finished_folders_are_left_alone(images, vq_ckpt, tmp_path, capsys):
    run(images, vq_ckpt, tmp_path / "codes")
    for path in images.rglob("*.png"):
        Image.new("RGB", (32, 32)).save(path)
    before = np.load(tmp_path / "codes" / "codes.npy")
    after, _, _ = run(images, vq_ckpt, tmp_path / "codes")
    assert np.array_equal(before, after)
    assert "nothing to do" in capsys.readouterr().out
