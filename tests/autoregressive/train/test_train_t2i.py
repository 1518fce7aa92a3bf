"""From captions to a trained text model, on tiny data: codes and features by file, then what train_c2i's tests ask."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

from autoregressive.models.checkpoint import CheckpointError, load_model
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.train import export, extract_codes_c2i, extract_text_features, text_features, train_c2i, train_t2i
from tests.autoregressive.train.conftest import TINY_GPT
from tests.autoregressive.train.test_trainers import COMMON, assert_same_checkpoint, interrupted, log_of

pytestmark = pytest.mark.usefixtures("tiny_models")
COLORS = ("red", "green", "blue")


class FakeEncoder:
    """One random vector a word, and one for the end, as a text encoder gives them."""

    dim = 8

    def __init__(self, name, path, *, max_length, dtype, device):
        self.name, self.max_length, self.texts = name, max_length, []

    def fingerprint(self):
        return {"name": self.name, "max_length": self.max_length}

    def prepare(self, prompts):
        return [prompt.lower() for prompt in prompts]

    def rows(self, text):
        self.texts.append(text)
        words = [*text.split(), "."][-self.max_length :]
        vectors = [np.random.default_rng(list(word.encode())).standard_normal(self.dim) for word in words]
        return torch.tensor(np.array(vectors), dtype=torch.float32)


@pytest.fixture
def encoders(monkeypatch):
    """Every encoder that was made; they are fakes."""
    made = []

    def load(*args, **kwargs):
        made.append(FakeEncoder(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(extract_text_features, "load_text_encoder", load)
    return made


@pytest.fixture
def captions(images):
    """captions.jsonl for the nine images of three colours, two captions each, one of them shared."""
    path = images / "captions.jsonl"
    rows = []
    for folder, color in zip(("0_red_a", "1_green_b", "2_blue_a"), COLORS, strict=True):
        for i in range(3):
            texts = [f"{color} noise", f"picture {i} of {color} noise"]
            rows.append(json.dumps({"image": f"{folder}/{i}.png", "captions": texts}))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def text(captions, encoders, tmp_path):
    folder = tmp_path / "text"
    extract_text_features.main(["--captions", str(captions), "--text-path", str(folder), "--max-length", "6"])
    return folder


def extract_codes(data, vq_ckpt, folder, *more):
    flags = ["--data-path", str(data), "--code-path", str(folder), "--vq-model", "VQ-Tiny", "--vq-ckpt", str(vq_ckpt)]
    extract_codes_c2i.main([*flags, "--image-size", "16", "--num-workers", "0", "--no-flip", *more])
    return folder


@pytest.fixture
def codes(captions, vq_ckpt, tmp_path):
    return extract_codes(captions, vq_ckpt, tmp_path / "codes")


def t2i_flags(codes, text, results, *more):
    return [
        *("--code-path", str(codes), "--val-code-path", str(codes), "--text-path", str(text)),
        *("--val-text-path", str(text), "--gpt-model", "GPT-Tiny", "--results-dir", str(results), "--lr", "1e-3"),
        *("--max-steps", "6", "--log-every", "1", "--eval-every", "3", "--ckpt-every", "2", "--sample-every", "4"),
        *("--gradient-accumulation-steps", "2", *COMMON, *more),
    ]


def test_codes_of_a_captions_file_are_those_of_the_folder(images, captions, codes, vq_ckpt, tmp_path):
    lines = captions.read_text().splitlines(keepends=True)
    (images / "some.jsonl").write_text("".join(lines[::-2]))
    some = extract_codes(images / "some.jsonl", vq_ckpt, tmp_path / "some", "--skip-classes", "*_b")
    by_folder = extract_codes(images, vq_ckpt, tmp_path / "by_folder")
    names = json.loads((some / "images.json").read_text())
    assert names == ["2_blue_a/2.png", "2_blue_a/0.png", "0_red_a/2.png", "0_red_a/0.png"]
    assert json.loads((some / "meta.json").read_text())["classes"] == ["0_red_a", "2_blue_a"]
    everything = json.loads((by_folder / "images.json").read_text())
    order = [everything.index(name) for name in names]
    assert np.array_equal(np.load(some / "codes.npy"), np.load(by_folder / "codes.npy")[order])


def test_features_come_back_as_the_encoder_gave_them(text, encoders, tmp_path):
    features = text_features.TextFeatures(text)
    assert features.meta["caption_dim"] == 8 and features.meta["text_encoder"]["name"] == "minilm"
    assert sorted(encoders[0].texts) == sorted(set(encoders[0].texts))  # one that several images share is encoded once
    assert len(features.captions) == 9
    for texts in features.captions.values():
        for caption in texts:
            rows = encoders[0].rows(caption)
            assert torch.equal(torch.from_numpy(features[caption].copy()), rows.half())
            padded, valid = features.padded(caption, 9)
            assert valid.tolist() == [False] * (9 - len(rows)) + [True] * len(rows)
            assert not padded[~valid].any() and torch.equal(padded[valid], rows.half().float())


def test_an_interrupted_extraction_goes_on(captions, codes, text, encoders, tmp_path, monkeypatch):
    whole = text_features.TextFeatures(text)
    expected = {caption: whole[caption] for caption in whole.index}
    monkeypatch.setattr(text_features, "SHARD", 4)
    monkeypatch.setattr(extract_text_features, "SHARD", 4)
    flags = ["--captions", str(captions), "--text-path", str(tmp_path / "broken"), "--max-length", "6"]
    rows = FakeEncoder.rows

    def fail_at_the_sixth(self, caption):
        if len(self.texts) == 5:
            raise MemoryError
        return rows(self, caption)

    monkeypatch.setattr(FakeEncoder, "rows", fail_at_the_sixth)
    with pytest.raises(MemoryError):
        extract_text_features.main(flags)
    with pytest.raises(SystemExit, match=r"has no meta\.json"):
        train_t2i.main(t2i_flags(codes, tmp_path / "broken", tmp_path / "run"))
    monkeypatch.setattr(FakeEncoder, "rows", rows)
    captions.write_text("".join(reversed(captions.read_text().splitlines(keepends=True))))  # does no harm
    extract_text_features.main(flags)
    assert len(encoders[-1].texts) == 8  # of 12: the first four were there
    broken = text_features.TextFeatures(tmp_path / "broken")
    assert len(broken.shards) == 3
    for caption, rows in expected.items():
        assert np.array_equal(broken[caption], rows)
    with pytest.raises(SystemExit, match=r"another job: max_length was 6 and is 5\. Give it the same"):
        extract_text_features.main([*flags, "--max-length", "5"])
    captions.write_text(captions.read_text().replace("red", "rosy"))
    with pytest.raises(SystemExit, match=r"another job: the captions are others\."):
        extract_text_features.main(flags)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png"', "line 2: expected"),
        ('{"image": "a.png"}', "line 2: expected"),
        ('{"image": "a.png", "captions": "a cat"}', "line 2: captions of a.png must be a list"),
        ('{"image": "a.png", "captions": []}', "line 2: captions of a.png must be a list"),
        ('{"image": "./b.png", "captions": ["a cat"]}', "line 2: b.png is there twice"),
        ('{"image": "/b.png", "captions": ["a cat"]}', "line 2: /b.png must be relative"),
    ],
)
def test_what_is_no_captions_file(tmp_path, line, message):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image": "b.png", "captions": ["a cat"]}\n' + line + "\n")
    with pytest.raises(SystemExit, match=re.escape(message)):
        extract_text_features.main(["--captions", str(path), "--text-path", str(tmp_path / "text")])


def test_lines_of_a_captions_file(tmp_path):
    """Their ends are a newline's alone: captions may hold others."""
    path = tmp_path / "captions.jsonl"
    path.write_bytes('\ufeff{"image": "./a.png", "captions": ["a\u2028cat\x85"]}\r\n\n'.encode())
    assert text_features.read_captions(path) == {"a.png": ["a\u2028cat\x85"]}


