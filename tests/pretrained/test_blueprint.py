"""What a checkpoint's small files say, and what the keys of `model` change about it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.errors import InputError
from dllm_sd.pretrained.blueprint import Blueprint, read_blueprint
from dllm_sd.pretrained.families import FAMILIES, MARK, recognise
from dllm_sd.pretrained.model import Lora, Model, Shape

ORIGINAL = Path(__file__).parents[1] / "fixtures" / "checkpoints"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Blueprint]:
    """The blueprint of a family's checkpoint after changes of its config.json and generation_config.json."""

    def read(
        name: str, written: dict[str, Any] | None = None, generation: dict[str, Any] | None = None, **options: Any
    ) -> Blueprint:
        folder = Path(shutil.copytree(ORIGINAL / name / "single", tmp_path / options.pop("folder", name)))
        for file, changes in (("config.json", written), ("generation_config.json", generation)):
            merged = json.loads((folder / file).read_text()) | (changes or {})
            (folder / file).write_text(json.dumps(merged))
        return read_blueprint(Model(path=str(folder), **options), text=False)

    return read


@pytest.mark.parametrize(
    ("model_type", "name", "shift", "block_length", "turn_end"),
    [
        ("llada", "llada", False, None, "<|eot_id|>"),
        ("illada", "illada", False, None, "<|eot_id|>"),
        ("Dream", "dream", True, None, "<|im_end|>"),
        ("sdar", "sdar", False, 4, "<|im_end|>"),
        ("a2d-qwen3", "a2d_qwen3", False, None, "<|im_end|>"),
        ("a2d-qwen2", "a2d_qwen2", False, None, "<|im_end|>"),
        ("llada2_moe", "llada2", False, 32, "<|role_end|>"),
    ],
)
def test_a_family_is_recognised_by_its_model_type(
    model_type: str, name: str, shift: bool, block_length: int | None, turn_end: str
):
    family = recognise({"model_type": model_type}, "here")
    assert family is FAMILIES[name]
    assert (family.shift, family.block_length, family.block_causal, family.turn_end) == (
        shift,
        block_length,
        block_length is not None,
        turn_end,
    )


def test_every_family_is_recognised_by_one_model_type_only():
    types = [model_type for family in FAMILIES.values() for model_type in family.model_types]
    assert len(types) == len(set(types))


def test_the_block_length_is_the_users_then_the_checkpoints_then_the_familys(read: Callable[..., Blueprint]):
    assert read("sdar", {"block_size": 8}, folder="a").block_length == 8
    assert read("sdar", {"block_size": 8}, folder="b", block_length=16).block_length == 16
    assert read("llada2", folder="c", mask_token=157).block_length == 32
    assert read("llada", folder="d").block_length is None
    assert read("llada", folder="e", block_length=4).block_length == 4
    assert read("a2d_qwen3", folder="Qwen3-0.6B-diffusion-mdlm-v0.1", mask_token=158).block_length is None
    assert read("a2d_qwen3", folder="Qwen3-0.6B-diffusion-bd3lm-v0.1", mask_token=158).block_length == 32


def test_the_generation_configs_end_tokens_come_first_and_each_once(read: Callable[..., Blueprint]):
    ends = {"eos_token_id": [153, 7, 153]}
    assert read("sdar", {"eos_token_id": 9}, ends, folder="a").end_ids == (153, 7, 9)
    assert read("sdar", {"eos_token_id": None}, {"eos_token_id": None}, folder="b").end_ids == (151,)  # the padding
    none = {"eos_token_id": None, "pad_token_id": None}
    with pytest.raises(InputError, match=r"has no end token; set eos_token .*, or name it in model\.end_tokens$"):
        read("sdar", none, none, folder="c")


def test_the_padding_is_the_checkpoints_or_else_the_last_end_token(read: Callable[..., Blueprint]):
    assert read("sdar", {"pad_token_id": 3}, {"pad_token_id": 4}, folder="a").pad_id == 4
    assert read("sdar", {"pad_token_id": 3}, {"pad_token_id": None}, folder="b").pad_id == 3
    assert read("sdar", {"pad_token_id": None}, {"pad_token_id": None}, folder="c").pad_id == 151
    assert read("sdar", {"pad_token_id": -1}, {"pad_token_id": 160}, folder="d").pad_id == 151  # no rows of these


@pytest.mark.parametrize("end_id", [160, -1])
def test_an_end_token_outside_the_embedding_is_refused(read: Callable[..., Blueprint], end_id: int):
    with pytest.raises(InputError, match=rf"has 160 embedding rows, but calls {end_id} an end token; fix eos_token_id"):
        read("llada", {}, {"eos_token_id": end_id})


def test_a_config_that_a_family_wrote_itself_into_needs_no_conversion():
    native = {"model_type": "qwen3", MARK: {"family": "sdar", "block_length": 8}}
    family = recognise(native, "here")
    assert (family.name, family.network, family.config, family.block_length) == ("sdar", None, None, 8)
    with pytest.raises(InputError, match="names an unknown family 'other' under dllm_sd; restore the file"):
        recognise(replace_family(native, "other"), "here")


def replace_family(written: dict[str, Any], name: str) -> dict[str, Any]:
    return {**written, MARK: {**written[MARK], "family": name}}


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Lora(rank=0), "model.lora.rank is 0; give a whole number from 1 to"),
        (lambda: Lora(dropout=1.0), "model.lora.dropout is 1; give a number of at least 0 and below 1"),
        (lambda: Lora(targets=()), "model.lora.targets is ..; name kinds of linear layers"),
        (lambda: Shape(num_hidden_layers=0), "model.shape.num_hidden_layers is 0; give a whole number from 1 to"),
        (lambda: Shape(hidden_size=30, num_attention_heads=4), "must be a multiple of twice"),
        (lambda: Model(quantization="4bit"), "set model.lora as well"),
        (lambda: Model(quantization="4bit", lora=Lora(), random_init=True), "set model.random_init to false"),
        (lambda: Model(quantization="4bit", lora=Lora(merge_rollouts=True)), "model.lora.merge_rollouts cannot fold"),
    ],
)
def test_impossible_models_are_refused(build: Callable[[], Any], says: str):
    with pytest.raises(InputError, match=says):
        build()
