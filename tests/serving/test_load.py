"""Many clients, a third of which hang up: every slot is free afterwards, memory is flat, and no thread is left."""

import json
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.model import Model
from dllm_sd.serving.service import Limits
from tests.serving.conftest import DECODE, service_of

served = pytest.importorskip("tests.serving.served", exc_type=ImportError)

CLIENTS, SECONDS = 64, 10


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def body_of(rng: random.Random) -> tuple[str, Any]:
    """A request of any kind."""
    prompt = [rng.randrange(4, 20) for _ in range(rng.randrange(1, 40))]
    if rng.random() < 0.5:
        settings = {"length": rng.choice([8, 16]), "temperature": rng.choice([0.0, 1.0])}
        return "/generate", {"prompt_ids": prompt, "key": rng.randrange(2**60), "settings": settings}
    stream, stop = rng.random() < 0.5, rng.choice([None, "12", ["3", "4"]])
    return "/v1/completions", {
        "prompt": prompt,
        "max_tokens": 16,
        "stream": stream,
        "stop": stop,
        "n": rng.choice([1, 2]),
    }


def client(server: Any, seed: int, end: float, done: "Counter[str]") -> None:
    """Ask until it is time; a third of the clients leave before the answer."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        path, tree = body_of(rng)
        if seed % 3 == 0:
            body = json.dumps(tree).encode()
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
                line.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
                time.sleep(rng.random() * 0.2)
            done["left"] += 1
        else:
            status, content, _ = server.raw("POST", path, json.dumps(tree).encode())
            done[f"status {status}"] += 1
            assert status in (200, 503), content


@pytest.mark.slow
@pytest.mark.parametrize("path", ["tiny", "tiny_ar"])
def test_many_clients_of_which_a_third_hang_up_leave_nothing_behind(path: str):
    model, threads = Model(path=path), {*threading.enumerate()}
    service = service_of(build_policy(model), model, limits=Limits(prompt=64, waiting=256), decode=DECODE)
    done: Counter[str] = Counter()
    with served.serving(service) as server:
        sizes = []
        for seconds in (5, SECONDS):  # the first time warms up
            end = time.monotonic() + seconds
            clients = [threading.Thread(target=client, args=(server, seed, end, done)) for seed in range(CLIENTS)]
            for one in clients:
                one.start()
            for one in clients:
                one.join(60)
                assert not one.is_alive()
            served.until(lambda: server.idle)
            sizes.append(resident())
        status, tree = server.post("/generate", {"prompt_ids": [5, 6], "key": 3})
        assert status == 200
        alone = service.policy.decode([[5, 6]], DECODE, [3])
        assert tree["tokens"] == alone.tokens[0].tolist()
    print(f"{path}: {dict(done)}, {[size >> 20 for size in sizes]} MiB")
    assert done["status 200"] > 100
    assert done["left"] > 50
    assert sizes[1] - sizes[0] < 48 * 2**20
    left = {*threading.enumerate()} - threads
    assert [one.name for one in left if type(one).__module__ != "tqdm._monitor"] == []
