"""The secret goes into one header and nowhere else."""

import io
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from dllm_sd.errors import InputError
from dllm_sd.writers import Cache, Sampling, Written
from tests.writers.service import SECRET, Service, drop, requests, status, write_one, writer


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_secret_stops_at_once_and_names_the_variable(
    service: Service, code: int, monkeypatch: pytest.MonkeyPatch
):
    for state in ("not set", "set"):
        service.faults["x"] = [status(code)]
        with pytest.raises(InputError, match=f"{re.escape(service.url)} answers {code}; .* MY_KEY .* is {state}$"):
            write_one(service, key_variable="MY_KEY")
        monkeypatch.setenv("MY_KEY", SECRET)
    assert len(service.seen) == 2


def test_the_secret_is_sent_and_stands_nowhere_else(
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: io.StringIO,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("MY_KEY", f"{SECRET}\n")
    server = writer(service, key_variable="MY_KEY", retries=1)
    service.faults.update({"b": [status(500)], "c": [drop], "d": [status(401)]})
    server.write(requests(*"abc"), Sampling(), Cache(tmp_path))
    assert {headers["Authorization"] for _, _, headers in service.seen} == {f"Bearer {SECRET}"}
    with pytest.raises(InputError) as caught:
        server.write(requests("d"), Sampling(), Cache(tmp_path))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 3
    said = [
        *(file.read_text() for file in files),
        *traceback.format_exception(caught.value),
        *(repr(server), str(server.identity), logged.getvalue(), *capfd.readouterr()),
    ]
    assert not any(SECRET in text for text in said)


def test_no_secret_is_sent_where_the_variable_is_not_set(service: Service):
    write_one(service)
    assert "Authorization" not in service.seen[0][2]


@pytest.mark.parametrize("secret", [f"{SECRET}\r\nX: y", f"{SECRET}é", f"{SECRET}\x7f"])
def test_a_secret_that_no_header_can_hold_is_refused_without_being_shown(
    service: Service, secret: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    with pytest.raises(InputError, match=r"OPENAI_API_KEY .* set it to the secret alone") as caught:
        write_one(service)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert service.seen == []


def test_a_redirection_takes_the_secret_nowhere(make_service: Callable[[], Service], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    service, other = make_service(), make_service()
    service.faults["x"] = [status(307, Location=f"{other.url}/chat/completions")]
    assert write_one(service) == Written(None, "http_307")
    assert other.seen == []
