"""Folders that are replaced whole: only this project's own, and whatever a crash left is recovered.
Deaths at every operation of a real export: tests/distributed/test_overwrite.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neftune_dist.checkpoint import marked_folder
from neftune_dist.config import UserError

MARK = "mark.json"


def make(folder: Path, content: str) -> None:
    with marked_folder.replaced(folder, MARK) as new:
        (new / "a.txt").write_text(content)
        (new / "b.txt").write_text(content)


def content(folder: Path) -> str:
    (one,) = {(folder / name).read_text() for name in ("a.txt", "b.txt")}
    return one


@pytest.mark.parametrize("thing", ["changed", "same size", "another", "folder", "link", "no mark"])
def test_foreign_content_is_kept(thing: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    make(folder, "one")
    if thing == "changed":
        (folder / "a.txt").write_text("longer")
    elif thing == "same size":
        (folder / "a.txt").write_text("two")
    elif thing == "another":
        (folder / "c.txt").write_text("mine")
    elif thing == "folder":
        (folder / "c").mkdir()
    elif thing == "link":
        (folder / "a.txt").unlink()
        (folder / "a.txt").symlink_to("b.txt")
    else:
        (folder / MARK).unlink()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError):
        make(folder, "two")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_error_while_filling_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    make(folder, "one")
    with pytest.raises(ZeroDivisionError), marked_folder.replaced(folder, MARK) as new:
        (new / "a.txt").write_text("half")
        raise ZeroDivisionError
    assert content(folder) == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "out", os.rename
    make(folder, "one")

    def refuse(source: Path, target: Path) -> None:
        if str(source).endswith("neftune-new"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="No space"):
            make(folder, "two")
    assert content(folder) == "one"
    make(folder, "three")
    assert content(folder) == "three"


def test_crash_between_renames_is_recovered(tmp_path: Path) -> None:
    folder, old = tmp_path / "out", tmp_path / ".out.neftune-old"
    make(folder, "one")
    folder.rename(old)  # the new one had not taken its place
    with pytest.raises(ZeroDivisionError), marked_folder.replaced(folder, MARK):
        assert content(folder) == "one"
        raise ZeroDivisionError
    assert content(folder) == "one" and not old.exists()
    make(old, "zero")  # both are there: the old one was about to be removed
    make(folder, "two")
    assert content(folder) == "two" and not old.exists()


@pytest.mark.parametrize("which", ["new", "old"])
def test_foreign_folder_in_the_way_is_kept(which: str, tmp_path: Path) -> None:
    way = tmp_path / f".out.neftune-{which}"
    way.mkdir()
    (way / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        make(tmp_path / "out", "one")
    assert (way / "thesis.txt").read_text() == "mine"
