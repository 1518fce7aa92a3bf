"""The folder of a sampling run, which can be killed at any moment and started again.

    run.json            the whole configuration, versions, timings, memory (`status` is "complete" at the end)
    images/000000.png   one file per image, each appearing only once it is whole
    tokens/000000.npy   the tokens that the image is decoded from, [N], in the smallest unsigned integers that hold the
                        codebook; written before the image. A run of decode_tokens.py has none
    labels.npy ...      what the caller records about the images
    samples.npz         all images as one array `arr_0`, uint8 [N, H, W, 3], for evaluation

Which images are missing is read off the folder itself; nothing else is remembered about progress.
"""

import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from tokenizer.files import atomic_file, remove_partial, write_json
from tokenizer.tokenizer_image.images import save_image_atomic

try:
    import fcntl
except ImportError:  # Windows, where folders can't be locked
    fcntl = None

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
WRITERS = min(8, os.cpu_count() or 1)  # PNG coding runs outside Python's lock


class RunError(RuntimeError):
    """A run that cannot start or go on; the message names the folder and the way out."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError into a RunError that says what to do: no space, no permission, a file-size limit."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Make room or choose another folder (--sample-dir); "
            f"the same command then goes on where it stopped"
        ) from error


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def read_record(run: Path) -> dict[str, Any]:
    """What run.json says of a run. Raises RunError if there is none that can be read."""
    path = run / "run.json"
    try:
        record = json.loads(path.read_text())
        if not {"settings", "status"} <= record.keys():
            raise ValueError("settings or status are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: not readable as a run ({error}); expected the folder of a sampling run") from error
    return record


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings of a run that differ from those wanted, {key: (there, here)}.

    A key that is missing counts as None: a run made before there was an option had its default.
    """
    here = json.loads(json.dumps(here))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    return {key: (there.get(key), here.get(key)) for key in keys}


