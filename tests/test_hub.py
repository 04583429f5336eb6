"""The hub is asked once whether it answers, and the refusal of what is missing comes at once and says why."""

import time
from collections.abc import Iterator
from email.message import Message
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
from huggingface_hub import constants

from dllm_sd import hub
from dllm_sd.errors import InputError
from dllm_sd.pretrained.blueprint import read_blueprint
from dllm_sd.pretrained.model import Model
from dllm_sd.tasks.sources import rows_of


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._unanswered.cache_clear()
    yield
    hub._unanswered.cache_clear()


def answering(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[Any]:
    """The hub answers every question with ``error``; returns the questions."""
    asked: list[Any] = []

    def urlopen(request: Any, timeout: float) -> Any:
        asked.append(request.full_url)
        assert timeout <= 10
        raise error

    monkeypatch.setattr(hub, "urlopen", urlopen)
    return asked


def test_a_hub_that_does_not_answer_is_asked_once_and_the_refusal_says_so(monkeypatch: pytest.MonkeyPatch):
    asked = answering(monkeypatch, URLError(OSError(-2, "Name or service not known")))
    start = time.perf_counter()
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            read_blueprint(Model(path="nobody/nothing"))
        assert str(caught.value) == (
            "there is no config.json at 'nobody/nothing' (model.path) in the local cache of the hub, and the hub does "
            f"not answer ({constants.ENDPOINT}: Name or service not known); connect to the network, or name a folder"
        )
    with pytest.raises(InputError, match=r"nobody/rows, split train .* the hub does not answer .* a local file"):
        rows_of("nobody/rows", "train", "task.data")
    assert time.perf_counter() - start < 20  # of which most is the import of datasets; the client alone pauses longer
    assert asked == [constants.ENDPOINT]


def test_offline_by_choice_is_told_from_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    asked = answering(monkeypatch, URLError("unused"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"and HF_HUB_OFFLINE forbids asking the hub; unset it, or name a folder$"):
        read_blueprint(Model(path="nobody/nothing"))
    assert asked == []


def test_a_hub_that_refuses_has_answered(monkeypatch: pytest.MonkeyPatch):
    answering(monkeypatch, HTTPError("https://hub", 403, "no", Message(), None))
    assert hub.why_offline() is None
    assert not constants.HF_HUB_OFFLINE


def test_a_web_address_is_no_name():
    with pytest.raises(InputError, match=r"^model\.path 'https://hub/Qwen/X' is a web address; give the name"):
        read_blueprint(Model(path="https://hub/Qwen/X"))
    with pytest.raises(InputError, match=r"^task\.data 'https://x/y\.jsonl' is a web address; download"):
        rows_of("https://x/y.jsonl", "train", "task.data")
