"""Files that are never seen half-written, whatever happens to the process that writes them."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = False) -> Iterator[IO[bytes]]:
    """A new binary file, which takes the name `path` once the block has ended well; after an error nothing is left.

    A killed process leaves a hidden `.NAME.*.part` beside it. Libraries that write by name may have `file.name`.

    Args:
        path: replaced, if it is there. Its folder must exist.
        sync: wait until the content is on the disk, so that not even a power failure leaves an empty file.

    Raises:
        OSError: naming `path`, where writing failed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(partial, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
            yield file
        os.chmod(partial, mode)  # safetensors puts a private file in its place
        if sync:
            _sync(partial, os.O_RDWR)
        os.replace(partial, path)
        if sync and os.name == "posix":
            _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partial(folder: Path) -> None:
    """Delete what killed processes left in a folder. None may be at work in it."""
    for partial in folder.glob(".*.part"):
        partial.unlink()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
