"""LlamaGen's golden numbers (tests/data/llamagen_golden.json) and the weights that they were computed with."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = json.loads((Path(__file__).parent / "data" / "llamagen_golden.json").read_text())


def fill_weights(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill a model with the reproducible weights of the golden file, in place; returns it in eval mode."""
    rng = np.random.RandomState(seed)
    state = {}
    for key, old in sorted(model.state_dict().items()):
        shape = tuple(old.shape)
        z = rng.standard_normal(int(np.prod(shape))).reshape(shape)
        parent = key.split(".")[-2] if "." in key else ""
        if key.endswith("codebook_used"):
            z = np.zeros(shape)
        elif "norm" in parent and key.endswith(".weight"):
            z = 1 + 0.1 * z
        elif key.endswith(".bias"):
            z = 0.05 * z
        elif key.endswith(
            ("embedding_table.weight", "tok_embeddings.weight", "uncond_embedding", "quantize.embedding.weight")
        ):
            z = 0.5 * z
        elif len(shape) == 4:
            z = z / np.sqrt(np.prod(shape[1:]))
        else:
            z = z / np.sqrt(shape[-1])
        state[key] = torch.from_numpy(z).to(old.dtype)
    model.load_state_dict(state, strict=True)
    return model.eval()
