"""Files appear whole or not at all, and never through a link."""

from pathlib import Path

import pytest

from dllm_sd.files import replacing, write_file


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
