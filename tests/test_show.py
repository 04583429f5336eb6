"""`dllm-sd show` needs no network: shapes of the checkpoints that shipped configs name come with the program."""

import importlib
import re
import socket
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.cli.main import main
from dllm_sd.config import load_config, shipped_configs
from dllm_sd.errors import InputError
from dllm_sd.pairing import check_model, check_model_offline
from dllm_sd.policies.loading import empty_network
from dllm_sd.pretrained.blueprint import known_blueprint, read_blueprint
from dllm_sd.pretrained.model import Model
from dllm_sd.pretrained.shapes import SHAPES
from tests.test_docs import DOCUMENTS, commands
from tests.tiers import later

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = {
    **{"GSAI-ML/LLaDA-8B-Instruct": 8_015_581_184, "Dream-org/Dream-v0-Instruct-7B": 7_615_616_512},
    **{"Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-1.7B": 1_720_574_976, "Qwen/Qwen3-4B": 4_022_468_096},
    **{"Qwen/Qwen3-8B": 8_190_735_360, "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768},
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
}
"""As published."""


def every_show() -> list[tuple[str, ...]]:
    """The words after `dllm-sd show`: every shipped config, and every command in the documents."""
    asked: list[tuple[str, ...]] = [(name,) for name in shipped_configs()]
    for document in DOCUMENTS:
        found = [words for command, *words in commands(document) if command == "show" and words]
        asked += [tuple(words) for words in found if not words[0].isupper()]
    return list(dict.fromkeys(asked))


@pytest.mark.parametrize("every", [False, *later(True)], ids=["one of each kind", "every one"])
def test_every_shipped_config_and_every_command_in_the_documents_is_shown_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], every: bool
):
    """No connection is even tried, and what an earlier download may have left is not looked at."""

    tried: list[Any] = []

    def connect(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    asked = every_show()
    assert ("quickstart_ar", "method=sgsd") in asked
    if not every:
        models = {load_config(words[0]).model: words for words in asked}
        asked = [*{(one.path in SHAPES, one.path is None): words for one, words in models.items()}.values()]
    for words in asked:
        status = main(["show", *words])
        out, err = capsys.readouterr()
        assert status == 0, (words, err)
        assert err == "", words
        assert re.search(r"parameters +│ +[\d,]+ │", out), words
        assert "peak: always" in out, words
        model = load_config(words[0]).model
        unmade = model.path is None and model.tokenizer is not None and not model.tokenizer.startswith("tiny")
        assert ("not checked" in out) == (model.path in SHAPES or "smoke" in words[0] or unmade), words
        assert not unmade or f"no usable tokenizer at {model.tokenizer!r}" in out
        assert "measured:" not in out
        assert ("% after" in out) <= ("predicts nothing about other models" in out), words
    assert tried == []


@cache
def parameters_of(name: str) -> int:
    """How many weights the network of a known shape has."""
    known = known_blueprint(Model(path=name))
    assert known is not None
    return empty_network(known).num_parameters()


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_as_many_weights_as_their_publishers_say(name: str):
    assert parameters_of(name) == PARAMETERS[name]


def test_every_shape_is_of_a_network_and_every_shipped_checkpoint_has_one():
    for name in SHAPES:
        assert parameters_of(name) > 1e8
    paths = {load_config(name).model.path for name in shipped_configs()} - {None, "tiny", "tiny_ar"}
    assert paths <= set(SHAPES)


@pytest.mark.parametrize("place", ["runs/no/tokenizer", "nobody/nothing", "/no/where", "./no_where"])
def test_a_shape_without_its_tokenizer_is_counted_and_shown_and_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny_reader_sft", [f"model.tokenizer={place}"])
    known, said = check_model_offline(config)
    assert said is not None
    assert place in said
    assert empty_network(known).get_input_embeddings().weight.shape == (84, 64)
    with pytest.raises(InputError, match=r"model\.tokenizer|model\.path"):
        check_model(config)


def test_the_reader_that_is_known_offline_has_a_row_for_each_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("make_tiny_reader")
    tool.make_tokenizer(tmp_path)
    config = load_config("tiny_reader_sft", [f"model.tokenizer={tmp_path}"])
    made, unset = (
        read_blueprint(config.model),
        replace(config.model, shape=replace(config.model.shape, vocab_size=None)),
    )
    assert made.config.vocab_size == read_blueprint(unset).config.vocab_size


def test_an_unknown_checkpoint_that_is_not_there_is_refused(tmp_path: Path):
    config = load_config("quickstart", [f"model.path={tmp_path}"])
    with pytest.raises(InputError, match=r"^there is no config\.json at"):
        check_model_offline(config)


def test_what_a_known_shape_cannot_do_is_refused_before_anything_is_downloaded():
    for name, override, words in (
        ("sdar_4b_gsm8k", "method.contexts=[suffix]", "reveals later blocks"),
        ("qwen3_4b_opsd", "method=d_opsd", "suffix reveals tokens after the graded"),
    ):
        config = load_config(name, [override])
        known = known_blueprint(config.model)
        assert known is not None
        with pytest.raises(InputError, match=words):
            check_model(config, known)
