"""The options of the sampling scripts: one typed table behind the flags, the YAML files and their documentation.

A section is a dataclass whose fields carry their help. `parse_options` reads the defaults, then the file that
`--config` names, then the flags; what comes later wins. Run as a script, this prints the table as Markdown.
"""

import argparse
import difflib
import os
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from adsa.names import CACHE_DTYPES, POLICY_NAMES  # noqa: E402

if TYPE_CHECKING:  # torch comes with it, which --help doesn't wait for
    from adsa import CacheConfig


class OptionError(ValueError):
    """Options that cannot be used; the message names the file and key, or the flag, and the way out."""


def option(
    default: Any,
    help: str,
    *,
    flags: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    path: bool = False,
    script: str | None = None,
    only_for: str | None = None,
) -> Any:
    """One row of the table.

    Args:
        default: the value where neither file nor flag gives one. None: the help says what happens.
        help: what it means, its unit, and what None does.
        flags: the flags, where they are not just the key's name.
        choices: the strings allowed.
        metavar: what the help calls the value.
        path: relative paths in a YAML file start from that file's folder.
        script: "grid" or "job", if only that kind of script has the flag. Files may always give the key.
        only_for: "c2i" or "t2i", if only scripts for that kind of model know the row, as flag and as key.
    """
    metadata = {"help": help, "flags": flags, "choices": choices, "metavar": metavar, "path": path, "script": script}
    return field(default=default, metadata=metadata | {"only_for": only_for})


@dataclass
class ModelOptions:
    """The models and the size of the image. What is not given is read from the checkpoints, where they tell it."""

    gpt_model: str | None = option(
        None, "registered size; default: as the checkpoint says, else GPT-B, t2i GPT-XL", metavar="NAME"
    )
    gpt_ckpt: str | None = option(None, "weights of the GPT: .safetensors, .pt or .pth", metavar="FILE", path=True)
    gpt_type: str = option("c2i", "class- or text-conditional", choices=("c2i", "t2i"))
    from_fsdp: bool = option(
        False,
        "the checkpoint is FSDP's STEP/consolidated.pth: name the run after the folder (wrapping is recognised anyway)",
    )
    cls_token_num: int | None = option(
        None, "condition tokens; default: as the checkpoint says, else 1 (c2i) or 120 (t2i)"
    )
    precision: str | None = option(
        None,
        "of the GPT; the tokenizer is always fp32. Default: bf16 on CUDA and with quantize, none (fp32) elsewhere",
        choices=("none", "fp16", "bf16"),
    )
    quantize: str | None = option(
        None,
        "the GPT's weights, embeddings apart: int8 takes half of bf16's memory, and on a CPU a step of few images is "
        "faster in bf16, and slower in other precisions; default: as the precision says",
        choices=("int8",),
    )
    compile: bool = option(
        False,
        "torch.compile the GPT, on a GPU: slow to start, faster per token",
    )
    cuda_graphs: bool = option(
        False,
        "record decode steps as CUDA graphs, which spares the host a launch for each small operation; cache and graphs "
        "stay in memory between batches",
    )
    vq_model: str | None = option(None, "tokenizer; default: as the checkpoint says, else VQ-16", metavar="NAME")
    vq_ckpt: str | None = option(None, "weights of the tokenizer", metavar="FILE", path=True)
    codebook_size: int | None = option(None, "default: as the checkpoint says, else the tokenizer's (16384 for VQ-16)")
    codebook_embed_dim: int | None = option(None, "default: as the checkpoint says, else the tokenizer's (8)")
    image_size: int | None = option(
        None,
        "pixels along a side, a multiple of downsample-size; default: as the checkpoint says, else 384, t2i 512",
        metavar="PX",
    )
    downsample_size: int | None = option(
        None, "pixels along a side of a token; default: the tokenizer's own", metavar="PX"
    )
    num_classes: int | None = option(None, "default: as the checkpoint says, else 1000. A t2i model has none")
    caption_dim: int | None = option(
        None,
        "numbers in a text feature; default: as the checkpoint says, else 2048",
        flags=("--caption-dim", "--t5-feature-dim"),
        only_for="t2i",
    )


