"""``save_pretrained``, ``from_pretrained`` and ``push_to_hub``, Hugging Face's way, for the GPT and the tokenizer."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin, constants, hf_hub_download

from autoregressive.models.checkpoint import CheckpointError, load_model, read_state_dict, recognise, save_safetensors

WEIGHTS = constants.SAFETENSORS_SINGLE_FILE


class Pretrained(ModelHubMixin):
    """A model whose ``__init__`` takes one dataclass, ``config``.

    ``save_pretrained(folder)`` writes model.safetensors, which samplers take as any other checkpoint, config.json (the
    fields of the dataclass) and a model card. ``from_pretrained(folder or name on the hub)`` reads them, strictly, and
    takes besides huggingface_hub's arguments:

    * ``dtype``: of the model; None: the file's.
    * ``device``: where; None: the CPU.

    Raises:
        CheckpointError: the files are missing, damaged, or don't fit each other.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        state = self.state_dict()
        found = recognise(state)
        metadata = {"model": found[1]} if found else {}
        save_safetensors(save_directory / WEIGHTS, state, metadata | {"args": json.dumps(asdict(self.config))})

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config=None, dtype=None, device="cpu", **where):
        folder = Path(model_id)
        if config is None:
            raise CheckpointError(f"{model_id} has no {constants.CONFIG_NAME}: it isn't what save_pretrained writes")
        path = folder / WEIGHTS if folder.is_dir() else hf_hub_download(model_id, WEIGHTS, **where)
        if dtype is None:
            dtype = next(t.dtype for t in read_state_dict(path).values() if t.is_floating_point())
        with torch.device("meta"):
            model = cls(config)
        return load_model(model, path, device=device, dtype=dtype).eval()
