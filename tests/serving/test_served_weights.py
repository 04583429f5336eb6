"""Adapters and weights that are replaced while the server runs: what decodes is what was named."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_sd.decoding.wire import request_to_json
from dllm_sd.export.exporting import export_policy
from dllm_sd.files.checkpoint_files import CHECKPOINT_WEIGHTS
from dllm_sd.policies.loading import AnyPolicy, build_policy, load_adapter
from dllm_sd.policies.weights import trained
from dllm_sd.pretrained.model import Lora, Model
from dllm_sd.serving import weights
from dllm_sd.serving.weights import CONFIG, TENSORS
from dllm_sd.training.checkpoint import write_checkpoint
from tests.serving.conftest import DECODE, service_of
from tests.tiers import later

served = pytest.importorskip("tests.serving.served", exc_type=ImportError)

QUICK = replace(DECODE, tokens_per_step=4)
PLAIN = Model(path="tiny")
ADAPTED = replace(PLAIN, lora=Lora(rank=4, alpha=8))


def changed(model: Model, seed: int) -> AnyPolicy:
    """A policy whose trained weights are others."""
    policy = build_policy(model)
    with torch.no_grad():
        for place, value in enumerate(trained(policy).values()):
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + place))
            value.add_(0.3 * value.abs().mean().clamp(min=0.05) * noise)
    return policy


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of two PEFT adapters of one shape, and of one of another rank."""
    folder = tmp_path_factory.mktemp("adapters")
    models = [(ADAPTED, 1), (ADAPTED, 2), (replace(PLAIN, lora=Lora(rank=2, alpha=8)), 3)]
    for number, (model, seed) in enumerate(models):
        export_policy(changed(model, seed), model, "peft", folder / str(number))
    return [folder / str(number) for number in range(3)]


def server_of(model: Model) -> Iterator[Any]:
    with served.serving(service_of(build_policy(model), model), allow_loading=True) as server:
        yield server


@pytest.fixture
def plain() -> Iterator[Any]:
    """A server of a model without an adapter."""
    yield from server_of(PLAIN)


@pytest.fixture
def adapted() -> Iterator[Any]:
    """A server of a model with an adapter of its own."""
    yield from server_of(ADAPTED)


def asked(server: Any, name: str | None = None) -> tuple[int, Any]:
    return server.post("/generate", request_to_json([5, 6, 7], 3, QUICK, None, name))


def logp_of(policy: AnyPolicy) -> list[float]:
    found = policy.decode([[5, 6, 7]], QUICK, [3]).logp
    assert found is not None
    return found[0].tolist()


def logp(server: Any, name: str | None = None) -> list[float]:
    status, tree = asked(server, name)
    assert status == 200, tree
    assert tree["model"] == (name or server.service.weights.base)
    return tree["logp"]


def with_adapter(folder: Path) -> list[float]:
    policy = build_policy(PLAIN)
    load_adapter(policy, str(folder))
    return logp_of(policy)


def load(server: Any, name: str, folder: Path | str, **more: Any) -> tuple[int, Any]:
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), **more})


@pytest.mark.parametrize("kind", ["plain", *later("adapted")])
def test_an_adapter_decodes_under_its_name_and_is_replaced_in_place(
    kind: str, request: pytest.FixtureRequest, adapters: list[Path]
):
    server = request.getfixturevalue(kind)
    base, one, other = logp(server), with_adapter(adapters[0]), with_adapter(adapters[1])
    assert len({tuple(x) for x in (base, one, other)}) == 3
    assert load(server, "p", adapters[0]) == (200, {"status": "adapter 'p' was loaded"})
    assert (logp(server, "p"), logp(server)) == (one, base)
    assert [model["id"] for model in server.get("/v1/models")[1]["data"]] == ["tiny", "p"]
    status, tree = load(server, "p", adapters[1])
    assert (status, "load_inplace" in tree["error"]["message"]) == (400, True)
    assert load(server, "p", adapters[1], load_inplace=True)[0] == 200
    assert (logp(server, "p"), logp(server)) == (other, base)
    assert load(server, "q", adapters[0], load_inplace=True)[0] == 200
    assert (logp(server, "q"), logp(server, "p"), logp(server)) == (one, other, base)
    for name in ("p", "q"):
        assert server.post("/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
        assert asked(server, name)[0] == 404
        assert server.post("/v1/unload_lora_adapter", {"lora_name": name})[0] == 404
    assert logp(server) == base
    if kind == "plain":
        assert type(server.service.policy.module.model).__name__ != "PeftModel"


def damaged(folder: Path, adapter: Path, how: str) -> Path:
    """A copy of an adapter with something wrong."""
    tensors, config = load_file(adapter / TENSORS), json.loads((adapter / CONFIG).read_text())
    name = sorted(tensors)[0]
    match how:
        case "not finite":
            tensors[name][0, 0] = torch.nan
        case "a tensor less":
            del tensors[name]
        case "a tensor more":
            tensors["base_model.model.other.weight"] = torch.zeros(1)
        case "another shape":
            tensors[name] = tensors[name][:, :-1].contiguous()
        case "another alpha":
            config["lora_alpha"] = 4
        case "another kind":
            config["use_rslora"] = True
    folder.mkdir()
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(config))
    if how == "no tensors":
        (folder / TENSORS).unlink()
    if how == "half a file":
        (folder / TENSORS).write_bytes((adapter / TENSORS).read_bytes()[:200])
    return folder