def test_mask():
    mask = train_t2i.attention_mask(torch.tensor([[False, False, True], [True, True, True]]), 2)
    expected = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask[0, 0].int().tolist() == expected
    assert torch.equal(mask[1, 0], torch.ones(5, 5).tril().bool())


def test_padding_does_not_count(codes, text):
    """A caption has one loss, however much padding is before it, and whatever is in the batch beside it."""
    losses = []
    for length, batch in ((6, [0, 4]), (6, [4]), (11, [4])):
        data = train_t2i.CaptionDataset(codes, text, 0, length)
        torch.manual_seed(0)
        model = Transformer(
            ModelArgs(**TINY_GPT, model_type="t2i", caption_dim=8, cls_token_num=length, block_size=16, vocab_size=32)
        ).eval()
        weights = {name: torch.randn(p.shape, generator=torch.manual_seed(1)) for name, p in model.named_parameters()}
        model.load_state_dict(weights, strict=False)
        items = [data.item(i, rng=np.random.default_rng(1)) for i in batch]
        tokens, features, valid = (torch.stack(part) for part in zip(*items, strict=True))
        assert not valid.all()
        with torch.no_grad():
            logits, _ = model(idx=tokens[:, :-1], **data.inputs(features, valid))
        losses.append(torch.nn.functional.cross_entropy(logits[-1], tokens[-1]).item())
    assert losses[1:] == pytest.approx(losses[:-1], abs=1e-4)


