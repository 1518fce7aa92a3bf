"""Files that appear whole or not at all."""

import errno
import json
import os

import pytest

from tokenizer.files import atomic_file, fingerprint, remove_partial, write_json


@pytest.mark.parametrize("sync", [False, True])
def test_the_name_appears_with_the_whole_file(tmp_path, sync):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_file(path, sync=sync) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_file_written_by_name_gets_ordinary_permissions(tmp_path):
    (tmp_path / "other").touch()
    with atomic_file(tmp_path / "a.bin") as file:
        file.close()
        os.unlink(file.name)
        os.close(os.open(file.name, os.O_WRONLY | os.O_CREAT, 0o600))
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_errors_leave_the_old_file_and_name_it(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.bin'$") as told, atomic_file(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert told.value.errno == errno.ENOSPC
    with pytest.raises(KeyboardInterrupt), atomic_file(path):
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_file(path):
        (tmp_path / "elsewhere").read_bytes()
    assert os.listdir(tmp_path) == ["a.bin"] and path.read_bytes() == b"old"
    with pytest.raises(FileNotFoundError, match=r"absent/b\.bin'$"), atomic_file(tmp_path / "absent" / "b.bin"):
        pass


def test_what_a_killed_process_left_can_be_removed(tmp_path):
    path = tmp_path / "a.bin"
    writing = atomic_file(path)
    writing.__enter__().write(b"half")
    (tmp_path / "kept.part").touch()
    assert len(os.listdir(tmp_path)) == 2
    remove_partial(tmp_path)
    assert os.listdir(tmp_path) == ["kept.part"]


def test_fingerprint_tells_content_and_not_place(tmp_path):
    path, size = tmp_path / "big", 70 << 20
    with open(path, "wb") as file:
        file.truncate(size)
    first = fingerprint(path)
    assert (first["file"], first["bytes"]) == ("big", size)
    with open(path, "r+b") as file:
        file.seek(size - 1)
        file.write(b"x")
    assert fingerprint(path)["sha256_of_blocks"] != first["sha256_of_blocks"]
    (tmp_path / "small").write_bytes(b"abc")
    (tmp_path / "copy").write_bytes(b"abc")
    assert fingerprint(tmp_path / "copy") == {**fingerprint(tmp_path / "small"), "file": "copy"}


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old"
    write_json(path, {"b": [1, None], "a": "é"})
    assert json.loads(path.read_text()) == {"b": [1, None], "a": "é"}
    assert os.listdir(tmp_path) == ["a.json"]
