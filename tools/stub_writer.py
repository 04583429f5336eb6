"""A local stand-in for a writer: an OpenAI-compatible server whose answers are a function of the question."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, TypeVar

from dllm_sd.randomness import make_key

TITLES = ("title", "principle", "when_to_apply", "description", "why_it_happens", "how_to_avoid")


def completion(text: Any) -> bytes:
    """The body of a response with ``text``."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def steps(question: str) -> str:
    """One step and an answer."""
    digits = make_key(question)
    return f"<step_1>{digits % 89}</step_1><answer>{digits % 7}</answer>"


def steps_or_entries(question: str) -> str:
    """Entries of a skill bank if the question asks for them, else steps."""
    if '"title"' not in question and '"description"' not in question:
        return steps(question)
    digits = make_key(question)
    return json.dumps([{name: str(digits % (97 + i)) for i, name in enumerate(TITLES)}])


class StubWriter(ThreadingHTTPServer):
    """Answers every chat by ``answer(question)``, the question being its last message."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str], str] = steps) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self._answer = answer

    @property
    def url(self) -> str:
        """The URL for a config."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, question: str) -> str:
        """The text for a question."""
        return self._answer(question)

    def respond(self, handler: "Handler", body: Mapping[str, Any]) -> None:
        """Answer one request with this body."""
        handler.answer(completion(self.reply(body["messages"][-1]["content"])))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: StubWriter  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        """Read the request, and let the server respond."""
        self.server.respond(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        """Send a body; names of ``headers`` have underscores for hyphens."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests."""


S = TypeVar("S", bound=StubWriter)


@contextmanager
def running(server: S) -> Iterator[S]:
    """Run the server in a thread."""
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