def test_resume_is_exact(codes, text, vq_ckpt, tmp_path, monkeypatch):
    more = ("--vq-ckpt", str(vq_ckpt), "--sample-images", "1", "--optimizer", "muon")
    train_t2i.main(t2i_flags(codes, text, tmp_path / "whole", *more))
    interrupted(train_t2i, t2i_flags(codes, text, tmp_path / "broken", *more), monkeypatch)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    assert_same_checkpoint(tmp_path / "broken", tmp_path / "whole")
    for name in ("0000004.png", "0000006.png"):
        pictures = [(tmp_path / run / "samples" / name).read_bytes() for run in ("whole", "broken")]
        assert pictures[0] == pictures[1]


def test_each_epoch_draws_one_of_the_captions(codes, text):
    data = train_t2i.CaptionDataset(codes, text, 0)
    drawn = {data.caption(4, np.random.default_rng(i)) for i in range(20)}
    assert drawn == {"green noise", "picture 1 of green noise"} and data.caption(4) == "green noise"
    lengths = {int(data[epoch, 4][2].sum()) for epoch in range(20)}
    assert lengths == {3, 6}  # words of both, and the end
    assert all(torch.equal(a, b) for a, b in zip(data[3, 4], data[3, 4], strict=True))


def test_it_learns_what_the_words_mean(codes, text, tmp_path):
    flags = ["--max-steps", "60", "--lr", "1e-2", "--eval-every", "20", "--no-ema"]
    train_t2i.main(t2i_flags(codes, text, tmp_path / "run", *flags))
    losses = [line["val_loss"] for line in log_of(tmp_path / "run") if "val_loss" in line]
    assert losses[-1] < losses[0] < np.log(32)

    out = tmp_path / "gpt.safetensors"
    export.main(["--run", str(tmp_path / "run"), "--out", str(out), "--dtype", "fp32"])
    with safe_open(out, "pt") as file:
        config = ModelArgs(**json.loads(file.metadata()["args"]))
    assert (config.model_type, config.caption_dim, config.cls_token_num) == ("t2i", 8, 6)
    model = load_model(Transformer(config), out).eval()
    data = train_t2i.CaptionDataset(codes, text, 0)
    losses = {}
    for shift in range(3):  # captions of the right colour, and of both others
        items = [data.item(i) for i in range(9)]
        tokens, *condition = (torch.stack(part) for part in zip(*items, strict=True))
        condition = [part.roll(3 * shift, 0) for part in condition]
        with torch.no_grad():
            losses[shift] = model(idx=tokens[:, :-1], targets=tokens, **data.inputs(*condition))[1].item()
    assert losses[0] < min(losses[1], losses[2])


