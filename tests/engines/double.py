"""A double of a vLLM server: the protocol on the standard library, a small model behind it, and faults on demand."""

import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from dllm_sd.decoding.settings import Decoding
from dllm_sd.policies.loading import load_policy
from dllm_sd.pretrained.model import Lora

MODEL = "small"


class Handler(BaseHTTPRequestHandler):
    """Answers in HTTP/1.1; the log is silent."""

    protocol_version = "HTTP/1.1"

    @property
    def double(self) -> "Double":
        assert isinstance(self.server, Double)
        return self.server

    def do_GET(self) -> None:
        self.reply({"data": [{"id": self.double.served, "max_model_len": self.double.longest}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.double.seen.append((self.path, body))
        if self.path == "/v1/completions":
            fault = self.double.faults.pop(0) if self.double.faults else None
            if fault is None or fault(self, body) is None:
                self.reply(self.double.complete(body))
        else:
            status, text = self.double.change(self.path, body)
            self.reply({"message": text}, status)

    def reply(self, tree: Any, status: int = 200) -> None:
        if tree is None:
            tree, status = {"error": "there is no such model"}, 404
        self.raw(json.dumps(tree).encode(), status)

    def raw(self, content: bytes, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


Fault = Callable[[Handler, Any], Any]
"""Answers in the double's place, and returns something else than None."""


class Double(ThreadingHTTPServer):
    """Serves one base model and its adapters, one completion after the other."""

    daemon_threads = True

    def __init__(self, path: str = "tiny_ar", rank: int = 4) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.policy = load_policy(path, lora=Lora(rank=rank))
        self.blank = {name: value.clone() for name, value in self._adapter().items()}
        self.adapters: dict[str, dict[str, torch.Tensor]] = {}
        self.seen: list[tuple[str, Any]] = []
        self.lock, self.released = Lock(), Event()
        self.behave()
        self.thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def behave(self) -> None:
        """Serve as a server should, from now on."""
        self.faults: list[Fault] = []
        self.edit: Callable[[dict[str, Any]], Any] = lambda answer: answer
        """Changes every answer."""
        self.stale = self.deaf = False
        """Whether adapters are taken but not used; whether seeds are ignored."""
        self.served, self.longest = MODEL, 4096

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def completions(self) -> list[Any]:
        return [body for path, body in self.seen if path == "/v1/completions"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are expected."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def _adapter(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.policy.module.named_parameters() if "lora_" in name}

    def change(self, path: str, body: Any) -> tuple[int, str]:
        if path == "/v1/unload_lora_adapter":
            self.adapters.pop(body["lora_name"], None)
        elif path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return 400, f"The lora adapter {body['lora_name']!r} has already been loaded."
            self.adapters[body["lora_name"]] = load_file(Path(body["lora_path"]) / "adapter_model.safetensors")
        else:
            return 404, "no such route"
        return 200, "done"

    def complete(self, body: Any) -> dict[str, Any] | None:
        if body["model"] != MODEL and body["model"] not in self.adapters:
            return None
        with self.lock:
            with torch.no_grad():
                for name, value in self._adapter().items():
                    value.copy_(self.blank[name])
            if body["model"] != MODEL and not self.stale:
                set_peft_model_state_dict(self.policy.module.model, self.adapters[body["model"]])
            settings = Decoding(length=body["max_tokens"], temperature=body["temperature"])
            done = self.policy.decode([body["prompt"]], settings, [0 if self.deaf else body["seed"]])
        tokens = done.tokens[0, : int(done.length)].tolist()
        assert done.logp is not None
        answer = {
            "model": body["model"],
            "choices": [
                {
                    "text": self.policy.text(tokens),
                    "token_ids": tokens,
                    "prompt_token_ids": body["prompt"],
                    "logprobs": {"token_logprobs": done.logp[0, : len(tokens)].tolist()},
                }
            ],
        }
        return self.edit(answer)