class RunFolder:
    """One run of `total` square images of `image_size` pixels, with their tokens if `keeps_tokens`.

    Every process may read and write images and tokens; the other methods are for the main process alone.
    """

    def __init__(self, path: str | Path, total: int, image_size: int, *, keeps_tokens: bool = True):
        self.path = Path(path)
        self.images = self.path / "images"
        self.tokens = self.path / "tokens"
        self.keeps_tokens = keeps_tokens
        self.npz = self.path / "samples.npz"
        self.total = total
        self.image_size = image_size
        self.record: dict[str, Any] = {}
        self._lock = -1

    def image(self, index: int) -> Path:
        """Where an image belongs."""
        return self.images / f"{index:06d}.png"

    def token_file(self, index: int) -> Path:
        """Where the tokens of an image belong."""
        return self.tokens / f"{index:06d}.npy"

    def is_complete(self, settings: Mapping[str, Any]) -> bool:
        """Whether this very run is done, by its own word; looks at no image, and opens nothing."""
        try:
            record = read_record(self.path)
        except RunError:
            return False  # which `open` explains
        return not differing(record["settings"], settings) and record["status"] == "complete" and self.npz.exists()

    def open(self, settings: Mapping[str, Any], details: Mapping[str, Any], files: Mapping[str, bytes]) -> list[int]:
        """Start the run, or go on with it.

        Args:
            settings: {dotted name: JSON value} of all that the images depend on; an earlier run here must agree.
            details: more to put into run.json, such as versions and devices.
            files: {name: content} to lie beside the images, such as the labels.

        Returns:
            Indices of the images that are missing, ascending.

        Raises:
            RunError: the folder can't be written, belongs to another run, or another process is at work in it.
        """
        try:
            with explained(self.path):
                self.images.mkdir(parents=True, exist_ok=True)
                if self.keeps_tokens:
                    self.tokens.mkdir(exist_ok=True)
                self._take_lock()
            earlier = self._earlier(settings)
            with explained(self.path):
                for folder in (self.path, self.images, self.tokens):  # what a killed process left half-written
                    remove_partial(folder)
                for name, content in files.items():
                    with atomic_file(self.path / name) as file:
                        file.write(content)
                missing = self._missing()
                if not missing and earlier.get("status") in ("sampled", "complete"):
                    self.record = earlier
                else:
                    self.record = {
                        "status": "sampling",
                        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                        "settings": dict(settings),
                        **details,
                        "images_before": self.total - len(missing),
                        "earlier_sessions": self._sessions(earlier, self.total - len(missing)),
                    }
                    self._write_record()
        except BaseException:
            self.close()
            raise
        return missing

    @staticmethod
    def _sessions(earlier: dict[str, Any], done: int) -> list[dict[str, Any]]:
        """The starts of the job before this one. A killed one couldn't tell its images; they are counted now."""
        if not earlier:
            return []
        last = {key: value for key, value in earlier.items() if key not in ("settings", "status", "earlier_sessions")}
        last.setdefault("images", max(0, done - earlier["images_before"]))
        return [*earlier["earlier_sessions"], last]

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{self.path}: another process is at work in this folder; wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks

    def _earlier(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What run.json says of an earlier run, checked to be this one; empty if there was none."""
        path = self.path / "run.json"
        anew = f"to start anew, delete {self.path} or choose another folder (--sample-dir)"
        try:
            earlier = json.loads(path.read_text())
            there = dict(earlier["settings"])
        except FileNotFoundError:
            if any(self.images.glob("*.png")):
                raise RunError(
                    f"{self.path}: holds images but no run.json, so not a run to go on with; {anew}"
                ) from None
            return {}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunError(f"{path}: not readable as a run ({error!r}); {anew}") from error
        differ = differing(there, settings)
        if differ:
            told = "; ".join(f"{key} is {old!r} there and {new!r} here" for key, (old, new) in differ.items())
            raise RunError(f"{self.path}: holds a run with other settings: {told}. Give it the same to go on; {anew}")
        return earlier

    def _missing(self) -> list[int]:
        with ThreadPoolExecutor(WRITERS) as pool:
            whole = pool.map(self._is_whole, range(self.total), chunksize=256)
            return [index for index, good in enumerate(whole) if not good]

    def _is_whole(self, index: int) -> bool:
        """Both ends of the PNG and its size are right, and there are tokens. The rest is, since files appear whole."""
        try:
            if self.keeps_tokens and not self.token_file(index).stat().st_size:
                return False
            with open(self.image(index), "rb") as file:
                start = file.read(24)
                file.seek(-len(PNG_END), os.SEEK_END)
                end = file.read()
        except OSError:
            return False
        return (
            start[:8] == PNG_START and struct.unpack(">II", start[16:24]) == (self.image_size,) * 2 and end == PNG_END
        )

    def write_images(self, indices: Sequence[int], images: np.ndarray, tokens: np.ndarray | None = None) -> None:
        """Write uint8 [B, H, W, 3] and their tokens, [B, N], under their indices.

        Raises RunError if the folder won't take them.
        """
        with explained(self.images), ThreadPoolExecutor(WRITERS) as pool:
            if self.keeps_tokens:
                list(pool.map(self._write_tokens, indices, tokens))
            list(pool.map(save_image_atomic, map(self.image, indices), images))

    def _write_tokens(self, index: int, tokens: np.ndarray) -> None:
        with atomic_file(self.token_file(index)) as file:
            file.write(npy_bytes(tokens))

    def read_tokens(self, index: int) -> np.ndarray:
        """The tokens of an image, [N]. Raises RunError if they are not there."""
        path = self.token_file(index)
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise RunError(
                f"{path}: no readable tokens ({error}); run the sampling command again: it makes them"
            ) from error

    def count(self) -> int:
        """How many images there are, of all processes."""
        return sum(entry.name.endswith(".png") and entry.name[0] != "." for entry in os.scandir(self.images))

    def read_image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises RunError if the file is damaged."""
        path = self.image(index)
        try:
            with Image.open(path) as image:
                array = np.asarray(image)
        except (OSError, SyntaxError) as error:
            raise RunError(
                f"{path}: damaged ({error}); delete it and run the same command to sample it again"
            ) from error
        expected = (self.image_size, self.image_size, 3)
        if array.shape != expected or array.dtype != np.uint8:
            raise RunError(f"{path}: {array.dtype} {array.shape}, expected uint8 {expected}; delete it and run again")
        return array

    def write_npz(self) -> None:
        """Pour all PNGs into samples.npz, each read once and few in memory; the same images make the same bytes."""
        shape = (self.total, self.image_size, self.image_size, 3)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with (
            explained(self.npz),
            atomic_file(self.npz) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry,  # dated 1980, always
            ThreadPoolExecutor(WRITERS) as pool,
            tqdm(total=self.total, desc="npz", unit=" images", leave=False, disable=None) as bar,
        ):
            entry.write(header.getvalue())
            for start in range(0, self.total, 256):
                for image in pool.map(self.read_image, range(start, min(start + 256, self.total))):
                    entry.write(image.tobytes())
                    bar.update()

    def note(self, **values: Any) -> None:
        """Add to run.json."""
        self.record |= values
        with explained(self.path / "run.json"):
            self._write_record()

    def _write_record(self) -> None:
        write_json(self.path / "run.json", self.record)

    def close(self) -> None:
        """Let others at the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def bar_interval() -> float:
    """Seconds between two drawings of a progress bar: often on a terminal, seldom in a log."""
    return 0.5 if os.isatty(2) else 30.0
