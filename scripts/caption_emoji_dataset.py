"""Write captions for the emoji data set, by rules.

    python scripts/caption_emoji_dataset.py --data data/emoji256
    python scripts/caption_emoji_dataset.py --data data/emoji256 --classes '*_noto' --skip-classes '*flag*'

Writes captions_train.jsonl and captions_val.jsonl into the data set's folder, one image a line:

    {"image": "train/176_food-fruit_twemoji/1F34E_twemoji.png", "captions": ["twemoji: red apple", "a red apple", ...]}

Images are named relative to the file's own folder. The first caption is always "set: name"; the others are drawn from
the rules below by seed and image, so that the order of the images doesn't matter. Edit the files as you like, or write
such a file for your own images: extract_codes_c2i.py and extract_text_features.py take any.
"""

import argparse
import hashlib
import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from tqdm import tqdm

from tokenizer.files import atomic_file

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # 1 to 5 in items.jsonl
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray")
# Hues (0 to 255, as Pillow has them) at which one colour ends and the next begins.
HUE_ENDS = ((9, "red"), (26, "orange"), (46, "yellow"), (113, "green"), (184, "blue"), (209, "purple"), (240, "pink"))
# Subgroups whose first word is what a person would say; of others, all words are.
TOPICS = ("animal", "face", "flag", "food", "hand", "person", "place", "plant", "transport")


def plain_name(name: str, tone: int) -> str:
    """A name as one would write it: "flag: France" is "flag of France"; a skin tone comes last."""
    name = re.sub("[“”’]", lambda quote: {"’": "'"}.get(quote[0], '"'), name)
    kind, _, rest = name.partition(": ")
    if rest:
        join = {"flag": " of ", "keycap": " "}.get(kind, " " if rest.startswith("facing") else " with ")
        name = f"{kind}{join}{rest}"
    return f"{name}, {TONES[tone - 1].replace('-', ' ')} skin tone" if tone else name


def with_article(phrase: str) -> str:
    """ "a" or "an" before a singular; plurals as they are."""
    if phrase.startswith("flag of "):
        return f"the {phrase}"
    head = re.split(r",| with | on | in | of | and ", phrase)[0]
    if head.endswith("s") and not head.endswith(("ss", "us", "is")):
        return phrase
    vowel = re.match(r"[aeiou]", phrase, re.IGNORECASE) and not re.match(r"(uni|uk|us|ut|eu|ew|one)", phrase.lower())
    return f"{'an' if vowel else 'a'} {phrase}"


def topic(subgroup: str) -> str:
    first = subgroup.split("-")[0]
    return first if first in TOPICS else subgroup.replace("-", " ")


def main_color(image: Image.Image) -> str | None:
    """The colour of what isn't page, one of COLORS, if 60 % of it has one."""
    hsv = np.asarray(image.resize((48, 48), Image.Resampling.BOX).convert("HSV")).reshape(-1, 3).astype(int)
    hue, saturation, value = hsv[(hsv[:, 1] > 25) | (hsv[:, 2] < 235)].T
    names = np.full(len(hue), "red", dtype="U8")  # also what is left past pink
    for end, name in reversed(HUE_ENDS):
        names[hue < end] = name
    names[(names == "red") & (saturation < 130) & (value > 200)] = "pink"
    names[np.isin(names, ("red", "orange", "yellow")) & (value < 170)] = "brown"
    names[saturation < 45] = np.where(value < 190, "gray", "white")[saturation < 45]
    names[value < 75] = "black"
    found, counts = np.unique(names, return_counts=True)
    color = str(found[counts.argmax()]) if len(found) and counts.max() >= 0.6 * len(names) else None
    return None if color == "white" else color  # paper on a white page


def captions(item: dict, color: str | None, count: int, seed: int) -> list[str]:
    """`count` captions of one line of items.jsonl, without repetition."""
    name, style = plain_name(item["name"], item["tone"]), item["set"]
    a_name, a_style = with_article(name), with_article(style)
    rules = [
        name,
        a_name,
        f"{name} emoji",
        f"{a_name} emoji",
        f"{a_name} emoji in {style} style",
        f"{name}, {style} style",
        f"{a_name} in {style} style",
        f"{a_style} drawing of {a_name}",
        f"{a_style} emoji of {a_name}",
        f"a picture of {a_name}",
        f"{topic(item['subgroup'])}: {name}",
        f"{topic(item['subgroup'])}: {name}, {style} style",
    ]
    if color and not re.search(rf"\b({'|'.join(COLORS)}|grey|white|flag|skin)\b", name):
        colored = f"{color} {name}"
        rules += [with_article(colored), f"{colored}, {style} style", f"{style}: {colored}"]
        rules += [f"{a_style} drawing of {with_article(colored)}"]
    digest = hashlib.sha256(f"{seed}:{item['file']}".encode()).digest()
    order = np.random.default_rng(np.frombuffer(digest, np.uint32)).permutation(len(rules))
    return list(dict.fromkeys([f"{style}: {name}", *(rules[i] for i in order)]))[:count]


def caption_dataset(
    data: Path, count: int, seed: int, classes: list[str] | None = None, skip_classes: list[str] = ()
) -> dict[str, int]:
    """Write both files; returns the images in each split.

    Raises:
        OSError: the folder has no data set.
        ValueError: no image matches.
    """

    def matches(item: dict, globs: list[str]) -> bool:
        return any(fnmatch(f"{item['subgroup']}_{item['set']}", glob) for glob in globs)

    items = [json.loads(line) for line in (data / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    items = [item for item in items if matches(item, classes or ["*"]) and not matches(item, skip_classes)]
    if not items:
        raise ValueError(f"no image of {data} is of --classes {' '.join(classes or ['*'])} and none of --skip-classes")
    lines = {"train": [], "val": []}
    for item in tqdm(items, unit="img", disable=None):
        with Image.open(data / item["file"]) as image:
            color = main_color(image)
        row = {"image": item["file"], "captions": captions(item, color, count, seed)}
        lines[item["split"]].append(json.dumps(row, ensure_ascii=False) + "\n")
    for split, rows in lines.items():
        with atomic_file(data / f"captions_{split}.jsonl") as file:
            file.write("".join(rows).encode())
    return {split: len(rows) for split, rows in lines.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder made by build_emoji_dataset.py")
    add("--classes", nargs="+", metavar="GLOB", help="only classes (SUBGROUP_SET, as food-fruit_noto) that match")
    add("--skip-classes", nargs="+", metavar="GLOB", default=[], help="classes to leave out")
    add("--count", type=int, default=6, help="captions per image (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice of rules (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("--count has to be 1 or more")
    try:
        counts = caption_dataset(**vars(args))
    except OSError as error:
        sys.exit(f"error: {error}; --data is a folder made by scripts/build_emoji_dataset.sh")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(", ".join(f"{args.data}/captions_{split}.jsonl: {count} images" for split, count in counts.items()))


if __name__ == "__main__":
    main()
