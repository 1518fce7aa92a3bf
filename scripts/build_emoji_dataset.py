"""Build the demo data set: four emoji sets as square RGB pictures on white, in an ImageFolder layout.

    bash scripts/build_emoji_dataset.sh                       # fetches the sources, then runs this file
    python scripts/build_emoji_dataset.py --source node_modules --font NotoColorEmoji.ttf

The result (see ATTRIBUTION.md for authors and licences):

    data/emoji/{train,val}/<class_id>_<subgroup>_<set>/<hexcode>_<set>.png
    data/emoji/classes.json     the 392 class names in id order, the 98 subgroups and the 4 sets
    data/emoji/items.jsonl      one object an image: file, name, hexcode, set, subgroup, group, split, class_id, ...
    data/emoji/build.json       what the folder was built from
    data/emoji/preview.png      a contact sheet

class_id = 4 * subgroup_id + set_id. Some classes have no pictures at all (Fluent has no country flags) and many have
none in the validation split: every class directory exists all the same, so the ids come out alike in both splits
(torchvision's ImageFolder needs allow_empty=True). A run that was interrupted goes on where it stopped.

Needs requirements-data.txt besides the project's own requirements.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pool
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

try:
    import cairosvg
except (ImportError, OSError) as error:  # OSError: the package is there, the cairo library isn't
    sys.exit(f"error: CairoSVG can't be used ({error}): pip install -r requirements-data.txt; apt install libcairo2")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokenizer.files import atomic_file  # noqa: E402

DEBIAN_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SETS = ("twemoji", "openmoji", "fluent", "noto")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

FILL = 0.9  # share of the canvas that the longer side of a picture takes
# Longer side of a typical picture, as a share of the set's own canvas. A small picture (a small square, a dot) is
# enlarged no further than MAX_GROWTH times what a typical one is, so that it stays a small one.
TYPICAL = {"twemoji": 1.0, "openmoji": 0.7, "fluent": 0.875, "noto": 0.89}
MAX_GROWTH = 1.3

STRIKE = 109  # the one size in which the font holds its bitmaps
ADVANCE = 136  # and the width of one of them in pixels

# Fluent's files carry names, not code points; these differ from the Unicode names by more than punctuation.
FLUENT_NAMES = {
    "deaf man": "man deaf",
    "deaf person": "person deaf",
    "deaf woman": "woman deaf",
    "elf": "person elf",
    "enraged face": "pouting face",
    "face with crossed-out eyes": "knocked-out face",
    "fairy": "person fairy",
    "genie": "person genie",
    "keycap: #": "keycap hashtag",
    "keycap: *": "keycap asterisk",
    "mage": "person mage",
    "man: blond hair": "man blonde hair",
    "men with bunny ears": "man with bunny ears",
    "men wrestling": "man wrestling",
    "mermaid": "woman merpeople",
    "merman": "man merpeople",
    "merperson": "person merpeople",
    "people with bunny ears": "person with bunny ears",
    "people wrestling": "person wrestling",
    "person: blond hair": "person blonde hair",
    "phoenix": "phoenix bird",
    "red triangle pointed up": "red triangle",
    "smiling face with open hands": "hugging face",
    "stuffed flatbread": "stuffed bread",
    "superhero": "person superhero",
    "supervillain": "person supervillain",
    "vampire": "person vampire",
    "woman: blond hair": "woman blonde hair",
    "women with bunny ears": "woman with bunny ears",
    "women wrestling": "woman wrestling",
    "zombie": "person zombie",
}


class SourceError(RuntimeError):
    """A source is missing or isn't what it should be."""


@dataclass(frozen=True)
class Item:
    """One picture to make."""

    name: str  # without skin tone
    hexcode: str
    tone: int  # 0 for neutral, 1 (light) to 5 (dark)
    group: str
    subgroup: str
    subgroup_id: int
    set: str
    source: str  # SVG path, or the text itself for the font
    split: str = "train"

    @property
    def class_id(self) -> int:
        return len(SETS) * self.subgroup_id + SETS.index(self.set)

    @property
    def file(self) -> str:
        return f"{self.split}/{class_folder(self.class_id, self.subgroup, self.set)}/{self.hexcode}_{self.set}.png"

    def record(self) -> dict:
        """The item's line of items.jsonl."""
        fields = asdict(self)
        del fields["source"]  # differs from machine to machine
        return {"file": self.file, "class_id": self.class_id, **fields}


def class_folder(class_id: int, subgroup: str, set_name: str) -> str:
    return f"{class_id:03d}_{subgroup}_{set_name}"


def short_hex(hexcode: str) -> str:
    """Code points without leading zeros and variation selectors, which the sets write each in its own way."""
    return "-".join(part.lstrip("0") for part in hexcode.lower().split("-") if part != "fe0f")


def name_key(name: str) -> str:
    """Letters and digits of a name, without accents."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", plain)


def split_key(name: str) -> str:
    """What the split is by: a name less gender and direction, as those variants are near copies of one another."""
    return (
        re.sub(r"\b(man|woman|person|men|women|people|boy|girl)\b|\bfacing right\b", "", name).strip(" :,") or "person"
    )


def digest(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big")


# --- choosing -------------------------------------------------------------------------------------------------------


def load_emoji(path: Path, tones: int, seed: int) -> list[dict]:
    """Unicode's emoji from OpenMoji's table, with `tones` skin-toned variants each and no skin-tone pairs."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows = [r for r in rows if not r["group"].startswith("extras-") and r["group"] != "component"]
    subgroups = list(dict.fromkeys(r["subgroups"] for r in rows))
    names = {r["hexcode"]: r["annotation"] for r in rows}
    chosen = []
    for row in rows:
        if "," in str(row["skintone"]):
            continue
        tone = int(row["skintone"] or 0)
        name = row["annotation"]
        if tone:
            name = names.get(row["skintone_base_hexcode"], name.split(":")[0])
            # which tones an emoji keeps is drawn by its name, so that all five are about equally frequent
            order = sorted(range(1, 6), key=lambda t, name=name: digest(seed, f"{name}/{t}"))
            if tone not in order[:tones]:
                continue
        chosen.append(
            {
                "hexcode": row["hexcode"],
                "name": name,
                "tone": tone,
                "group": row["group"],
                "subgroup": row["subgroups"],
                "subgroup_id": subgroups.index(row["subgroups"]),
            }
        )
    return chosen


def fluent_index(folder: Path) -> dict[tuple[str, int], Path]:
    """SVG path by (name key, tone)."""
    index = {}
    for path in sorted(folder.glob("*.svg")):
        match = re.fullmatch(r"(.+?)(?:-flat)?(?:-(default|medium-light|medium-dark|light|medium|dark))?", path.stem)
        stem, tone = match.groups()
        tone_id = TONES.index(tone) + 1 if tone in TONES else 0
        index[name_key(stem), tone_id] = path
    return index


class Noto:
    """Pictures from the font. Sequences (flags, families, professions) need libraqm's shaping."""

    def __init__(self, path: Path):
        if not features.check("raqm"):
            raise SourceError("this Pillow has no libraqm, which joins emoji sequences: pip install --upgrade pillow")
        try:
            self.font = ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise SourceError(f"{path}: not the bitmap version (CBDT) of Noto Color Emoji ({error})") from error

    def draw(self, text: str) -> Image.Image:
        image = Image.new("RGBA", (ADVANCE, ADVANCE))
        ImageDraw.Draw(image).text((0, 0), text, font=self.font, embedded_color=True)
        return image

    def has(self, text: str) -> bool:
        """Whether the font shows `text` as one picture."""
        return round(self.font.getlength(text)) == ADVANCE and self.draw(text).getbbox() is not None


