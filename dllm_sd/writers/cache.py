"""Written texts on the disk, by the content of what was asked: a run that is repeated asks for nothing again."""

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
"""``ask(requests)`` yields the place of a request and what was written for it, in any order, each place once."""


class Cache:
    """One small JSON file for each text, ``folder/ab/abcd....json``, with what was asked beside it.

    The name is the SHA-256 of who was asked for what; that of the text stands beside it, except in files of earlier
    versions. Threads and processes may share a folder: files appear whole
    or not at all. A file that holds something else is counted, ignored and written anew.
    """

    def __init__(self, folder: str | Path) -> None:
        """Make the folder if there is none; nothing outside it is written.

        Raises:
            InputError: if that is not possible.
        """
        self.folder = Path(folder)
        self.hits, self.misses, self.corrupt = 0, 0, 0
        self._lock = Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def get(self, asked: Mapping[str, Any]) -> str | None:
        """The text for what was `asked`, None if there is none."""
        text, corrupt = None, False
        try:
            entry = json.loads(self._path(asked).read_bytes().decode("utf-8"))
            text = entry.pop("text")
            corrupt = (
                not isinstance(text, str) or not text.strip() or entry.pop("sha256", None) not in (None, _sum(text))
            )
            corrupt = corrupt or _canonical(entry) != _canonical(asked)
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

    def put(self, asked: Mapping[str, Any], text: str) -> None:
        """Keep a text.

        Raises:
            InputError: if the folder cannot be written, such as on a full disk.
        """
        path = self._path(asked)
        content = json.dumps({"text": text, "sha256": _sum(text), **asked}, ensure_ascii=False, indent=1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            encoded = content.encode("utf-8", "backslashreplace")  # half a surrogate as JSON writes it
            write_file(path, encoded, alone=False)
        except OSError as error:
            raise self._unwritable(error) from error

    def _path(self, asked: Mapping[str, Any]) -> Path:
        name = sha256(_canonical(asked).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"the cache of written texts cannot write in {self.folder} ({on_one_line(error)}); "
            "make room there, or name another folder"
        )


def ask_once(
    identity: Mapping[str, Any], requests: Sequence[Request], sampling: Sampling, cache: Cache | None, ask: Ask
) -> list[Written]:
    """What was written for each request, in order: from the cache, else by ``ask``, once for equal requests.

    A text is kept as soon as it arrives; failures are not kept.
    """
    every = [_asked(identity, request, sampling) for request in requests]
    names = [_canonical(asked) for asked in every]
    found: dict[str, Written] = {}
    missing: dict[str, int] = {}
    for place, (name, asked) in enumerate(zip(names, every, strict=True)):
        if name not in found and name not in missing:
            text = cache.get(asked) if cache else None
            if text is None:
                missing[name] = place
            else:
                found[name] = Written(text, None, cached=True)
    places = list(missing.values())
    if places:
        with closing(ask([requests[place] for place in places])) as answers:
            for i, written in answers:
                found[names[places[i]]] = written
                if cache and written.text is not None:
                    cache.put(every[places[i]], written.text)
    return [found[name] for name in names]


def _asked(identity: Mapping[str, Any], request: Request, sampling: Sampling) -> dict[str, Any]:
    """Who is asked for what, as plain JSON."""
    settings = asdict(sampling) | {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}
    if not sampling.top_k:  # so that texts from before there was this key are found
        del settings["top_k"]
    messages = [dict(message) for message in request.messages]
    return {"writer": dict(identity), "messages": messages, "sampling": settings, "key": request.key}


def _sum(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(tree: Any) -> str:
    """One text for equal trees, in ASCII."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))
