"""Convert a checkpoint, released or of a training run, to a folder that from_pretrained() reads.

    python scripts/convert_weights.py pretrained_models/c2i_XL_384.pt hub/c2i_XL_384
    python scripts/convert_weights.py pretrained_models/vq_ds16_c2i.pt hub/vq_ds16_c2i --dtype fp16

Which model it is, its weights tell, but for the size of a GPT's images, which is taken from the file's name. Then

    Transformer.from_pretrained("hub/c2i_XL_384", dtype=torch.bfloat16)      # autoregressive.models.gpt
    VQModel.from_pretrained("hub/vq_ds16_c2i")                               # tokenizer.tokenizer_image.vq_model
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from autoregressive.models.checkpoint import CheckpointError, load_model, read_state_dict, recognise
from autoregressive.models.gpt import GPT_models
from tokenizer.tokenizer_image.vq_model import VQ_models

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def convert(path: Path, out: Path, image_size: int | None, downsample_size: int, dtype: torch.dtype | None) -> str:
    """Write the folder; returns a line that says what it holds.

    Raises:
        CheckpointError: the file can't be read, is of no registered model, or its images' size isn't known.
    """
    state = read_state_dict(path)
    found = recognise(state)
    if found is None:
        raise CheckpointError(f"{path} is of no registered model, so its sizes aren't known")
    kind, name, args = found
    if kind == "GPT":
        told = re.search(r"_(256|384|512)(?=\D|$)", path.stem)
        if image_size is None and told is None:
            raise CheckpointError(f"{path}: its name doesn't tell how large its images are; pass --image-size PIXELS")
        args["block_size"] = ((image_size or int(told[1])) // downsample_size) ** 2
    with torch.device("meta"):
        model = {"GPT": GPT_models, "VQ": VQ_models}[kind][name](**args)
    load_model(model, path, dtype=dtype or next(t.dtype for t in state.values() if t.is_floating_point()))
    model.save_pretrained(out)
    size = (out / "model.safetensors").stat().st_size
    return f"{out}: {name}, {', '.join(f'{key} {value}' for key, value in args.items())}, {size / 1e6:.1f} MB"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".pt, .pth or .safetensors; averaged weights, if it has them")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="of a GPT's images, along a side")
    parser.add_argument("--downsample-size", type=int, default=16, help="pixels of a token, along a side (default: 16)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: the file's")
    args = parser.parse_args(argv)
    try:
        print(convert(args.checkpoint, args.out, args.image_size, args.downsample_size, DTYPES.get(args.dtype)))
    except (CheckpointError, OSError) as error:
        sys.exit(f"convert_weights: {error}")


if __name__ == "__main__":
    main()
