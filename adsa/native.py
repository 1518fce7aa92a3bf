"""C++ of this project: compiled where it runs, when it is first wanted, and kept in the user's folder for caches."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# By what PyTorch has found the processor to have.
_VECTORS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}
# What not every processor with AVX512 has: how PyTorch is asked for it, and GCC's name, in the order of its versions.
_EXTRAS = {
    "avx512_vnni": ("_is_vnni_supported", "-mavx512vnni"),
    "avx512_bf16": ("_is_avx512_bf16_supported", "-mavx512bf16"),
    "amx_tile": ("_is_amx_tile_supported", None),
}
_SHARED = Path(__file__).with_name("vectors.h")  # that sources include
_TIME_LIMIT = 120  # seconds


def wanted() -> bool:
    """Whether to try C++: on a processor whose vectors are known here, unless ADSA_KERNELS=0 says no."""
    return _capability() in _VECTORS and os.environ.get("ADSA_KERNELS") != "0"


def supports(extra: str) -> bool:
    """Whether the processor has these instructions beyond AVX512, by Linux' name, as far as PyTorch can tell."""
    asked = getattr(torch.cpu, _EXTRAS[extra][0], None)
    return _capability() == "AVX512" and asked is not None and asked()


@functools.cache
def library(source: Path, **constants: int | str) -> ctypes.CDLL | None:
    """A source's functions, or None, with a warning that says why, where they can't be had. Tried once.

    Threads are those of PyTorch, whose OpenMP it shares.

    Args:
        source: C++ for GCC, in one file beside vectors.h.
        constants: of its preprocessor.
    """
    failure = None
    for command in _commands():
        try:
            made = _compiled(source, constants, command)
            try:
                return ctypes.CDLL(str(made))
            except OSError:  # cut off, or of another system that has the same folder
                made.unlink(missing_ok=True)
                return ctypes.CDLL(str(_compiled(source, constants, command)))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home
            failure = failure or error
    lines = str(getattr(failure, "stderr", None) or failure).strip().splitlines() or [type(failure).__name__]
    why = next((line for line in lines if "error" in line), lines[0])
    _tell(source.name, why)
    return None


def functions(library: ctypes.CDLL, arguments: Mapping[str, str]) -> dict[str, Callable[..., None]]:
    """A library's functions by name, with what each takes: "p" for a pointer, "i" an integer, "f" a float."""
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
    found = {}
    for name, letters in arguments.items():
        found[name] = getattr(library, name)
        found[name].restype, found[name].argtypes = None, [kinds[letter] for letter in letters.replace(" ", "")]
    return found


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError for what C++ would read past its end, or as other numbers."""
    if tensor.shape != shape or not tensor.is_cpu or dtype not in (None, tensor.dtype):
        kind = "" if dtype is None else f"{dtype} "
        raise ValueError(
            f"{name} must be {kind}{[*shape]} on the CPU, not {tensor.dtype} {[*tensor.shape]} on {tensor.device}"
        )


@functools.cache
def _tell(name: str, why: str) -> None:
    """Once, though there is more than one loops.cpp."""
    warnings.warn(
        f"{name} can't be compiled here, so that steps are slower: {why}. It needs g++, or another GCC that CXX "
        "names, and a folder to write to, which XDG_CACHE_HOME may name; ADSA_KERNELS=0 does without",
        stacklevel=3,
    )


def _compiled(source: Path, constants: dict[str, int | str], command: Sequence[str] = ("g++",)) -> Path:
    """The shared object of a source, from an earlier time if it is the same."""
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"there is no {command[0]}")
    defined = [f"-D{name}={value}" for name, value in constants.items()]
    command = [*command, *_FLAGS, *_VECTORS[_capability()], *defined]
    texts = [*command, source.read_text(), _SHARED.read_text()]
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adsa"
    made = folder / f"{source.stem}-{key}.so"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as room:
            new = Path(room) / made.name
            command += [str(source), "-o", str(new)]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_TIME_LIMIT)
            new.replace(made)  # whole or not at all, and other processes may do the same
    return made


def _commands() -> list[list[str]]:
    """Commands to try in turn: an older compiler doesn't know all that the processor has."""
    extras = [flag for extra, (_, flag) in _EXTRAS.items() if flag and supports(extra)]
    return [[*compiler, *extras[:known]] for compiler in _compilers() for known in range(len(extras), -1, -1)]


def _compilers() -> list[list[str]]:
    """Commands to try: what CXX says, with its arguments, and g++."""
    named = os.environ.get("CXX", "").split()
    return [named, ["g++"]] if named else [["g++"]]


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()
