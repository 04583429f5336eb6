"""SPD's released code: projectors of matrices, and gradients, projectors and logits of a small Qwen2 model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from dllm_sd import load_policy
from dllm_sd.network.site_head import SiteHead
from dllm_sd.network.subspace import Gradients, Subspace, Supervised, collect, kv_layers, projected, projector
from dllm_sd.network.view import View
from tests.oracles.fixtures import checkpoints, golden
from tests.oracles.subspace import multiplied, singular_vectors

TENSORS, FACTS = golden("spd")
MODEL: dict[str, Any] = FACTS["model"]
LAYERS: list[int] = MODEL["target_layers"]


def read(name: str) -> Tensor:
    return TENSORS[f"model/{name}"]


def assert_near(ours: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, expected.to(ours.dtype), atol=atol, rtol=0)


@pytest.fixture(scope="module")
def network() -> Any:
    prefix = "model/weights/"
    made = Qwen2ForCausalLM(Qwen2Config(**MODEL["config"])).double().eval()
    weights = {name.removeprefix(prefix): value.double() for name, value in TENSORS.items() if name.startswith(prefix)}
    made.load_state_dict(weights)
    return made


@pytest.fixture(scope="module")
def gradients(network: Any) -> Gradients:
    examples = []
    for ids, length, sites in zip(read("input_ids").long(), MODEL["lengths"], read("label_mask").bool(), strict=True):
        examples.append(Supervised(ids[:length], sites[:length], ids[:length]))
    layers = Subspace().chosen(MODEL["config"]["num_hidden_layers"], read("layer3/G_K").shape[1])
    assert list(layers) == LAYERS
    return collect(SiteHead(network, shift=True), examples, layers, MODEL["max_length"])


@pytest.mark.fixture
@pytest.mark.parametrize("case", FACTS["matrix_cases"], ids=lambda case: case["id"])
def test_a_projector_is_that_of_the_released_code(case: dict[str, Any]):
    found = {name: TENSORS[f"matrix/{case['id']}/{name}"] for name in ("G", "K", "V", "projector", "singular_values")}
    mode = case["mode"]
    ours = projector(found["G"], mode.get("rank"), mode.get("energy_threshold"))
    assert ours.dtype == torch.float32
    assert_near(ours, found["projector"], 2e-5)
    assert ours.trace().round() == case["effective_rank"]
    for name in ("K", "V"):
        assert_near(found[name] @ ours, TENSORS[f"matrix/{case['id']}/{name}_projected"], 1e-4)
    singular = torch.tensor(singular_vectors(found["G"])[0])
    assert_near(singular, found["singular_values"], 1e-3)
    uncentred = projector(found["G"], case["effective_rank"], centre=False)
    assert_near(
        (uncentred - found["projector"]).abs().max(), torch.tensor(case["max_abs_difference_if_not_centred"]), 2e-5
    )


@pytest.mark.fixture
def test_gradients_are_those_of_the_released_code(gradients: Gradients):
    assert gradients.used == len(MODEL["examples_used"])
    assert gradients.skipped == len(MODEL["lengths"]) - gradients.used
    for layer in LAYERS:
        for ours, name in zip(gradients.layers[layer], ("G_K", "G_V"), strict=True):
            expected = read(f"layer{layer}/{name}")
            assert ours.dtype == torch.float64
            assert_near(ours, expected, 1e-5 * float(expected.abs().max()))
            still = (ours == 0).all(1)
            assert int(still.sum()) == MODEL["zero_rows_after_last_supervised"]
            assert torch.equal(still, (expected == 0).all(1))


@pytest.mark.fixture
def test_projectors_are_those_of_the_released_code(gradients: Gradients):
    found = Subspace()(gradients)
    for layer in LAYERS:
        for ours, name, rank in zip(found[layer], ("P_K", "P_V"), MODEL["ranks"][str(layer)], strict=True):
            assert ours is not None
            assert_near(ours, read(f"layer{layer}/{name}"), 1e-4)
            assert abs(float(ours.trace()) - rank) < 1e-9


@pytest.mark.fixture
@pytest.mark.parametrize("ours", [True, False], ids=["own projectors", "stored projectors"])
@pytest.mark.parametrize("project", ["both", "keys"])
def test_projected_logits_are_those_of_the_released_code(network: Any, gradients: Gradients, project: Any, ours: bool):
    example = MODEL["logit_example"]
    ids = read("input_ids").long()[example : example + 1, : MODEL["lengths"][example]]
    projectors = Subspace(project=project)(gradients)
    if not ours:
        projectors = {
            layer: tuple(
                None if p is None else read(f"layer{layer}/{name}")
                for p, name in zip(pair, ("P_K", "P_V"), strict=True)
            )
            for layer, pair in projectors.items()
        }
    with torch.no_grad():
        with projected(network, projectors):  # pyright: ignore[reportArgumentType]
            inside = network(ids).logits[0]
        after = network(ids).logits[0]
    assert_near(inside, read("logits_projected" if project == "both" else "logits_projected_k_only"), 1e-4)
    assert_near(after, read("logits_plain"), 1e-4)


@pytest.mark.fixture
@pytest.mark.parametrize("folder", checkpoints(), ids=lambda folder: folder.name)
def test_every_published_architecture_is_projected_as_by_hooks(folder: Path):
    disable_progress_bar()
    facts = json.loads((folder / "fixture.json").read_text(encoding="utf-8"))
    policy = load_policy(str(folder / "single"), block_length=facts["block_length"], mask_token=facts["mask_token_id"])
    module: Any = policy.module
    ids, sites = torch.arange(1, 9), torch.tensor([False] * 5 + [True] * 3)
    canvas = ids.masked_fill(sites, facts["mask_token_id"])
    layers = kv_layers(module.network)
    assert len(layers) == module.network.config.num_hidden_layers
    found = collect(module, [Supervised(canvas, sites, ids)], range(len(layers)))
    projectors = Subspace(rank=2)(found)
    view = View(canvas[None], torch.ones_like(sites)[None], sites[None])
    pairs = [one for at, pair in projectors.items() for one in zip(layers[at], pair, strict=True)]
    with torch.no_grad():
        plain = policy.site_logits(view)
        with multiplied(pairs):
            expected = policy.site_logits(view)
        with projected(module.network, projectors):
            assert_near(policy.site_logits(view), expected, 1e-4)
        assert torch.equal(policy.site_logits(view), plain)
    assert not torch.allclose(plain, expected, atol=1e-3)
