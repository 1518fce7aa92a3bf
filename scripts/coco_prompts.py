"""Draw prompts from MS-COCO's captions, for sample_t2i_ddp.py.

    python scripts/coco_prompts.py --annotations captions_val2014.json --output data/coco/coco_val2014.tsv

Draws images without repetition, and one caption of each, by the seed alone: the order of the file doesn't matter.
Writes a table with the columns Prompt and image_id, which LlamaGen's own script reads as well. The annotations (CC BY
4.0) are annotations/captions_val2014.json in http://images.cocodataset.org/annotations/annotations_trainval2014.zip.
"""

import argparse
import csv
import hashlib
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokenizer.files import atomic_file  # noqa: E402


class CocoError(RuntimeError):
    """The annotations can't be used; the message names the file and the way out."""


def read_captions(path: Path) -> list[tuple[int, int, str]]:
    """(id, image id, caption) of a captions file, those without words left out. Raises CocoError if it is none."""
    try:
        rows = json.loads(path.read_bytes())["annotations"]
        captions = [(row["id"], row["image_id"], " ".join(row["caption"].split())) for row in rows]
    except OSError as error:
        raise CocoError(f"{path}: {error.strerror or error}; --help tells where the annotations come from") from error
    except ValueError as error:
        raise CocoError(f"{path}: not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CocoError(f"{path}: no captions in it; wanted is captions_val2014.json, not the instances") from error
    return [caption for caption in captions if caption[2]]


def draw(captions: list[tuple[int, int, str]], count: int, seed: int) -> list[tuple[str, int]]:
    """(caption, image id) of `count` different images, in random order. Raises CocoError if there are fewer."""

    def lot(kind: str, number: int) -> bytes:
        return hashlib.sha256(f"{seed}/{kind}/{number}".encode()).digest()

    caption_of = {}
    for _, image_id, text in sorted(captions, key=lambda caption: lot("caption", caption[0])):
        caption_of.setdefault(image_id, text)
    if len(caption_of) < count:
        raise CocoError(f"{len(caption_of)} images have captions, and {count} are wanted: give a smaller --count")
    images = sorted(caption_of, key=lambda image_id: lot("image", image_id))[:count]
    return [(caption_of[image_id], image_id) for image_id in images]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE.json", help="captions_val2014.json")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.tsv", help="its folder is made if need be")
    parser.add_argument("--count", type=int, default=30_000, metavar="N", help="images (default: 30000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another draw (default: 0)")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count must be at least 1, not {args.count}")
    if args.output.suffix != ".tsv":
        parser.error(f"--output must end in .tsv, as what it holds is separated by tabs: {args.output}")
    try:
        rows = draw(read_captions(args.annotations), args.count, args.seed)
        table = io.StringIO()
        csv.writer(table, delimiter="\t", lineterminator="\n").writerows([("Prompt", "image_id"), *rows])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(args.output) as file:
            file.write(table.getvalue().encode())
    except (CocoError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(rows)} prompts in {args.output}")


if __name__ == "__main__":
    main()
