"""The routes of the server: bodies read within limits, refusals as JSON, clients that hang up noticed."""

import asyncio
import hmac
import json
import sys
import traceback
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dllm_sd.files.reading import json_value
from dllm_sd.files.typed_json import build
from dllm_sd.serving.connections import hung_up
from dllm_sd.serving.openai import ApiResponse, read_asked
from dllm_sd.serving.refusal import Refusal
from dllm_sd.serving.service import Service, refusing

SLOWEST = 60.0
"""Seconds that a body may take to arrive."""
GONE = 499
"""Status, in nginx's words, of a request whose client hung up; nobody reads it."""
NAME = 200
"""Characters of the name of loaded weights."""


class Routes:
    """What the server answers."""

    def __init__(self, service: Service, allow_loading: bool = False) -> None:
        """Answer for a service; without ``allow_loading`` no request can name a path."""
        self.service, self.allow_loading = service, allow_loading

    @property
    def table(self) -> list[Route]:
        """The routes."""
        post = {
            "/generate": self.generate,
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat,
            "/v1/load_lora_adapter": self.load_adapter,
            "/v1/unload_lora_adapter": self.unload_adapter,
            "/v1/load_weights": self.load_weights,
        }
        get = {"/health": self.health, "/v1/models": self.models}
        return [
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
        ]

    async def health(self, request: Request) -> Response:
        """Say whether the server can decode, and what it has to do."""
        scheduler = self.service.scheduler
        well = scheduler.thread.is_alive() and not scheduler.closing
        counts = {"running": len(scheduler.running), "waiting": len(scheduler.waiting)}
        return JSONResponse({"status": "ok" if well else "stopping", **counts}, 200 if well else 503)

    async def models(self, request: Request) -> Response:
        """List the weights that can be asked for."""
        base, *adapters = self.service.weights.names
        limits = self.service.limits
        lengths = {
            "max_model_len": limits.prompt + limits.completion,
            "max_prompt": limits.prompt,
            "max_completion": limits.completion,
        }
        kind = {"object": "model", "created": 0, "owned_by": "dllm-sd", **lengths}
        every = [{"id": name, **kind} for name in (base, *adapters)]
        parents = [{}, *({"parent": base} for _ in adapters)]
        return JSONResponse({"object": "list", "data": [{**a, **b} for a, b in zip(every, parents, strict=True)]})

    async def generate(self, request: Request) -> Response:
        """Decode token ids, and return the whole trajectory."""
        tree = await self._body(request)
        return JSONResponse(await unless_gone(request, lambda: self.service.generate(tree)))

    async def completions(self, request: Request) -> Response:
        """Complete texts."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, chat=True)

    async def load_adapter(self, request: Request) -> Response:
        """Load a PEFT adapter from a folder on this machine."""
        body = await self._loading(request, "lora_name", "lora_path")
        with refusing():
            in_place = build(bool | None, body.get("load_inplace"), "load_inplace") or False
        weights, name, path = self.service.weights, body["lora_name"], body["lora_path"]
        return await self._do(lambda: weights.load_adapter(name, path, in_place))

    async def unload_adapter(self, request: Request) -> Response:
        """Remove an adapter."""
        body = await self._loading(request, "lora_name")
        return await self._do(lambda: self.service.weights.unload_adapter(body["lora_name"]))

    async def load_weights(self, request: Request) -> Response:
        """Replace all weights by those of a folder on this machine."""
        body = await self._loading(request, "name", "path")
        return await self._do(lambda: self.service.weights.load_all(body["name"], body["path"]))

    async def _do(self, work: Callable[[], str]) -> Response:
        return JSONResponse({"status": await self.service.run_exclusively(work)})

    async def _loading(self, request: Request, *names: str) -> dict[str, Any]:
        """Read a request that names weights to load."""
        body = await self._body(request)
        if not self.allow_loading:
            raise Refusal(403, "this server loads no weights; start it with --allow-loading")
        for name in names:
            with refusing():
                value = build(str, body.get(name), name)
            if not value or (name in ("lora_name", "name") and len(value) > NAME):
                raise Refusal(422, f"{name} must be a text of 1 to {NAME} characters")
        return body

    async def _answer(self, request: Request, chat: bool) -> Response:
        """Answer in the words of OpenAI's servers, whose status for all that is wrong with a request is 400."""
        try:
            return await self._answered(request, chat)
        except Refusal as refusal:
            if refusal.status != 422:
                raise
            raise Refusal(400, str(refusal)) from refusal

    async def _answered(self, request: Request, chat: bool) -> Response:
        tree = await self._body(request)
        asked = await unless_gone(request, lambda: read_asked(self.service, tree, chat))
        if asked.stream:
            check_present(request)
            return EventStream(ApiResponse(self.service, asked))
        return JSONResponse(await unless_gone(request, lambda: ApiResponse(self.service, asked).whole()))

    async def _body(self, request: Request) -> dict[str, Any]:
        """Read a JSON object, of a size and in a time that are bounded."""
        limit = self.service.limits.body
        content = bytearray()
        try:
            async with asyncio.timeout(SLOWEST):
                async for part in request.stream():
                    content += part
                    if len(content) > limit:
                        raise Refusal(413, f"the request is larger than {limit} bytes; send less at once")
        except TimeoutError:
            raise Refusal(408, f"the request took more than {SLOWEST:g} seconds to arrive; send it again") from None
        except ClientDisconnect:
            raise Refusal(GONE, "the client hung up") from None
        check_present(request)
        try:
            tree = json_value(bytes(content).removeprefix(BOM_UTF8))
        except ValueError as error:
            raise Refusal(400, f"the request is not JSON ({error!s:.100}); send a JSON object") from None
        if not isinstance(tree, dict):
            raise Refusal(400, "the request must be a JSON object")
        return tree


