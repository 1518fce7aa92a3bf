"""Class labels: which image is of which class, and classes by their names."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoregressive.sample.options import ModelOptions, OptionError, Options, RunOptions, near

LLAMAGEN_LABELS = (207, 360, 387, 974, 88, 979, 417, 279)  # of its demo, for the 1000 classes of ImageNet


def require_classes(options: Options) -> None:
    """Raises OptionError for a text-conditional model, which has no classes to sample."""
    if options.model.gpt_type != "c2i":
        raise OptionError(f"model.gpt_type is {options.model.gpt_type}, and this script samples classes (c2i)")


class Classes:
    """The classes of a model and their names, where they have any.

    Args:
        model: with `num_classes` known.
        run: `class_names` is the file; else it is classes.json beside the GPT; else 1000 classes are ImageNet's.

    Raises:
        OptionError: the file can't be read, or has another number of names than there are classes.
    """

    def __init__(self, model: ModelOptions, run: RunOptions):
        self.count = model.num_classes
        self._file = Path(run.class_names or Path(model.gpt_ckpt).parent / "classes.json")
        self._names: list[str] | None = None
        if run.class_names or self._file.exists():
            self._names = self._read()

    def _read(self) -> list[str]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(f"run.class_names: {self._file}: {error}") from error
        names = content.get("classes") if isinstance(content, dict) else content
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != self.count:
            raise OptionError(f"run.class_names: {self._file}: expected a list of {self.count} names, one per class")
        return names

    @property
    def names(self) -> list[str]:
        """One per class; its number where it has no name."""
        if self._names is None and self.count == 1000:
            from torchvision.models import ResNet18_Weights  # slow to import, and seldom wanted

            self._names = list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
        return self._names or [f"class {i}" for i in range(self.count)]

    def ids(self, labels: Sequence[str], key: str) -> list[int]:
        """Class ids from ids or names. Raises OptionError for what is neither, or a name that several classes have."""
        found = []
        for label in labels:
            if label.isdecimal():
                if int(label) >= self.count:
                    raise OptionError(f"{key}: class {label} is not among the model's 0 to {self.count - 1}")
                found.append(int(label))
                continue
            matches = [i for i, name in enumerate(self.names) if name == label]
            matches = matches or [i for i, name in enumerate(self.names) if name.lower() == label.lower()]
            if len(matches) != 1:
                what = f"stands for the classes {matches}: give the number" if matches else "is no class"
                raise OptionError(f"{key}: {label!r} {what}{'' if matches else near(label, self.names)}")
            found += matches
        return found

    def few(self) -> list[int]:
        """Classes for a small grid: LlamaGen's eight for ImageNet, else up to eight spread over all."""
        if self.count == 1000:
            return list(LLAMAGEN_LABELS)
        return [i * self.count // 8 for i in range(8)] if self.count > 8 else list(range(self.count))


def assign(classes: Sequence[int], total: int, distribution: str, seed: int) -> np.ndarray:
    """The class of every image, int64 [total]: `classes` in turn, or drawn uniformly (a function of seed alone)."""
    classes = np.asarray(classes, dtype=np.int64)
    if distribution == "balanced":
        return np.resize(classes, total)
    return classes[np.random.default_rng(seed).integers(len(classes), size=total)]
