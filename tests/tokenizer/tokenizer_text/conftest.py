import json

import pytest
import sentencepiece
import torch

WORDS = "a red apple on the table green pepper left of big blue cat dog house in city at night"


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A small T5 v1.1 encoder with random weights; the tokenizer is a spiece.model alone, as in T5 v1.1's releases."""
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5") / "flan-t5-xl"
    folder.mkdir()
    text = folder.parent / "text.txt"
    text.write_text("\n".join([WORDS, *WORDS.split()] * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 4}))
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def t5_copy(t5_folder, tmp_path):
    """The same in a folder that a test may spoil."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in t5_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy
