"""Prompts: from the command line, from stdin, or from a file in any of the forms that they come in."""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from autoregressive.sample.options import OptionError, Options, TextOptions, near


def require_text(options: Options) -> None:
    """Raises OptionError for a class-conditional model, which has no prompts to sample."""
    if options.model.gpt_type != "t2i":
        raise OptionError(f"model.gpt_type is {options.model.gpt_type}, and this script samples prompts (t2i)")


@dataclass(frozen=True)
class Prompts:
    """What to sample, one image each.

    Attributes:
        name: for the run folder: the file's name in lower case, without its ending.
        source: for messages: the file, or the option.
        texts: runs of white space are one space, so that each is one line. May be empty: an encoder takes that, too.
        image_ids: of the pictures that the prompts describe, where the file tells (a column or key `image_id`).
        skipped: how many empty lines the file had.
    """

    name: str
    source: str
    texts: list[str]
    image_ids: list[int | str | None]
    skipped: int = 0

    def first(self, count: int) -> "Prompts":
        """The first `count` of them."""
        return replace(self, texts=self.texts[:count], image_ids=self.image_ids[:count])

    def notes(self, wanted: int | None = None) -> list[str]:
        """What a user should know about them: lines skipped, prompts that are empty, fewer than were wanted."""
        told, count = [], len(self.texts)
        if self.skipped:
            told.append(f"{self.source}: {number(self.skipped, 'empty line')} skipped")
        empty = [index for index, text in enumerate(self.texts) if not text]
        if empty:
            told.append(
                f"{self.source}: {number(len(empty), 'empty prompt')} (index {few(empty)}), sampled from no words"
            )
        if wanted is not None and count < wanted:
            told.append(f"{self.source}: {number(count, 'prompt')}, so {count} images and not {wanted}")
        return told

    def digest(self) -> str:
        """SHA-256 of the texts, in their order."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """LlamaGen's captions.txt and result.jsonl, as bytes; image paths are relative to the run folder."""
        lines = []
        for index, (text, image_id) in enumerate(zip(self.texts, self.image_ids, strict=True)):
            line = {"text": text, "image_path": f"images/{index:06d}.png"}
            lines.append(line if image_id is None else line | {"image_id": image_id})
        captions = "".join(f"{text}\n" for text in self.texts)
        result = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return {"captions.txt": captions.encode(), "result.jsonl": result.encode()}


def read_prompts(options: TextOptions) -> Prompts:
    """The prompts that the options name.

    Raises:
        OptionError: there are none, or the file can't be read as what its ending says; with line or byte.
    """
    if options.prompts:
        return _prompts("prompts", "text.prompts", [(text, None) for text in options.prompts])
    if options.prompt_file is None:
        raise OptionError(
            'no prompts are given: name a file by --prompts FILE (text.prompt_file), or give them by --prompt "a red '
            'apple" (text.prompts)'
        )
    if options.prompt_file == "-":
        return _prompts("stdin", "stdin", _lines(_decoded(sys.stdin.buffer.read(), "stdin")))
    path = Path(options.prompt_file)
    ending = path.suffix.lower()
    if ending not in _READERS:
        hint = "; scripts/coco_prompts.py makes a .tsv of COCO's annotations" if ending == ".json" else ""
        raise OptionError(
            f"text.prompt_file: {path}: prompts are read from {', '.join(_READERS)}, not from "
            f"{ending or 'a file without ending'}{near(ending, list(_READERS))}{hint}"
        )
    try:
        text = _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise OptionError(f"text.prompt_file: {path}: {error.strerror or error}") from error
    return _prompts(path.stem.lower(), str(path), _READERS[ending](text, path) if text.strip() else [])


_Row = tuple[str, int | str | None] | None  # a prompt and its image id; None for an empty line


def _prompts(name: str, source: str, rows: Iterable[_Row]) -> Prompts:
    rows = list(rows)
    found = [(" ".join(row[0].split()), row[1]) for row in rows if row is not None]
    if not found:
        raise OptionError(f"{source}: no prompts in it")
    for index, (text, _) in enumerate(found):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise OptionError(f"{source}: the prompt with index {index} is not Unicode text: {text!r}")
    return Prompts(name, source, [text for text, _ in found], [image for _, image in found], len(rows) - len(found))


def _decoded(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{source}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}. Convert it, for "
            f"example by `iconv -f latin1 -t utf-8`"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _lines(text: str, path: Path | None = None) -> list[_Row]:
    return [(line, None) if line.strip() else None for line in text.removesuffix("\n").split("\n")]


def _jsonl(text: str, path: Path) -> Iterator[_Row]:
    for at, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        if not line.strip():
            yield None
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise OptionError(f"{path}, line {at}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise OptionError(f'{path}, line {at}: expected {{"text": "a prompt", ...}}, not {line[:80]}')
        yield row["text"], row.get("image_id")


def _table(text: str, path: Path) -> Iterator[_Row]:
    """Rows under a header with a column Prompt, and maybe one image_id.

    LlamaGen's files are separated by tabs, even its coco_captions.csv, whose one column is full of unquoted commas. So
    only a .csv whose header has commas and no tab is separated by commas.
    """
    header = text.split("\n", 1)[0]
    comma = path.suffix.lower() == ".csv" and "," in header and "\t" not in header
    end = "end of file"  # seen as a row of its own, unless an open quotation mark swallowed it
    text = text.removesuffix("\n") + f"\n{end}\n"
    reader = csv.reader(io.StringIO(text), delimiter="," if comma else "\t")
    columns = [name.strip() for name in next(reader)]
    lowered = [name.lower() for name in columns]
    if "prompt" not in lowered:
        raise OptionError(f"{path}: no column Prompt; its columns: {', '.join(columns) or 'none'}")
    prompt = lowered.index("prompt")
    image = lowered.index("image_id") if "image_id" in lowered else None
    rows, line = [], reader.line_num + 1
    try:
        for row in reader:
            rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise OptionError(f"{path}, line {line}: {error}; is a quotation mark left open?") from error
    line, last = rows.pop()
    if last != [end]:
        raise OptionError(f"{path}, line {line}: a quotation mark is left open")
    for line, row in rows:
        if not row:
            yield None
            continue
        if not prompt < len(row) <= len(columns):
            mark = "comma" if comma else "tab"
            raise OptionError(
                f"{path}, line {line}: {number(len(row), 'column')} of the header's {len(columns)}, with Prompt as "
                f"number {prompt + 1}; a prompt with a {mark} in it needs quotation marks"
            )
        image_id = row[image] if image is not None and len(row) > image else None
        yield row[prompt], int(image_id) if image_id and image_id.isdecimal() else image_id or None


_READERS = {".txt": _lines, ".tsv": _table, ".csv": _table, ".jsonl": _jsonl}


def tell(notes: Iterable[str]) -> None:
    """Notes for the user, on stderr."""
    for note in notes:
        tqdm.write(f"note: {note}", file=sys.stderr)  # not through a progress bar


def number(count: int, noun: str) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def few(items: Iterable[object], separator: str = ", ") -> str:
    """The first three, and whether there are more."""
    items = list(map(str, items))
    return separator.join([*items[:3], "..."] if len(items) > 3 else items)
