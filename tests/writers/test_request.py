"""What a writer is asked with: values without a meaning are refused in a sentence."""

import re
from typing import Any

import pytest

from dllm_sd.errors import InputError
from dllm_sd.writers import Sampling, Server


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": ""}, "a writer's url is empty; give the base URL"),
        ({"url": "host:8000/v1"}, "must be an http or https address"),
        ({"url": "ftp://host/v1"}, "must be an http or https address"),
        ({"url": "file:///etc/passwd"}, "must be an http or https address"),
        ({"url": "http://"}, "must be an http or https address"),
        ({"url": "http://a..b/v1"}, "must be an http or https address"),
        ({"url": "http://[::1/v1"}, "must be an http or https address"),
        ({"url": "http://host:99999/v1"}, "must be an http or https address"),
        ({"url": "http://host/v1?key=pass-w0rd"}, "without query"),
        ({"url": "http://host/v1#pass-w0rd"}, "without query and fragment"),
        ({"url": "http://host/v1\r\nX: pass-w0rd"}, "must be an http or https address"),
        (
            {"url": "http://me:pass-w0rd@host/v1"},
            "put the secret into the environment variable that key_variable names",
        ),
        ({"url": "http://host/v1/chat/completions"}, "leave out /chat/completions"),
        ({"model": ""}, "a writer's model is empty; give the name"),
        ({"key_variable": "sk-pass-w0rd"}, "key_variable is not the name of an environment variable"),
        ({"key_variable": ""}, "key_variable is not the name of an environment variable"),
        ({"timeout": 0.0}, "Server.timeout is 0; give a number above 0 and at most 86400"),
        ({"timeout": float("nan")}, "Server.timeout is"),
        ({"timeout": float("inf")}, "Server.timeout is"),
        ({"backoff": -1.0}, "Server.backoff is -1; give a number from 0 to 60"),
        ({"backoff": float("inf")}, "Server.backoff is"),
        ({"retries": -1}, "Server.retries is -1; give a whole number of at least 0"),
        ({"concurrency": 0}, "Server.concurrency is 0; give a whole number from 1 to"),
    ],
)
def test_a_server_without_a_meaning_is_refused_in_a_sentence(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Server(**{"url": "http://host:8000/v1", "model": "m", **options})
    assert "pass-w0rd" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://host:8000/v1", "https://api.openai.com/v1/", "http://[::1]:80", "http://127.0.0.1"]
)
def test_base_urls_are_taken(url: str):
    assert Server(url, "m").url == url


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "Sampling.length is 0; give a whole number from 1 to"),
        ({"temperature": -0.1}, "Sampling.temperature is"),
        ({"temperature": float("nan")}, "Sampling.temperature is"),
        ({"temperature": float("inf")}, "Sampling.temperature is"),
        ({"top_p": 0.0}, "Sampling.top_p is"),
        ({"top_p": 1.1}, "Sampling.top_p is"),
        ({"top_p": float("nan")}, "Sampling.top_p is"),
    ],
)
def test_a_sampling_without_a_meaning_is_refused_in_a_sentence(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Sampling(**options)
