"""Files that are written whole or not at all."""

import errno
import os
import re
import tempfile

import pytest

from instantas.files import check_writable, remove_parts, whole_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "a.png"
    with whole_file(path) as part:
        assert part.parent == tmp_path and part.suffix == ".png"
        part.write_bytes(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half" and names(tmp_path) == ["a.png"]


def test_a_name_without_a_folder_is_in_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with whole_file("a.txt") as part:
        part.write_text("here")
    assert (tmp_path / "a.txt").read_text() == "here"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_and_nothing_replaced_when_the_block_fails(tmp_path, error):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.png"]


def test_an_existing_file_is_replaced_only_where_that_is_wanted(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    message = re.escape(f"path: expected a new file, got {str(path)!r}, which exists")
    with pytest.raises(ValueError, match=message), whole_file(path, overwrite=False):
        pytest.fail("the block was entered")
    with whole_file(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="which exists"), whole_file(path, overwrite=False) as part:
        part.write_text("ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and names(tmp_path) == ["a.png"]


def test_what_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="path: expected an existing folder, got .*missing"):
        check_writable(tmp_path / "missing" / "a.png")
    with pytest.raises(ValueError, match="path: expected a file, got the folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="path: expected an existing folder, got .*file"):
        check_writable(tmp_path / "file" / "a.png")
    assert check_writable(str(tmp_path / "a.png")) == tmp_path / "a.png"


def test_a_place_that_cannot_be_written_is_found_by_trying(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="path: expected a file that can be written, got .*File name too long"):
        check_writable(tmp_path / ("a" * 250 + ".png"))

    def read_only(*arguments, **settings):  # the superuser may write to every folder of a disk that can be written
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", read_only)
    with pytest.raises(ValueError, match="path: expected a file that can be written, got .*Read-only file system"):
        check_writable(tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_what_other_files_have_left_stays(tmp_path):
    ours, others = ".a.17.part.checkpoint", [".a.1.17.part.checkpoint", ".a.b.17.part.checkpoint", ".a.17.part.png"]
    for name in (ours, *others):
        (tmp_path / name).write_text("")
    remove_parts(tmp_path / "a.checkpoint")
    assert names(tmp_path) == sorted(others)
