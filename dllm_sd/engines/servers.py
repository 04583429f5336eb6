"""The servers of an engine: requests with retries on whichever server is up, and the weights that they decode with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from typing import Any

from dllm_sd.engines.engine import KEY, CompletionRequest, RemoteEngine
from dllm_sd.errors import InputError, Stopped, shortened
from dllm_sd.http_client import HttpClient, Reply, json_headers, pause
from dllm_sd.trajectory import Trajectory

FAILURES_UNTIL_DOWN = 3
"""After so many failed attempts in a row a server counts as down, and others get its requests."""


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


class Servers:
    """The servers of one engine; safe to use from several threads."""

    def __init__(self, engine: RemoteEngine) -> None:
        """Prepare the client; nothing is sent yet.

        Raises:
            InputError: if the API key cannot be sent.
        """
        self.engine = engine
        self._servers = [_Server(url) for url in engine.url]
        self._client = HttpClient(json_headers(engine.key_variable, f"{KEY}.key_variable"), engine.timeout)
        self._stop, self._lock = self._client.stop, Lock()
        self._load: tuple[str, str, bool] | None = None
        self.retried = 0
        """Attempts at completions that failed and were repeated."""

    def check(self, longest: int, prefix: str) -> None:
        """Ask every server whether it is up, knows the model, and reads ``longest`` tokens of prompt and completion.

        Names that begin with ``prefix`` are those of this run's weights: a server that took all of them knows its model
        by such a name.

        Raises:
            InputError: naming the server, and the remedy.
        """
        client = replace(self._client, timeout=min(self.engine.timeout, 60.0))
        for i, server in enumerate(self._servers):
            reply = client.send(self.engine.path(server.url, "/v1/models"))
            self._refuse(server, reply)
            if reply.failure is not None:
                raise InputError(
                    f"{KEY}.url.{i} {server.url} does not answer as a server of models ({reply.failure}); start it, or "
                    "give the base URL of one that runs"
                )
            models = _models(reply.content)
            names = [name for name in models if name == self.engine.model or name.startswith(prefix)]
            if not names:
                raise InputError(
                    f"{KEY}.model {self.engine.model!r} is not served at {server.url}, which has "
                    f"{shortened(', '.join(models)) or 'none'}; name one of these"
                )
            most = models[names[0]]
            if most is not None and most < longest:
                raise InputError(
                    f"the server at {server.url} reads {most} tokens, but max_prompt and decode.length are {longest} "
                    "together; start it with a larger --max-model-len, or lower them"
                )

    def load(self, name: str, folder: str, adapter: bool) -> None:
        """Load weights on all servers that are up; a server that comes back later gets them then.

        Raises:
            Stopped: if no server takes them.
        """
        self._load = (name, folder, adapter)
        outcomes = [self._give_weights(server) for server in self._servers]
        if all(reply.failure for reply in outcomes):
            reply = outcomes[0]
            raise Stopped(
                f"no server of {KEY}.url takes the weights {name} from {folder} ({reply.failure}: "
                f"{_said(reply)}); start them so that they load weights and see this folder, and run the same command "
                "again"
            )

    def note(self, name: str, folder: str, adapter: bool) -> None:
        """Learn that another process has loaded weights on the servers."""
        self._load = (name, folder, adapter)
        for server in self._servers:
            server.weights = name

    def complete(self, request: CompletionRequest) -> Trajectory:
        """Return the completion that a server made.

        Raises:
            WrongAnswer: if a server answered what must not be trained on.
            Stopped: if the request failed on all attempts.
        """
        route, tree = self.engine.ask(request)
        body = json.dumps(tree).encode()
        for attempt in count():
            server = self._choose()
            if server.weights != request.model != self.engine.model:
                self._give_weights(server)
            reply = self._client.send(self.engine.path(server.url, route), body)
            self._returned(server, reply)
            self._refuse(server, reply)
            if reply.failure is None:
                return self._read(server, reply, request)
            if reply.failure == "http_404":  # a server that was restarted lacks the weights
                server.weights = None
            elif not reply.is_temporary:
                raise Stopped(
                    f"the server at {server.url} ({KEY}) refuses a completion ({reply.failure}: {_said(reply)}); "
                    "change its settings or those of decode, and run the same command again"
                )
            seconds = pause(self.engine.backoff, request.key, attempt, reply.retry_after)
            if attempt == self.engine.retries or self._stop.wait(seconds):
                raise Stopped(
                    f"no server of {KEY}.url made a completion in {attempt + 1} attempts (the last at {server.url}: "
                    f"{reply.failure}); finished rollouts are kept: start the servers, and run the same command again"
                )
            self.retried += 1
        raise AssertionError("count() has no end")

    def cancel(self) -> None:
        """Cancel all requests in flight; no request can be made afterwards."""
        self._stop.set()

    def _read(self, server: _Server, reply: Reply, request: CompletionRequest) -> Trajectory:
        try:
            return self.engine.read(json.loads(reply.content), request)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise WrongAnswer(
                f"the server at {server.url} ({KEY}) gave an answer that must not be trained on: {error}"
            ) from error

    def _choose(self) -> _Server:
        """Return the server with the fewest requests in flight, of those that are up if one is."""
        with self._lock:
            up = [server for server in self._servers if server.failed < FAILURES_UNTIL_DOWN] or self._servers
            server = min(up, key=lambda server: server.running)
            server.running += 1
            return server

    def _returned(self, server: _Server, reply: Reply) -> None:
        with self._lock:
            server.running -= 1
            outage = reply.failure is not None and not reply.failure.startswith("http_4")
            server.failed = server.failed + 1 if outage else 0

    def _give_weights(self, server: _Server) -> Reply:
        """Load the current weights on a server, and forget the former ones."""
        assert self._load is not None
        name, folder, adapter = self._load
        reply = self._post(server, *self.engine.load(name, folder, adapter))
        if reply.failure is not None:
            return reply
        former, server.weights, server.failed = server.weights, name, 0  # it is up
        if former not in (None, name) and (forgotten := self.engine.unload(str(former), adapter)) is not None:
            self._post(server, *forgotten)
        return reply

    def _post(self, server: _Server, route: str, tree: Mapping[str, Any]) -> Reply:
        reply = self._client.send(self.engine.path(server.url, route), json.dumps(tree).encode())
        self._refuse(server, reply)
        return reply

    def _refuse(self, server: _Server, reply: Reply) -> None:
        """Refuse to go on with a server that wants another API key."""
        if reply.failure in ("http_401", "http_403"):
            raise InputError(
                f"the server at {server.url} ({KEY}.url) answers {reply.failure[5:]} ({_said(reply)}); put a secret "
                f"that it accepts into the environment variable {self.engine.key_variable} ({KEY}.key_variable)"
            )


def _models(content: bytes) -> dict[str, int | None]:
    """Return the names of the served models, with the most tokens that each reads if the server says so."""
    try:
        models = json.loads(content)["data"]
        entries = {str(entry["id"]): entry.get("max_model_len") for entry in models}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}
    return {name: most if isinstance(most, int) else None for name, most in entries.items()}


def _said(reply: Reply) -> str:
    """Return what a server said of its refusal, on one line."""
    return shortened(" ".join(reply.content.decode("utf-8", "replace").split())) or "nothing more"
