"""Both trainers end to end on tiny data: they learn, and a run that was cut short ends as an unbroken one."""

import json
import math
import multiprocessing
import os
import pickle
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from autoregressive.models.checkpoint import load_model
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.train import export, extract_codes_c2i, plot_log, train_c2i, training
from autoregressive.train.gpt_training import noised
from tokenizer.tokenizer_image import reconstruction, vq_train
from tokenizer.tokenizer_image.vq_model import VQ_models

pytestmark = pytest.mark.usefixtures("tiny_models")
COMMON = ["--mixed-precision", "none", "--no-compile", "--num-workers", "0", "--global-batch-size", "4", "--ema"]


@pytest.fixture
def codes(images, vq_ckpt, tmp_path):
    folder = tmp_path / "codes"
    extract_codes_c2i.main(
        [
            *(
                "--data-path",
                str(images),
                "--code-path",
                str(folder),
                "--vq-model",
                "VQ-Tiny",
                "--vq-ckpt",
                str(vq_ckpt),
            ),
            *("--image-size", "16", "--num-workers", "0"),
        ]
    )
    return folder


def test_token_noise_takes_tokens_of_the_same_place_from_other_images():
    torch.manual_seed(0)
    codes = torch.arange(8)[:, None] * 1000 + torch.arange(400)
    inputs = noised(codes, 0.5)
    assert torch.equal(inputs % 1000, codes % 1000)
    changed = (inputs != codes).float().mean(1)
    assert changed.max() < 0.6 and changed.std() > 0.05  # another share in each image
    assert torch.equal(noised(codes, 0.0), codes)


def vq_flags(images, results, *more):
    return [
        *(
            "--data-path",
            str(images),
            "--val-path",
            str(images),
            "--vq-model",
            "VQ-Tiny",
            "--results-dir",
            str(results),
        ),
        *(
            "--image-size",
            "24",
            "--val-image-size",
            "32",
            "--perceptual-weight",
            "0",
            "--color-weight",
            "1",
            "--resize-range",
            "1",
            "2",
        ),
        *("--disc-start", "3", "--disc-dim", "4", "--disc-weight", "0.1", "--disc-adaptive-weight"),
        *("--codebook-restart-every", "2", "--entropy-loss-ratio", "0.1"),
        *("--lr", "1e-3", "--lr-schedule", "cosine", "--max-steps", "6", "--log-every", "1", "--eval-every", "3"),
        *("--ckpt-every", "2", *COMMON, *more),
    ]


def gpt_flags(codes, results, *more):
    return [
        *("--code-path", str(codes), "--val-code-path", str(codes), "--gpt-model", "GPT-Tiny"),
        *("--results-dir", str(results), "--lr", "1e-3", "--lr-schedule", "cosine", "--warmup-steps", "2"),
        *("--max-steps", "6", "--log-every", "1", "--eval-every", "3", "--ckpt-every", "2", "--sample-every", "4"),
        *("--gradient-accumulation-steps", "2", *COMMON, *more),
    ]