def test_a_class_model_gives_all_but_its_classes(images, codes, text, vq_ckpt, tmp_path):
    flags = [*("--code-path", str(codes), "--gpt-model", "GPT-Tiny", "--max-steps", "2", "--sample-every", "100")]
    train_c2i.main([*flags, "--results-dir", str(tmp_path / "c2i"), *COMMON])
    ckpt = tmp_path / "c2i" / "checkpoints" / "0000002.pt"
    taken = torch.load(ckpt, weights_only=True)["ema"]

    def fresh_model(**other):
        torch.manual_seed(7)
        sizes = TINY_GPT | {"model_type": "t2i", "caption_dim": 8, "cls_token_num": 6, "vocab_size": 32} | other
        return Transformer(ModelArgs(**sizes))

    model, before = fresh_model(), fresh_model().state_dict()
    own = {f"cls_embedding.{name}" for name in ("uncond_embedding", "cap_proj.fc1.weight", "cap_proj.fc2.weight")}
    assert set(train_t2i.load_shared(model, ckpt)) == own
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in own else taken[name]), name
    assert set(train_t2i.load_shared(fresh_model(class_dropout_prob=0), ckpt)) == own
    with pytest.raises(CheckpointError, match="doesn't fit"):
        train_t2i.load_shared(fresh_model(n_layer=3), ckpt)

    train_t2i.main(t2i_flags(codes, text, tmp_path / "t2i", "--init-from", str(ckpt), "--max-steps", "2"))
    start = json.loads((tmp_path / "t2i" / "log.jsonl").read_text().splitlines()[0])
    assert start["tensors_taken"] == len(taken) - 1 and set(start["tensors_fresh"]) == own

    torch.save({"model": model.state_dict()}, tmp_path / "t2i.pt")
    other = fresh_model(dim=32)
    assert train_t2i.load_shared(other, tmp_path / "t2i.pt") == []
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_two_processes_make_the_same_steps_as_one(codes, text, tmp_path, two_processes):
    def flags(name):
        plain = ["--dropout-p", "0", "--token-dropout-p", "0", "--class-dropout-prob", "0", "--max-steps", "3"]
        return t2i_flags(codes, text, tmp_path / name, *plain, "--eval-every", "1")

    train_t2i.main(flags("one"))
    two_processes("autoregressive.train.train_t2i", flags("two"))
    one, two = (
        torch.load(tmp_path / run / "checkpoints" / "0000003.pt", weights_only=True)["model"] for run in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    losses = [[line["val_loss"] for line in log_of(tmp_path / run) if "val_loss" in line] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_what_cannot_start_says_why(images, captions, codes, text, vq_ckpt, tmp_path, capsys):
    flags = t2i_flags(codes, text, tmp_path / "run")
    (images / "some.jsonl").write_text("".join(captions.read_text().splitlines(keepends=True)[:4]))
    extract_text_features.main(["--captions", str(images / "some.jsonl"), "--text-path", str(tmp_path / "some")])
    with pytest.raises(SystemExit, match=r"extract_text_features: .*captions\.jsonl"):
        extract_text_features.main(["--captions", str(captions), "--text-path", str(captions / "inside")])
    shorter = tmp_path / "shorter"
    extract_text_features.main(["--captions", str(captions), "--text-path", str(shorter), "--max-length", "5"])
    cases = [
        ([*flags, "--val-text-path", str(shorter)], "are of different text encoders"),
        ([*flags, "--text-path", str(tmp_path / "absent")], "has no meta.json"),
        ([*flags, "--text-path", str(tmp_path / "some")], "has no captions for 5 images"),
        ([*flags, "--cls-token-num", "5"], "--cls-token-num 5 is less than the 6"),
        ([*flags, "--init-from", str(vq_ckpt)], "--vq-ckpt"),
    ]
    for case, message in cases:
        with pytest.raises(SystemExit, match=re.escape(message)):
            train_t2i.main(case)
    with pytest.raises(SystemExit):
        train_t2i.main(["--code-path", "a", "--text-path", "b", "--val-code-path", "c"])
    assert "--val-code-path and --val-text-path" in capsys.readouterr().err

    train_t2i.main([*flags, "--max-steps", "1"])
    captions.write_text(captions.read_text().replace("noise", "static"))
    extract_text_features.main(["--captions", str(captions), "--text-path", str(tmp_path / "new"), "--max-length", "6"])
    with pytest.raises(SystemExit, match="the text features"):
        train_t2i.main([*flags, "--text-path", str(tmp_path / "new")])
