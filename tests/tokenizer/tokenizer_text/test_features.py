"""The cache of text features."""

import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file

from tokenizer.tokenizer_text.encoder import TextEncoderError, load_text_encoder
from tokenizer.tokenizer_text.features import FeatureCache

PROMPTS = ["a red apple on the table", "", "cat", "A Red   Apple on the table"]


def cached(model, folder, **options):
    return FeatureCache(folder, load_text_encoder("flan-t5-xl", model, **{"max_length": 40} | options))


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_features_are_encoded_once(t5_copy, tmp_path):
    folder = tmp_path / "made" / "features"
    expected = load_text_encoder("flan-t5-xl", t5_copy, max_length=40).encode(PROMPTS)
    assert_same(cached(t5_copy, folder).features_of(PROMPTS), expected)
    files = list(folder.iterdir())
    assert len(files) == 3, "the last prompt is the first one, once cleaned"
    assert sorted(len(load_file(file)["features"]) for file in files) == sorted(expected[1][:3].sum(1).tolist())

    again = cached(t5_copy, folder)
    (t5_copy / "model.safetensors").write_bytes(b"gone")
    assert_same(again.features_of(PROMPTS[::-1]), [part.flip(0) for part in expected])
    with pytest.raises(TextEncoderError, match=r"model\.safetensors|can't be loaded"):
        again.features_of(["dog"])


def test_encoders_do_not_share(t5_folder, tmp_path):
    for options in ({}, {"dtype": torch.bfloat16}, {"max_length": 4}):
        cache = cached(t5_folder, tmp_path, **options)
        assert_same(cache.features_of(PROMPTS), cache.encoder.encode(PROMPTS))
    assert len(list(tmp_path.glob("*.safetensors"))) == 9


@pytest.mark.parametrize("damage", ["truncated", "empty", "other file", "another prompt's"])
def test_damaged_files_are_made_anew(t5_folder, tmp_path, damage):
    cache = cached(t5_folder, tmp_path)
    expected = cache.features_of(["cat"])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    cache.features_of(["dog"])
    (other,) = set(tmp_path.iterdir()) - {file}
    bad = {"truncated": whole[:-7], "empty": b"", "other file": os.urandom(500), "another prompt's": other.read_bytes()}
    file.write_bytes(bad[damage])
    assert_same(cache.features_of(["cat"]), expected)
    assert file.read_bytes() == whole


def test_many_writers(t5_folder, tmp_path):
    """Eight caches at a time encode the same prompts into one folder, and read them back."""
    prompts = [f"a red apple {'cat ' * i}" for i in range(12)]
    encoder = load_text_encoder("flan-t5-xl", t5_folder, max_length=40)
    expected = encoder.encode(prompts)
    start = threading.Barrier(8)

    def work(_):
        cache = FeatureCache(tmp_path, encoder)
        start.wait(60)
        return [cache.features_of(prompts), cache.features_of(prompts)]

    with ThreadPoolExecutor(8) as pool:
        for found in chain(*pool.map(work, range(8))):
            assert_same(found, expected)
    assert len(list(tmp_path.iterdir())) == 12, "and nothing else, not even hidden"


def test_a_folder_that_cannot_be_written(t5_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TextEncoderError, match=r"file/.*choose another folder"):
        cached(t5_folder, tmp_path / "file" / "features").features_of(["cat"])

    cache = cached(t5_folder, tmp_path / "features")
    cache.encoder.encode(["cat"])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as a full disk would do
    try:
        with pytest.raises(TextEncoderError, match=r"features/.*can't be written .*free some space"):
            cache.features_of(["cat"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list((tmp_path / "features").iterdir()) == []
    assert_same(cache.features_of(["cat"]), cache.encoder.encode(["cat"]))
