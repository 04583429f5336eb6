"""Many clients of a server at once: a third hang up as soon as they have asked, and ask again; the others stay."""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

PATIENCE = 30
"""Seconds that a client waits for its answer."""


@dataclass
class Seen:
    """What clients of a server saw."""

    answers: "Counter[str]" = field(default_factory=Counter)
    """How requests ended: ``200``, ``503``, ``left`` (the client hung up), or the name of an error."""
    slowest: dict[str, float] = field(default_factory=lambda: {"200": 0.0, "503": 0.0, "health": 0.0})
    """The longest wait in seconds, of answers, of refusals and of `/health`."""
    health: list[float] = field(default_factory=list)
    """Seconds that each question to `/health` took."""
    unsaid: int = 0
    """Refusals without Retry-After."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, ending: str, begun: float) -> None:
        """Count a request that began at a time of the monotonic clock."""
        with self.lock:
            self.answers[ending] += 1
            self.slowest[ending] = max(self.slowest.get(ending, 0.0), time.monotonic() - begun)


def any_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request of any kind."""
    kind, prompt = rng.randrange(3), [rng.randrange(4, 20) for _ in range(rng.randrange(1, 40))]
    if kind == 0:
        settings = {"length": rng.choice([8, 16]), "temperature": rng.choice([0.0, 1.0])}
        return "/generate", {"prompt_ids": prompt, "key": rng.randrange(2**60), "settings": settings}
    more = {"max_tokens": 16, "stop": rng.choice([None, "12", ["3", "4"]]), "n": rng.choice([1, 2])}
    if kind == 1:
        return "/v1/completions", {"prompt": prompt, "stream": rng.random() < 0.5, **more}
    content = "".join(rng.choice("0123") for _ in range(16))
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **more}


def crowd(port: int, clients: int, seconds: float) -> Seen:
    """Let clients ask for some seconds, and return what they saw once all of them have their last answer."""
    seen, end = Seen(), time.monotonic() + seconds
    with ThreadPoolExecutor(clients + 1) as pool:
        kinds = (_leaving if seed % 3 == 0 else _staying for seed in range(clients))
        futures = [pool.submit(kind, port, random.Random(seed), end, seen) for seed, kind in enumerate(kinds)]
        futures.append(pool.submit(_watching, port, end, seen))
        for future in futures:
            future.result()
    return seen


def _leaving(port: int, rng: random.Random, end: float, seen: Seen) -> None:
    while (begun := time.monotonic()) < end:
        path, tree = any_request(rng)
        body = json.dumps(tree).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as line:
                line.sendall(head + body)
        except OSError as error:
            seen.note(type(error).__name__, begun)
        else:
            seen.note("left", begun)


def _staying(port: int, rng: random.Random, end: float, seen: Seen) -> None:
    while (begun := time.monotonic()) < end:
        path, tree = any_request(rng)
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            connection.request("POST", path, json.dumps(tree).encode())
            answer = connection.getresponse()
            answer.read()
            seen.note(str(answer.status), begun)
            if answer.status == 503:
                seen.unsaid += answer.headers["Retry-After"] is None
                time.sleep(rng.random() * 0.2)
        except OSError as error:
            seen.note(type(error).__name__, begun)
        finally:
            connection.close()


def _watching(port: int, end: float, seen: Seen) -> None:
    while (begun := time.monotonic()) < end:
        connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            seen.note("health", begun)
            seen.health.append(time.monotonic() - begun)
        except OSError as error:
            seen.note(f"health {type(error).__name__}", begun)
        finally:
            connection.close()
        time.sleep(0.1)


@contextmanager
def sampled(pid: int, every: float = 1.0) -> Iterator[Callable[[], tuple[list[int], list[int]]]]:
    """Sample what a process holds inside; the function that is given returns MiB of memory and open descriptors."""
    memory, descriptors, stop = list[int](), list[int](), threading.Event()

    def look() -> None:
        process = Path(f"/proc/{pid}")
        while not stop.wait(every):
            memory.append(int((process / "statm").read_text().split()[1]) >> 8)
            descriptors.append(sum(1 for _ in (process / "fd").iterdir()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: (memory, descriptors)
    finally:
        stop.set()
        thread.join()
