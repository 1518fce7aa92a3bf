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
from autoregressive.train.training import HelpFormatter, TrainingError, differences, join_processes
from tokenizer.files import atomic_file, remove_partial, write_json
from tokenizer.tokenizer_text.encoder import TEXT_ENCODERS, TextEncoderError, load_text_encoder

PRECISIONS = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--captions", type=Path, required=True, help="captions file (.jsonl)")
    add("--text-path", type=Path, required=True, help="folder to write")
    add("--text-encoder", choices=TEXT_ENCODERS, default="minilm", help="default: %(default)s")
    where = "default: minilm's Python package; for others pretrained_models/t5-ckpt, or else the Hugging Face hub"
    add("--text-encoder-path", type=Path, help=f"folder of its files, or one that has that folder; {where}")
    add("--max-length", type=int, default=120, help="tokens, longer captions are cut (default: %(default)s)")
    add("--precision", choices=list(PRECISIONS), default="bf16", help="of the encoder (default: %(default)s)")
    return parser.parse_args(argv)


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_file(path) as file:
        np.save(file, array)


def start_job(folder: Path, job: dict, captions_file: Path) -> None:
    """Write job.json and captions.jsonl, or make sure that the folder is of this job. Raises TrainingError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    copy, path = folder / "captions.jsonl", folder / "job.json"
    if not path.exists():
        with atomic_file(copy) as file:
            file.write(captions_file.read_bytes())
        write_json(path, job)
        return
    there = json.loads(path.read_text())
    files_there, files = there.pop("files", None), job.get("files")
    told = differences(there, {key: value for key, value in job.items() if key != "files"})
    if files_there != files:
        told.append("the files of the encoder are others")
    if read_captions(copy) != read_captions(captions_file):
        told.append("the captions are others")
    if told:
        raise TrainingError(
            f"{folder} holds features of another job: {'; '.join(told)}. Give it the same to go on, or choose another "
            "--text-path"
        )


def finish_job(folder: Path, job: dict, images: int, texts: int) -> None:
    """Write meta.json, once all shards are there."""
    lengths = np.concatenate([np.load(shard_files(folder, shard)[1]) for shard in range(-(-texts // SHARD))])
    meta = {
        "text_encoder": job,
        "max_length": job["max_length"],
        "caption_dim": np.load(shard_files(folder, 0)[0], mmap_mode="r").shape[1],
        "images": images,
        "texts": texts,
        "mean_length": round(float(lengths.mean()), 2),
        "at_max_length": int((lengths >= job["max_length"]).sum()),
    }
    write_json(folder / "meta.json", meta)
    length = f"{meta['mean_length']} tokens of {meta['caption_dim']} on average"
    print(f"{folder}: {texts} texts of {images} images, {length}")


def extract(args: argparse.Namespace) -> None:
    """Fill the feature folder; see the module's docstring."""
    accelerator = join_processes()
    main_process, folder = accelerator.is_main_process, args.text_path
    read_captions(args.captions)  # mistakes in it are told before anything is loaded
    encoder = load_text_encoder(
        args.text_encoder,
        args.text_encoder_path,
        max_length=args.max_length,
        dtype=PRECISIONS[args.precision],
        device=accelerator.device,
    )
    job = encoder.fingerprint()
    if main_process:
        start_job(folder, job, args.captions)
    accelerator.wait_for_everyone()
    if (folder / "meta.json").exists():
        accelerator.print(f"{folder} is complete (it has meta.json): nothing to do")
        return

    captions = read_captions(folder / "captions.jsonl")  # the shards are of its order, whatever --captions' is by now
    texts = texts_of(captions)
    parts = [texts[start : start + SHARD] for start in range(0, len(texts), SHARD)]
    mine = list(enumerate(parts))[accelerator.process_index :: accelerator.num_processes]
    total = sum(len(part) for _, part in mine)
    with tqdm(total=total, unit="text", disable=None if main_process else True, desc="extract text") as bar:
        for shard, part in mine:
            features_file, lengths_file = shard_files(folder, shard)
            if features_file.exists():
                bar.update(len(part))
                continue
            rows = []
            for text in encoder.prepare(part):
                rows.append(encoder.rows(text).to("cpu", torch.float16).numpy())
                if not np.isfinite(rows[-1]).all():
                    raise TrainingError(f"{args.text_encoder} gave values for {text!r} that float16 can't hold")
                bar.update()
            _save(lengths_file, np.array([len(r) for r in rows], np.int32))
            _save(features_file, np.concatenate(rows))
    accelerator.wait_for_everyone()
    if main_process:
        finish_job(folder, job, len(captions), len(texts))


def main(argv: list[str] | None = None) -> None:
    try:
        extract(parse_args(argv))
    except (TrainingError, TextEncoderError, OSError) as error:
        sys.exit(f"extract_text_features: {error}")


if __name__ == "__main__":
    main()
