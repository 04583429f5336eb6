"""Cache of written texts on disk, keyed by the content of the request: a repeated run sends no request again."""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

from dllm_sd.errors import InputError, on_one_line
from dllm_sd.files.writing import write_file
from dllm_sd.writers.request import Request, Sampling, Written

Ask = Callable[[Sequence[Request]], Generator[tuple[int, Written]]]
"""``ask(requests)`` yields the index of a request and the response, in any order, each index once."""


class Cache:
    """One small JSON file for each text, ``folder/ab/abcd....json``, which also holds its request.

    The file name is the SHA-256 of writer and request. The SHA-256 of the text is stored too, except in files of
    earlier versions. Threads and processes may share a folder, since files are written atomically. Files with other
    content are counted as corrupt, ignored and overwritten.
    """

    def __init__(self, folder: str | Path) -> None:
        """Create the folder if needed; nothing is written outside it.

        Raises:
            InputError: if the folder cannot be created.
        """
        self.folder = Path(folder)
        self.hits, self.misses, self.corrupt = 0, 0, 0
        self._lock = Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def get(self, request: Mapping[str, Any]) -> str | None:
        """Return the text for a `request`, or None if there is none."""
        text, corrupt = None, False
        try:
            entry = json.loads(self._path(request).read_bytes().decode("utf-8"))
            text = entry.pop("text")
            corrupt = (
                not isinstance(text, str)
                or not text.strip()
                or entry.pop("sha256", None) not in (None, _checksum(text))
            )
            corrupt = corrupt or _canonical(entry) != _canonical(request)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            corrupt = True
        text = None if corrupt else text
        with self._lock:
            self.hits += text is not None
            self.misses += text is None
            self.corrupt += corrupt
        return text

    def put(self, request: Mapping[str, Any], text: str) -> None:
        """Store a text.

        Raises:
            InputError: if the folder cannot be written, for example because the disk is full.
        """
        path = self._path(request)
        content = json.dumps({"text": text, "sha256": _checksum(text), **request}, ensure_ascii=False, indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            encoded = content.encode("utf-8", "backslashreplace")  # a lone surrogate becomes a JSON escape
            write_file(path, encoded, alone=False)
        except OSError as error:
            raise self._unwritable(error) from error

    def _path(self, request: Mapping[str, Any]) -> Path:
        name = sha256(_canonical(request).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"the cache of written texts cannot write in {self.folder} ({on_one_line(error)}); "
            "make room there, or name another folder"
        )


def ask_once(
    identity: Mapping[str, Any], requests: Sequence[Request], sampling: Sampling, cache: Cache | None, ask: Ask
) -> list[Written]:
    """Return the response to each request, in order: from the cache, else from ``ask``, once for equal requests.

    A text is stored as soon as it arrives; failures are not stored.
    """
    trees = [_request_tree(identity, request, sampling) for request in requests]
    names = [_canonical(tree) for tree in trees]
    responses: dict[str, Written] = {}
    missing: dict[str, int] = {}
    for index, (name, tree) in enumerate(zip(names, trees, strict=True)):
        if name not in responses and name not in missing:
            text = cache.get(tree) if cache else None
            if text is None:
                missing[name] = index
            else:
                responses[name] = Written(text, None, cached=True)
    indices = list(missing.values())
    if indices:
        with closing(ask([requests[index] for index in indices])) as answers:
            for number, written in answers:
                responses[names[indices[number]]] = written
                if cache and written.text is not None:
                    cache.put(trees[indices[number]], written.text)
    return [responses[name] for name in names]


def _request_tree(identity: Mapping[str, Any], request: Request, sampling: Sampling) -> dict[str, Any]:
    """Return writer and request as plain JSON."""
    settings = asdict(sampling) | {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}
    if not sampling.top_k:  # so that texts of versions without this key are found
        del settings["top_k"]
    messages = [dict(message) for message in request.messages]
    return {"writer": dict(identity), "messages": messages, "sampling": settings, "key": request.key}


def _checksum(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(tree: Any) -> str:
    """Return the same ASCII text for equal trees."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))