@dataclass
class TextOptions:
    """Prompts, and what makes features of them. For text-conditional models."""

    only_for: ClassVar[str] = "t2i"

    prompts: Sequence[str] = option((), "the prompts themselves, one image each", flags=("--prompt",), metavar="TEXT")
    prompt_file: str | None = option(
        None,
        "prompts in a file: .txt (one a line), .tsv or .csv (a column Prompt) or .jsonl (a key text). A grid can also "
        "read the lines of stdin: -",
        flags=("--prompts", "--prompt-csv"),
        metavar="FILE",
        path=True,
    )
    encoder: str | None = option(
        None,
        "text encoder: minilm, flan-t5-xl, t5-v1_1-xl or t5-v1_1-xxl; default: minilm for a caption-dim of 384, else "
        "flan-t5-xl",
        flags=("--text-encoder", "--t5-model-type"),
        metavar="NAME",
    )
    encoder_path: str | None = option(
        None,
        "the folder that the encoder's folder is in, or that folder itself; default: minilm's Python package; the "
        "project's pretrained_models/t5-ckpt if it is there, else the Hugging Face hub",
        flags=("--text-encoder-path", "--t5-path"),
        metavar="DIR",
        path=True,
    )
    precision: str | None = option(
        None,
        "of the encoder; default: the GPT's",
        flags=("--text-precision",),
        choices=("none", "fp16", "bf16"),
    )
    max_length: int | None = option(
        None,
        "tokens of a prompt; what is longer is cut. Must be the GPT's cls-token-num, which is the default",
        flags=("--text-max-length", "--t5-feature-max-len"),
    )
    left_padding: bool = option(True, "pad short prompts on the left, as the models were trained")
    clean: bool = option(True, "clean prompts as LlamaGen does: lower case, no addresses", flags=("--clean-prompts",))
    feature_dir: str = option(
        "samples/text_features",
        "encoded prompts are kept in here, for all runs",
        flags=("--text-feature-dir",),
        metavar="DIR",
        path=True,
    )
    keep_encoder: bool = option(
        False, "leave the encoder on the device while images are sampled", flags=("--keep-text-encoder",)
    )


@dataclass
class SamplingOptions:
    """From logits to tokens."""

    cfg_scale: float = option(1.5, "classifier-free guidance; 1 is off", metavar="S")
    cfg_interval: float = option(-1.0, "guidance ends after this many decode steps; -1: never", metavar="STEPS")
    top_k: int = option(0, "draw among the K most likely tokens; 0: all", metavar="K")
    top_p: float = option(1.0, "draw among the most likely tokens that sum to P; 1: all", metavar="P")
    temperature: float = option(1.0, "divides the logits", metavar="T")
    zipar_window: int | None = option(
        None,
        "decode several rows at once, each so many tokens behind the row above (arXiv 2412.04062): fewer passes; "
        "default: raster order",
        metavar="TOKENS",
    )
    zipar_adaptive: bool = option(
        False,
        "the window is the smallest one: a row begins when its first token, drawn again with more of the row above, "
        "would stay for all images of the batch; so images depend on the batch that they are sampled in",
    )


@dataclass
class CacheOptions:
    """Which image tokens the KV cache keeps (arXiv 2506.18226)."""

    policy: str = option("full", "full is the dense cache", choices=POLICY_NAMES)
    budget: int | None = option(None, "slots for image tokens, per layer; every policy but full needs it", metavar="N")
    prefix: int | None = option(
        None, "how many of the first image tokens always stay; default: the policy's", metavar="N"
    )
    local: int | None = option(None, "how many of the newest always stay; default: the policy's", metavar="N")
    granularity: str = option("head", "who chooses: each head, or a layer's heads together", choices=("head", "layer"))
    mode: str = option(
        "evict",
        "evict: what leaves is gone; select: all stay in memory, chosen anew each step",
        choices=("evict", "select"),
    )
    renew_every: int | None = option(
        None, "steps that one ranking serves; 1 is the paper; default: the policy's", metavar="STEPS"
    )
    merge: bool | None = option(
        None,
        "merge what leaves into the nearest key of those that stay; default: the policy's, of which adsa_plus does",
    )
    dtype: str | None = option(
        None, "of keys and values; int8 and int4: integers with scales; default: the model's", choices=CACHE_DTYPES
    )
    fold_condition: bool = option(True, "hold LlamaGen's text tokens as one slot that is exactly their sum")


