"""Sets of images, and what a network makes of them: read, shared out among processes, cached beside the images."""

import fnmatch
import hashlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from autoregressive.sample.run_folder import bar_interval
from evaluations.extractors import INCEPTION, EvaluationError, Extractor, folder_state
from tokenizer.files import atomic_file
from tokenizer.tokenizer_image.images import EXTENSIONS, ImageError, center_crop, load_rgb

FORMAT = 1  # of the features; another preprocessing makes them others, and needs another number


@dataclass
class Features:
    """What an extractor made of a set of images; also a file, see :func:`write_features`.

    Attributes:
        extractor: its name.
        identity: of the set of images.
        image_size: what the images were cropped to, 0 if they were not.
        sizes: int [K, 2], the heights and widths that occur.
        features: float32 [N, D].
        logits: float32 [N, C], or None if the network has none.
        spatial: float32 [N, S], or None.
    """

    extractor: str
    identity: str
    image_size: int
    sizes: np.ndarray
    features: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.features)


@dataclass
class Statistics:
    """Means and covariances of the Inception network's features, as ADM publishes them for its reference sets.

    `identity` is that of the file; mu_s and sigma_s are for sFID.
    """

    identity: str
    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None


class ImageSet(Protocol):
    """Images in a fixed order.

    Attributes:
        path: as the user named it.
        identity: changes with the images, but not when they are copied.
        state: changes whenever the files do; cached features belong to it.
    """

    path: Path
    identity: str
    state: str

    def __len__(self) -> int: ...

    def cache(self, name: str) -> Path:
        """Where features of this name are kept."""
        ...

    def read(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises ImageError."""
        ...


class FolderImages:
    """All images below a folder, sorted by path.

    Args:
        path: the folder.
        classes: only those in its folders that match one of these patterns; None: all.
    """

    def __init__(self, path: Path, classes: list[str] | None = None):
        self.path, self.classes = path, classes
        self.files = []
        for folder, inner, names in os.walk(path, followlinks=True):
            if folder == str(path) and classes is not None:
                inner[:] = [name for name in inner if any(fnmatch.fnmatch(name, pattern) for pattern in classes)]
                names = []
            self.files += [Path(folder, name) for name in names if _is_image(name)]
        self.files.sort()
        if not self.files:
            among = "" if classes is None else f" in the folders that match {' '.join(classes)}"
            raise EvaluationError(f"{path}: holds no images{among} ({', '.join(sorted(EXTENSIONS))})")
        self._identify(path)

    def _identify(self, folder: Path) -> None:
        identity, state = hashlib.sha256(), hashlib.sha256()
        for file in self.files:
            status = file.stat()
            line = f"{Path(os.path.relpath(file, folder)).as_posix()}\n{status.st_size}\n".encode()
            identity.update(line)
            state.update(line + f"{status.st_mtime_ns}\n".encode())
        self.identity, self.state = identity.hexdigest()[:16], state.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def cache(self, name: str) -> Path:
        selection = "" if self.classes is None else f"-{slug('+'.join(self.classes))}"
        if len(selection) > 100:  # a file's name has its limits
            selection = f"-{hashlib.sha256(selection.encode()).hexdigest()[:16]}"
        return self.path / f"features-{name}{selection}.npz"

    def read(self, index: int) -> np.ndarray:
        return np.asarray(load_rgb(self.files[index]))


class ArrayImages:
    """The images of an npz file: arr_0, uint8 [N, H, W, 3]."""

    def __init__(self, path: Path):
        self.path = path
        self.identity = self.state = _npz_identity(path)
        self.images = _array(path, "arr_0")
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise EvaluationError(
                f"{path}: its arr_0 is {self.images.dtype} {list(self.images.shape)}, expected uint8 [N, H, W, 3]"
            )

    def __len__(self) -> int:
        return len(self.images)

    def cache(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.features-{name}.npz")

    def read(self, index: int) -> np.ndarray:
        return np.array(self.images[index])


def open_set(
    path: Path, extractor: str, image_size: int | None = None, classes: list[str] | None = None
) -> tuple[ImageSet | Features | None, Statistics | None, list[str]]:
    """Find out what a path holds: images, features, or published statistics with or without images.

    Args:
        path: an .npz file, the folder of a sampling run or a folder of images.
        extractor: the name of the one that will look at the images.
        image_size: what they will be cropped to; None: they won't.
        classes: patterns for the names of a folder's folders.

    Returns:
        the images or their features, the statistics, and notes for the user.

    Raises:
        EvaluationError: nothing that can be used, of another extractor, or fewer than two images.
    """
    statistics, notes = None, []
    if path.is_dir():
        found = ArrayImages(_finished_run(path)) if (path / "run.json").exists() else FolderImages(path, classes)
    elif path.suffix == ".npz" and path.is_file():
        names = _npz_names(path)
        if {"mu", "sigma"} <= names:
            if extractor == INCEPTION:
                arrays = {name: _array(path, name) for name in ("mu", "sigma", "mu_s", "sigma_s") if name in names}
                statistics = Statistics(_npz_identity(path), **arrays)
            else:
                notes.append(f"{path}: its mu and sigma are the Inception network's; {extractor} uses its arr_0 alone")
        if "features" in names:
            found = _read_features(path)
            if found.extractor != extractor or found.image_size != (image_size or 0):
                raise EvaluationError(
                    f"{path}: features by {found.extractor}{_cropped(found.image_size)}, not by "
                    f"{extractor}{_cropped(image_size)}; give the images, or the flags that it was made with"
                )
        elif "arr_0" in names:
            found = ArrayImages(path)
        elif statistics is not None:
            return None, statistics, notes
        else:
            raise EvaluationError(
                f"{path}: neither images (arr_0) nor features nor statistics that {extractor} can use; it holds "
                f"{', '.join(sorted(names)) or 'nothing'}"
            )
    else:
        what = "neither a folder nor an .npz file" if path.exists() else "no such file or folder"
        raise EvaluationError(f"{path}: {what}; expected an .npz file, the folder of a run or a folder of images")
    if classes is not None and not isinstance(found, FolderImages):
        raise EvaluationError(f"{path}: classes can be chosen ({' '.join(classes)}) in a folder of images only")
    if len(found) < 2:
        raise EvaluationError(f"{path}: holds {len(found)} images; nothing can be said about fewer than 2")
    return found, statistics, notes


def extract(
    images: ImageSet,
    name: str,
    load: Callable[[], Extractor],
    state: PartialState,
    *,
    batch_size: int,
    workers: int,
    image_size: int | None = None,
) -> Features | None:
    """The features of a set, from the file beside it if that is of these very images. Called by all processes alike.

    Args:
        images: the set.
        name, load: the extractor's name, and a function that gives it.
        state: from `start_processes`.
        batch_size: images that a process computes at a time; which images share a batch depends on nothing else.
        workers: processes that read images for each process.
        image_size: crop the images to squares of that many pixels first, as ADM does.

    Returns:
        The features on the main process, None on the others.

    Raises:
        EvaluationError: an image that can't be read, or another process that failed.
    """
    cache = images.cache(slug(name) + (f"-{image_size}px" if image_size else ""))
    key = json.dumps([FORMAT, name, image_size, images.state, folder_state(name)])
    found = kept_features(cache, key) if state.is_main_process else None
    if broadcast_object_list([found is not None])[0]:
        return found

    torch.backends.cudnn.allow_tf32 = False  # features are to be the same on all GPUs
    batches = own_batches(state, len(images), batch_size)
    with state.local_main_process_first():  # which may have to fetch the weights
        extractor = load().to(state.device)
    parts = gathered(state, _run(images, extractor, batches, state, workers, image_size))
    if not state.is_main_process:
        return None
    outputs = [part for part, _ in parts if part]
    found = Features(
        extractor=name,
        identity=images.identity,
        image_size=image_size or 0,
        sizes=np.array(sorted(set().union(*(sizes for _, sizes in parts)))),
        **{kind: np.concatenate([part[kind] for part in outputs]) for kind in outputs[0]},
    )
    try:
        write_features(cache, found, key)
    except OSError as error:
        print(f"note: the features of {images.path} are not kept: {error}", file=sys.stderr)
    return found


def write_features(path: Path, found: Features, key: str = "") -> None:
    """Write features as an .npz file, which can stand for the images as a reference."""
    arrays = {field.name: getattr(found, field.name) for field in fields(Features)}
    with atomic_file(path) as file:
        np.savez(file, key=key, **{name: array for name, array in arrays.items() if array is not None})


class _Pictures(Dataset):
    """uint8 [H, W, 3] each, or a message about what is wrong with the file."""

    def __init__(self, images: ImageSet, image_size: int | None):
        self.images, self.image_size = images, image_size

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            picture = self.images.read(index)
        except ImageError as error:
            return str(error)
        if self.image_size and picture.shape[:2] != (self.image_size, self.image_size):
            picture = np.asarray(center_crop(Image.fromarray(picture), self.image_size))
        return picture


@torch.inference_mode()
def _run(
    images: ImageSet,
    extractor: Extractor,
    batches: list[list[int]],
    state: PartialState,
    workers: int,
    image_size: int | None,
) -> tuple[dict[str, np.ndarray], set[tuple[int, int]]]:
    """What this process's batches give, and the sizes of its images."""
    parts, sizes = [], set()
    loader = DataLoader(
        _Pictures(images, image_size), batch_sampler=batches, num_workers=min(workers, len(batches)), collate_fn=list
    )
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    with tqdm(
        total=sum(map(len, batches)),
        desc=f"features of {images.path}{share}",
        unit=" images",
        disable=not state.is_main_process,
        mininterval=bar_interval(),
    ) as bar:
        for pictures in loader:
            for picture in pictures:
                if isinstance(picture, str):
                    raise EvaluationError(picture)
            parts.append(_outputs(extractor, pictures, state.device))
            sizes |= {picture.shape[:2] for picture in pictures}
            bar.update(len(pictures))
    return {kind: np.concatenate([part[kind] for part in parts]) for kind in (parts[0] if parts else ())}, sizes


def _outputs(extractor: Extractor, pictures: list[np.ndarray], device: torch.device) -> dict[str, np.ndarray]:
    """The extractor's outputs for one batch, which may hold images of several sizes."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(pictures):
        places.setdefault(picture.shape, []).append(place)
    outputs: dict[str, np.ndarray] = {}
    for same in places.values():
        x = torch.from_numpy(np.stack([pictures[place] for place in same])).to(device).permute(0, 3, 1, 2)
        for kind, value in extractor(x).items():
            outputs.setdefault(kind, np.empty((len(pictures), value.shape[1]), np.float32))[same] = value.cpu().numpy()
    return outputs


def own_batches(state: PartialState, count: int, batch_size: int) -> list[list[int]]:
    """The batches of indices that this process computes; those of all processes, in their order, are 0 to count - 1."""
    starts = range(0, count, batch_size)
    mine = [starts[i] for i in np.array_split(np.arange(len(starts)), state.num_processes)[state.process_index]]
    return [list(range(start, min(start + batch_size, count))) for start in mine]


def gathered(state: PartialState, mine):
    """What all processes have, in their order, on the main process; [None, ...] elsewhere."""
    if state.num_processes == 1:
        return [mine]
    everyone = [None] * state.num_processes
    try:
        torch.distributed.gather_object(mine, everyone if state.is_main_process else None)
    except RuntimeError as error:  # the connection broke
        raise EvaluationError(f"another process has stopped, see its message ({str(error).splitlines()[0]})") from error
    return everyone


def kept_features(path: Path, key: str) -> Features | None:
    """The features that :func:`write_features` wrote into a file, if they are whole and of this key."""
    try:
        with np.load(path) as file:
            return _features(file) if str(file["key"]) == key else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _read_features(path: Path) -> Features:
    try:
        with np.load(path) as file:
            return _features(file)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: not a file of features that can be read ({error}); make it anew") from error


def _features(file) -> Features:
    arrays = {field.name: file[field.name] for field in fields(Features) if field.name in file}
    scalars = {"extractor": str(file["extractor"]), "identity": str(file["identity"])}
    return Features(**arrays | scalars | {"image_size": int(file["image_size"])})


def _finished_run(path: Path) -> Path:
    """The images of a sampling run, which must be complete."""
    again = "run the same sampling command again, which finishes it"
    try:
        status = json.loads((path / "run.json").read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path / 'run.json'}: not readable as a run ({error!r}); {again}") from error
    if status != "complete":
        raise EvaluationError(f"{path}: this run is not complete (its run.json says {status!r}); {again}")
    if not (path / "samples.npz").exists():
        raise EvaluationError(f"{path}: has no samples.npz; {again}")
    return path / "samples.npz"


def _members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: not a readable .npz file ({error}); make or fetch it again") from error


def _npz_names(path: Path) -> set[str]:
    return {member.filename.removesuffix(".npy") for member in _members(path)}


def _npz_identity(path: Path) -> str:
    """From the checksums that the file holds of its arrays."""
    told = sorted((member.filename, member.file_size, member.CRC) for member in _members(path))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _array(path: Path, name: str) -> np.ndarray:
    """An array of an npz file; left on the disk if it is stored uncompressed, since it may be larger than memory."""
    try:
        member = next((m for m in _members(path) if m.filename == f"{name}.npy"), None)
        if member is not None and member.compress_type == zipfile.ZIP_STORED:
            with open(path, "rb") as file:
                file.seek(member.header_offset + 26)  # the lengths of the name and of the extra field
                lengths = file.read(4)
                file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
                if not fortran and not dtype.hasobject:
                    return np.memmap(path, dtype, "r", file.tell(), shape)
        with np.load(path) as file:
            return file[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: its {name} cannot be read ({error}); make or fetch it again") from error


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-")


def _cropped(image_size: int | None) -> str:
    return f" from images cropped to {image_size} pixels" if image_size else ""