def check_present(request: Request) -> None:
    """Do nothing more for a client that has gone.

    Raises:
        Refusal: if it has, which nobody reads.
    """
    if hung_up(request.scope):
        raise Refusal(GONE, "the client hung up")


async def unless_gone(request: Request, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Begin to work for a client that is still there, and await the result; cancel the work when it hangs up.

    Raises:
        Refusal: if it hung up, which nobody reads.
    """
    check_present(request)
    task, gone = asyncio.create_task(work()), asyncio.create_task(_hung_up(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refusal(GONE, "the client hung up")
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of an answer; a client that hangs up ends it."""

    def __init__(self, answer: ApiResponse) -> None:
        super().__init__(status_code=200, headers={"Cache-Control": "no-store"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def event(words: str, more: bool = True) -> None:
            body = f"data: {words}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async def pieces() -> None:
            try:
                await self.answer.stream(lambda tree: event(json.dumps(tree, allow_nan=False)))
            except Refusal as refusal:
                await event(json.dumps(refusal.tree))
            await event("[DONE]", more=False)

        task, gone = asyncio.create_task(pieces()), asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            done = task.done()
            for one in (task, gone):
                one.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
        if done:
            task.result()


class Guarded:
    """An application that answers only who knows the key; whether the server is well anybody may ask."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] == "http" and scope["path"] != "/health":
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self.wanted):
                refusal = Refusal(401, "the key is missing or wrong; send the header Authorization: Bearer KEY")
                await _refused(refusal, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Bounded:
    """An application that works on so many requests at once; another one is refused at once, to be made again.

    What only asks how the server is does not count: it is answered at any time.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most, self.working = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if hung_up(scope):
            await _refused(Refusal(GONE, "the client hung up"))(scope, receive, send)
            return
        if self.working >= self.most:
            refusal = Refusal(503, f"the server works on {self.most} requests already; ask again later", retry_after=1)
            await _refused(refusal)(scope, receive, send)
            return
        self.working += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.working -= 1


def _refused(refusal: Refusal, headers: dict[str, str] | None = None) -> Response:
    wait = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    return JSONResponse(refusal.tree, refusal.status, {**(headers or {}), **wait})


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refused(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is no {request.url.path:.100}", 405: f"{request.method:.10} is not for this path"}
    return _refused(Refusal(error.status_code, words.get(error.status_code, str(error.detail))))


async def _on_failure(request: Request, error: Exception) -> Response:
    traceback.print_exception(error, file=sys.stderr)
    return _refused(Refusal(500, "the server failed; its operator finds the reason in its output"))


def application(service: Service, key: str | None = None, allow_loading: bool = False) -> ASGIApp:
    """Return the server as an ASGI application; with a ``key`` only who knows it is answered."""
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        Refusal: _on_refusal,
        HTTPException: _on_http,
        Exception: _on_failure,
    }
    answering = Starlette(routes=Routes(service, allow_loading).table, exception_handlers=handlers)
    app = Bounded(answering, service.limits.requests)
    return app if key is None else Guarded(app, key)
