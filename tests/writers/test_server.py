"""A writer over HTTP against a real server with injected faults."""

import json
import socket
from email.utils import formatdate
from pathlib import Path
from threading import Barrier, Thread
from time import monotonic, sleep, time
from typing import Any

import pytest

from dllm_sd import http_client
from dllm_sd.errors import InputError
from dllm_sd.writers import Cache, Sampling, Server, Writer, Written
from tests.writers.service import BRIEF, FAULTS, Handler, Service, requests, slow, status, write_one, writer


@pytest.mark.parametrize("name", FAULTS)
def test_a_text_is_written_after_a_fault_that_may_pass(service: Service, name: str):
    _, fault = FAULTS[name]
    service.faults["x"] = [fault]
    assert write_one(service, retries=1, **BRIEF.get(name, {})) == Written("text of x", None)
    assert service.count("x") == 2


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_a_reason_and_no_exception(service: Service, name: str):
    reason, fault = FAULTS[name]
    service.faults["x"] = [fault, fault]
    assert write_one(service, retries=1, **BRIEF.get(name, {})) == Written(None, reason)
    assert service.count("x") == 2


@pytest.mark.parametrize("code", [400, 413, 422, 301, 307])
def test_an_answer_that_will_not_change_is_not_asked_for_again(service: Service, code: int):
    service.faults["x"] = [status(code)]
    assert write_one(service) == Written(None, f"http_{code}")
    assert service.count("x") == 1


def test_texts_come_in_the_order_of_the_requests_whatever_fails_between(service: Service, tmp_path: Path):
    names = [*FAULTS, *(f"good {i}" for i in range(10))]
    service.faults.update({name: [fault] for name, (_, fault) in FAULTS.items()})
    service.faults["good 3"] = [status(400)]
    server, cache = writer(service, retries=1, timeout=0.5), Cache(tmp_path)
    first = server.write(requests(*names), Sampling(), cache)
    assert first == [
        Written(None, "http_400") if name == "good 3" else Written(f"text of {name}", None) for name in names
    ]
    assert len(service.seen) == 2 * len(FAULTS) + 10
    assert (cache.hits, cache.misses) == (0, len(names))


def test_a_second_run_asks_for_nothing_and_has_the_same_texts(service: Service, tmp_path: Path):
    asked = requests(*"abcdef", "caf\u00e9 \U0001f600")
    first = writer(service).write(asked, Sampling(), Cache(tmp_path))
    service.seen.clear()
    cache = Cache(tmp_path)
    second = writer(service, timeout=1.0, retries=0).write(asked, Sampling(), cache)
    assert (
        [one.text for one in second] == [one.text for one in first] == [f"text of {t}" for t in [*"abcdef", "café 😀"]]
    )
    assert all(one.cached for one in second)
    assert not any(one.cached for one in first)
    assert (cache.hits, cache.misses, cache.corrupt) == (7, 0, 0)
    assert service.seen == []


def test_what_arrived_before_a_refusal_is_kept(service: Service, tmp_path: Path):
    service.faults["c"] = [status(401)]
    with pytest.raises(InputError):
        writer(service, concurrency=1).write(requests(*"abcde"), Sampling(), Cache(tmp_path))
    cache = Cache(tmp_path)
    writer(service).write(requests(*"ab"), Sampling(), cache)
    assert cache.hits == 2


def test_equal_requests_are_asked_once(service: Service):
    written = writer(service).write(requests(*"abaab"), Sampling())
    assert [one.text for one in written] == [f"text of {t}" for t in "abaab"]
    assert sorted(text for text, _, _ in service.seen) == ["a", "b"]


def test_nothing_is_asked_where_nothing_is_requested(service: Service):
    assert writer(service).write([], Sampling()) == []
    assert service.seen == []


def test_a_total_outage_is_a_reason_for_every_text():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}/v1", "m", backoff=0.0)
    assert server.write(requests(*"abc"), Sampling()) == [Written(None, "refused")] * 3


def test_a_failure_is_not_kept(service: Service, tmp_path: Path):
    service.faults["x"] = [status(500)]
    server, cache = writer(service, retries=0), Cache(tmp_path)
    assert server.write(requests("x"), Sampling(), cache) == [Written(None, "http_500")]
    assert server.write(requests("x"), Sampling(), cache) == [Written("text of x", None)]


