"""Weights in and out of files, for the GPT and the VQ tokenizer alike.

Reads LlamaGen's releases and training checkpoints (.pt, .pth) and .safetensors. Nothing is unpickled but tensors, files
are memory-mapped, and a file that doesn't fit is an error that says what it is, and what would fit.
"""

import argparse
import difflib
import functools
import json
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer.files import atomic_file

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
# Written by LlamaGen's caches and older versions; derived from the configuration, so never read back.
_STALE = re.compile(r"(^|\.)(freqs_cis|kv_cache\.[kv]_cache)$")


class CheckpointError(RuntimeError):
    """A weight file can't be read or written, or doesn't fit the model. The message names the file and a way out."""


def read_state_dict(path: str | Path, *, ema: bool = True) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file, whatever they are wrapped in.

    Known wrappings are {"ema": ...}, {"model": ...} (DDP), {"module": ...} (DeepSpeed), {"state_dict": ...} (Lightning)
    and a bare dict of tensors (FSDP); they are told apart by content. Prefixes of torch.compile and DDP, and stale
    `freqs_cis` and `kv_cache` entries are dropped.

    Args:
        path: a .pt, .pth or .safetensors file.
        ema: prefer the averaged weights, where the file has both.

    Returns:
        Name to tensor, on the CPU, in the file's dtypes. The tensors are views of the memory-mapped file: pages
        are read when touched and need no memory of their own. Copy what is to outlive a change of the file.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint, or holds more than tensors.
    """
    path = Path(path)
    head = _read_head(path)
    if head.startswith(b"PK") and path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is a file of torch.save: rename it to {path.stem}.pt")
    if head.startswith((b"PK", b"\x80")):
        state = _unwrap(_load_torch(path, zipped=head.startswith(b"PK")), path, ema)
    elif path.suffix == ".safetensors" or head[8:9] == b"{":
        state = _load_safetensors(path)
    else:
        raise CheckpointError(
            f"{path} is no checkpoint (neither torch.save's format nor safetensors). {_redownload(path)}"
        )

    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    state = {key.replace("_orig_mod.", ""): tensor.detach() for key, tensor in state.items()}
    return {key: tensor for key, tensor in state.items() if not _STALE.search(key)}


def load_model(
    model: nn.Module,
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    ema: bool = True,
) -> nn.Module:
    """Load a checkpoint into a model, strictly: every parameter and persistent buffer comes from the file.

    Tensors are cast and moved one at a time, so that the only full copy in memory is the model itself; one
    built under `torch.device("meta")` needs no memory before. If the file doesn't fit, the model is left as it was.

    Args:
        model: on any device, or on the meta device.
        path: see :func:`read_state_dict`.
        device: where the model ends up.
        dtype: of its floating-point parameters and persistent buffers; None keeps the model's own.
        ema: see :func:`read_state_dict`.

    Returns:
        The same model. Its non-persistent buffers keep their values.

    Raises:
        CheckpointError: the file can't be read, or its names or shapes differ from the model's.
    """
    found = read_state_dict(path, ema=ema)
    expected = model.state_dict(keep_vars=True)
    _check_fit(Path(path), _shapes(found), _shapes(expected))
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in expected:
            raise CheckpointError(
                f"The model's buffer {name} is on the meta device, and no checkpoint has it as it isn't persistent. "
                "Build it on a real device."
            )

    for key, target in expected.items():
        wanted = dtype if dtype is not None and target.is_floating_point() else target.dtype
        if target.is_meta:
            tensor = found[key].to(device=device, dtype=wanted, copy=True)
            if isinstance(target, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=target.requires_grad)
            owner, _, name = key.rpartition(".")
            setattr(model.get_submodule(owner), name, tensor)
        else:  # the parameter object stays, as an optimizer may hold it
            target.data = found[key].to(device=target.device, dtype=wanted, copy=True)
    return model.to(device)


def recognise(state_dict: Mapping[str, Tensor]) -> tuple[str, str, dict[str, object]] | None:
    """Which registered model weights are of, by their names and shapes.

    Returns:
        "GPT" or "VQ", the registered name, and the ModelArgs that the name leaves open, but for what no weight tells
        (a GPT's block_size); None for another model, or another size.
    """
    facts = _facts(_shapes(state_dict))
    name = _name(facts) if facts["kind"] else None
    if name is None:
        return None
    fields = {
        "vocab": "vocab_size",
        "type": "model_type",
        "classes": "num_classes",
        "caption_dim": "caption_dim",
        "condition_tokens": "cls_token_num",
        "codes": "codebook_size",
        "code_dim": "codebook_embed_dim",
    }
    return facts["kind"], name, {field: facts[fact] for fact, field in fields.items() if fact in facts}


def save_safetensors(path: str | Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a .safetensors file, atomically: at any moment `path` is the old file or the whole new one.

    The same content makes the same bytes.

    Args:
        path: its folder is made if need be.
        state_dict: name to tensor, of any device and layout.
        metadata: strings for the file's header.

    Raises:
        CheckpointError: the folder can't be written, or the disk is full. Nothing is left behind.
        TypeError: the metadata isn't all strings.
    """
    path = Path(path)
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must be strings, but {key!r} is {value!r}; use str() or json.dumps()")
    # A clone where tensors share memory, which the format has no notion of.
    storages: set[int] = set()
    tensors = {}
    for key, tensor in state_dict.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, sync=True) as file:
            file.close()  # safetensors writes by name alone
            save_file(tensors, file.name, metadata=dict(metadata))
            _sort_metadata(Path(file.name))
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise CheckpointError(f"Could not write {path} ({_mb(size)}): {error}. {_free_space(path.parent)}") from error


