"""The loss on real images through caches, less that of the dense one: for sweeps.py and headtohead.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from adsa import CacheConfig
from autoregressive.sample.job import start_processes
from autoregressive.sample.options import OptionError
from autoregressive.sample.sampler import Blueprint
from evaluations.paper.protocol import Task, TextTask
from evaluations.perplexity import Compass, open_data


def compass_of(task: Task, folder: Path, *, images: int, batch: int) -> Compass:
    """Measures caches on the images of a protocol's `codes`; arguments as :class:`Compass`.

    Raises:
        OptionError: it names none, or they are not there or don't fit the model.
    """
    if task.codes is None:
        kind = "t2i" if isinstance(task, TextTask) else "c2i"
        raise OptionError(
            f"the protocol's section '{kind}' has no key 'codes': the folder of images that the loss is measured on, "
            f"made by extract_codes_c2i.py"
        )
    options, device = task.options(), start_processes(task.cpu).device
    blueprint = Blueprint(options.model, device)
    data = open_data(options, blueprint, task.codes, task.code_captions if isinstance(task, TextTask) else None)
    return Compass(blueprint, data, folder, device, images=images, batch=batch)


@dataclass(frozen=True)
class Setting:
    """What is measured: a cache, and how it is decoded."""

    cache: CacheConfig
    window: int | None = None
    cfg_scale: float = 1.0


class Sweep:
    """Settings, measured once each, less dense.

    Args:
        compass: measures.
        settings: all that will be asked for.
    """

    def __init__(self, compass: Compass, settings: Sequence[Setting]):
        self.compass = compass
        wanted = dict.fromkeys([Setting(CacheConfig("full")), *settings])
        self.losses, self._by_row = {}, {}
        for setting in tqdm(wanted, unit=" caches"):
            found = compass.measure(setting.cache, setting.window, setting.cfg_scale)
            self.losses[setting], self._by_row[setting] = np.array(found["losses"]), found.get("by_row")

    def more(self, setting: Setting, than: Setting | None = None) -> tuple[float, float]:
        """Mean and standard error over images of the loss less another's; None: the dense cache's."""
        difference = self.losses[setting] - self.losses[than or Setting(CacheConfig("full"))]
        return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)

    def by_row(self, setting: Setting) -> np.ndarray:
        """The loss less the dense cache's of each row of tokens, from the top, over all images.

        Raises OptionError for results that don't tell it.
        """
        mine, dense = self._by_row[setting], self._by_row[Setting(CacheConfig("full"))]
        if mine is None or dense is None:
            raise OptionError(f"{self.compass.folder}: has losses without rows, by an older version; delete them")
        return np.array(mine) - np.array(dense)

    def told(self, setting: Setting, than: Setting | None = None) -> str:
        """In thousandths of a nat."""
        mean, error = self.more(setting, than)
        return f"{1000 * mean:+.1f} +- {1000 * error:.1f}"