@dataclass
class RunOptions:
    """What to sample and where it goes."""

    seed: int = option(0, "every image's own seed is made from this and its index", flags=("--global-seed", "--seed"))
    class_labels: Sequence[str] | None = option(
        None,
        "ids or names of the classes that a job samples; default: all",
        metavar="CLASS",
        script="job",
        only_for="c2i",
    )
    grid_labels: Sequence[str] | None = option(
        None,
        "class ids or names, one for each image of a grid; default: a few",
        flags=("--class-labels",),
        metavar="CLASS",
        script="grid",
        only_for="c2i",
    )
    class_names: str | None = option(
        None,
        'JSON list of names, or {"classes": [...]}; default: classes.json beside the GPT',
        metavar="FILE",
        path=True,
        only_for="c2i",
    )
    compare: Sequence[str] | None = option(
        None,
        "caches to sample side by side, as full or POLICY-BUDGET; the other cache options hold for all",
        metavar="CACHE",
        script="grid",
    )
    columns: int | None = option(
        None,
        "images in a row, of each cache; default: 4, or in a grid of many as many as rows",
        metavar="N",
        script="grid",
    )
    output: str = option("sample_c2i.png", "the grid", metavar="FILE.png", path=True, script="grid")
    sample_dir: str = option("samples", "the run folder is made in here", metavar="DIR", path=True, script="job")
    per_proc_batch_size: int = option(32, "images that one process samples at a time", metavar="N", script="job")
    num_fid_samples: int = option(
        50000, "images in all; of prompts, at most as many as there are", metavar="N", script="job"
    )
    image_size_eval: int | None = option(
        None,
        "images are resized to this (bicubic, no antialias); default: image-size, for c2i at most 256",
        metavar="PX",
        script="job",
    )
    label_distribution: str = option(
        "balanced",
        "balanced: classes in turn; uniform: drawn at random",
        choices=("balanced", "uniform"),
        script="job",
        only_for="c2i",
    )
    cpu: bool = option(False, "run on the CPU even where there is a GPU")