def log_of(results):
    """Log lines without what may differ: start-up lines and speeds."""
    lines = [json.loads(line) for line in (results / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines if "start" not in line]


def leaves(tree, path=""):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        yield path, tree
    for key, value in items:
        yield from leaves(value, f"{path}/{key}")


def assert_same_checkpoint(a, b):
    a, b = (dict(leaves(torch.load(path / "checkpoints" / "0000006.pt", weights_only=True))) for path in (a, b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if not key.startswith("/args"):
            same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
            assert same, key


def interrupted(module, flags, monkeypatch):
    """Crash right after the checkpoint of step 2, then SIGTERM in the middle of step 4, then run to the end."""
    save, seed = training.save_checkpoint, training.seed_step

    def crash(folder, steps, *rest):
        save(folder, steps, *rest)
        raise MemoryError("as good as kill -9")

    monkeypatch.setattr(training, "save_checkpoint", crash)
    with pytest.raises(MemoryError):
        module.main(flags)
    monkeypatch.setattr(training, "save_checkpoint", save)

    def terminate(base, step, rank):
        seed(base, step, rank)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "seed_step", terminate)
    module.main(flags)
    monkeypatch.setattr(training, "seed_step", seed)
    module.main(flags)


def test_vq_resume_is_exact(images, tmp_path, monkeypatch):
    monkeypatch.setattr(vq_train, "USAGE_WINDOW", 200)  # so that there are restarts at the steps 2 and 4
    vq_train.main(vq_flags(images, tmp_path / "whole"))
    interrupted(vq_train, vq_flags(images, tmp_path / "broken"), monkeypatch)
    assert (tmp_path / "broken" / "checkpoints" / "0000005.pt").exists()  # what SIGTERM left
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    assert_same_checkpoint(tmp_path / "broken", tmp_path / "whole")
    assert (tmp_path / "whole" / "samples" / "0000006.png").exists()
    log = log_of(tmp_path / "whole")
    assert "gen" not in log[2] and any("gen" in line and "disc" in line for line in log)  # GAN from step 3 on


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gpt_resume_is_exact(codes, vq_ckpt, tmp_path, monkeypatch, optimizer):
    more = ("--vq-ckpt", str(vq_ckpt), "--sample-classes", "0", "2", "--optimizer", optimizer)
    train_c2i.main(gpt_flags(codes, tmp_path / "whole", *more))
    interrupted(train_c2i, gpt_flags(codes, tmp_path / "broken", *more), monkeypatch)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    assert_same_checkpoint(tmp_path / "broken", tmp_path / "whole")
    for name in ("0000004.png", "0000006.png"):
        pictures = [(tmp_path / run / "samples" / name).read_bytes() for run in ("whole", "broken")]
        assert pictures[0] == pictures[1]


def test_signals_reach_workers_and_do_no_harm(codes, tmp_path, monkeypatch):
    """A terminal's Ctrl-C and torchrun's end are for all processes of a group, and may come at any time."""
    monkeypatch.setattr(training, "_ignore_signals", lambda worker: None)
    seed = training.seed_step

    def interrupt(base, step, rank):
        seed(base, step, rank)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "seed_step", interrupt)
    train_c2i.main(gpt_flags(codes, tmp_path / "run", "--num-workers", "2", "--max-steps", "50", "--eval-every", "0"))
    assert log_of(tmp_path / "run")[-1]["step"] == 9
    assert (tmp_path / "run" / "checkpoints" / "0000009.pt").exists()
    assert not multiprocessing.active_children()


def test_a_run_goes_on_with_the_same_settings_only(codes, images, tmp_path):
    train_c2i.main(gpt_flags(codes, tmp_path / "run", "--max-steps", "2"))
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(
        SystemExit, match=r"run holds a run with other settings: --lr was 0.001 and is 0.002; --ema was"
    ):
        train_c2i.main(gpt_flags(codes, tmp_path / "run", "--lr", "2e-3", "--no-ema"))
    meta = json.loads((codes / "meta.json").read_text())
    (codes / "meta.json").write_text(json.dumps(meta | {"classes": ["other", "names", "here"]}))
    with pytest.raises(SystemExit, match=r"settings: the codes was 9 x 2 x 16, sha256 .* and is 9 x 2 x 16, sha256 "):
        train_c2i.main(gpt_flags(codes, tmp_path / "run"))
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log

    # Elsewhere, longer, with other reports and another split of the work: all these may change.
    (codes / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    codes.rename(tmp_path / "moved")
    more = ("--max-steps", "4", "--log-every", "2", "--gradient-accumulation-steps", "1", "--sample-classes", "1")
    train_c2i.main(gpt_flags(tmp_path / "moved", tmp_path / "run", *more))
    assert [line["step"] for line in log_of(tmp_path / "run") if "loss" in line] == [1, 2, 4]

    vq_train.main(vq_flags(images, tmp_path / "vq", "--max-steps", "1"))
    (images / "0_red_a" / "0.png").unlink()
    with pytest.raises(SystemExit, match=r"settings: the images was 9, .* and is 8, "):
        vq_train.main(vq_flags(images, tmp_path / "vq"))


@pytest.mark.parametrize("clip", ["1", "0"])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(codes, tmp_path, monkeypatch, clip):
    rate = training.learning_rate
    monkeypatch.setattr(training, "learning_rate", lambda step, *rest: math.nan if step == 2 else rate(step, *rest))
    more = ("--ckpt-every", "1", "--keep-checkpoints", "1", "--max-grad-norm", clip)
    with pytest.raises(SystemExit, match=r"train_c2i: step 3 left weights that are not finite\. Older .*lower --lr"):
        train_c2i.main(gpt_flags(codes, tmp_path / "run", *more))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000002.pt"]

    more = ("--ckpt-every", "2", "--log-every", "10", "--eval-every", "0", "--max-grad-norm", clip)
    with pytest.raises(SystemExit, match=r"train_c2i: the loss or the norm of its gradient is not finite at step 4\."):
        train_c2i.main(gpt_flags(codes, tmp_path / "late", *more))
    assert [path.name for path in (tmp_path / "late" / "checkpoints").iterdir()] == ["0000002.pt"]


def test_tokenizer_learns_and_the_decoder_can_be_tuned_alone(images, tmp_path):
    flags = ["--max-steps", "40", "--disc-weight", "0", "--eval-every", "40", "--lr", "3e-3"]
    vq_train.main(vq_flags(images, tmp_path / "vq", *flags))
    log = [line for line in log_of(tmp_path / "vq") if "rec" in line]
    assert log[-1]["rec"] < 0.7 * log[0]["rec"]

    ckpt = tmp_path / "vq" / "checkpoints" / "0000040.pt"
    flags = ["--vq-ckpt", str(ckpt), "--freeze-encoder", "--disc-weight", "0", "--codebook-restart-every", "0"]
    vq_train.main(vq_flags(images, tmp_path / "tuned", *flags))
    before = VQ_models["VQ-Tiny"]()
    load_model(before, ckpt)
    tuned = torch.load(tmp_path / "tuned" / "checkpoints" / "0000006.pt", weights_only=True)
    for weights in (tuned["model"], tuned["ema"]):
        for name, tensor in before.state_dict().items():
            frozen = name.startswith(("encoder", "quant"))
            assert torch.equal(weights[name], tensor) == frozen, name

    reconstruction.main(
        [
            *("--data-path", str(images), "--vq-model", "VQ-Tiny", "--vq-ckpt", str(ckpt), "--image-size", "32"),
            *("--results-dir", str(tmp_path / "measured")),
        ]
    )
    metrics = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert metrics["psnr"] == pytest.approx(log_of(tmp_path / "vq")[-1]["val_psnr"], abs=1e-4)


def test_entries_are_restarted_when_their_use_is_known(images, tmp_path, monkeypatch):
    restarts = []
    monkeypatch.setattr(vq_train, "restart_codes", lambda *_: restarts.append(1))
    flags = ["--disc-weight", "0", "--max-steps", "15", "--eval-every", "0", "--codebook-restart-until", "11"]
    monkeypatch.setattr(vq_train, "USAGE_WINDOW", 5 * 4 * 6 * 6)  # the tokens of five steps
    vq_train.main(vq_flags(images, tmp_path / "vq", *flags))
    assert len(restarts) == 3  # at 6, 8 and 10
    with pytest.raises(SystemExit, match="--codebook-restart-every moves the codebook, which --freeze-encoder keeps"):
        vq_train.main(vq_flags(images, tmp_path / "frozen", "--freeze-encoder"))


def test_gpt_learns_and_a_larger_grid_starts_from_it(codes, images, vq_ckpt, tmp_path):
    train_c2i.main(gpt_flags(codes, tmp_path / "small", "--max-steps", "60", "--lr", "1e-2", "--eval-every", "30"))
    losses = [line["val_loss"] for line in log_of(tmp_path / "small") if "val_loss" in line]
    assert losses[-1] < losses[0] < np.log(32)

    large = tmp_path / "large_codes"
    extract_codes_c2i.main(
        [
            *(
                "--data-path",
                str(images),
                "--code-path",
                str(large),
                "--vq-model",
                "VQ-Tiny",
                "--vq-ckpt",
                str(vq_ckpt),
            ),
            *("--image-size", "32", "--num-workers", "0"),
        ]
    )
    ckpt = tmp_path / "small" / "checkpoints" / "0000060.pt"
    train_c2i.main(gpt_flags(large, tmp_path / "large", "--init-from", str(ckpt), "--eval-every", "1"))
    losses = [line["val_loss"] for line in log_of(tmp_path / "large") if "val_loss" in line]
    assert losses[0] < np.log(32) - 0.2  # what was learnt on the small grid is there at once


@pytest.fixture
def llamagen_codes(tmp_path):
    """Five images of four variants as LlamaGen's extraction writes them, and four more variants beside them."""
    rng = np.random.default_rng(0)
    for name in ("imagenet_ten_crop", "imagenet_ten_crop_105"):
        for kind, shape in (("codes", (1, 4, 16)), ("labels", (1,))):
            folder = tmp_path / name / f"imagenet64_{kind}"
            folder.mkdir(parents=True)
            for i in range(5):
                np.save(folder / f"{i}.npy", rng.integers(32, size=shape) if kind == "codes" else np.array([100 * i]))
    return tmp_path / "imagenet_ten_crop"


@pytest.mark.parametrize("trainer", [train_c2i, vq_train])
def test_compiled_steps_are_the_same(trainer, codes, images, tmp_path, monkeypatch):
    """Traced and differentiated ahead as with --compile, but not put into C++, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = []
    for name in ("no-compile", "compile"):
        if trainer is train_c2i:
            plain = ["--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0"]
            flags = gpt_flags(codes, tmp_path / name, *plain)
        else:
            flags = vq_flags(images, tmp_path / name, "--disc-start", "1", "--codebook-restart-every", "0")
        trainer.main([*flags, f"--{name}", "--max-steps", "3"])
        losses.append([line["loss"] for line in log_of(tmp_path / name) if "loss" in line])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_codes_of_llamagen(llamagen_codes, tmp_path):
    data = train_c2i.LlamaGenDataset(llamagen_codes, seed=0)
    assert (len(data), data.tokens, data.num_classes) == (5, 16, 1000)
    stored = np.concatenate(
        [np.load(folder / "imagenet64_codes" / "3.npy")[0] for folder in sorted(tmp_path.glob("imagenet*"))]
    )
    drawn = {tuple(codes.tolist()) for codes, label in (data[epoch, 3] for epoch in range(200)) if label == 300}
    assert drawn == {tuple(row) for row in stored}
    assert data.item(3)[0].tolist() == stored[0].tolist()

    flags = [*gpt_flags(llamagen_codes, tmp_path / "run"), "--max-steps", "2", "--eval-every", "0"]
    train_c2i.main(flags)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "0000002.pt", weights_only=True)
    assert checkpoint["config"]["num_classes"] == 1000 and checkpoint["config"]["vocab_size"] == 16384
    with pytest.raises(SystemExit, match=r"imagenet64_labels/\d\.npy: class \d00 needs --num-classes"):
        train_c2i.main([*flags, "--results-dir", str(tmp_path / "few"), "--num-classes", "100"])
    (llamagen_codes / "imagenet64_labels" / "4.npy").unlink()
    with pytest.raises(SystemExit, match=r"imagenet64_labels': 4, .*imagenet64_codes': 5"):
        train_c2i.main(flags)


def test_codes_are_mapped_and_never_sent(codes, tmp_path):
    """Workers that are spawned get a file's name, whether it was read before or not."""
    np.save(codes / "codes.npy", np.load(codes / "codes.npy").repeat(50, axis=1))
    data = train_c2i.ClassDataset(codes, 0)
    before = pickle.dumps(data)
    item = data[1, 4]
    after = pickle.dumps(data)
    for sent in (before, after):
        assert b"codes.npy" in sent and len(sent) < 3000
        again = pickle.loads(sent)[1, 4]
        assert torch.equal(again[0], item[0]) and again[1] == item[1]


def test_export(codes, tmp_path):
    train_c2i.main(gpt_flags(codes, tmp_path / "run", "--max-steps", "2"))
    out = tmp_path / "gpt.safetensors"
    export.main(["--run", str(tmp_path / "run"), "--out", str(out)])
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "GPT-Tiny" and metadata["steps"] == "2"
    model = Transformer(ModelArgs(**json.loads(metadata["args"])))
    ema = torch.load(tmp_path / "run" / "checkpoints" / "0000002.pt", weights_only=True)["ema"]
    for name, tensor in load_model(model, out).state_dict().items():
        assert torch.equal(tensor, ema[name].half().float()), name
    names = tmp_path / "classes.json"
    assert json.loads(names.read_text()) == {"classes": ["0_red_a", "1_green_b", "2_blue_a"]}
    export.main(["--run", str(tmp_path / "run"), "--out", str(out), "--class-pattern", r"\d_(.*)_."])
    assert json.loads(names.read_text()) == {"classes": ["red", "green", "blue"]}
    with pytest.raises(SystemExit, match=r"--class-pattern .* does not match the class 1_green_b"):
        export.main(["--run", str(tmp_path / "run"), "--out", str(out), "--class-pattern", "(.*)_a"])
    with pytest.raises(SystemExit, match="has no checkpoints"):
        export.main(["--run", str(tmp_path / "absent"), "--out", str(out)])


def test_plot_of_a_log(codes, tmp_path):
    train_c2i.main(gpt_flags(codes, tmp_path / "run", "--max-steps", "2"))
    plot_log.main([str(tmp_path / "run"), "--out", str(tmp_path / "curves.png")])
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 2 * picture.height  # two panels side by side
    with pytest.raises(SystemExit, match=r"absent/log\.jsonl"):
        plot_log.main([str(tmp_path / "absent"), "--out", str(tmp_path / "none.png")])


def test_two_processes_make_the_same_steps_as_one(codes, images, tmp_path, two_processes):
    def gpt_run(name):
        plain = ["--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0", "--max-steps", "3"]
        return gpt_flags(codes, tmp_path / name, *plain, "--sample-every", "100", "--eval-every", "1")

    train_c2i.main(gpt_run("one"))
    two_processes("autoregressive.train.train_c2i", gpt_run("two"))
    two_processes("tokenizer.tokenizer_image.vq_train", vq_flags(images, tmp_path / "vq", "--disc-start", "1"))
    one, two = (
        torch.load(tmp_path / run / "checkpoints" / "0000003.pt", weights_only=True)["model"] for run in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    losses = [[line["val_loss"] for line in log_of(tmp_path / run) if "val_loss" in line] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    starts = [json.loads((tmp_path / run / "log.jsonl").read_text().split("\n")[0]) for run in ("one", "two")]
    assert [start["processes"] for start in starts] == [1, 2]
    tokenizer = log_of(tmp_path / "vq")  # its batch statistics are each process's own, so no equality
    assert [line["step"] for line in tokenizer if "disc" in line] == [2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) for line in tokenizer if "loss" in line)


def test_what_cannot_start_says_why(codes, images, tmp_path):
    flags = gpt_flags(codes, tmp_path / "a")
    cases = [
        (train_c2i, gpt_flags(tmp_path / "absent", tmp_path / "a"), "has no codes.npy"),
        (train_c2i, [*flags, "--num-classes", "2"], "--num-classes > 2"),
        (train_c2i, [*flags, "--sample-classes", "0", "3"], "classes are 0 to 2"),
        (train_c2i, [*flags, "--init-from", str(tmp_path / "absent.pt")], "absent.pt"),
        (train_c2i, [*flags, "--global-batch-size", "3"], "--global-batch-size 3"),
        (vq_train, [*vq_flags(images, tmp_path / "b"), "--perceptual-weight", "1"], "--lpips-weights"),
        (vq_train, vq_flags(tmp_path / "absent", tmp_path / "b"), "no such folder"),
    ]
    for module, flags, message in cases:
        with pytest.raises(SystemExit, match=re.escape(message)):
            module.main(flags)
    (images / "0_red_a" / "0.png").write_text("no image")
    with pytest.raises(SystemExit, match=r"0_red_a/0\.png"):
        vq_train.main(vq_flags(images, tmp_path / "c", "--cache-images"))
