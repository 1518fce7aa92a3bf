"""The run folder: what counts as whole, what may go on, and what is refused."""

import errno
import json
import zipfile

import numpy as np
import pytest

from autoregressive.sample import run_folder
from autoregressive.sample.run_folder import RunError, RunFolder, npy_bytes

SETTINGS = {"sampling.cfg_scale": 2.0, "model.gpt_ckpt": {"file": "a", "bytes": 1}}
IMAGES = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3)).astype(np.uint8)
TOKENS = np.arange(20, dtype=np.uint16).reshape(5, 4)


def opened(path, settings=SETTINGS, total=5):
    folder = RunFolder(path, total, 8)
    return folder, folder.open(settings, {"world_size": 1}, {"labels.npy": npy_bytes(np.arange(total))})


@pytest.fixture
def finished(tmp_path):
    folder, missing = opened(tmp_path / "run")
    assert missing == [0, 1, 2, 3, 4]
    folder.write_images(range(5), IMAGES, TOKENS)
    folder.write_npz()
    folder.note(status="complete", images=5)
    folder.close()
    return folder


def test_npz_is_what_was_written(finished):
    with np.load(finished.npz) as archive:
        assert archive.files == ["arr_0"]
        assert np.array_equal(archive["arr_0"], IMAGES)
    assert np.load(finished.path / "labels.npy").tolist() == [0, 1, 2, 3, 4]
    first = finished.npz.read_bytes()
    finished.write_npz()
    assert finished.npz.read_bytes() == first, "no dates in it"
    assert zipfile.ZipFile(finished.npz).testzip() is None


def test_finished_run_is_left_alone(finished):
    before = (finished.path / "run.json").read_bytes()
    folder, missing = opened(finished.path)
    assert missing == []
    assert folder.record["status"] == "complete"
    assert (finished.path / "run.json").read_bytes() == before


def test_half_written_images_are_missing(finished):
    whole = finished.image(1).read_bytes()
    finished.image(0).unlink()
    finished.image(1).write_bytes(whole[:-5])
    finished.image(2).write_bytes(b"")
    finished.image(3).write_bytes(b"\0" * len(whole))
    run_folder.save_image_atomic(finished.image(4), IMAGES[4, :4, :4])
    (finished.images / ".000001.png.abc.part").write_bytes(b"half")
    (finished.path / ".samples.npz.abc.part").write_bytes(b"half")
    folder, missing = opened(finished.path)
    assert missing == [0, 1, 2, 3, 4]
    assert not list(finished.path.rglob("*.part"))
    assert folder.record["status"] == "sampling"
    assert folder.record["earlier_sessions"][0]["images"] == 5


def test_images_without_their_tokens_are_missing(finished):
    assert np.array_equal(finished.read_tokens(3), TOKENS[3])
    assert finished.read_tokens(3).dtype == np.uint16
    finished.token_file(1).unlink()
    finished.token_file(2).write_bytes(b"")
    (finished.tokens / ".000001.npy.abc.part").write_bytes(b"half")
    for index in (1, 2):
        with pytest.raises(RunError, match=rf"00000{index}\.npy: no readable tokens .* run the sampling command again"):
            finished.read_tokens(index)
    assert opened(finished.path)[1] == [1, 2]
    assert not list(finished.path.rglob("*.part"))


def test_folder_without_tokens(tmp_path):
    folder = RunFolder(tmp_path, 5, 8, keeps_tokens=False)
    folder.open(SETTINGS, {}, {})
    folder.write_images(range(5), IMAGES)
    folder.close()
    assert not folder.tokens.exists()
    assert folder.open(SETTINGS, {}, {}) == []
    folder.close()


def test_complete_runs_are_known_by_their_settings(finished):
    assert finished.is_complete(SETTINGS)
    assert not finished.is_complete(SETTINGS | {"more": 1})
    finished.npz.unlink()
    assert not finished.is_complete(SETTINGS)
    (finished.path / "run.json").write_text("{")
    assert not finished.is_complete(SETTINGS)


def test_earlier_sessions_are_told(tmp_path):
    folder, _ = opened(tmp_path)
    folder.write_images(range(2), IMAGES[:2], TOKENS[:2])
    folder.close()
    folder, missing = opened(tmp_path)
    assert missing == [2, 3, 4]
    folder.close()
    folder, _ = opened(tmp_path)
    assert [session["images"] for session in folder.record["earlier_sessions"]] == [2, 0]
    assert folder.record["images_before"] == 2


def test_other_settings_are_refused(finished):
    other = {"sampling.cfg_scale": 3.0, "model.gpt_ckpt": {"file": "a", "bytes": 2}}
    with pytest.raises(RunError) as error:
        opened(finished.path, other)
    assert "sampling.cfg_scale is 2.0 there and 3.0 here" in str(error.value)
    assert "model.gpt_ckpt is" in str(error.value)
    assert "delete" in str(error.value)


def test_images_of_unknown_origin_are_refused(finished):
    (finished.path / "run.json").unlink()
    with pytest.raises(RunError, match=r"holds images but no run\.json"):
        opened(finished.path)
    (finished.path / "run.json").write_text("{")
    with pytest.raises(RunError, match="not readable as a run"):
        opened(finished.path)


def test_two_jobs_at_once_are_refused(tmp_path):
    first, _ = opened(tmp_path)
    with pytest.raises(RunError, match="another process is at work"):
        opened(tmp_path)
    first.close()
    opened(tmp_path)[0].close()


def test_where_folders_cannot_be_locked_runs_go_on_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "fcntl", None)
    first, _ = opened(tmp_path)
    second, missing = opened(tmp_path)
    assert missing == [0, 1, 2, 3, 4]
    first.close()
    second.close()


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*file/run: Not a directory"):
        opened(tmp_path / "file" / "run")


def test_full_disk_leaves_no_npz(finished, monkeypatch):
    finished.npz.unlink()

    def full(index):
        if index == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return IMAGES[index]

    monkeypatch.setattr(finished, "read_image", full)
    with pytest.raises(RunError, match=r"cannot write .*samples\.npz: No space left on device"):
        finished.write_npz()
    assert sorted(path.name for path in finished.path.iterdir()) == ["images", "labels.npy", "run.json", "tokens"]


def test_damaged_image_is_named(finished):
    content = bytearray(finished.image(2).read_bytes())
    content[60:70] = b"\0" * 10
    finished.image(2).write_bytes(content)
    with pytest.raises(RunError, match=r"000002\.png: damaged .* delete it"):
        finished.write_npz()


def test_record_is_json(finished):
    record = json.loads((finished.path / "run.json").read_text())
    assert record["settings"] == SETTINGS
    assert record["world_size"] == 1
