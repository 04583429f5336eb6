"""Requests to several servers: which of them is asked, and what a server does that fails, comes back or refuses."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

from dllm_sd.decoding.remote import RemoteDecoder, TokenIds
from dllm_sd.engines import CompletionRequest, DllmSd, Vllm
from dllm_sd.engines import servers as module
from dllm_sd.engines.engine import RemoteEngine
from dllm_sd.engines.servers import FAILURES_UNTIL_DOWN, Servers
from dllm_sd.errors import InputError, Stopped
from dllm_sd.http_client import pause
from dllm_sd.rollouts.attempt_queue import AttemptQueue, Workers
from dllm_sd.rollouts.journal import RolloutJournal
from dllm_sd.training.folder import FREE
from tests.engines.test_vllm import REQUEST as READ
from tests.engines.test_vllm import answered

REQUEST = replace(READ, decode={"length": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0})

Answer = tuple[int, Any]


class Scripted(ThreadingHTTPServer):
    """A server whose answers to each route are given; its model is ``m``."""

    daemon_threads = True

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: Any) -> None:
                double.seen.append(self.path)
                status, tree = double.says[self.path](body)
                content = json.dumps(tree).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if status == 503 and double.retry_after:
                    self.send_header("Retry-After", double.retry_after)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        super().__init__(("127.0.0.1", 0), Handler)
        double = self
        self.retry_after = ""
        """Seconds that go with each status of 503."""
        self.seen: list[str] = []
        self.loaded: list[str] = []
        self.says: dict[str, Callable[[Any], Answer]] = {
            "/v1/models": lambda _: (200, {"data": [{"id": name} for name in ("m", *self.loaded)]}),
            "/v1/completions": self.complete,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": lambda body: (404, {"error": f"no adapter {body['lora_name']}"}),
        }
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def complete(self, body: Any) -> Answer:
        known = body["model"] in ("m", *self.loaded)
        return (200, {**answered([4, 7, 9]), "model": body["model"]}) if known else (404, {"error": "no such model"})

    def load(self, body: Any) -> Answer:
        if body["lora_name"] in self.loaded:
            return 400, {"error": "it has already been loaded"}
        self.loaded.append(body["lora_name"])
        return 200, "loaded"

    def count(self, route: str) -> int:
        return self.seen.count(route)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def pair() -> Iterator[list[Scripted]]:
    servers = [Scripted(), Scripted()]
    yield servers
    for server in servers:
        server.stop()


def says(status: int, tree: Any = None) -> Callable[[Any], Answer]:
    return lambda body: (status, tree)


def servers_of(*servers: Scripted, **options: Any) -> Servers:
    return Servers(Vllm(url=tuple(one.url for one in servers), model="m", **{"backoff": 0.01, **options}))


COMPLETIONS, LOADING = "/v1/completions", "/v1/load_lora_adapter"


@pytest.mark.parametrize("failure", ["completions", "everything"])
def test_a_server_that_was_down_gets_requests_again_when_it_is_up(pair: list[Scripted], failure: str):
    first, second = pair
    servers = servers_of(first, second, retries=FAILURES_UNTIL_DOWN)
    routes = [COMPLETIONS] if failure == "completions" else [*first.says]
    well = {route: first.says[route] for route in routes}
    first.says |= dict.fromkeys(routes, says(500))
    for _ in range(FAILURES_UNTIL_DOWN):
        servers.complete(REQUEST)
    assert first.count(COMPLETIONS) >= FAILURES_UNTIL_DOWN
    first.says |= well
    tried = first.count(COMPLETIONS)
    until = time.monotonic() + 20
    while first.count(COMPLETIONS) == tried:
        assert time.monotonic() < until, "it is never tried again"
        servers.complete(REQUEST)
        time.sleep(0.01)
    retried = servers.retried
    for _ in range(4):
        servers.complete(REQUEST)
    assert servers.retried == retried


def test_a_server_that_stays_down_is_asked_less_and_less_and_costs_no_attempt(pair: list[Scripted]):
    first, second = pair
    servers = servers_of(first, second, retries=1, backoff=0.05)
    first.says |= dict.fromkeys(first.says, says(500))
    for _ in range(FAILURES_UNTIL_DOWN):
        servers.complete(REQUEST)
    retried, started = servers.retried, time.monotonic()
    while time.monotonic() < started + 1.5:
        servers.complete(REQUEST)
    assert servers.retried == retried
    assert 2 <= first.count("/v1/models") <= 6  # pauses of 0.05, 0.1, 0.2, 0.4, 0.8 s, each from half of it


@pytest.mark.parametrize("status", [400, 404, 422, 500])
def test_a_server_that_does_not_take_the_weights_is_avoided(pair: list[Scripted], status: int):
    first, second = pair
    servers = servers_of(first, second, retries=1, backoff=60.0)
    first.says[LOADING] = says(status, {"error": "there is no such folder"})
    assert servers.load("w", "/folder", True) == [False, True]
    for _ in range(8):
        servers.complete(replace(REQUEST, model="w"))
    assert (first.count(COMPLETIONS), second.count(COMPLETIONS)) == (0, 8)
    assert servers.retried == 0


def test_another_process_learns_which_servers_took_the_weights(pair: list[Scripted]):
    first, second = pair
    second.loaded.append("w")
    servers = servers_of(first, second, retries=1, backoff=60.0)
    servers.note("w", "/folder", True, [False, True])
    for _ in range(8):
        servers.complete(replace(REQUEST, model="w"))
    assert (first.count(COMPLETIONS), second.count(COMPLETIONS)) == (0, 8)


def test_a_server_that_was_restarted_gets_the_weights_once_for_all_requests(pair: list[Scripted]):
    server = pair[0]
    servers = servers_of(server, retries=4)
    servers.load("w", "/folder", True)
    server.loaded.clear()
    slow = server.says[LOADING]
    server.says[LOADING] = lambda body: (time.sleep(0.2), slow(body))[1]
    threads = [Thread(target=servers.complete, args=(replace(REQUEST, model="w", key=key),)) for key in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.count(LOADING) == 2
    assert server.loaded == ["w"]


def test_weights_that_a_server_has_already_are_not_refused(pair: list[Scripted]):
    first, second = pair
    for server in pair:
        server.loaded.append("w")
    second.says[LOADING] = says(400, {"error": "the name is taken"})
    servers = servers_of(first, second)
    assert servers.load("w", "/folder", True) == [True, True]


def test_servers_forget_the_adapter_of_a_run_that_has_ended(pair: list[Scripted]):
    forgotten: list[str] = []

    def forget(body: Any) -> Answer:
        forgotten.append(body["lora_name"])
        return 200, "removed"

    for server in pair:
        server.says["/v1/unload_lora_adapter"] = forget
    servers = servers_of(*pair)
    servers.unload()
    assert not forgotten
    servers.load("v1", "folder", True)
    servers.load("v2", "folder", True)
    assert forgotten == ["v1"] * 2
    pair[1].stop()
    servers.unload()
    servers.unload()
    assert forgotten == ["v1", "v1", "v2"]


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("route", [COMPLETIONS, LOADING])
def test_a_server_that_denies_in_the_middle_stops_the_run_and_says_the_true_reason(
    pair: list[Scripted], status: int, route: str
):
    server = pair[0]
    server.says[route] = says(status, {"error": "because"})
    servers = servers_of(server)
    about_key = status == 401 or route == COMPLETIONS
    remedy = "put a secret that it accepts into .*DLLM_SD_ENGINE_KEY" if about_key else "start it with --enable-lora"
    with pytest.raises(Stopped, match=rf"answers {status} \(.*because.*{remedy}"):
        servers.load("w", "/folder", True) if route == LOADING else servers.complete(REQUEST)


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ((404, {"detail": "Not Found"}), False),
        ((405, {"detail": "Method Not Allowed"}), False),
        ((403, {"error": "this server loads no weights"}), False),
        ((404, {"error": "The lora adapter 'dllm-sd-none' cannot be found."}), True),
        ((400, {"error": "no"}), True),
        ((200, "unloaded"), True),
    ],
)
def test_a_server_that_takes_no_weights_is_refused_at_the_start(pair: list[Scripted], answer: Answer, accepted: bool):
    pair[1].says["/v1/unload_lora_adapter"] = says(*answer)
    servers = servers_of(*pair)
    if accepted:
        servers.check(10, 10, lambda name: False)
        return
    with pytest.raises(InputError, match=r"takes no weights .* start it with --enable-lora, and VLLM_ALLOW_RUNTIME"):
        servers.check(10, 10, lambda name: False)


@pytest.mark.parametrize(
    ("most", "words"),
    [
        ({"max_model_len": 29}, r"reads 29 tokens, but max_prompt and decode\.length are 30 together"),
        ({"max_completion": 19}, r"reads completions of 19 tokens, but decode\.length is 20; .*--max-completion 20"),
        ({"max_model_len": 30, "max_prompt": 10, "max_completion": 20}, None),
        ({"max_model_len": None, "max_prompt": 9}, None),
    ],
)
def test_what_is_too_long_for_a_server_is_refused_at_the_start(pair: list[Scripted], most: Any, words: str | None):
    pair[0].says["/v1/models"] = says(200, {"data": [{"id": "m", **most}]})
    servers = servers_of(*pair)
    if words is None:
        notes = servers.check(10, 20, lambda name: False)
        assert ["reads prompts of 9 tokens" in note for note in notes] == [True] * (most.get("max_prompt") == 9)
        return
    with pytest.raises(InputError, match=words):
        servers.check(10, 20, lambda name: False)


def decoder_of(servers: Servers, folder: Path, processes: int) -> RemoteDecoder:
    return RemoteDecoder(servers, TokenIds((9,), 0, (), 20), lambda: ("m", "0"), RolloutJournal(folder, 0), processes)


@pytest.mark.parametrize(("processes", "most"), [(1, 16), (2, 8), (3, 6), (100, 1)])
def test_processes_share_the_requests_that_may_be_in_flight(tmp_path: Path, processes: int, most: int):
    servers = Servers(DllmSd(url=("http://a", "http://b"), model="m", concurrency=8))
    assert decoder_of(servers, tmp_path, processes).most == most


def test_processes_prefer_several_servers(pair: list[Scripted]):
    engine = Vllm(url=tuple(one.url for one in pair), model="m")
    for process in range(4):
        Servers(engine, process).complete(REQUEST)
    assert [one.count(COMPLETIONS) for one in pair] == [2, 2]


def test_all_that_is_no_question_of_the_model_may_change_when_a_run_goes_on():
    names = {entry.name for entry in fields(RemoteEngine)}
    assert {key.removeprefix("decode.engine.") for key in FREE if key.startswith("decode.engine.")} == names - {"model"}


@pytest.mark.parametrize(
    "error", [InputError("wrong"), Stopped("gone"), FloatingPointError("nan"), OSError(28, "full", "file")]
)
def test_processes_that_share_a_queue_end_alike(error: Exception):
    """What ends the decoder of one process ends the others with the same kind of error."""
    barrier, given = Barrier(2, timeout=20), [None, None]
    raised: list[BaseException | None] = [None, None]

    def gather(rank: int) -> Callable[[list[Any]], list[Any]]:
        def exchange(mine: list[Any]) -> list[Any]:
            given[rank] = mine  # pyright: ignore[reportArgumentType, reportCallIssue]
            barrier.wait()
            every = [one for part in given for one in part or ()]
            barrier.wait()
            return every

        return exchange

    def work(rank: int) -> None:
        queue = AttemptQueue([], lambda *_: 0, lambda *_: ("", None), limit=1, workers=Workers(rank, 2, gather(rank)))  # pyright: ignore[reportArgumentType]
        try:
            if rank == 0:
                queue.abandon(error)
                raise error
            queue.take(1)
        except Exception as caught:
            raised[rank] = caught

    threads = [Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(one) for one in raised] == [type(error)] * 2
    assert str(raised[0]) == str(raised[1])


def test_a_request_says_what_an_answer_must_be():
    """Defaults are those of an autoregressive model, whose requests vLLM gets."""
    request = CompletionRequest(**{entry.name: getattr(REQUEST, entry.name) for entry in fields(CompletionRequest)})
    assert (request.mask_id, request.block_length, request.blocks_of_prompt, request.causal) == (-1, 1, False, True)


@pytest.mark.parametrize(
    "other",
    [
        "http://127.0.0.1:8000/v1",
        "HTTP://LocalHost:8000/",
        "http://[::1]:8000/v1/",
        "http://localhost.:8000",
        "http://[0:0:0:0:0:0:0:1]:8000",
    ],
)
def test_one_server_in_two_spellings_is_refused(other: str):
    with pytest.raises(InputError, match=r"decode\.engine\.url\.1 names the same server as decode\.engine\.url\.0"):
        Vllm(url=("http://localhost:8000", other), model="m")


def test_a_default_port_is_the_same_as_none_and_other_servers_are_others():
    for one, same in (("http://h", "http://H:80/v1"), ("https://h:443/x/", "https://h/x/v1")):
        with pytest.raises(InputError, match="names the same server"):
            Vllm(url=(one, "http://other", same), model="m")
    different = ("http://h", "https://h", "http://h:8000", "http://h/a", "http://h/b", "http://localhost", "http://g")
    assert Vllm(url=different, model="m").url == different


class Busy:
    """Refuses some requests as `dllm-sd serve` does that has too much to do, and then serves."""

    def __init__(self, server: Scripted, route: str, times: int) -> None:
        self.well, self.left, self.at = server.says[route], times, list[float]()
        server.says[route] = self

    def __call__(self, body: Any) -> Answer:
        self.at.append(time.monotonic())
        self.left -= 1
        return self.well(body) if self.left < 0 else (503, {"error": "the server works on 256 requests already"})


@pytest.mark.parametrize("route", [COMPLETIONS, LOADING])
def test_a_server_that_has_too_much_to_do_is_asked_again_and_is_not_down(
    pair: list[Scripted], monkeypatch: pytest.MonkeyPatch, route: str
):
    server, waited = pair[0], list[float]()
    monkeypatch.setattr(module, "pause", lambda *given: waited.append(pause(*given)) or 0.01)
    server.retry_after = "1"
    busy = Busy(server, route, FAILURES_UNTIL_DOWN)
    servers = servers_of(server, retries=0)
    if route == LOADING:
        assert servers.load("w", "/folder", True) == [True]
    else:
        servers.complete(REQUEST)
    assert len(busy.at) == FAILURES_UNTIL_DOWN + 1
    assert waited == [1.0] * FAILURES_UNTIL_DOWN
    assert not servers._servers[0].is_down


def test_a_server_that_has_too_much_to_do_leaves_requests_to_the_others(pair: list[Scripted]):
    first, second = pair
    first.retry_after = "30"
    Busy(first, COMPLETIONS, 10**6)
    servers, begun = servers_of(first, second, retries=0), time.monotonic()
    servers._servers[0].busy_until = begun + 30
    for _ in range(8):
        assert servers.complete(REQUEST)[1] == second.url
    assert time.monotonic() - begun < 10
    assert first.count(COMPLETIONS) == 0


def test_a_server_that_has_too_much_to_do_for_too_long_stops_the_run(pair: list[Scripted]):
    server = pair[0]
    server.retry_after = "1"
    Busy(server, COMPLETIONS, 10**6)
    with pytest.raises(Stopped, match=r"in 1 attempts \(the last at .*: http_503\)"):
        servers_of(server, retries=0, timeout=0.5).complete(REQUEST)
