"""The cache of written texts: by content, whole or not at all, mended where it is broken."""

import hashlib
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from dllm_sd.errors import InputError
from dllm_sd.writers import Cache, Request, Sampling, Written, ask_once

IDENTITY = {"kind": "weights", "fingerprint": "abc"}
REQUEST = Request(({"role": "user", "content": "Wie heißt \U0001f600?"},), 7)
ASKED: dict[str, Any] = {"writer": IDENTITY, "messages": [{"role": "user", "content": "x"}], "key": 1}


class Author:
    """Writes ``text 0``, ``text 1``, ... and counts."""

    def __init__(self, *failures: str) -> None:
        self.count, self.failures = 0, list(failures)

    def __call__(self, requests: Sequence[Request]) -> Generator[tuple[int, Written]]:
        for place in reversed(range(len(requests))):
            yield place, Written(None, self.failures.pop(0)) if self.failures else Written(f"text {self.count}", None)
            self.count += 1


def write(cache: Cache | None, author: Author, *requests: Request, **other: Any) -> list[Written]:
    return ask_once(
        other.get("identity", IDENTITY), requests or [REQUEST], other.get("sampling", Sampling()), cache, author
    )


def the_file(folder: Path) -> Path:
    [file] = [file for file in folder.rglob("*") if file.is_file()]
    return file


def test_an_entry_is_a_readable_file_named_after_its_content(tmp_path: Path):
    write(Cache(tmp_path), Author())
    file = the_file(tmp_path)
    assert (file.parent.name, file.suffix, len(file.stem)) == (file.stem[:2], ".json", 64)
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "text": "text 0",
        "sha256": hashlib.sha256(b"text 0").hexdigest(),
        "writer": IDENTITY,
        "messages": [{"role": "user", "content": "Wie heißt \U0001f600?"}],
        "sampling": {"length": 1024, "temperature": 0.0, "top_p": 1.0, "thinking": None},
        "key": 7,
    }
    assert "heißt" in file.read_text(encoding="utf-8")


def test_what_was_written_is_not_asked_again(tmp_path: Path):
    author, cache = Author(), Cache(tmp_path)
    assert write(cache, author) == [Written("text 0", None)]
    assert write(cache, author) == write(Cache(tmp_path), author) == [Written("text 0", None, cached=True)]
    assert (author.count, cache.hits, cache.misses, cache.corrupt) == (1, 1, 1, 0)


@pytest.mark.parametrize(
    "other",
    [
        {"identity": {**IDENTITY, "fingerprint": "abd"}},
        {"sampling": Sampling(length=5)},
        {"sampling": Sampling(temperature=0.1)},
        {"sampling": Sampling(top_p=0.1)},
        {"sampling": Sampling(thinking=False)},
        {"request": replace(REQUEST, key=8)},
        {"request": replace(REQUEST, messages=({"role": "system", "content": "Wie heißt \U0001f600?"},))},
        {"request": replace(REQUEST, messages=(*REQUEST.messages, *REQUEST.messages))},
    ],
)
def test_whatever_differs_in_what_was_asked_is_another_text(tmp_path: Path, other: dict[str, Any]):
    author, cache = Author(), Cache(tmp_path)
    write(cache, author)
    assert write(cache, author, other.pop("request", REQUEST), **other) == [Written("text 1", None)]
    assert write(cache, author) == [Written("text 0", None, cached=True)]


def test_a_whole_number_as_temperature_is_the_same_number(tmp_path: Path):
    author, cache = Author(), Cache(tmp_path)
    write(cache, author, sampling=Sampling(temperature=1, top_p=1))
    assert write(cache, author, sampling=Sampling(temperature=1.0, top_p=1.0))[0].cached


@pytest.mark.parametrize("with_cache", [True, False])
def test_equal_requests_are_asked_once_and_all_get_the_text(tmp_path: Path, with_cache: bool):
    author, cache = Author(), Cache(tmp_path)
    other = replace(REQUEST, key=8)
    written = write(cache if with_cache else None, author, REQUEST, other, REQUEST)
    assert [one.text for one in written] == ["text 1", "text 0", "text 1"]
    assert author.count == 2
    assert cache.misses == (2 if with_cache else 0)


def test_failures_are_not_kept(tmp_path: Path):
    author, cache = Author("timeout"), Cache(tmp_path)
    assert write(cache, author) == [Written(None, "timeout")]
    assert not any(file.is_file() for file in tmp_path.rglob("*"))
    assert write(cache, author) == [Written("text 1", None)]