def _sort_metadata(path: Path) -> None:
    """Bring the metadata into order: safetensors writes it in another one each time."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # or what follows would have to move
            file.seek(8)
            file.write(text.ljust(size))


def _free_space(folder: Path) -> str:
    try:
        return f"{_mb(shutil.disk_usage(folder).free)} are free there; is the folder writable?"
    except OSError:
        return f"{folder} is no folder that can be written to."


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


# Reading


def _read_head(path: Path) -> bytes:
    """The first bytes of a file that may be a checkpoint; a CheckpointError where they tell that it isn't one."""
    if path.is_dir():
        inside = _weight_files(path)
        holds = f"It holds {_some(inside)}: pass one of them." if inside else "It holds no weight files."
        raise CheckpointError(f"{path} is a folder, not a checkpoint file. {holds}")
    if not path.exists():
        raise CheckpointError(_missing(path))
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes), as an interrupted download leaves it. {_redownload(path)}")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html")):
        raise CheckpointError(
            f"{path} is an HTML page ({_mb(path.stat().st_size)}), not a checkpoint. A download URL of Hugging "
            f"Face must have /resolve/ where the page of the file has /blob/. {_redownload(path)}"
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a git-LFS pointer, which stands for the checkpoint in a repository cloned without its large "
            f"files. Run `git lfs pull` there. {_redownload(path)}"
        )
    return head


def _weight_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        where = f"The folder {path.parent} doesn't exist."
    elif near := difflib.get_close_matches(path.name, _weight_files(path.parent), n=3, cutoff=0.5):
        where = f"Near names there: {', '.join(near)}."
    else:
        where = f"There: {_some(_weight_files(path.parent)) or 'no weight files'}."
    return f"There is no file {path}. {where} {_redownload(path)}"


def _redownload(path: Path) -> str:
    released = re.fullmatch(r"(c2i|t2i|vq)_\w+\.pt", path.name)
    return f"Released weights are fetched by `bash scripts/download_weights.sh {path.stem if released else '--list'}`."


