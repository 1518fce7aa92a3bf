"""Fetch LlamaGen's released weights from Hugging Face, and check them.

    python scripts/download_weights.py --list
    python scripts/download_weights.py c2i_B_384 vq_ds16_c2i                          # class to image, 384 px
    python scripts/download_weights.py t2i_XL_stage2_512 vq_ds16_t2i flan-t5-xl       # text to image, 512 px

An interrupted download goes on where it stopped; a file that is there and valid is not fetched again. HF_ENDPOINT names
a mirror, HF_TOKEN an access token.
"""

import argparse
import difflib
import errno
import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import huggingface_hub  # noqa: E402
from tqdm import tqdm  # noqa: E402

from autoregressive.models.checkpoint import CheckpointError, read_state_dict  # noqa: E402


class DownloadError(RuntimeError):
    """Something could not be fetched, or isn't what it should be. The message names it and a way out."""


@dataclass(frozen=True)
class WeightFile:
    """One released checkpoint, a float32 file of tensors alone.

    Attributes:
        name: the file's name without ".pt".
        repo: on Hugging Face.
        values: how many numbers it holds, buffers included.
        use: what for, in a few words.
        sha256: None where it isn't known.
    """

    name: str
    repo: str
    values: int
    use: str
    sha256: str | None = None

    @property
    def size(self) -> int:
        """Bytes, but for less than a thousandth that the file format adds."""
        return 4 * self.values

    @property
    def check(self) -> str:
        return "sha256" if self.sha256 else f"{self.values:,} values (sha256 is not known)"

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.pt"

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the file in `folder`; None if nothing is."""
        path = self.path(folder)
        if not path.is_file():
            return f"{path} isn't there"
        if self.sha256:
            digest = sha256(path)
            return None if digest == self.sha256 else f"{path} has sha256 {digest}, expected {self.sha256}"
        try:
            values = sum(tensor.numel() for tensor in read_state_dict(path).values())
        except CheckpointError as error:
            return str(error)
        return None if values == self.values else f"{path} holds {values:,} values, expected {self.values:,}"

    def fetch(self, folder: Path, force: bool) -> None:
        huggingface_hub.hf_hub_download(self.repo, f"{self.name}.pt", local_dir=folder, force_download=force)

    def by_hand(self, folder: Path) -> str:
        return f"https://huggingface.co/{self.repo}/resolve/main/{self.name}.pt to {self.path(folder)}"


@dataclass(frozen=True)
class TextEncoder:
    """A T5 model with its tokenizer: a folder as transformers reads it, weights in one or more shards.

    Attributes:
        name: of the folder, under t5-ckpt.
        repo: on Hugging Face.
        size: bytes.
        features: the dimension of what it puts out, `d_model` in its config.json.
        use: what for, in a few words.
    """

    name: str
    repo: str
    size: int
    features: int
    use: str

    check = "every shard of its index (sha256 is not known)"

    def path(self, folder: Path) -> Path:
        return folder / "t5-ckpt" / self.name

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the folder of this model in `folder`; None if nothing is."""
        path = self.path(folder)
        try:
            config = json.loads((path / "config.json").read_text())
            if config.get("d_model") != self.features:
                return f"{path}/config.json has d_model {config.get('d_model')}, expected {self.features}"
            if not (path / "spiece.model").is_file():
                return f"{path}/spiece.model, the tokenizer, isn't there"
            kind = self._weights(path)
            if kind is None:
                return f"{path} has no weights"
            index = path / f"{kind}.index.json"
            if not index.is_file():
                read_state_dict(path / kind)
                return None
            shards: dict[str, set[str]] = {}
            for key, shard in json.loads(index.read_text())["weight_map"].items():
                shards.setdefault(shard, set()).add(key)
            for shard, keys in shards.items():
                if missing := keys - read_state_dict(path / shard).keys():
                    return f"{path / shard} lacks {len(missing)} tensors of its index, {min(missing)} among them"
        except (CheckpointError, OSError, ValueError, KeyError, AttributeError) as error:
            return f"{path} is incomplete or damaged: {error}"
        return None

    @staticmethod
    def _weights(path: Path) -> str | None:
        """The name that the weights of a folder go by, whole or as the stem of their shards."""
        for pattern, name in (("*.safetensors", "model.safetensors"), ("pytorch_model*.bin", "pytorch_model.bin")):
            if any(path.glob(pattern)):
                return name
        return None

    def fetch(self, folder: Path, force: bool) -> None:
        path = self.path(folder)
        # Pickled weights only if there are no others; TensorFlow's and Flax' never.
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            patterns = ["*.json", "spiece.model", weights]
            huggingface_hub.snapshot_download(self.repo, local_dir=path, allow_patterns=patterns, force_download=force)
            if self._weights(path):
                break

    def by_hand(self, folder: Path) -> str:
        return f"the files of https://huggingface.co/{self.repo}/tree/main to {self.path(folder)}"


_C2I, _T2I = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"
_B, _L = 110_888_448, 342_910_976
_VQ16 = 71_883_403 + 65_536  # with the buffer codebook_used
_T2I_XL = 777_678_080 + 245_760  # with the buffer uncond_embedding

