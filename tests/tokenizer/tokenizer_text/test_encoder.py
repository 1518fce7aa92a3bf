"""Text encoders: a small random T5, and MiniLM as it comes with its package."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity

from tokenizer.tokenizer_text.encoder import TextEncoderError, load_text_encoder

PROMPTS = ["a red apple on the table", "", "cat", "the big blue dog at night in the city left of a green house"]


@pytest.fixture(scope="module")
def t5(t5_folder):
    return load_text_encoder("flan-t5-xl", t5_folder, max_length=40)


@pytest.fixture(scope="module")
def minilm():
    return load_text_encoder("minilm")


def test_t5_is_as_upstream_calls_it(t5, t5_folder):
    """LlamaGen: pad the batch to max_length on the right, mask, then turn each row until its padding is on the left."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    model = T5EncoderModel.from_pretrained(t5_folder).eval()
    batch = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        right = model(**batch).last_hidden_state * batch.attention_mask[..., None]
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths[1] == 1, "an empty prompt is </s> alone"
    assert len(set(lengths)) == 4
    assert max(lengths) < 40

    features, mask = t5.encode(PROMPTS)
    assert features.shape == (4, 40, 32)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert mask.dtype == torch.int64
    for row, n in enumerate(lengths):
        assert mask[row].tolist() == [0] * (40 - n) + [1] * n
        assert torch.equal(features[row, : 40 - n], torch.zeros(40 - n, 32)), "padding is exactly zero"
        # Masked positions take part in the library's sums as zeros, so that only rounding differs.
        torch.testing.assert_close(features[row, 40 - n :], right[row, :n], atol=1e-5, rtol=1e-5)


