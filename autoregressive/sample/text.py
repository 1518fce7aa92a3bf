"""From prompts to the features and masks that a text-conditional GPT takes: encoded once, and kept on disk."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from autoregressive.sample.options import OptionError, Options
from autoregressive.sample.prompts import Prompts, few, number
from autoregressive.sample.run_folder import bar_interval
from autoregressive.sample.sampler import PRECISIONS
from tokenizer.tokenizer_text.encoder import load_text_encoder
from tokenizer.tokenizer_text.features import FeatureCache


class TextConditions:
    """Text features by image index.

    Args:
        options: `text` is used, and `model` as a :class:`Blueprint` has filled it in.
        prompts: one for each image.
        device: where the encoder works.

    Raises:
        OptionError: the encoder's features don't fit the GPT.
        TextEncoderError: there is no such encoder, or its files can't be read.
    """

    def __init__(self, options: Options, prompts: Prompts, device: torch.device):
        text, model = options.text, options.model
        name = text.encoder or ("minilm" if model.caption_dim == 384 else "flan-t5-xl")
        if text.max_length not in (None, model.cls_token_num):
            raise OptionError(
                f"text.max_length is {text.max_length}, but the GPT takes {model.cls_token_num} text tokens "
                f"(model.cls_token_num), padding included"
            )
        self.encoder = load_text_encoder(
            name,
            text.encoder_path,
            max_length=model.cls_token_num,
            dtype=PRECISIONS[text.precision or model.precision],
            device=device,
            clean=text.clean,
            left_padding=text.left_padding,
        )
        if self.encoder.dim != model.caption_dim:
            raise OptionError(
                f"text.encoder {name} makes features of {self.encoder.dim} numbers, and {model.gpt_ckpt} takes "
                f"{model.caption_dim} (model.caption_dim): name the encoder that it was trained with by --text-encoder"
            )
        self.prompts = prompts
        self.keep_encoder = text.keep_encoder
        self.cache = FeatureCache(text.feature_dir, self.encoder)

    def left_out(self) -> dict[str, Any]:
        """Prompts that are cut, having too many tokens, and those of which cleaning leaves nothing.

        Returns:
            How many of either, and the first ten by their index; of one that is cut, also what is left out.
        """
        cut, emptied = [], []
        for index in _bar(range(len(self.prompts.texts)), "checking prompts"):
            text = self.prompts.texts[index]
            (rest,) = self.encoder.cut([text])
            if rest is not None:
                cut.append({"index": index, "left_out": rest})
            elif text and not any(self.encoder.prepare([text])):
                emptied.append(index)
        return {
            "max_length": self.encoder.max_length,
            "cut": {"count": len(cut), "first": cut[:10]},
            "emptied": {"count": len(emptied), "first": emptied[:10]},
        }

    def encode(self, images: Sequence[int], show: bool = True) -> None:
        """Encode the prompts of these images, with a progress bar if wanted; then free the encoder's memory."""
        for index in _bar(images, "encoding prompts", show):
            self([index])
        if not self.keep_encoder:
            self.encoder.release()

    def __call__(self, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Image indices -> features [B, L, C] and masks [B, L]."""
        return self.cache.features_of([self.prompts.texts[index] for index in images])


def told_left_out(found: dict[str, Any]) -> list[str]:
    """What :meth:`TextConditions.left_out` found, as notes for the user."""
    told = []
    if cut := found["cut"]["count"]:
        shown = [f"index {item['index']} before {item['left_out'][:60]!r}" for item in found["cut"]["first"]]
        told.append(f"{number(cut, 'prompt')} cut to {found['max_length']} tokens: {few(shown, '; ')}")
    if emptied := found["emptied"]["count"]:
        told.append(
            f"{number(emptied, 'prompt')} of which cleaning leaves nothing (index {few(found['emptied']['first'])}); "
            f"--no-clean-prompts takes prompts as they are"
        )
    return told


def _bar(items: Sequence[int], what: str, show: bool = True) -> tqdm:
    return tqdm(items, desc=what, unit=" prompts", mininterval=bar_interval(), disable=not show, leave=False)
