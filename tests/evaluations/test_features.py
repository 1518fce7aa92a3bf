import io
import os

import numpy as np
import pytest
from PIL import Image

from evaluations import features
from evaluations.extractors import INCEPTION, EvaluationError
from evaluations.features import Features, FolderImages, extract, open_set, write_features
from tests.evaluations.conftest import pictures
from tests.evaluations.stand_in import NAME, StandIn


@pytest.fixture
def run(state):
    """A function: path -> its features, from the cache or by the stand-in extractor."""

    def features_of(path, load=StandIn, batch_size=8, workers=0, image_size=None, classes=None, name=NAME):
        images, _, _ = open_set(path, name, image_size, classes)
        return extract(images, name, load, state, batch_size=batch_size, workers=workers, image_size=image_size)

    return features_of


def expected(images):
    """Colours of 2 x 2 parts of uint8 [N, H, W, 3], as the stand-in extractor has them."""
    n, h, w, _ = images.shape
    return images.reshape(n, 2, h // 2, 2, w // 2, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(n, 12) / 255


def not_needed():
    raise AssertionError("the features should have come from the cache")


def test_folder_npz_and_run_give_the_same(folder, run_folder, run, tmp_path):
    path, images = folder("a{0}/b")  # in a folder within the folder
    np.savez(tmp_path / "stored.npz", arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    found = run(path.parent)
    assert found.features == pytest.approx(expected(images), abs=1e-6)
    assert found.features.dtype == np.float32
    assert found.logits.shape == (20, 5)
    assert found.spatial.shape == (20, 27)
    sampled = run_folder("run")
    np.savez(sampled / "samples.npz", arr_0=images)
    for other in (tmp_path / "stored.npz", tmp_path / "packed.npz", sampled):
        assert np.array_equal(run(other).features, found.features), other


def test_large_arrays_stay_on_the_disk(tmp_path):
    np.savez(tmp_path / "stored.npz", other=np.arange(5), arr_0=pictures(4, 0))
    images, _, _ = open_set(tmp_path / "stored.npz", NAME)
    assert isinstance(images.images, np.memmap)
    assert np.array_equal(images.images, pictures(4, 0))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_do_not_matter(folder, run, batch_size):
    path, images = folder("a")
    assert run(path, batch_size=batch_size).features == pytest.approx(expected(images), abs=1e-6)


def test_images_of_all_kinds(run, tmp_path):
    """Grey, with a palette, transparent, of other sizes: each gives what it gives alone."""
    colour, grey, clear = pictures(3, 5)
    Image.fromarray(colour).save(tmp_path / "a.png")
    Image.fromarray(grey[..., 0]).save(tmp_path / "b.png")
    Image.fromarray(np.dstack([clear, np.zeros((8, 8), np.uint8)])).save(tmp_path / "c.png")
    Image.fromarray(colour).resize((16, 24), Image.Resampling.NEAREST).save(tmp_path / "d.PNG")
    Image.fromarray(grey).quantize(255).save(tmp_path / "e.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_text("nor this")
    found = run(tmp_path)
    assert found.sizes.tolist() == [[8, 8], [24, 16]]
    assert found.features[0] == pytest.approx(expected(colour[None])[0], abs=1e-6)
    assert found.features[1] == pytest.approx(expected(np.repeat(grey[None, ..., :1], 3, -1))[0], abs=1e-6)
    assert found.features[2] == pytest.approx(1)  # white shows through
    assert found.features[3] == pytest.approx(found.features[0], abs=1e-6)
    assert found.features[4] == pytest.approx(expected(grey[None])[0], abs=0.02)


def test_images_are_cropped_to_one_size(run, tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = pictures(1, 0)[0]
    for name in ("a.png", "b.png"):
        Image.fromarray(image).save(tmp_path / name)
    assert run(tmp_path, image_size=8).features[0] == pytest.approx(expected(image[None, :, 4:12])[0], abs=1e-6)
    assert run(tmp_path).sizes.tolist() == [[8, 16]]  # kept apart from the other


def test_classes_are_chosen(folder, run, tmp_path):
    wanted = np.concatenate([folder("set/cat_x", 3)[1], folder("set/dog_x", 2)[1]])
    folder("set/cat_y", 4)
    assert len(run(tmp_path / "set")) == 9
    assert run(tmp_path / "set", classes=["*_x"]).features == pytest.approx(expected(wanted), abs=1e-6)
    assert len(run(tmp_path / "set", load=not_needed)) == 9
    with pytest.raises(EvaluationError, match=r"holds no images in the folders that match z\*"):
        run(tmp_path / "set", classes=["z*"])


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_named(folder, run, workers):
    path, _ = folder("a")
    (path / "0007.png").write_bytes((path / "0007.png").read_bytes()[:60])
    with pytest.raises(EvaluationError, match=r"0007.png: not a readable image .*replace or delete the file"):
        run(path, workers=workers)
    assert not list(path.glob("features*"))


def test_paths_that_hold_nothing_to_use(folder, run_folder, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    np.savez(tmp_path / "labels.npz", labels=np.arange(3))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    unfinished = run_folder("unfinished", status="sampling")
    for path, message in {
        tmp_path / "none": "no such file or folder",
        tmp_path / "empty": "holds no images",
        tmp_path / "file.txt": r"neither a folder nor an \.npz file",
        tmp_path / "broken.npz": r"not a readable \.npz file",
        tmp_path / "labels.npz": r"neither images \(arr_0\).* it holds labels",
        tmp_path / "floats.npz": r"its arr_0 is float64 \[4, 8, 8, 3\], expected uint8",
        folder("one", 1)[0]: "holds 1 images; nothing can be said about fewer than 2",
        unfinished: "not complete.*'sampling'.*run the same sampling command again",
    }.items():
        with pytest.raises(EvaluationError, match=message) as error:
            run(path)
        assert str(path) in str(error.value)


def test_truncated_npz_is_named(tmp_path):
    content = io.BytesIO()
    np.savez(content, arr_0=pictures(4, 0))
    (tmp_path / "cut.npz").write_bytes(content.getvalue()[:-300])
    with pytest.raises(EvaluationError, match=r"cut\.npz: not a readable \.npz file"):
        open_set(tmp_path / "cut.npz", NAME)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_features_are_kept_until_the_images_change(folder, run, tmp_path, kind):
    path, images = folder("a")
    file = path / "0003.png"
    if kind == "npz":
        path = file = tmp_path / "a.npz"
        np.savez(path, arr_0=images)
    first = run(path)
    again = run(path, load=not_needed, batch_size=3)
    assert np.array_equal(again.features, first.features)
    assert np.array_equal(again.spatial, first.spatial)
    assert again.identity == first.identity
    assert again.sizes.tolist() == [[8, 8]]
    images[3] = 200
    if kind == "npz":
        np.savez(path, arr_0=images)
    else:
        size = file.stat().st_size
        Image.fromarray(images[3]).save(file)
        os.truncate(file, max(size, file.stat().st_size))
    changed = run(path)
    assert not np.array_equal(changed.features[3], first.features[3])
    assert np.array_equal(np.delete(changed.features, 3, 0), np.delete(first.features, 3, 0))


def test_touched_files_are_looked_at_again_but_are_the_same_set(folder, run):
    path, _ = folder("a")
    identity = run(path).identity
    os.utime(path / "0000.png", (1, 1))
    with pytest.raises(AssertionError):
        run(path, load=not_needed)
    assert run(path).identity == identity
    (path / "0000.png").unlink()
    assert run(path).identity != identity


def test_features_of_a_network_in_a_folder_are_kept_until_its_files_change(folder, run, tmp_path):
    path, _ = folder("a")
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "model.safetensors").write_bytes(b"one")
    name = f"timm/local-dir:{tmp_path / 'network'}"
    run(path, name=name)
    run(path, name=name, load=not_needed)
    (tmp_path / "network" / "model.safetensors").write_bytes(b"two")
    with pytest.raises(AssertionError):
        run(path, name=name, load=not_needed)


def test_damaged_cache_is_made_anew(folder, run):
    path, _ = folder("a")
    first = run(path)
    [cache] = path.glob("features*")
    cache.write_bytes(cache.read_bytes()[:-500])
    assert np.array_equal(run(path).features, first.features)
    assert np.array_equal(run(path, load=not_needed).features, first.features)


def test_folder_that_takes_no_cache(folder, run, capsys):
    path, images = folder("a")
    (path / f"features-{NAME}.npz").mkdir()
    assert run(path).features == pytest.approx(expected(images), abs=1e-6)
    assert "are not kept" in capsys.readouterr().err


def test_cache_of_another_format_is_not_used(folder, run, monkeypatch):
    path, _ = folder("a")
    run(path)
    monkeypatch.setattr(features, "FORMAT", features.FORMAT + 1)
    with pytest.raises(AssertionError):
        run(path, load=not_needed)


def test_features_stand_for_images(folder, run):
    path, _ = folder("a")
    first = run(path)
    [cache] = path.glob("features*")
    for file in path.glob("*.png"):
        file.unlink()
    found, statistics, _ = open_set(cache, NAME)
    assert isinstance(found, Features)
    assert statistics is None
    assert np.array_equal(found.features, first.features)
    assert found.identity == first.identity
    with pytest.raises(EvaluationError, match=r"features by stand-in, not by timm/resnet50; give the images"):
        open_set(cache, "timm/resnet50")
    with pytest.raises(EvaluationError, match=r"not by stand-in from images cropped to 64 pixels"):
        open_set(cache, NAME, image_size=64)


def test_damaged_features_are_named(tmp_path):
    write_features(tmp_path / "f.npz", Features(NAME, "id", 0, np.array([[8, 8]]), np.zeros((4, 3), np.float32)))
    with np.load(tmp_path / "f.npz") as file:
        arrays = {name: file[name] for name in file if name != "identity"}
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(EvaluationError, match=r"f\.npz: not a file of features"):
        open_set(tmp_path / "f.npz", NAME)


def test_adm_reference(tmp_path):
    statistics = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "adm.npz", arr_0=pictures(6, 0), **statistics)
    images, found, notes = open_set(tmp_path / "adm.npz", INCEPTION)
    assert len(images) == 6
    assert np.array_equal(found.sigma_s, np.eye(3))
    assert notes == []
    images, found, notes = open_set(tmp_path / "adm.npz", NAME)
    assert len(images) == 6
    assert found is None
    assert "stand-in uses its arr_0 alone" in notes[0]
    np.savez(tmp_path / "only.npz", mu=np.zeros(5), sigma=np.eye(5))
    images, found, _ = open_set(tmp_path / "only.npz", INCEPTION)
    assert images is None
    assert found.mu_s is None
    with pytest.raises(EvaluationError, match=r"nor statistics that stand-in can use; it holds mu, sigma"):
        open_set(tmp_path / "only.npz", NAME)


def test_order_is_by_path(folder):
    path, _ = folder("a", 12)
    assert [file.name for file in FolderImages(path).files] == [f"{index:04d}.png" for index in range(12)]