def test_the_body_holds_the_chat_and_the_sampling_and_every_try_the_same_seed(service: Service):
    service.faults["x"] = [status(500)]
    settings = Sampling(length=7, temperature=0.5, top_p=0.9, thinking=False)
    writer(service).write(requests(*"xy"), settings)
    seeds: dict[str, set[int]] = {"x": set(), "y": set()}
    for text, sent, _ in service.seen:
        seeds[text].add(sent.pop("seed"))
        assert sent == {
            "model": "m",
            "messages": [{"role": "system", "content": "Write."}, {"role": "user", "content": text}],
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    [x], [y] = seeds["x"], seeds["y"]
    assert x != y
    assert 0 <= x < 2**31
    assert 0 <= y < 2**31


def test_a_thinking_switch_is_sent_only_where_it_is_set(service: Service):
    write_one(service)
    assert "chat_template_kwargs" not in service.seen[0][1]


def test_no_more_are_in_flight_than_concurrency_says_and_as_many(service: Service):
    service.meet = Barrier(3, timeout=3).wait  # opens only where three have come together
    written = writer(service, concurrency=3, retries=0).write(requests(*"abcdefghi"), Sampling())
    assert [one.text for one in written] == [f"text of {t}" for t in "abcdefghi"]
    assert service.most == 3


@pytest.mark.parametrize("when", ["3600", "date"])
def test_retry_after_is_honoured_up_to_a_bound(service: Service, when: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_client, "LONGEST_WAIT", 0.2)
    header = formatdate(time() + 3600, usegmt=True) if when == "date" else when
    service.faults["x"] = [status(429, Retry_After=header)]
    start = monotonic()
    assert write_one(service).text == "text of x"
    assert 0.2 <= monotonic() - start < 2


@pytest.mark.parametrize("header", ["soon", "-5", "nan", "9" * 5000, "Wed, 99 Foo 2020 00:00:00 GMT"])
def test_a_retry_after_without_a_meaning_does_no_harm(service: Service, header: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_client, "LONGEST_WAIT", 0.05)
    service.faults["x"] = [status(503, Retry_After=header)]
    assert write_one(service).text == "text of x"


def test_a_server_that_has_too_much_to_do_is_no_failed_attempt(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_client, "LONGEST_WAIT", 0.05)
    service.faults["x"] = [status(503, Retry_After="1")] * 5
    assert write_one(service, retries=0).text == "text of x"
    service.faults["x"] = [status(503, Retry_After="1")] * 5
    assert write_one(service, retries=0, timeout=0.01).failure in ("http_503", "timeout")
    service.faults["x"] = [status(503)] * 5
    assert write_one(service, retries=0).failure == "http_503"


def test_pauses_double_with_a_jitter_of_their_own_and_have_a_bound():
    for tries in range(4):
        pauses = [http_client.pause(2.0, key, tries) for key in range(50)]
        assert all(2.0**tries <= pause <= 2.0 ** (tries + 1) for pause in pauses)
        assert len(set(pauses)) == 50
        assert pauses == [http_client.pause(2.0, key, tries) for key in range(50)]
    assert http_client.pause(2.0, 1, 0, retry_after=7.0) == 7.0
    assert http_client.pause(2.0, 1, 0, retry_after=3600.0) == http_client.pause(2.0, 1, 5000) == 60.0


def test_a_pause_is_waited_for(service: Service):
    service.faults["x"] = [status(500)]
    start = monotonic()
    assert write_one(service, backoff=0.2).text == "text of x"
    assert 0.1 <= monotonic() - start < 2


def test_a_wrong_address_or_model_stops_at_once(service: Service):
    service.faults["x"] = [status(404)]
    with pytest.raises(InputError, match=r"answers 404; give the base URL, .* not 'm'"):
        write_one(service)
    assert len(service.seen) == 1


def test_a_refusal_calls_off_what_is_in_flight_and_what_waits(service: Service):
    service.faults.update({"slow": [slow], "busy": [status(429, Retry_After="60")], "x": [late_refusal]})
    start = monotonic()
    with pytest.raises(InputError):
        writer(service, timeout=60.0, concurrency=3).write(requests("slow", "busy", "x", *"abcdef"), Sampling())
    assert monotonic() - start < 2
    assert len(service.seen) == 3


def late_refusal(handler: Handler) -> None:
    service: Any = handler.server
    while len(service.seen) < 3:
        sleep(0.01)
    handler.answer(b"", 401)


def test_a_server_that_speaks_no_tls_is_a_reason(service: Service):
    secure = writer(service, url=service.url.replace("http:", "https:"), retries=1)
    assert secure.write(requests("x"), Sampling())[0].failure in ("tls", "dropped")


def test_two_threads_may_write_with_one_server_and_cache(service: Service, tmp_path: Path):
    server, cache, found = writer(service), Cache(tmp_path), []
    threads = [
        Thread(target=lambda: found.append(server.write(requests(*"abcdef"), Sampling(), cache))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[one.text for one in texts] for texts in found] == [[f"text of {t}" for t in "abcdef"]] * 3


def test_a_server_is_a_writer_and_is_known_by_address_and_model():
    one: Writer = Server("http://host:8000/v1/", "m", retries=0)
    assert one.identity == Server("http://host:8000/v1", "m", timeout=9.0).identity
    assert one.identity != Server("http://host:8000/v1", "n").identity
    assert json.loads(json.dumps(one.identity)) == one.identity
