"""Files: written so that they are never seen half-written, and told apart by what is in them."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


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


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON by :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def remove_partial(folder: Path) -> None:
    """Delete what killed processes left in a folder. None may be at work in it."""
    for partial in folder.glob(".*.part"):
        partial.unlink()


def fingerprint(path: str | Path) -> dict[str, Any]:
    """Tells files apart quickly: name, bytes, and SHA-256 of the size and up to 64 blocks of 1 MiB, evenly spread."""
    size, block, digest = Path(path).stat().st_size, 1 << 20, hashlib.sha256()
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        for i in range(min(64, -(-size // block))):
            file.seek(i * block if size <= 64 * block else i * (size - block) // 63)
            digest.update(file.read(block))
    return {"file": Path(path).name, "bytes": size, "sha256_of_blocks": digest.hexdigest()}


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
