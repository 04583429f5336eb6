"""``dllm-sd serve``: a run or a model behind HTTP."""

import argparse
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from ipaddress import ip_address

from accelerate import Accelerator, PartialState

from dllm_sd.cli.run_or_model import load, quiet_libraries, warn
from dllm_sd.errors import InputError
from dllm_sd.serving.service import Limits, Service


def run(options: argparse.Namespace) -> int:
    """Serve until a signal."""
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise InputError(f"serve needs {missing[0]}, which is not installed; run pip install 'dllm-sd[serve]'")
    server, routes = (import_module(f"dllm_sd.serving.{name}") for name in ("server", "routes"))
    quiet_libraries()
    if PartialState().num_processes > 1:
        raise InputError("serve is one process; start it without accelerate launch, once on each device")
    key = _key(options.api_key_variable)
    listener = server.bind(options.host, options.port)
    host, port = listener.getsockname()[:2]
    if key is None and not ip_address(host).is_loopback:
        warn(f"everybody who reaches {host} can use this model; set --api-key-variable to ask for a key")
    try:
        config, policy, weights = load("serve", options.model, options.overrides, options.task, options.adapter)
    except BaseException:
        listener.close()
        raise
    limits = {"completion": max(Limits.completion, config.decode.length)}
    body = options.max_body and 1024 * options.max_body
    given = {
        "completion": options.max_completion,
        "waiting": options.max_waiting,
        "requests": options.max_requests,
        "body": body,
    }
    limits |= {name: value for name, value in given.items() if value is not None}
    accelerator = Accelerator()
    service = Service(
        policy,
        config.model,
        config.decode,
        name=options.name or options.model,
        limits=Limits(prompt=config.max_prompt, **limits),
        thinking=config.eval.thinking,
        around=lambda: accelerator.autocast(),
    )
    app = routes.application(service, key, options.allow_loading)
    print(f"serving {weights} at http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
    server.HttpServer(app, service).run([listener])
    return 0


def _key(variable: str | None) -> str | None:
    """Return the key that clients must send."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"--api-key-variable names {variable!r}, which holds no key; put one into that environment variable, in "
            "ASCII and without spaces"
        )
    return key
