"""Labels: balanced or drawn, and classes by name."""

import numpy as np
import pytest

from autoregressive.sample.labels import LLAMAGEN_LABELS, Classes, assign
from autoregressive.sample.options import ModelOptions, OptionError, RunOptions


def classes(folder, count=10, **run):
    return Classes(ModelOptions(gpt_ckpt=str(folder / "gpt.safetensors"), num_classes=count), RunOptions(**run))


def test_balanced():
    labels = assign(range(4), 10, "balanced", 0)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert assign([7, 5], 3, "balanced", 0).tolist() == [7, 5, 7]


def test_uniform():
    labels = assign(range(4), 4000, "uniform", 3)
    assert np.array_equal(labels, assign(range(4), 4000, "uniform", 3))
    assert not np.array_equal(labels, assign(range(4), 4000, "uniform", 4))
    assert np.bincount(labels).min() > 900
    assert labels[:12].tolist() != [0, 1, 2, 3] * 3
    assert set(assign([7, 5], 50, "uniform", 0)) == {5, 7}


def test_names_and_numbers(tiny):
    assert classes(tiny).ids(["3", "thing a", "Thing J", "3"], "run.class_labels") == [3, 0, 9, 3]
    assert classes(tiny).names[2] == "thing c"
    assert classes(tiny).few() == [0, 1, 2, 3, 5, 6, 7, 8]


def test_without_names(tmp_path):
    assert classes(tmp_path).names[2] == "class 2"
    assert classes(tmp_path, 3).few() == [0, 1, 2]


def test_imagenet(tmp_path):
    imagenet = classes(tmp_path, 1000)
    assert imagenet.few() == list(LLAMAGEN_LABELS)
    assert imagenet.ids(["golden retriever", "Otter", "Cardigan", "cardigan"], "run.class_labels") == [
        207,
        360,
        264,
        474,
    ]
    with pytest.raises(OptionError, match=r"'CARDIGAN' stands for the classes \[264, 474\]: give the number"):
        imagenet.ids(["CARDIGAN"], "run.class_labels")


def test_refused(tiny, tmp_path):
    with pytest.raises(OptionError, match=r"run\.class_labels: class 10 is not among the model's 0 to 9"):
        classes(tiny).ids(["10"], "run.class_labels")
    with pytest.raises(OptionError, match=r"'thin a' is no class \(did you mean thing a\?\)"):
        classes(tiny).ids(["thin a"], "run.class_labels")
    with pytest.raises(OptionError, match="expected a list of 11 names"):
        classes(tiny, 11)
    with pytest.raises(OptionError, match=r"nowhere\.json"):
        classes(tiny, class_names=str(tmp_path / "nowhere.json"))