HARM = ("not finite", "a tensor less", "a tensor more", "another shape", "no tensors", "half a file", "another kind")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapted", "plain"])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(
    kind: str, request: pytest.FixtureRequest, adapters: list[Path], tmp_path: Path
):
    server = request.getfixturevalue(kind)
    base = logp(server)
    folders = [damaged(tmp_path / how, adapters[0], how) for how in HARM]
    folders += [tmp_path, tmp_path / "nothing"]
    for loaded in (False, True):
        others = [adapters[2], damaged(tmp_path / "another alpha", adapters[0], "another alpha")] if loaded else []
        for folder in folders + others:
            status, tree = load(server, "p", folder, load_inplace=True)
            assert status == 422, folder
            assert len(tree["error"]["message"]) <= 700
            assert server.service.weights.names == ["tiny", "p"][: 1 + loaded]
        assert logp(server) == base
        if not loaded:
            assert load(server, "p", adapters[0])[0] == 200
    assert logp(server, "p") == with_adapter(adapters[0])


def test_names_are_taken_once_and_adapters_are_few(plain: Any, adapters: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "MOST_ADAPTERS", 2)
    assert load(plain, "tiny", adapters[0])[0] == 400
    for wrong in ("", "x" * 201, 5, None):
        assert load(plain, wrong, adapters[0])[0] == 422  # pyright: ignore[reportArgumentType]
    for number in range(4):
        assert load(plain, f"p{number}", adapters[number % 2])[0] == 200
    assert plain.service.weights.names == ["tiny", "p2", "p3"]  # the oldest made room
    assert [logp(plain, name) for name in ("p2", "p3")] == [with_adapter(folder) for folder in adapters[:2]]


def test_paths_are_read_only_where_that_was_allowed(diffusion: Any, adapters: list[Path]):
    for path, body in {
        "/v1/load_lora_adapter": {"lora_name": "p", "lora_path": str(adapters[0])},
        "/v1/unload_lora_adapter": {"lora_name": "p"},
        "/v1/load_weights": {"name": "p", "path": str(adapters[0])},
    }.items():
        status, tree = diffusion.post(path, body)
        assert (status, "--allow-loading" in tree["error"]["message"]) == (403, True)


def test_all_weights_are_replaced_by_a_checkpoint_or_a_model(plain: Any, adapters: list[Path], tmp_path: Path):
    one, other = changed(PLAIN, 1), changed(PLAIN, 2)
    write_checkpoint(tmp_path / "checkpoints" / "000005", {CHECKPOINT_WEIGHTS: trained(one)}, {"update": 5})
    export_policy(other, PLAIN, "merged", tmp_path / "exported")
    for name, folder, policy in (
        ("v5", tmp_path / "checkpoints" / "000005", one),
        ("v6", tmp_path / "exported", other),
    ):
        status, tree = plain.post("/v1/load_weights", {"name": name, "path": str(folder)})
        assert (status, tree) == (200, {"status": f"the weights are those of '{name}' now"})
        assert logp(plain) == logp_of(policy)
        assert asked(plain, name)[0] == 200
        assert asked(plain, "tiny")[0] == 404
    for folder in (tmp_path, adapters[0], tmp_path / "nothing"):
        assert plain.post("/v1/load_weights", {"name": "v7", "path": str(folder)})[0] == 422
    assert load(plain, "p", adapters[0])[0] == 200
    assert plain.post("/v1/load_weights", {"name": "v7", "path": str(tmp_path / "exported")})[0] == 400
    assert plain.post("/v1/unload_lora_adapter", {"lora_name": "p"})[0] == 200
    assert logp(plain, "v6") == logp_of(other)
    assert plain.post("/v1/load_weights", {"name": "v8", "path": str(tmp_path / "checkpoints" / "000005")})[0] == 200
    assert logp(plain) == logp_of(one)


def test_weights_change_only_while_nothing_is_decoded_with_them(plain: Any, adapters: list[Path]):
    assert load(plain, "p", adapters[0])[0] == 200
    with ThreadPoolExecutor(9) as pool:
        before = [pool.submit(asked, plain, "p") for _ in range(4)]
        done = pool.submit(load, plain, "p", adapters[1], load_inplace=True)
        after = [pool.submit(asked, plain, "p") for _ in range(4)]
        assert done.result()[0] == 200
        found = [future.result() for future in (*before, *after)]
    tokens = [build_and_decode(folder) for folder in adapters[:2]]
    for status, tree in found:
        assert status == 200
        assert tree["tokens"] in tokens  # never of both


def build_and_decode(folder: Path) -> list[int]:
    policy = build_policy(PLAIN)
    load_adapter(policy, str(folder))
    return policy.decode([[5, 6, 7]], QUICK, [3]).tokens[0].tolist()
