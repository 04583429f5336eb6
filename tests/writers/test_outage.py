"""A server that is down is not asked for the rest: it costs one text's patience, not every text's."""

import socket
from collections import Counter
from pathlib import Path
from time import monotonic, sleep

import pytest

from dllm_sd.writers import Cache, Sampling, Server, Written
from dllm_sd.writers.server import DOWN_AFTER
from tests.tiers import later
from tests.writers.service import BRIEF, FAULTS, Handler, Service, requests, slow, status, writer

NAMES = "abcdefghij"
OUTAGES = ("slow", "dropped", "cut", "500", "503")
ANSWERS = ("garbage", "invalid_utf8", "empty", "no_http", "429")


@pytest.mark.parametrize("name", [*OUTAGES[1:], *later(OUTAGES[0])])
def test_after_five_texts_in_a_row_the_rest_is_not_asked(service: Service, name: str):
    reason, fault = FAULTS[name]
    service.faults.update({text: [fault] * 2 for text in NAMES})
    server = writer(service, retries=1, concurrency=1, **BRIEF.get(name, {}))
    written = server.write(requests(*NAMES), Sampling())
    assert written == [Written(None, reason)] * 5 + [Written(None, "server_down")] * 5
    assert [text for text, _, _ in service.seen] == list("aabbccddee")


@pytest.mark.parametrize("name", ["a text", "400", *ANSWERS])
def test_any_answer_shows_that_the_server_is_there(service: Service, name: str):
    service.faults.update({text: [status(503)] * 2 for text in NAMES})
    reason, fault = FAULTS.get(name, ("http_400", status(400)))
    service.faults["e"] = [] if name == "a text" else [fault] * 2
    written = writer(service, retries=1, concurrency=1).write(requests(*NAMES), Sampling())
    between = Written("text of e", None) if name == "a text" else Written(None, reason)
    down = Written(None, "http_503")
    assert written == [down] * 4 + [between] + [down] * 5
    assert service.count("j") == 2


@pytest.mark.parametrize("name", ANSWERS)
def test_a_server_that_answers_nonsense_is_not_down(service: Service, name: str):
    reason, fault = FAULTS[name]
    service.faults.update({text: [fault] for text in NAMES})
    assert writer(service, retries=0).write(requests(*NAMES), Sampling()) == [Written(None, reason)] * 10


def test_a_text_that_a_further_try_brings_is_no_failure(service: Service):
    service.faults.update({text: [status(500)] * 4 for text in NAMES})
    written = writer(service).write(requests(*NAMES), Sampling())
    assert [one.text for one in written] == [f"text of {text}" for text in NAMES]


def test_an_outage_costs_the_pauses_of_one_text_and_not_of_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    server = Server(url, "m", backoff=0.1, retries=2, concurrency=4)
    start = monotonic()
    written = server.write(requests(*map(str, range(1000))), Sampling())
    assert monotonic() - start < 10  # 1000 texts in fours, each with pauses of 0.15 to 0.3 s, would take 37 at least
    counts = Counter(one.failure for one in written)
    assert counts.keys() == {"refused", "server_down"}
    assert DOWN_AFTER <= counts["refused"] <= DOWN_AFTER + 3  # what was in its pauses says what it knows


def test_what_is_in_flight_and_what_pauses_is_called_off(service: Service):
    def late(handler: Handler) -> None:
        while service.count("slow") + service.count("busy") < 2:
            sleep(0.01)
        handler.answer(b"{}", 500)

    service.faults.update({"slow": [slow], "busy": [status(429, Retry_After="60")], "a": [late, status(500)]})
    service.faults.update({text: [status(500)] * 2 for text in NAMES[1:]})
    server, start = writer(service, timeout=60.0, concurrency=3, retries=1), monotonic()
    written = server.write(requests("slow", "busy", *NAMES), Sampling())
    assert monotonic() - start < 4  # `slow` takes 5 s
    reasons = ["server_down", "http_429", *["http_500"] * 5, *["server_down"] * 5]
    assert [one.failure for one in written] == reasons
    assert not service.count("j")


def test_the_next_batch_asks_anew_and_only_for_what_is_missing(service: Service, tmp_path: Path):
    service.faults.update({text: [status(500)] for text in NAMES[2:]})
    server, cache = writer(service, retries=0, concurrency=1), Cache(tmp_path)
    first = server.write(requests(*NAMES), Sampling(), cache)
    assert [one.failure for one in first] == [None] * 2 + ["http_500"] * 5 + ["server_down"] * 3
    service.faults.clear()
    service.seen.clear()
    second = server.write(requests(*NAMES), Sampling(), cache)
    assert [one.text for one in second] == [f"text of {text}" for text in NAMES]
    assert [text for text, _, _ in service.seen] == list(NAMES[2:])
