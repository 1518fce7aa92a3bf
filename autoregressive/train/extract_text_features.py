"""Turn captions into text features for train_t2i.py.

    python autoregressive/train/extract_text_features.py --captions photos/captions.jsonl --text-path features/photos
    torchrun --nproc_per_node 8 autoregressive/train/extract_text_features.py --text-encoder flan-t5-xl ...

A captions file has an image a line: {"image": "folder/name.png", "captions": ["a cat", "a black cat"]}. What is written
is told in text_features.py. An interrupted job goes on where it was.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from tqdm import tqdm

from autoregressive.train.text_features import SHARD, read_captions, shard_files, texts_of
from autoregressive.train.training import TrainingError, join_processes
from tokenizer.files import atomic_file
from tokenizer.tokenizer_text.encoder import TEXT_ENCODERS, TextEncoderError, load_text_encoder

PRECISIONS = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--captions", type=Path, required=True, help="captions file (.jsonl)")
    add("--text-path", type=Path, required=True, help="folder to write")
    add("--text-encoder", choices=TEXT_ENCODERS, default="minilm", help="default: %(default)s")
    add("--text-encoder-path", type=Path, help="folder of its weights, if not where they are looked for")
    add("--max-length", type=int, default=120, help="tokens, longer captions are cut (default: %(default)s)")
    add("--precision", choices=list(PRECISIONS), default="bf16", help="of the encoder (default: %(default)s)")
    return parser.parse_args(argv)


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_file(path) as file:
        np.save(file, array)


def _save_json(path: Path, content: dict) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


@torch.no_grad()
def extract(args: argparse.Namespace) -> None:
    """Fill the feature folder; see the module's docstring."""
    accelerator = join_processes()
    rank, world, main_process = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    folder = args.text_path
    captions = read_captions(args.captions)
    texts = texts_of(captions)
    encoder = load_text_encoder(
        args.text_encoder,
        args.text_encoder_path,
        max_length=args.max_length,
        dtype=PRECISIONS[args.precision],
        device=accelerator.device,
    )
    job = encoder.fingerprint()
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "job.json").exists():
            earlier = json.loads((folder / "job.json").read_text())
            if earlier != job or read_captions(folder / "captions.jsonl") != captions:
                raise TrainingError(
                    f"{folder} was made from other captions, or by another encoder or flags ({earlier}): delete it, or "
                    "choose another --text-path"
                )
        else:
            with atomic_file(folder / "captions.jsonl") as file:
                file.write(args.captions.read_bytes())
            _save_json(folder / "job.json", job)
    accelerator.wait_for_everyone()
    if (folder / "meta.json").exists():
        accelerator.print(f"{folder} is complete (it has meta.json): nothing to do")
        return

    shards = range(rank, -(-len(texts) // SHARD), world)
    bar = tqdm(total=len(texts) // world, unit="text", disable=None if main_process else True, desc="extract text")
    for shard in shards:
        features_file, lengths_file = shard_files(folder, shard)
        part = texts[shard * SHARD : (shard + 1) * SHARD]
        if not features_file.exists():
            rows = []
            for text in encoder.prepare(part):
                rows.append(encoder.rows(text).to("cpu", torch.float16).numpy())
                if not np.isfinite(rows[-1]).all():
                    raise TrainingError(f"{args.text_encoder} gave values for {text!r} that float16 can't hold")
                bar.update()
            _save(lengths_file, np.array([len(r) for r in rows], np.int32))
            _save(features_file, np.concatenate(rows))
        else:
            bar.update(len(part))
    bar.close()
    accelerator.wait_for_everyone()
    if not main_process:
        return
    lengths = np.concatenate([np.load(shard_files(folder, s)[1]) for s in range(-(-len(texts) // SHARD))])
    dim = np.load(shard_files(folder, 0)[0], mmap_mode="r").shape[1]
    meta = {
        "text_encoder": job,
        "max_length": args.max_length,
        "caption_dim": dim,
        "images": len(captions),
        "texts": len(texts),
        "mean_length": round(float(lengths.mean()), 2),
        "at_max_length": int((lengths >= args.max_length).sum()),
    }
    _save_json(folder / "meta.json", meta)
    print(f"{folder}: {len(texts)} texts of {len(captions)} images, {meta['mean_length']} tokens of {dim} on average")


def main(argv: list[str] | None = None) -> None:
    try:
        extract(parse_args(argv))
    except (TrainingError, TextEncoderError) as error:
        sys.exit(f"extract_text_features: {error}")


if __name__ == "__main__":
    main()