def _load_torch(path: Path, zipped: bool) -> object:
    try:
        # LlamaGen's training checkpoints hold their command line as a Namespace, which has no code to run.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name is None and not zipped:
            raise CheckpointError(
                f"{path} is no checkpoint, or damaged: {_first_line(error)}. {_redownload(path)}"
            ) from error
        raise CheckpointError(
            f"{path} holds more than tensors ({name[1] if name else _first_line(error)}). It is not loaded, as "
            "unpickling such objects can run any code. If you trust it, save the weights alone where it was made: "
            'torch.save(torch.load(FILE, weights_only=False)["model"], NEW_FILE)'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    size = _mb(path.stat().st_size)
    return f"{path} ({size}) is cut short or damaged: {_first_line(error)}. {_redownload(path)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _unwrap(content: object, path: Path, ema: bool) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    state = content
    for name in ("ema", "model", "module", "state_dict")[not ema :]:
        if isinstance(content.get(name), Mapping):
            state = content[name]
            break
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        other = "; there are averaged weights, so pass ema=True" if "ema" in content else ""
        raise CheckpointError(
            f"{path} holds {_some(content) or 'nothing'}; expected weights under ema, model, module or state_dict, or "
            f"tensors alone{other}"
        )
    return dict(state)


# Telling what doesn't fit, and what would


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _check_fit(path: Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    differing = [
        f"{key} {found[key]}, expected {expected[key]}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    if not missing and not unexpected and not differing:
        return
    have, want = _facts(found), _facts(expected)
    lines = [f"{path} doesn't fit the model.", f"  found:      {_describe(have)}", f"  expected:   {_describe(want)}"]
    if missing:
        lines.append(f"  missing:    {_some(missing)}")
    if unexpected:
        lines.append(f"  unexpected: {_some(unexpected)}")
    if differing:
        lines.append(f"  shapes:     {_some(differing, '; ')}")
    lines.append(f"  what to do: {' '.join(_advice(have, want, missing))}")
    raise CheckpointError("\n".join(lines))


def _some(items: Iterable[object], separator: str = ", ") -> str:
    items = [str(item) for item in items]
    rest = f"{separator}and {len(items) - 3} more" if len(items) > 3 else ""
    return separator.join(items[:3]) + rest


def _facts(shapes: Mapping[str, tuple]) -> dict[str, object]:
    """What model these weights are of, as far as names and shapes tell. Keys that are absent can't be told."""

    def blocks(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})

    if "tok_embeddings.weight" in shapes:
        vocab, dim = shapes["tok_embeddings.weight"]
        facts = {"kind": "GPT", "layers": blocks("layers."), "dim": dim, "vocab": vocab}
        if table := shapes.get("cls_embedding.embedding_table.weight"):
            facts |= {"type": "c2i", "classes": table[0] - 1}  # the last row is the null class
        elif projection := shapes.get("cls_embedding.cap_proj.fc1.weight"):
            facts |= {"type": "t2i", "caption_dim": projection[1]}
            if null := shapes.get("cls_embedding.uncond_embedding"):
                facts["condition_tokens"] = null[0]
        return facts
    if "quantize.embedding.weight" in shapes and "encoder.conv_in.weight" in shapes:
        codes, code_dim = shapes["quantize.embedding.weight"]
        levels, channels = blocks("encoder.conv_blocks."), shapes["encoder.conv_in.weight"][0]
        return {"kind": "VQ", "levels": levels, "channels": channels, "codes": codes, "code_dim": code_dim}
    return {"kind": None, "keys": sorted(shapes)}


_SIZE = {"GPT": ("layers", "dim"), "VQ": ("levels", "channels")}


def _size(facts: Mapping[str, object]) -> tuple:
    return tuple(facts[key] for key in _SIZE[facts["kind"]])


@functools.cache
def _registered(kind: str) -> dict[tuple, str]:
    """The names of the registered models by size."""
    # Here, as models import this module, and only a failing load wants them.
    from autoregressive.models.gpt import GPT_models
    from tokenizer.tokenizer_image.vq_model import VQ_models

    names = {}
    for name, build in {"GPT": GPT_models, "VQ": VQ_models}[kind].items():
        with torch.device("meta"):
            names.setdefault(_size(_facts(_shapes(build().state_dict()))), name)
    return names


def _name(facts: Mapping[str, object]) -> str | None:
    return _registered(facts["kind"]).get(_size(facts))


def _describe(facts: Mapping[str, object]) -> str:
    if facts["kind"] is None:
        return f"{len(facts['keys'])} tensors ({_some(facts['keys'])}), neither a GPT's nor a VQ tokenizer's"
    name = _name(facts)
    if facts["kind"] == "VQ":
        size = f"{facts['levels']} levels from {facts['channels']} channels"
        codes = f"{facts['codes']} codes of dimension {facts['code_dim']}"
        return f"VQ tokenizer {name or 'of no registered size'}: {size}, {codes}"
    size = f"{facts['layers']} layers, dim {facts['dim']}, {facts['vocab']} codes"
    text = f"{facts.get('type', 'unconditional')} {name or 'GPT of no registered size'}: {size}"
    if facts.get("type") == "c2i":
        text += f", {facts['classes']} classes and the null class"
    elif facts.get("type") == "t2i":
        text += f", text features of dimension {facts['caption_dim']}"
    return text


def _advice(have: Mapping[str, object], want: Mapping[str, object], missing: list[str]) -> list[str]:
    """Sentences that name the flag to change, for each fact that differs."""
    if have["kind"] != want["kind"]:
        if have["kind"] == "VQ" and want["kind"] == "GPT":
            return ["This is a VQ tokenizer file: pass it as --vq-ckpt, and a GPT's file as --gpt-ckpt."]
        if have["kind"] == "GPT" and want["kind"] == "VQ":
            return ["This is a GPT file: pass it as --gpt-ckpt, and a VQ tokenizer's file as --vq-ckpt."]
        return ["Pass a checkpoint of the expected model."]

    advice = []
    if have.get("type") != want.get("type") and have.get("type"):
        sign = "cap_proj, a projection of text" if have["type"] == "t2i" else "embedding_table, a table of classes"
        advice.append(f"This is a {have['type']} file (it has {sign}): pass --gpt-type {have['type']}.")
    if have["kind"] and _size(have) != _size(want):
        flag = "--gpt-model" if have["kind"] == "GPT" else "--vq-model"
        name, asked = _name(have), _name(want) or "the expected size"
        fits = f"pass {flag} {name}, or" if name else "no registered model has its size;"
        advice.append(f"It looks like {name or 'another size'} and {asked} was asked for: {fits} a file of {asked}.")
    for fact, flag in (
        ("vocab", "--codebook-size"),
        ("codes", "--codebook-size"),
        ("code_dim", "--codebook-embed-dim"),
        ("classes", "--num-classes"),
        ("caption_dim", "--t5-feature-dim"),
        ("condition_tokens", "--cls-token-num"),
    ):
        if fact in have and fact in want and have[fact] != want[fact]:
            advice.append(f"Pass {flag} {have[fact]} (this is {want[fact]} now).")
    if have.get("type") == "t2i" and "cls_embedding.uncond_embedding" in missing:
        advice.append(
            "The null prompt uncond_embedding must come from the checkpoint: LlamaGen's is a random buffer that is "
            "never trained, and another one would change every guided image without a word. Use the released file, or "
            "save the model's whole state_dict(), buffers included."
        )
    return advice or ["The file is incomplete, or of a variant of this model: pass a checkpoint of the expected model."]
