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
        ({"key_variable": "sk-pass-w0rd"}, "key_variable is no name of an environment variable"),
        ({"key_variable": ""}, "key_variable is no name of an environment variable"),
        ({"timeout": 0.0}, "a writer's timeout must be above 0 and at most 86400 seconds"),
        ({"timeout": float("nan")}, "a writer's timeout"),
        ({"timeout": float("inf")}, "a writer's timeout"),
        ({"backoff": -1.0}, "a writer's backoff must be from 0 to 60 seconds"),
        ({"backoff": float("inf")}, "a writer's backoff"),
        ({"retries": -1}, "a writer's retries must be at least 0"),
        ({"concurrency": 0}, "a writer's concurrency must be at least 1"),
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
        ({"length": 0}, "a writer's length is the longest text in tokens; give at least 1"),
        ({"temperature": -0.1}, "a writer's temperature"),
        ({"temperature": float("nan")}, "a writer's temperature"),
        ({"temperature": float("inf")}, "a writer's temperature"),
        ({"top_p": 0.0}, "a writer's top_p"),
        ({"top_p": 1.1}, "a writer's top_p"),
        ({"top_p": float("nan")}, "a writer's top_p"),
    ],
)
def test_a_sampling_without_a_meaning_is_refused_in_a_sentence(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Sampling(**options)
