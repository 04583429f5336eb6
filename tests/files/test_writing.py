"""Files appear whole or not at all, and never through a link."""

from pathlib import Path

import pytest

from dllm_sd.files.writing import remove, replacing, write_file


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path):
    write_file(tmp_path / "a", "ü\n")
    write_file(tmp_path / "b", b"\x00\r\n")
    assert (tmp_path / "a").read_bytes() == "ü\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\r\n"


def test_a_block_that_fails_leaves_the_former_file_and_nothing_beside_it(tmp_path: Path):
    write_file(tmp_path / "a", "before")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as file:
        file.write(b"half" + None)  # pyright: ignore[reportOperatorIssue]
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_in_the_place_of_the_partial_file_is_not_followed(tmp_path: Path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / ".a.partial").symlink_to(tmp_path / "outside")
    write_file(tmp_path / "a", "new")
    assert (tmp_path / "outside").read_text() == "precious"
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "a").is_symlink()


def test_what_is_removed_is_a_file_a_folder_a_link_or_nothing(tmp_path: Path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").symlink_to(tmp_path / "kept")
    (tmp_path / "file").write_text("x")
    for name in ("link", "dead", "folder", "file", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "precious"