def test_tokenizer_json_serves_as_well(t5, t5_copy):
    """As flan-t5 has it: no sentencepiece is needed then."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(t5_copy).save_pretrained(t5_copy)
    (t5_copy / "spiece.model").unlink()
    assert (t5_copy / "tokenizer.json").is_file()
    features, _ = load_text_encoder("flan-t5-xl", t5_copy, max_length=40).encode(PROMPTS)
    assert torch.equal(features, t5.encode(PROMPTS)[0])


def test_right_padding(t5, t5_folder):
    right = load_text_encoder("flan-t5-xl", t5_folder, max_length=40, left_padding=False)
    (features, mask), (left, left_mask) = right.encode(PROMPTS), t5.encode(PROMPTS)
    for row, n in enumerate(mask.sum(1).tolist()):
        assert mask[row].tolist() == [1] * n + [0] * (40 - n)
        assert torch.equal(features[row, :n], left[row, 40 - n :])
        assert not features[row, n:].any()
    assert torch.equal(mask.flip(1), left_mask)


@pytest.mark.parametrize("name", ["t5", "minilm"])
def test_features_do_not_depend_on_the_batch(name, request):
    encoder = request.getfixturevalue(name)
    features, mask = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone, alone_mask = encoder.encode([prompt])
        assert torch.equal(alone[0], features[row]), "bit for bit"
        assert torch.equal(alone_mask[0], mask[row])
    assert encoder.encode([])[0].shape == (0, encoder.max_length, encoder.dim)


def test_minilm_needs_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    features, mask = load_text_encoder("minilm").encode(["a red apple", ""])
    assert features.shape == (2, 120, 384)
    assert mask.sum(1).tolist() == [5, 2], "[CLS] a red apple [SEP]; [CLS] [SEP]"
    assert not features[0, :115].any()
    assert features[0, 115:].any(1).all()


def test_minilm_is_the_published_model(minilm):
    """Similarities of mean token features, as Hugging Face's documentation of the model's API gives them."""
    sentences = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    features, mask = minilm.encode(sentences)
    means = features.sum(1) / mask.sum(1, keepdim=True)
    found = cosine_similarity(means[:1], means[1:])
    torch.testing.assert_close(found, torch.tensor([0.69458, 0.94292, 0.25688]), atol=1e-4, rtol=0)


def test_prompts_are_cleaned_twice(minilm):
    untouched = load_text_encoder("minilm", clean=False)
    assert minilm.prepare([":: Red+Cat"]) == ["red cat"]
    assert untouched.prepare([":: Red+Cat"]) == [":: Red+Cat"]
    assert torch.equal(minilm.encode([":: Red+Cat"])[0], minilm.encode(["red cat"])[0])
    assert untouched.encode([":: Red+Cat"])[1].sum() > untouched.encode(["red cat"])[1].sum()
    for encoder in (minilm, untouched):
        assert encoder.prepare(["\ud83d cat"]) == ["? cat"], "half of an emoji, as broken JSON has it"
    with pytest.raises(TypeError, match="a red apple"):
        minilm.encode("a red apple")


def test_cut_tells_what_does_not_fit(t5_folder):
    encoder = load_text_encoder("minilm", max_length=5)  # [CLS] and [SEP], so three words of the vocabulary
    assert encoder.cut(["A  Red Apple on a table", "a red apple", ""]) == ["on a table", None, None]
    features, mask = encoder.encode(["a red apple on a table"])
    assert torch.equal(features, encoder.encode(["a red apple"])[0])
    assert mask.sum() == 5

    text = PROMPTS[3]
    encoder = load_text_encoder("flan-t5-xl", t5_folder, max_length=12)
    (rest,) = encoder.cut([text])
    assert text.endswith(rest)
    kept = text[: -len(rest)].rstrip()
    assert encoder.cut([kept]) == [None]
    assert torch.equal(encoder.encode([text])[0], encoder.encode([kept])[0])
    assert encoder.encode([text])[1].all(), "12 tokens, </s> among them"


def test_weights_are_read_late_and_released(t5_copy):
    encoder = load_text_encoder("flan-t5-xl", t5_copy)
    weights = t5_copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(b"none yet")
    with pytest.raises(TextEncoderError, match=str(t5_copy)):
        encoder.encode(["cat"])
    weights.unlink()
    weights.write_bytes(content)
    before = encoder.encode(["cat"])[0]
    weights.unlink()
    assert torch.equal(encoder.encode(["cat"])[0], before), "they are in memory now"
    encoder.release()
    with pytest.raises(TextEncoderError, match=r"model\.safetensors"):
        encoder.encode(["cat"])
    weights.write_bytes(content)
    assert torch.equal(encoder.encode(["cat"])[0], before)


def test_dtypes(t5, t5_copy):
    half = load_text_encoder("flan-t5-xl", t5_copy, max_length=40, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16):  # of no influence
        features, _ = half.encode(PROMPTS)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features, half.encode(PROMPTS)[0], atol=0, rtol=0)
    torch.testing.assert_close(features.float(), t5.encode(PROMPTS)[0], atol=0.1, rtol=0.1)

    state = load_file(t5_copy / "model.safetensors")
    state["encoder.final_layer_norm.weight"] *= 1e6
    save_file(state, t5_copy / "model.safetensors", {"format": "pt"})
    load_text_encoder("flan-t5-xl", t5_copy).encode(PROMPTS)
    with pytest.raises(TextEncoderError, match="use bfloat16"):
        load_text_encoder("flan-t5-xl", t5_copy, dtype=torch.float16).encode(PROMPTS)


def test_fingerprint(t5_folder, t5_copy):
    def fingerprint(folder=t5_copy, **options):
        return json.dumps(load_text_encoder("flan-t5-xl", folder, **options).fingerprint())

    plain = fingerprint()
    assert fingerprint(t5_folder) == plain, "the place doesn't matter"
    assert fingerprint(left_padding=False, device="cpu") == plain
    changed = [fingerprint(max_length=40), fingerprint(clean=False), fingerprint(dtype=torch.bfloat16)]
    for name in ("model.safetensors", "spiece.model", "config.json"):
        content = (t5_copy / name).read_bytes()
        (t5_copy / name).write_bytes(content + b" ")
        changed.append(fingerprint())
        (t5_copy / name).write_bytes(content)
    assert len({plain, *changed}) == 7
    assert fingerprint() == plain


def test_the_folder_above_will_do(t5_folder):
    assert load_text_encoder("flan-t5-xl", t5_folder.parent).folder == t5_folder
    with pytest.raises(TextEncoderError, match=r"t5-v1_1-xl comes from"):
        load_text_encoder("t5-v1_1-xl", t5_folder.parent)


@pytest.mark.parametrize("missing", ["config.json", "spiece.model", "model.safetensors"])
def test_missing_files_are_told(t5_copy, missing):
    (t5_copy / missing).unlink()
    with pytest.raises(TextEncoderError) as error:
        load_text_encoder("flan-t5-xl", t5_copy)
    for part in (str(t5_copy), "huggingface.co/google/flan-t5-xl", "download_weights.sh flan-t5-xl", "minilm"):
        assert part in str(error.value)


def test_weights_must_be_complete(t5_copy):
    state = load_file(t5_copy / "model.safetensors")
    del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(state, t5_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(TextEncoderError, match=r"lacks 1 weights.*block\.1\.layer\.1\.DenseReluDense\.wo"):
        load_text_encoder("flan-t5-xl", t5_copy).encode(["cat"])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mini-lm", {}, "no text encoder 'mini-lm' .did you mean minilm.*flan-t5-xl"),
        ("minilm", {"path": "/no/such/folder"}, "/no/such/folder is no folder"),
        ("minilm", {"max_length": 513}, "max_length is 513; minilm takes 3 to 512 tokens"),
        ("minilm", {"max_length": 2}, "max_length is 2"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(TextEncoderError, match=message):
        load_text_encoder(name, **options)


def test_other_models_are_refused(t5_copy):
    (t5_copy / "config.json").write_text('{"model_type": "gpt2", "hidden_size": 8}')
    with pytest.raises(TextEncoderError, match=r"config.json is none of a bert or t5 model: 'gpt2'"):
        load_text_encoder("flan-t5-xl", t5_copy)
    (t5_copy / "config.json").write_text("{")
    with pytest.raises(TextEncoderError, match=r"config.json can't be read"):
        load_text_encoder("flan-t5-xl", t5_copy)


def test_shards_must_be_complete(t5, t5_copy):
    from transformers import T5EncoderModel

    T5EncoderModel.from_pretrained(t5_copy).save_pretrained(t5_copy, max_shard_size="20KB")
    (t5_copy / "model.safetensors").unlink(missing_ok=True)
    first, *more = sorted(t5_copy.glob("model-*.safetensors"))
    assert more
    sharded = load_text_encoder("flan-t5-xl", t5_copy, max_length=40)
    # Products round as the weights lie in memory, which is as they lie in their files.
    torch.testing.assert_close(sharded.encode(PROMPTS)[0], t5.encode(PROMPTS)[0], atol=1e-5, rtol=1e-5)
    loaded, whole = (encoder._model.state_dict() for encoder in (sharded, t5))
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)
    first.unlink()
    with pytest.raises(TextEncoderError, match=rf"lacks {first.name}, which model\.safetensors\.index\.json names"):
        load_text_encoder("flan-t5-xl", t5_copy)
    (t5_copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(TextEncoderError, match=r"model\.safetensors\.index\.json can't be read"):
        load_text_encoder("flan-t5-xl", t5_copy)


def test_hub(t5, t5_folder, tmp_path, monkeypatch):
    """What was fetched from the hub earlier is used as it is; what wasn't is an error without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("tokenizer.tokenizer_text.encoder.DOWNLOADS", tmp_path / "downloads")
    repository = tmp_path / "models--google--flan-t5-xl"
    shutil.copytree(t5_folder, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    encoder = load_text_encoder("flan-t5-xl", max_length=40)
    assert encoder.folder == repository / "snapshots" / "0123abc"
    assert encoder.fingerprint() == t5.fingerprint()
    assert torch.equal(encoder.encode(PROMPTS)[0], t5.encode(PROMPTS)[0])

    (encoder.folder / "spiece.model").unlink()  # as an interrupted download leaves it
    with pytest.raises(TextEncoderError, match=r"0123abc has no tokenizer.*give that as the path.*minilm"):
        load_text_encoder("flan-t5-xl")
    with pytest.raises(
        TextEncoderError, match=r"DeepFloyd/t5-v1_1-xxl can't be fetched.*give that as the path.*minilm"
    ):
        load_text_encoder("t5-v1_1-xxl")

    shutil.copytree(t5_folder, tmp_path / "downloads" / "flan-t5-xl")
    assert load_text_encoder("flan-t5-xl").folder == tmp_path / "downloads" / "flan-t5-xl", "before any other"
