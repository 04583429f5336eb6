"""Weights that are trained are kept in a type that can hold what an update adds to them."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.config import Config, build_config, load_config, shipped_configs
from dllm_sd.errors import InputError
from dllm_sd.pairing import check_model
from tools.check_precision import changed_share, trains_all_weights

LORAS: dict[str, dict[str, Any] | None] = {
    **{"all weights": None, "adapters": {"rank": 2}},
    "adapters and a whole module": {"rank": 2, "modules_to_save": ["lm_head"]},
}


def config(**keys: Any) -> Config:
    return build_config({"task": "sudoku", "decode": {"length": 16, "block_length": 4}, **keys})


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "lora"),
    [
        pytest.param(*case, marks=() if i % 5 == 0 else pytest.mark.slow)
        for i, case in enumerate(product(["float64", "float32", "bfloat16", "float16"], [None, "bfloat16"], LORAS))
    ],
)
def test_weights_that_lose_their_steps_are_refused_unless_asked_for(dtype, autocast, lora, name, pure):
    model = {"path": "tiny", "dtype": dtype, "lora": LORAS[lora]}
    asked = config(model=model, optim={"autocast": autocast, "pure_bfloat16": pure, "name": name})
    if dtype == "float16" or (dtype == "bfloat16" and lora != "adapters" and not pure):
        with pytest.raises(InputError, match=rf"^model\.dtype {dtype} .*set model\.dtype to float32 and optim\.auto"):
            check_model(asked)
    else:
        check_model(asked)


@pytest.mark.slow
def test_every_shipped_config_that_trains_all_weights_changes_them():
    found = {name: load_config(name) for name in shipped_configs()}
    found = {name: one for name, one in found.items() if trains_all_weights(one)}
    assert {"qwen3_8b_sdpo", "qwen3_4b_demo_psd", "r1_distill_1.5b_topd"} <= set(found)
    for name, one in found.items():
        assert changed_share(one, one.model.dtype, one.optim.autocast) > 0.98, name


@pytest.mark.slow
def test_in_bfloat16_alone_hardly_any_weight_would_change():
    assert changed_share(load_config("qwen3_4b_demo_psd"), "bfloat16", None) < 0.05


def test_no_shipped_config_asks_for_bfloat16_alone():
    for name in shipped_configs():
        one = load_config(name)
        whole = one.model.lora is None or one.model.lora.modules_to_save
        assert not one.optim.pure_bfloat16, name
        assert not whole or one.model.dtype == "float32", name


def test_the_refusal_comes_before_the_checkpoint_is_looked_for(tmp_path: Path):
    with pytest.raises(InputError, match="without float32 master weights"):
        check_model(config(model={"path": str(tmp_path / "absent"), "dtype": "bfloat16"}))