@dataclass
class Options:
    """All sections, in the order of the YAML file."""

    model: ModelOptions = field(default_factory=ModelOptions)
    text: TextOptions = field(default_factory=TextOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def rows(self) -> dict[str, dict[str, Field]]:
        """{section: {key: its row}} of what this kind of model has."""
        known, kinds = {}, (None, self.model.gpt_type)
        for part in fields(self):
            section = getattr(self, part.name)
            if getattr(section, "only_for", None) in kinds:
                known[part.name] = {row.name: row for row in fields(section) if row.metadata["only_for"] in kinds}
        return known

    def values(self) -> dict[str, dict[str, Any]]:
        """{section: {key: value}}, as JSON can tell them."""
        return {name: {key: getattr(getattr(self, name), key) for key in rows} for name, rows in self.rows().items()}

    @classmethod
    def text_to_image(cls) -> "Options":
        """LlamaGen's defaults for text-conditional models, where they are other than for classes."""
        return cls(
            model=ModelOptions(gpt_type="t2i"),
            sampling=SamplingOptions(cfg_scale=7.5, top_k=1000),
            run=RunOptions(num_fid_samples=30000, output="sample_t2i.png"),
        )

    def cache_config(self) -> "CacheConfig":
        """Raises OptionError for impossible values."""
        from adsa import CacheConfig

        try:
            return CacheConfig.from_dict(asdict(self.cache))
        except ValueError as error:
            raise OptionError(str(error)) from error

    def check(self) -> None:
        """Raises OptionError for values that no model could be sampled with."""
        sampling, run = self.sampling, self.run
        if not run.compare:  # which has its own
            self.cache_config()
        positive = {
            "model.image_size": self.model.image_size,
            "model.downsample_size": self.model.downsample_size,
            "model.num_classes": self.model.num_classes,
            "model.cls_token_num": self.model.cls_token_num,
            "model.caption_dim": self.model.caption_dim,
            "text.max_length": self.text.max_length,
            "run.columns": run.columns,
            "run.per_proc_batch_size": run.per_proc_batch_size,
            "run.num_fid_samples": run.num_fid_samples,
            "run.image_size_eval": run.image_size_eval,
        }
        for key, value in positive.items():
            if value is not None and value < 1:
                raise OptionError(f"{key} must be at least 1, not {value}")
        for key in ("class_labels", "grid_labels"):
            if getattr(run, key) == []:
                raise OptionError(f"run.{key} names no class; leave it out for the default")
        if self.text.prompts and self.text.prompt_file is not None:
            raise OptionError("text.prompts and text.prompt_file both name prompts: give one of them")
        if not 0 <= run.seed < 2**63:
            raise OptionError(f"run.seed must be 0 to 2^63 - 1, not {run.seed}")
        if sampling.top_k < 0:
            raise OptionError(f"sampling.top_k must be 0 (off) or more, not {sampling.top_k}")
        if not 0 < sampling.top_p <= 1:
            raise OptionError(f"sampling.top_p must be above 0 and at most 1 (off), not {sampling.top_p}")
        if sampling.zipar_window is not None:
            if sampling.zipar_window < 1:
                raise OptionError(f"sampling.zipar_window must be at least 1, not {sampling.zipar_window}")
            if self.model.compile:
                raise OptionError(
                    "sampling.zipar_window and model.compile don't go together: of several tokens at once each number "
                    "would be another graph"
                )
        elif sampling.zipar_adaptive:
            raise OptionError("sampling.zipar_adaptive needs sampling.zipar_window, the smallest window")
        others = {
            "model.compile": self.model.compile,
            "sampling.zipar_window": sampling.zipar_window is not None,
            "sampling.cfg_interval": sampling.cfg_interval > -1,  # rows that go with guidance end all recordings
            "cache.mode select": self.cache.mode == "select",
        }
        if self.model.cuda_graphs and any(others.values()):
            given = ", ".join(name for name, there in others.items() if there)
            raise OptionError(f"model.cuda_graphs doesn't go together with {given}: give one of them")
        if not 0 <= sampling.temperature < float("inf"):
            raise OptionError(f"sampling.temperature must be 0 or more, not {sampling.temperature}")


def flags_of(section: str, row: Field) -> tuple[str, ...]:
    """The flags of a row; those of the cache carry its name."""
    prefix = "cache-" if section == "cache" else ""
    return tuple(row.metadata["flags"]) or (f"--{prefix}{row.name.replace('_', '-')}",)


def near(name: str, known: Sequence[str]) -> str:
    """' (did you mean X?)', or nothing if no name is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


# Types


def _kind(owner: type, row: Field) -> tuple[type, bool]:
    """(str, int, float, bool or list, whether None is allowed); a list is one of strings."""
    hint = typing.get_type_hints(owner)[row.name]
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return (list if typing.get_origin(hint) else hint), optional


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}


def _typed(value: Any, kind: type, optional: bool, choices: Sequence[str] | None) -> Any:
    """A value from YAML as its row wants it. Raises OptionError that says what was expected."""
    if value is None and optional:
        return None
    expected = f"one of {', '.join(choices)}" if choices else _NAMES[kind]
    if kind is list and isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        return [str(item) for item in value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (choices and value not in choices):
        hint = near(str(value), choices) if choices else ""
        if kind is float and isinstance(value, str) and "e" in value:
            hint = " (YAML wants a point before the e, as in 1.0e-3)"
        raise OptionError(f"expected {expected}, got {value!r}{hint}")
    return value


def _from_flag(kind: type, optional: bool, choices: Sequence[str] | None):
    """An argparse type. Where None is allowed and means something, the word `none` gives it; a list is told by item."""

    def convert(text: str):
        if optional and kind is not list and text.lower() == "none" and not (choices and "none" in choices):
            return None
        try:
            value = str(text) if kind is list else kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {_NAMES[kind]}, got {text!r}") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text!r}{near(text, choices)}")
        return value

    return convert


# Files


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, and not a value lost."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_config(path: str | Path, options: Options, *, nested: bool = False) -> dict[str, dict[str, Any]]:
    """Read a YAML file, and the one that its `base:` names, which it overrides key by key.

    Args:
        path: the file.
        options: whose sections and types the file must fit.
        nested: whether this is a base itself, which may have no further base.

    Returns:
        {section: {key: value}} of the keys given.

    Raises:
        OptionError: naming file and key.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise OptionError(
            f"{path}: {error.strerror or error}; the project's own files are in {shown(ROOT / 'configs')}"
        ) from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: not UTF-8 text; is it a YAML file?") from error
    except yaml.YAMLError as error:
        raise OptionError(f"{path}: not valid YAML: {error}") from error
    content = {} if content is None else content
    sections = options.rows()
    if not isinstance(content, dict):
        raise OptionError(f"{path}: expected the sections {', '.join(sections)}, got {content!r}")

    base = content.pop("base", None)
    values: dict[str, dict[str, Any]] = {}
    if base is not None:
        if nested or not isinstance(base, str):
            raise OptionError(
                f"{path}: key 'base': " + ("a base has no base" if nested else f"expected a file, got {base!r}")
            )
        values = read_config(path.parent / base, options, nested=True)
    for name, given in content.items():
        if name not in sections:
            if hasattr(options, str(name)):
                raise OptionError(f"{path}: section {name!r} is not for {options.model.gpt_type} models")
            raise OptionError(
                f"{path}: unknown section {name!r}{_near_key(name, sections)}; known: {', '.join(sections)}"
            )
        if given is None:
            continue
        if not isinstance(given, dict):
            raise OptionError(f"{path}: section {name!r}: expected keys and values, got {given!r}")
        rows = sections[name]
        for key, value in given.items():
            if key not in rows:
                raise OptionError(f"{path}: unknown key '{name}.{key}'{_near_key(str(key), rows, sections)}")
            kind, optional = _kind(type(getattr(options, name)), rows[key])
            try:
                value = _typed(value, kind, optional, rows[key].metadata["choices"])
            except OptionError as error:
                raise OptionError(f"{path}: key '{name}.{key}': {error}") from None
            if rows[key].metadata["path"] and value is not None:
                value = os.path.normpath(path.parent / Path(value).expanduser())
            values.setdefault(name, {})[key] = value
    return values


def _near_key(key: str, rows: dict, sections: dict | None = None) -> str:
    """A suggestion among a section's keys, or else among all sections' keys, since sections are easily mixed up."""
    suggestion = near(key, rows) or near(key.replace("-", "_"), rows)
    if suggestion or sections is None:
        return suggestion
    elsewhere = {row: f"{name}.{row}" for name, rows in sections.items() for row in rows}
    match = difflib.get_close_matches(key.replace("-", "_"), elsewhere, n=1)
    return f" (did you mean {elsewhere[match[0]]}?)" if match else f"; known: {', '.join(rows)}"


def shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    shown = os.path.relpath(path)
    return str(path) if shown.startswith(os.path.join("..", "..", "..")) else shown


# Flags


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag, and doesn't print forty flags over the message."""

    def error(self, message: str) -> typing.NoReturn:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # each process of a machine finds the same mistake
            print(f"{self.prog}: error: {message}\n(see {self.prog} --help)", file=sys.stderr, flush=True)
        sys.exit(2)


def parse_options(
    defaults: Options, argv: Sequence[str] | None, *, script: str, description: str, examples: str
) -> Options:
    """Command line -> options, or an exit with status 2 and a message.

    Args:
        defaults: also says, by its model.gpt_type, which rows there are; filled in place and returned.
        argv: the arguments; None: the process's own.
        script: "grid" or "job": whose flags to offer.
        description, examples: for the help.
    """
    parser, known = _parser(defaults, script, description, examples)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        parser.error(f"unknown argument {unknown[0]!r}{near(name, known)}")
    given = vars(given)
    config = given.pop("config")
    try:
        values = read_config(config, defaults) if config else {}
        _forget_overridden(values, given)
        for name, value in given.items():
            section, key = name.split(".")
            _, optional = _kind(type(getattr(defaults, section)), defaults.rows()[section][key])
            value = None if value == ["none"] and optional else value
            values.setdefault(section, {})[key] = value
        for name, section in values.items():
            for key, value in section.items():
                setattr(getattr(defaults, name), key, value)
        defaults.check()
    except OptionError as error:
        parser.error(str(error))
    return defaults


def _parser(defaults: Options, script: str, description: str, examples: str) -> tuple[_Parser, list[str]]:
    """The parser of a script's flags, and all of these."""
    parser = _Parser(
        usage="%(prog)s [--config FILE.yaml] [flags]",
        description=description,
        epilog=examples,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="gives any of the options below; a flag overrides it. See configs/README.md",
    )
    known = ["--config", "--help"]
    for name, rows in defaults.rows().items():
        section = getattr(defaults, name)
        group = parser.add_argument_group(name, (type(section).__doc__ or "").strip())
        for row in rows.values():
            if row.metadata["script"] not in (None, script):
                continue
            kind, optional = _kind(type(section), row)
            flags, meta = flags_of(name, row), row.metadata
            text = meta["help"] + default_text(getattr(section, row.name))
            settings = {
                "dest": f"{name}.{row.name}",
                "default": argparse.SUPPRESS,
                "help": text.replace("%", "%%"),
            }
            if kind is bool:
                group.add_argument(*flags, action=argparse.BooleanOptionalAction, **settings)
            else:
                metavar = meta["metavar"] or (
                    "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else kind.__name__.upper()
                )
                convert = _from_flag(kind, optional, meta["choices"])
                several = {"nargs": "+", "action": "extend"} if kind is list else {}
                group.add_argument(*flags, type=convert, metavar=metavar, **several, **settings)
            known += flags
    return parser, known


def _forget_overridden(values: dict[str, dict[str, Any]], given: dict[str, Any]) -> None:
    """Take out of a file's values what the flags given put an end to, besides the keys that they name."""

    def forget(section: str, *keys: str) -> None:
        for key in keys:
            values.get(section, {}).pop(key, None)

    if given.get("cache.policy") == "full":  # the dense cache needs no budget
        forget("cache", "budget", "prefix", "local")
    if given.keys() & {"cache.policy", "cache.budget"}:  # one cache is asked for, and not several
        forget("run", "compare")
    if given.keys() & {"text.prompts", "text.prompt_file"}:
        forget("text", "prompts", "prompt_file")


def default_text(value: Any) -> str:
    """How the help tells a default that is not told in words."""
    if value is None or value is False or value == ():
        return ""
    return f" [{'on' if value is True else value}]"


def markdown() -> str:
    """Every key of every section, with its type, default and meaning."""
    lines = []
    for part in fields(Options):
        section = getattr(Options(), part.name)
        lines += [
            f"### {part.name}",
            "",
            (type(section).__doc__ or "").strip(),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for row in fields(section):
            kind, _ = _kind(type(section), row)
            allowed = ", ".join(row.metadata["choices"] or []) or _NAMES[kind]
            value, only = getattr(section, row.name), row.metadata["only_for"]
            shown = "" if value in (None, ()) else str(value).lower() if kind is bool else str(value)
            told = f"{only}: {row.metadata['help']}" if only else row.metadata["help"]
            lines.append(f"| `{row.name}` | {allowed} | {shown} | {told} |")
        lines.append("")
    return "\n".join(lines[:-1])


if __name__ == "__main__":
    print(markdown())