RELEASES: dict[str, WeightFile | TextEncoder] = {
    release.name: release
    for release in (
        WeightFile("c2i_B_256", _C2I, _B, "GPT-B, classes, 256 px"),
        WeightFile("c2i_B_384", _C2I, _B, "GPT-B, classes, 384 px"),
        WeightFile("c2i_L_256", _C2I, _L, "GPT-L, classes, 256 px"),
        WeightFile("c2i_L_384", _C2I, _L, "GPT-L, classes, 384 px"),
        WeightFile(
            "c2i_XL_384",
            _C2I,
            774_699_520,
            "GPT-XL, classes, 384 px",
            "736cb92bebdcb16737dbd35210a07ae4f7fd001cdfd55b26205d89182d1807ba",
        ),
        WeightFile(
            "c2i_XXL_384",
            _C2I,
            1_410_972_672,
            "GPT-XXL, classes, 384 px",
            "cba5a780b9d2394386e7410c630bced3a70e109cf7107e1783c9a986e9e7754e",
        ),
        WeightFile("c2i_3B_384", _C2I, 3_096_659_200, "GPT-3B, classes, 384 px"),
        WeightFile("vq_ds16_c2i", _C2I, _VQ16, "VQ-16, for the c2i models"),
        WeightFile(
            "vq_ds8_c2i",
            _C2I,
            70_109_835 + 65_536,
            "VQ-8",
            "c70d2966ec012f378793214ff0755087e7c5fe6f035b469995143325dca4a4e3",
        ),
        WeightFile("vq_ds16_t2i", _T2I, _VQ16, "VQ-16, for the t2i models"),
        WeightFile("t2i_XL_stage1_256", _T2I, _T2I_XL, "GPT-XL, text, 256 px"),
        WeightFile("t2i_XL_stage2_512", _T2I, _T2I_XL, "GPT-XL, text, 512 px"),
        TextEncoder("flan-t5-xl", "google/flan-t5-xl", 11_400_000_000, 2048, "text encoder of the t2i models"),
    )
}


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, with a progress bar."""
    digest = hashlib.sha256()
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"checking {path.name}", leave=False)
    with path.open("rb") as file, bar:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def download(release: WeightFile | TextEncoder, folder: Path) -> str:
    """Bring a release into `folder` and check it; one that is there and valid is left alone.

    Returns:
        What was done, as a line for the user.

    Raises:
        DownloadError: no network, no space, no permission, or the file is not what it should be.
    """
    path = release.path(folder)
    there = path.exists()
    problem = release.problem(folder)
    if problem is None:
        return f"{path} is there already, checked by its {release.check}"
    # A folder is completed; a wrong file is replaced, once the right one is complete.
    force = there and isinstance(release, WeightFile)
    if force:
        print(f"Fetching it anew: {problem}", file=sys.stderr)
    _check_space(release, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        release.fetch(folder, force)
    except Exception as error:  # the library's errors have no common base but this
        raise DownloadError(_explain(release, folder, error)) from error
    if problem := release.problem(folder):
        raise DownloadError(
            f"{release.name} was fetched, but {problem}. Delete {path} and run the same command again; if that doesn't "
            f"help, fetch {release.by_hand(folder)} by hand."
        )
    return f"{path} is complete, checked by its {release.check}"


def _check_space(release: WeightFile | TextEncoder, folder: Path) -> None:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    # What is fetched already counts: the library's partial files, and the finished shards of a folder.
    partial = (existing / ".cache" / "huggingface", release.path(folder)) if existing == folder.absolute() else ()
    done = sum(file.stat().st_size for part in partial if part.is_dir() for file in part.rglob("*") if file.is_file())
    free = shutil.disk_usage(existing).free
    if free < release.size - done:
        raise DownloadError(
            f"{release.name} needs {release.size / 1e9:.2f} GB, and {existing} has {free / 1e9:.2f} GB free. "
            "Choose another folder with --dir."
        )


def _explain(release: WeightFile | TextEncoder, folder: Path, error: Exception) -> str:
    reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{folder} is full: {release.name} needs {release.size / 1e9:.2f} GB. Choose another folder with --dir."
    if isinstance(error, OSError) and error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EEXIST,
        errno.ENOTDIR,
    ):
        return f"{folder} can't be written ({reason}). Choose another folder with --dir."
    return (
        f"{release.name} could not be fetched from https://huggingface.co/{release.repo} ({reason}). Is there a "
        "network, and a proxy or HF_ENDPOINT if you need one? Run the same command again: it goes on where it stopped. "
        f"By hand: {release.by_hand(folder)}"
    )


def table(folder: Path) -> str:
    """All releases: name, size, whether a file of that name is in `folder`, use and check."""
    rows = [("name", "size", "there", "use", "checked by")]
    for name, release in RELEASES.items():
        there = "yes" if release.path(folder).exists() else "-"
        rows.append((name, f"{release.size / 1e9:.2f} GB", there, release.use, release.check))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch; --list shows the names")
    parser.add_argument("--list", action="store_true", help="show what there is, and what of it is in --dir")
    parser.add_argument("--dir", type=Path, default=ROOT / "pretrained_models", help="default: %(default)s")
    args = parser.parse_args(argv)
    args.names = list(dict.fromkeys(name.removesuffix(".pt") for name in args.names))
    for name in args.names:
        if name not in RELEASES:
            lower = {known.lower(): known for known in RELEASES}
            near = lower[difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0)[0]]
            parser.error(f"{name!r} is no released file; did you mean {near}? --list shows all")
    if not args.names and not args.list:
        parser.error(f"name what to fetch: {', '.join(RELEASES)}; --list tells more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        print(table(args.dir))
    failed = 0
    for name in args.names:
        try:
            print(download(RELEASES[name], args.dir))
        except DownloadError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
        except KeyboardInterrupt:
            print("\nStopped. Run the same command again: it goes on from here.", file=sys.stderr)
            return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