def choose_items(source: Path, font: Path, tones: int, seed: int) -> list[Item]:
    """Every picture that the four sets have of the chosen emoji.

    Raises SourceError for a source that isn't there.
    """
    table = source / "openmoji/data/openmoji.json"
    folders = {
        "twemoji": source / "@twemoji/svg",
        "openmoji": source / "openmoji/color/svg",
        "fluent": source / "fluentui-emoji/icons/flat",
    }
    for path in (table, *folders.values()):
        if not path.exists():
            raise SourceError(
                f"{path} is missing: give the folder with the npm packages by --source, "
                "or let scripts/build_emoji_dataset.sh fetch them"
            )
    if not font.is_file():
        raise SourceError(f"{font} is missing: apt install fonts-noto-color-emoji, or name the font by --font")
    by_hex = {s: {short_hex(p.stem): p for p in sorted(folders[s].glob("*.svg"))} for s in ("twemoji", "openmoji")}
    fluent = fluent_index(folders["fluent"])
    noto = Noto(font)

    items = []
    for row in load_emoji(table, tones, seed):
        text = "".join(chr(int(part, 16)) for part in row["hexcode"].split("-"))
        key = name_key(FLUENT_NAMES.get(row["name"], row["name"]))
        found = {s: by_hex[s].get(short_hex(row["hexcode"])) for s in by_hex}
        found["fluent"] = fluent.get((key, row["tone"]))
        found["noto"] = text if noto.has(text) else None
        items += [Item(**row, set=s, source=str(found[s])) for s in SETS if found[s]]
    for s in SETS:
        if not any(i.set == s for i in items):
            hint = "; it has to be the bitmap version (CBDT) of Noto Color Emoji" if s == "noto" else ""
            raise SourceError(f"no emoji was found in {folders.get(s, font)}{hint}")
    return items


def validation_keys(items: list[Item], fraction: float, seed: int) -> set[str]:
    """Split keys that are held out: `fraction` of them, at most twice that of any one subgroup."""
    subgroup = {split_key(i.name): i.subgroup for i in items}
    size = Counter(subgroup.values())
    wanted = round(fraction * len(subgroup))
    taken, held = Counter(), set()
    for key in sorted(subgroup, key=lambda k: digest(seed, k)):
        if len(held) < wanted and taken[subgroup[key]] + 1 <= 2 * fraction * size[subgroup[key]]:
            taken[subgroup[key]] += 1
            held.add(key)
    return held


# --- drawing --------------------------------------------------------------------------------------------------------


