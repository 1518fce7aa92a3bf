"""Which models, budgets, seeds, counts and references a table or figure is made with: a YAML file of configs/paper.

FLAGS in the environment are more flags for the sampling scripts, as in FLAGS="--per-proc-batch-size 32".
"""

import argparse
import os
import shlex
import types
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from autoregressive.sample.options import ROOT, OptionError, Options, UniqueKeyLoader, near, parse_options, shown

CONFIGS = ROOT / "configs" / "paper"
RESIZES = ("llamagen", "antialias")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What c2i and t2i have in common.

    Attributes:
        config: the sampling configuration of the dense runs; the others differ in their cache alone.
        budgets: cached image tokens, largest first.
        images: of each run.
        seeds: a run of each cache for each.
        sample_dir: where the run folders are.
        flags: more flags for the sampling script.
        codes: real images, as extract_codes_c2i.py makes them of images: what the loss is measured on.
    """

    config: Path
    budgets: tuple[int, ...]
    images: int
    seeds: tuple[int, ...]
    sample_dir: Path
    flags: tuple[str, ...] = ()
    codes: Path | None = None

    @property
    def cpu(self) -> bool:
        """Whether the flags keep to the CPU even where there is a GPU."""
        return "--cpu" in self.flags

    def options(self) -> Options:
        """Those of the dense runs. Raises OptionError."""
        defaults = Options.text_to_image() if isinstance(self, TextTask) else Options()
        argv = ["--config", str(self.config), *self.flags]
        return parse_options(defaults, argv, script="job", description="", examples="")

    def check(self) -> None:
        """Raises OptionError for values that nothing could be made with."""
        for name in ("budgets", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise OptionError(f"key '{name}': expected one or more different numbers, got {list(values)}")
        if min(self.budgets) < 1 or min(self.seeds) < 0 or self.images < 2:
            raise OptionError("budgets are at least 1, seeds at least 0 and images at least 2")


@dataclass(frozen=True, kw_only=True)
class ClassTask(Task):
    """Class-conditional images, judged by FID and its kin: tables 1 and 3.

    Attributes:
        reference: the images that samples should resemble, as fid.py's REFERENCE.
        reference_images: a folder of these as images, where `reference` is made of it or holds it no longer.
        reference_classes: patterns for the folders that count, of those in reference_images; {class} in a pattern
            stands for the name of every class of the model.
        feature_extractor: fid.py's --feature-extractor.
        ablation_seeds: of table 3, which has many rows; default: as `seeds`.
        resizes: ways of scaling images down to the evaluation's size that are compared: llamagen, antialias.
    """

    script: ClassVar[str] = "sample_c2i_ddp"

    reference: Path
    reference_images: Path | None = None
    reference_classes: tuple[str, ...] = ()
    feature_extractor: str
    ablation_seeds: tuple[int, ...] = ()
    resizes: tuple[str, ...] = ()

    def check(self) -> None:
        super().check()
        if not set(self.ablation_seeds) <= set(self.seeds):
            raise OptionError(
                f"key 'ablation_seeds': expected some of the seeds {list(self.seeds)}, got {list(self.ablation_seeds)}"
            )
        for resize in self.resizes:
            if resize not in RESIZES:
                raise OptionError(
                    f"key 'resizes': expected {' or '.join(RESIZES)}, got {resize!r}{near(resize, RESIZES)}"
                )


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """Text-conditional images, judged by CLIP: table 2.

    Attributes:
        prompts: a file of them, as sample_t2i_ddp.py reads it.
        clip_model, clip_pretrained, clip_prefix: clip_score.py's --clip-model, --pretrained and --prefix.
        code_captions: of the images that `codes` holds, as extract_text_features.py makes them.
    """

    script: ClassVar[str] = "sample_t2i_ddp"

    prompts: Path
    clip_model: str
    clip_pretrained: str | None = None
    clip_prefix: str = "A photo depicts"
    code_captions: Path | None = None

    def check(self) -> None:
        super().check()
        if (self.codes is None) != (self.code_captions is None):
            raise OptionError("keys 'codes' and 'code_captions' go together")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How to make the tables and figures of one pair of models.

    Attributes:
        name: of the file, without its ending.
        path: the file.
    """

    name: str
    path: Path
    c2i: ClassTask
    t2i: TextTask