def test_a_text_is_kept_as_soon_as_it_arrives(tmp_path: Path):
    def dies(requests: Sequence[Request]) -> Generator[tuple[int, Written]]:
        yield 1, Written("early", None)
        raise KeyboardInterrupt

    asked = [REQUEST, replace(REQUEST, key=8)]
    with pytest.raises(KeyboardInterrupt):
        ask_once(IDENTITY, asked, Sampling(), Cache(tmp_path), dies)
    assert write(Cache(tmp_path), Author(), *asked) == [Written("text 0", None), Written("early", None, cached=True)]


def test_a_file_cut_off_anywhere_is_ignored_counted_and_rewritten(tmp_path: Path):
    write(Cache(tmp_path), Author())
    file = the_file(tmp_path)
    whole, cache = file.read_bytes(), Cache(tmp_path)
    sizes = [*range(0, len(whole), 11), len(whole) - 1]
    for size in sizes:
        file.write_bytes(whole[:size])
        assert write(cache, Author()) == [Written("text 0", None)]
        assert file.read_bytes() == whole
    assert (cache.hits, cache.misses, cache.corrupt) == (0, len(sizes), len(sizes))
    assert write(cache, Author())[0].cached


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"null", b"[]", b'{"text": 3}', b'{"text": "of something else", "key": 7}', b"[" * 100_000],
)
def test_a_file_that_holds_something_else_is_ignored_and_rewritten(tmp_path: Path, content: bytes):
    write(Cache(tmp_path), Author())
    file, cache = the_file(tmp_path), Cache(tmp_path)
    file.write_bytes(content)
    assert write(cache, Author()) == [Written("text 0", None)]
    assert cache.corrupt == 1
    assert write(cache, Author())[0].cached


def test_an_entry_without_a_text_is_ignored(tmp_path: Path):
    cache = Cache(tmp_path)
    cache.put(ASKED, " ")
    assert cache.get(ASKED) is None
    assert cache.corrupt == 1


def test_half_a_surrogate_in_a_question_does_no_harm(tmp_path: Path):
    author, cache = Author(), Cache(tmp_path)
    asked = Request(({"role": "user", "content": "\ud800 \\ud800"},), 1)
    assert write(cache, author, asked) == [Written("text 0", None)]
    assert write(cache, author, asked) == [Written("text 0", None, cached=True)]


def test_a_write_that_fails_leaves_the_former_text_whole_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = Cache(tmp_path)
    cache.put(ASKED, "former")

    def fail(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(InputError, match=r"cannot write in .*No space left on device.*; make room there"):
            cache.put(ASKED, "later")
    assert cache.get(ASKED) == "former"
    assert the_file(tmp_path).suffix == ".json"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"the cache of written texts cannot write in .*; .* name another folder"):
        Cache(tmp_path / "file" / "folder")


def test_nothing_is_written_outside_the_folder(tmp_path: Path):
    cache = Cache(tmp_path / "cache")
    evil = replace(REQUEST, messages=({"role": "../../..", "content": "/etc/passwd\0"},))
    write(cache, Author(), evil, identity={"kind": "../..", "url": "/"})
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_threads_that_share_a_cache_read_whole_texts_or_none(tmp_path: Path):
    cache, text, found = Cache(tmp_path), "word " * 2000, set[str | None]()

    def work() -> None:
        for _ in range(20):
            found.add(cache.get(ASKED))
            cache.put(ASKED, text)

    threads = [Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found <= {None, text}
    assert cache.corrupt == 0
    assert cache.hits + cache.misses == 120
    assert the_file(tmp_path).suffix == ".json"


def test_a_text_that_was_changed_on_the_disk_is_counted_and_not_used(tmp_path: Path):
    cache, asked = Cache(tmp_path), {"key": 1}
    cache.put(asked, "a text")
    (file,) = tmp_path.rglob("*.json")
    whole = file.read_text()
    for changed in (whole.replace("a text", "another"), whole.replace('"sha256": "', '"sha256": "0')):
        file.write_text(changed)
        assert cache.get(asked) is None
    assert cache.corrupt == 2
    former = json.loads(whole)
    del former["sha256"]
    file.write_text(json.dumps(former))  # as earlier versions wrote it
    assert cache.get(asked) == "a text"