def load_art(item: Item, pixels: int, noto: Noto) -> Image.Image:
    """The picture on its own canvas, RGBA [pixels, pixels] from SVG and [ADVANCE, ADVANCE] from the font."""
    if item.set == "noto":
        return noto.draw(item.source)
    png = cairosvg.svg2png(url=item.source, output_width=pixels, output_height=pixels)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def fit(art: Image.Image, size: int, typical: float) -> Image.Image:
    """Centre `art` on a white square so that its longer side takes FILL of it; RGB [size, size]."""
    box = art.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise ValueError("the picture is empty")
    longer = max(box[2] - box[0], box[3] - box[1])
    scale = FILL * size / max(longer, typical * max(art.size) / MAX_GROWTH)
    width, height = (max(1, round(scale * side)) for side in (box[2] - box[0], box[3] - box[1]))
    # Pillow resizes RGBA with premultiplied alpha, so transparent black doesn't bleed into the edges
    art = art.crop(box).resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(art, ((size - width) // 2, (size - height) // 2))
    return canvas.convert("RGB")


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_atomic(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


_worker = {}


def _start_worker(out: Path, size: int, font: Path) -> None:
    _worker.update(out=out, size=size, noto=Noto(font))


def _make(item: Item) -> str | None:
    """Draw one picture; returns what was wrong with it, if something was."""
    try:
        art = load_art(item, 2 * _worker["size"], _worker["noto"])
        image = fit(art, _worker["size"], TYPICAL[item.set])
    except Exception as error:  # a broken SVG fails in many ways inside the renderer
        return f"{item.hexcode} of {item.set} ({error!r})"
    write_atomic(_worker["out"] / item.file, png_bytes(image))
    return None


def contact_sheet(out: Path, items: list[Item], seed: int, rows: int = 16, cell: int = 96) -> Image.Image:
    """A sample of emoji that all sets have, a row holding four of them in each set."""
    sets = defaultdict(dict)
    for item in items:
        sets[item.hexcode][item.set] = item
    full = sorted((h for h in sets if len(sets[h]) == len(SETS)), key=lambda h: digest(seed, h))[: 4 * rows]
    sheet = Image.new("RGB", (4 * len(SETS) * cell, rows * cell), "white")
    for n, hexcode in enumerate(full):
        for s, set_name in enumerate(SETS):
            with Image.open(out / sets[hexcode][set_name].file) as image:
                image = image.resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(image, (((n % 4) * len(SETS) + s) * cell, n // 4 * cell))
    return sheet


# --- building -------------------------------------------------------------------------------------------------------


def build(
    source: Path,
    font: Path,
    out: Path,
    size: int = 192,
    val_fraction: float = 0.1,
    tones: int = 1,
    seed: int = 0,
    workers: int = 1,
) -> list[Item]:
    """Make the data set in `out`; returns its items.

    Raises SourceError for a missing source, and for a folder that was built from other sources or settings.
    """
    items = choose_items(source, font, tones, seed)
    held = validation_keys(items, val_fraction, seed)
    items = [replace(i, split="val" if split_key(i.name) in held else "train") for i in items]
    by_id = {i.subgroup_id: i.subgroup for i in items}
    subgroups = [by_id[n] for n in sorted(by_id)]

    packages = ("@twemoji/svg", "openmoji", "fluentui-emoji")
    versions = {p: json.loads((source / p / "package.json").read_text())["version"] for p in packages}
    versions["font_sha256"] = hashlib.sha256(font.read_bytes()).hexdigest()
    settings = {"size": size, "val_fraction": val_fraction, "tones": tones, "seed": seed, "sources": versions}
    record = out / "build.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        raise SourceError(
            f"{out} was built from other sources or settings ({record}): remove it, or give another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(record, json.dumps(settings, indent=2).encode())

    for split in ("train", "val"):
        for n, subgroup in enumerate(subgroups):
            for s, set_name in enumerate(SETS):
                (out / split / class_folder(len(SETS) * n + s, subgroup, set_name)).mkdir(parents=True, exist_ok=True)
    draw_all(items, out, size, font, workers)

    items = [i for i in items if (out / i.file).exists()]
    classes = {"classes": [f"{g}_{s}" for g in subgroups for s in SETS], "subgroups": subgroups, "sets": SETS}
    write_atomic(out / "classes.json", json.dumps(classes, indent=1).encode())
    lines = "".join(json.dumps(i.record(), ensure_ascii=False) + "\n" for i in items)
    write_atomic(out / "items.jsonl", lines.encode())
    write_atomic(out / "preview.png", png_bytes(contact_sheet(out, items, seed)))
    return items


def draw_all(items: list[Item], out: Path, size: int, font: Path, workers: int) -> None:
    """Draw the pictures that aren't there yet; names on stderr those that can't be drawn."""
    todo = [i for i in items if not (out / i.file).exists()]
    with ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(Pool(workers, _start_worker, (out, size, font)))
            results = pool.imap_unordered(_make, todo, chunksize=16)
        else:
            _start_worker(out, size, font)
            results = map(_make, todo)
        bar = tqdm(results, total=len(items), initial=len(items) - len(todo), unit="img", disable=None, mininterval=1)
        problems = [problem for problem in bar if problem]
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)


def summary(items: list[Item]) -> str:
    """Counts by set and split, as a small table."""
    count = Counter((i.set, i.split) for i in items)
    lines = [f"{'set':10}{'train':>8}{'val':>8}"]
    lines += [f"{s:10}{count[s, 'train']:8}{count[s, 'val']:8}" for s in SETS]
    total = Counter(i.split for i in items)
    lines.append(f"{'all':10}{total['train']:8}{total['val']:8}")
    names, classes = {i.name for i in items}, {i.class_id for i in items}
    lines.append(f"{len(items)} images of {len(names)} names in {len(classes)} classes")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="the node_modules folder with the three npm packages")
    add("--font", type=Path, default=DEBIAN_FONT, help="NotoColorEmoji.ttf, bitmap version (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "data/emoji", help="default: data/emoji in the repository")
    add("--size", type=int, default=192, help="side of the pictures in pixels (default: %(default)s)")
    add("--val-fraction", type=float, default=0.1, help="share of the names that is held out (default: %(default)s)")
    add("--tones", type=int, default=1, choices=range(6), help="skin tones besides the neutral one (default: 1)")
    add("--seed", type=int, default=0, help="of the split and of the choice of tones (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    args = parser.parse_args()
    if args.size < 16 or not 0 <= args.val_fraction < 1 or args.workers < 1:
        parser.error("--size has to be 16 or more, --val-fraction in [0, 1) and --workers 1 or more")
    try:
        items = build(**vars(args))
    except (SourceError, OSError) as error:
        sys.exit(f"error: {error}")
    print(summary(items))


if __name__ == "__main__":
    main()
