"""The servers of an engine: requests with retries on whichever server is up, and the weights that they decode with."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from time import monotonic
from typing import Any

from dllm_sd.engines.engine import KEY, CompletionRequest, RemoteEngine
from dllm_sd.errors import InputError, Stopped, shortened
from dllm_sd.http_client import LONGEST_WAIT, HttpClient, Reply, json_headers, pause
from dllm_sd.randomness import make_key
from dllm_sd.trajectory import Trajectory

FAILURES_UNTIL_DOWN = 3
"""After so many failed attempts in a row a server counts as down, and others get its requests."""
TRAINED = "dllm-sd-"
"""How the names of weights that a run trains begin on the servers."""
LONGEST_QUESTION = 10.0
"""Most seconds in which a server that was down has to say that it is up."""


class WrongAnswer(Stopped):
    """A server answered something that must not be trained on."""


@dataclass
class _Server:
    url: str
    running: int = 0
    """Requests in flight."""
    failed: int = 0
    """Attempts in a row that failed for an outage."""
    weights: str | None = None
    """Name of the weights that were loaded last."""
    asked: int = 0
    """Times that it was asked in vain whether it is up again."""
    busy_until: float = 0.0
    """When it will take requests again, by the monotonic clock, as it said when it had too many."""
    ask_at: float = 0.0
    """When it is to be asked again, by the monotonic clock, if it is down."""
    loading: Lock = field(default_factory=Lock)
    """Held while weights are loaded, which is done once for all requests that need them."""

    @property
    def is_down(self) -> bool:
        """Whether others get its requests."""
        return self.failed >= FAILURES_UNTIL_DOWN

    def take(self, weights: str) -> None:
        """Note that it has loaded weights, and so is up."""
        self.weights, self.failed, self.asked = weights, 0, 0


class Servers:
    """The servers of one engine; safe to use from several threads."""

    def __init__(self, engine: RemoteEngine, first: int = 0) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            engine: the keys of the engine.
            first: index of the server that is preferred among equals, so that several processes prefer several.

        Raises:
            InputError: if the API key cannot be sent.
        """
        self.engine = engine
        self._servers = [_Server(url) for url in engine.url]
        self._order = self._servers[first % len(engine.url) :] + self._servers[: first % len(engine.url)]
        self._client = HttpClient(json_headers(engine.key_variable, f"{KEY}.key_variable"), engine.timeout)
        self._stop, self._lock = self._client.stop, Lock()
        self._load: tuple[str, str, bool] | None = None
        self.retried = 0
        """Attempts at completions that failed and were repeated."""

    def check(self, prompt: int, completion: int, is_own: Callable[[str], bool]) -> list[str]:
        """Ask every server whether it is up, knows the model, reads enough tokens, and takes weights.

        Args:
            prompt: tokens of the longest prompt.
            completion: positions of the longest completion.
            is_own: whether a name is that of weights of this run: a server that took all of them knows its model by it.

        Returns:
            A sentence for each server that would refuse the longest prompt, which the problems may not have.

        Raises:
            InputError: naming the server, and the remedy.
        """
        client, notes = replace(self._client, timeout=min(self.engine.timeout, 60.0)), list[str]()
        for i, server in enumerate(self._servers):
            reply = client.send(self.engine.path(server.url, "/v1/models"))
            if (denied := self._denied(server, reply)) is not None:
                raise InputError(denied)
            if reply.failure is not None:
                raise InputError(
                    f"{KEY}.url.{i} {server.url} does not answer as a server of models ({reply.failure}); start it, or "
                    "give the base URL of one that runs"
                )
            models = _models(reply.content)
            names = [name for name in models if name == self.engine.model or is_own(name)]
            if not names:
                is_taken = models and all(name.startswith(TRAINED) for name in models)
                remedy = (
                    "these are weights of another run, so wait until it has ended, and start the server again"
                    if is_taken
                    else "name one of these"
                )
                raise InputError(
                    f"{KEY}.model {self.engine.model!r} is not served at {server.url}, which has "
                    f"{shortened(', '.join(models)) or 'none'}; {remedy}"
                )
            model = models[names[0]]
            _refuse_short(server, model, prompt, completion)
            self._refuse_fixed(server, client)
            if isinstance(most := model.get("max_prompt"), int) and most < prompt:
                notes.append(
                    f"the server at {server.url} reads prompts of {most} tokens, and longer ones, of up to max_prompt "
                    f"{prompt}, would stop the run; start it with max_prompt={prompt}, or lower max_prompt"
                )
        return notes

    def load(self, name: str, folder: str, adapter: bool) -> list[bool]:
        """Load weights on all servers that are up; a server that comes back later gets them then.

        Returns:
            Which servers took them.

        Raises:
            Stopped: if no server takes them.
        """
        self._load = (name, folder, adapter)
        replies = [self._give_weights(server) for server in self._servers]
        if all(reply.failure for reply in replies):
            reply = replies[0]
            raise Stopped(
                f"no server of {KEY}.url takes the weights {name} from {folder} ({reply.failure}: {_said(reply)}); "
                f"start them {self.engine.loading}, so that they see this folder and have no adapters of another run, "
                "and run the same command again"
            )
        return [reply.failure is None for reply in replies]

    def unload(self) -> None:
        """Let the servers forget the adapter that they have of the run, as far as they answer: it is not used again."""
        for server in self._servers:
            if self._load is None or server.weights is None:
                continue
            if (forgotten := self.engine.unload(server.weights, self._load[2])) is not None:
                route, tree = forgotten
                self._quick.send(self.engine.path(server.url, route), json.dumps(tree).encode())
                server.weights = None

    def note(self, name: str, folder: str, adapter: bool, taken: Sequence[bool]) -> None:
        """Learn which servers have ``taken`` the weights that another process has loaded."""
        self._load = (name, folder, adapter)
        for server, took in zip(self._servers, taken, strict=True):
            if took:
                server.take(name)
            else:
                self._leave(server)

    def complete(self, request: CompletionRequest) -> tuple[Trajectory, str]:
        """Return the completion that a server made, and the URL of the server.

        A server that has too much to do is no failed attempt, for as long as one attempt may take (`timeout`).

        Raises:
            WrongAnswer: if a server answered what must not be trained on.
            Stopped: if the request failed on all attempts.
        """
        route, tree = self.engine.ask(request)
        body, server = json.dumps(tree).encode(), None
        failed, patience = 0, monotonic() + self.engine.timeout
        while True:
            self._ask_again()
            server = self._choose(server)
            reply = self._attempt(server, route, body, request.model)
            if reply.failure is None:
                return self._read(server, reply, request), server.url
            seconds = pause(self.engine.backoff, request.key, failed, reply.retry_after)
            failed += not (reply.is_busy and monotonic() < patience)
            if failed > self.engine.retries or self._stop.wait(seconds):
                raise Stopped(
                    f"no server of {KEY}.url made a completion in {failed} attempts (the last at {server.url}: "
                    f"{reply.failure}); finished rollouts are kept: start the servers, and run the same command again"
                )
            with self._lock:
                self.retried += 1

    def cancel(self) -> None:
        """Cancel all requests in flight; no request can be made afterwards."""
        self._stop.set()

    def _attempt(self, server: _Server, route: str, body: bytes, model: str) -> Reply:
        """Make one attempt at a completion; what it fails with may pass, here or elsewhere.

        Raises:
            Stopped: if it cannot.
        """
        try:
            if server.weights != model != self.engine.model:
                given = self._provide(server, model)
                if given.failure is not None:
                    return given
            reply = self._client.send(self.engine.path(server.url, route), body)
        finally:
            with self._lock:
                server.running -= 1
        self._learn(server, reply)
        if (denied := self._denied(server, reply)) is not None:
            raise Stopped(f"{denied}, and run the same command again")
        if reply.failure == "http_404":  # a server that was restarted lacks the weights
            server.weights = None
        elif reply.failure is not None and not reply.is_temporary:
            raise Stopped(
                f"the server at {server.url} ({KEY}) refuses a completion ({reply.failure}: {_said(reply)}); "
                "change its settings or those of decode, and run the same command again"
            )
        return reply

    def _read(self, server: _Server, reply: Reply, request: CompletionRequest) -> Trajectory:
        try:
            return self.engine.read(json.loads(reply.content), request)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise WrongAnswer(
                f"the server at {server.url} ({KEY}) gave an answer that must not be trained on: {error}"
            ) from error

    def _choose(self, former: _Server | None) -> _Server:
        """Return the server with the fewest requests in flight, of those that are up if one is.

        A request that the ``former`` server failed goes to another where that is possible, and none to a server that
        has too much to do while another has not.
        """
        with self._lock:
            up, now = [server for server in self._order if not server.is_down] or self._order, monotonic()
            server = min(up, key=lambda server: (server.busy_until > now, server is former, server.running))
            server.running += 1
            return server

    def _learn(self, server: _Server, reply: Reply) -> None:
        """Count failures for an outage."""
        outage = reply.failure is not None and not reply.failure.startswith("http_4") and not reply.is_busy
        with self._lock:
            server.busy_until = monotonic() + min(reply.retry_after, LONGEST_WAIT) if reply.is_busy else 0.0
            was_down, server.failed = server.is_down, server.failed + 1 if outage else 0
            if not outage:
                server.asked = 0
            elif server.is_down and not was_down:
                self._wait(server)

    def _leave(self, server: _Server) -> None:
        """Take a server as down that does not take the weights."""
        with self._lock:
            server.failed = max(server.failed, FAILURES_UNTIL_DOWN)
            self._wait(server)

    def _wait(self, server: _Server) -> None:
        """Let a server that is down be asked again after a pause, which doubles every time."""
        server.ask_at = monotonic() + pause(self.engine.backoff, make_key("server", server.url), server.asked)
        server.asked += 1

    def _ask_again(self) -> None:
        """Ask servers whether they are up that have been down for a while, if others are up meanwhile.

        One that says so gets requests again; the first that fails takes it down again.
        """
        with self._lock:
            down = [server for server in self._servers if server.is_down]
            due = [server for server in down if server.ask_at <= monotonic()] if len(down) < len(self._servers) else []
            for server in due:
                server.ask_at = monotonic() + 2 * LONGEST_QUESTION  # only one thread asks
        for server in due:
            reply = self._ask_models(server)
            with self._lock:
                if reply.failure is not None:
                    self._wait(server)
                    continue
                server.failed = FAILURES_UNTIL_DOWN - 1

    def _provide(self, server: _Server, name: str) -> Reply:
        """Load the current weights on a server that lacks them, unless another thread has done so meanwhile."""
        with server.loading:
            return Reply() if server.weights == name else self._give_weights(server)

    def _give_weights(self, server: _Server) -> Reply:
        """Load the current weights on a server, and forget the former ones."""
        assert self._load is not None
        name, folder, adapter = self._load
        reply = self._post(server, *self.engine.load(name, folder, adapter))
        if reply.failure is not None and not self._has(server, name, reply):
            self._leave(server)
            return reply
        former = server.weights
        with self._lock:
            server.take(name)
        if former not in (None, name) and (forgotten := self.engine.unload(str(former), adapter)) is not None:
            self._post(server, *forgotten)
        return Reply()

    def _has(self, server: _Server, name: str, reply: Reply) -> bool:
        """Whether a server did not load weights because it has them, by another process or before a lost answer."""
        if b"already been loaded" in reply.content:
            return True
        return name in _models(self._ask_models(server).content)

    def _ask_models(self, server: _Server) -> Reply:
        """What a server says of its models, if it does soon."""
        return self._quick.send(self.engine.path(server.url, "/v1/models"))

    @property
    def _quick(self) -> HttpClient:
        """A client for what a server that is up answers soon."""
        return replace(self._client, timeout=min(self.engine.timeout, LONGEST_QUESTION))

    def _post(self, server: _Server, route: str, tree: Mapping[str, Any]) -> Reply:
        """Ask for something that is no completion; a server that has too much to do is asked again (`timeout`)."""
        patience, reply = monotonic() + self.engine.timeout, None
        while reply is None or (reply.is_busy and monotonic() < patience):
            if reply is not None and self._stop.wait(pause(self.engine.backoff, 0, 0, reply.retry_after)):
                break
            reply = self._client.send(self.engine.path(server.url, route), json.dumps(tree).encode())
        if (denied := self._denied(server, reply, loading=True)) is not None:
            raise Stopped(f"{denied}, and run the same command again")
        return reply

    def _denied(self, server: _Server, reply: Reply, loading: bool = False) -> str | None:
        """Why a server answers nobody without another secret, or loads no weights, with the remedy; None if it does."""
        said = f"the server at {server.url} ({KEY}.url) answers {(reply.failure or '')[5:]} ({_said(reply)})"
        if reply.failure == "http_403" and loading:
            return f"{said} to a request to load weights; start it {self.engine.loading}"
        if reply.failure in ("http_401", "http_403"):
            return (
                f"{said}; put a secret that it accepts into the environment variable {self.engine.key_variable} "
                f"({KEY}.key_variable)"
            )
        return None

    def _refuse_fixed(self, server: _Server, client: HttpClient) -> None:
        """Refuse a server that takes no weights.

        It is asked to forget an adapter that it does not have: one that takes adapters names it in its refusal, and one
        that does not knows no such request.

        Raises:
            InputError: naming the server, and the remedy.
        """
        name = "dllm-sd-none"
        forgotten = self.engine.unload(name, True)
        assert forgotten is not None
        reply = client.send(self.engine.path(server.url, forgotten[0]), json.dumps(forgotten[1]).encode())
        is_unknown = reply.failure == "http_404" and name.encode() not in reply.content
        if is_unknown or reply.failure in ("http_403", "http_405", "http_501"):
            raise InputError(
                f"the server at {server.url} ({KEY}.url) takes no weights ({reply.failure}: {_said(reply)}), so it "
                f"would not follow the student; start it {self.engine.loading}"
            )


def _refuse_short(server: _Server, model: Mapping[str, Any], prompt: int, completion: int) -> None:
    """Refuse a server whose model reads fewer tokens than the run has, as far as the server says so.

    Raises:
        InputError: naming the keys.
    """
    for name, wanted, keys, option in (
        ("max_model_len", prompt + completion, "max_prompt and decode.length are", "a larger --max-model-len"),
        ("max_completion", completion, "decode.length is", f"--max-completion {completion}"),
    ):
        most = model.get(name)
        if isinstance(most, int) and most < wanted:
            what, both, them = ("", " together", "them") if name == "max_model_len" else ("completions of ", "", "it")
            raise InputError(
                f"the server at {server.url} reads {what}{most} tokens, but {keys} {wanted}{both}; start it with "
                f"{option}, or lower {them}"
            )


def _models(content: bytes) -> dict[str, Mapping[str, Any]]:
    """Return the description of each served model, by its name."""
    try:
        models = json.loads(content)["data"]
        return {str(entry["id"]): dict(entry) for entry in models}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}


def _said(reply: Reply) -> str:
    """Return a server's explanation of its refusal, on one line."""
    return shortened(" ".join(reply.content.decode("utf-8", "replace").split())) or "nothing more"
