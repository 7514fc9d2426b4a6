"""What is written aside and then renamed."""

import os
from pathlib import Path

import pytest

from peft_diffusion.core.errors import UserError
from peft_diffusion.core.files import file_of, files_below, write_bytes, written_aside


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    write_bytes(path, b"one")
    with pytest.raises(ZeroDivisionError), written_aside(path) as aside:
        aside.write_bytes(b"half")
        assert file_of(aside.name) == "a.bin" and aside.parent == path.parent
        raise ZeroDivisionError
    assert path.read_bytes() == b"one" and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="there is no umask")
def test_a_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_an_error_names_the_file_and_not_what_was_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / ".a.bin.123"))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'a.bin'} cannot be written: No space left on device; free space"):
        write_bytes(tmp_path / "a.bin", b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.bin", ".a", ".a.b", ".123"])
def test_names_of_others_are_not_taken_for_ours(name: str) -> None:
    assert file_of(name) is None


def test_what_lies_below_a_folder_is_listed_by_links_too_and_without_what_is_hidden(tmp_path: Path) -> None:
    shown, elsewhere = tmp_path / "shown", tmp_path / "elsewhere"
    for path in ("ink", "sub/flat", "._ink", ".trash/old", "sub/.thumbnails/flat"):
        (shown / path).parent.mkdir(parents=True, exist_ok=True)
        (shown / path).touch()
    elsewhere.mkdir()
    (elsewhere / "line").touch()
    (shown / "linked").symlink_to(elsewhere)
    (shown / "round").symlink_to(shown)
    (shown / "nowhere").symlink_to(tmp_path / "gone")
    (shown / "a").mkdir()
    (shown / "a" / "link").symlink_to(shown / "sub")  # which has a path of its own
    found = [path.relative_to(shown).as_posix() for path in files_below(shown)]
    assert found == ["ink", "linked/line", "nowhere", "sub/flat"]