def load_protocol(model: str) -> Protocol:
    """Read a protocol: "demo", "XL" or the path of a YAML file. Relative paths in it start from the file's folder.

    Raises:
        OptionError: naming the file and key.
    """
    path = Path(model)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{model}.yaml"
        if not path.exists():
            known = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
            raise OptionError(f"--model {model}: expected {', '.join(known)} or a .yaml file{near(model, known)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror or error}; see {shown(CONFIGS)} for examples") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{path}: not valid YAML: {error}") from error
    kinds = {"c2i": ClassTask, "t2i": TextTask}
    _known(path, "section", content if isinstance(content, dict) else {}, kinds)
    tasks = {}
    for name, kind in kinds.items():
        given = content.get(name) if isinstance(content, dict) else None
        if not isinstance(given, dict):
            raise OptionError(f"{path}: section {name!r}: expected keys and values, got {given!r}")
        tasks[name] = _task(path, name, kind, given)
    return Protocol(name=path.stem, path=Path(shown(path)), **tasks)


def _task(path: Path, section: str, kind: type[Task], given: dict[str, Any]) -> Task:
    rows = {row.name: row for row in fields(kind)}
    _known(path, "key", given, rows, f"{section}.")
    values, hints = {}, typing.get_type_hints(kind)
    for name, row in rows.items():
        if name in given:
            try:
                values[name] = _value(hints[name], given[name], path.parent)
            except ValueError as error:
                raise OptionError(f"{path}: key '{section}.{name}': {error}") from None
        elif row.default is MISSING:
            raise OptionError(f"{path}: key '{section}.{name}' is missing")
    values["flags"] = (*values.get("flags", ()), *shlex.split(os.environ.get("FLAGS", "")))
    try:
        task = kind(**values)
        task.check()
    except OptionError as error:
        raise OptionError(f"{path}: section {section!r}: {error}") from None
    return task


def _known(path: Path, what: str, given: dict, known: dict, before: str = "") -> None:
    for key in given:
        if key not in known:
            hint = near(str(key), list(known)) or f"; known: {', '.join(known)}"
            raise OptionError(f"{path}: unknown {what} '{before}{key}'{hint}")


def _value(hint: Any, value: Any, folder: Path) -> Any:
    """A value from YAML as its field wants it. Raises ValueError that says what was expected."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {value!r}")
        return tuple(_value(item, one, folder) for one in value)
    expected = {Path: (str, "a path"), str: (str, "text"), int: (int, "a whole number")}[hint]
    if type(value) is not expected[0]:
        raise ValueError(f"expected {expected[1]}, got {value!r}")
    if hint is Path:
        return _path(folder, value)
    if hint is str and value.startswith("local-dir:"):  # a model in a folder
        return f"local-dir:{_path(folder, value.removeprefix('local-dir:'))}"
    return value


def _path(folder: Path, value: str) -> Path:
    """From a file in this folder; as short as it can be said from here, since results tell paths."""
    return Path(shown(Path(os.path.normpath(folder / Path(value).expanduser()))))


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    """Add --model and --output, which all scripts of this folder have; see :func:`output_folder`."""
    add = parser.add_argument
    add(
        "--model",
        default="demo",
        metavar="NAME",
        help="demo (default: the models that ship with the project), XL (LlamaGen's released models, by the paper's "
        "own protocol: for GPUs) or a .yaml file as those in configs/paper",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: results/NAME after this script, with _MODEL for other models than the demo",
    )


def output_folder(args: argparse.Namespace, name: str, protocol: Protocol) -> Path:
    """The folder that --output or its default names, made if it isn't there; `name` as "table1"."""
    folder = args.output or Path("results", name if protocol.name == "demo" else f"{name}_{protocol.name}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
