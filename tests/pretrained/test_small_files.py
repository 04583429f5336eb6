"""Whatever a checkpoint's small files hold, a model is built or one sentence says what is wrong, within seconds."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import dllm_sd
from dllm_sd.errors import InputError
from dllm_sd.policies.loading import build_policy, empty_network, load_adapter
from dllm_sd.pretrained.adapters import check_scale
from dllm_sd.pretrained.blueprint import read_blueprint
from dllm_sd.pretrained.model import Lora, Model
from dllm_sd.pretrained.weight_files import INDEX_FILE, stored_tensors
from tests.tiers import later

ASSETS = Path(dllm_sd.__file__).parent / "assets"
ORIGINAL = Path(__file__).parents[1] / "fixtures" / "checkpoints"
FAMILIES = sorted(path.name for path in ORIGINAL.iterdir())
DEEP = "[" * 10_000 + "]" * 10_000
VALUES = {
    **{"null": "null", "list": "[]", "object": "{}", "empty": '""', "text": '"x"', "minus": "-1", "zero": "0"},
    **{"infinite": "1e400", "NaN": "NaN", "huge": "1000000000000", "billion": "1000000000", "true": "true"},
    **{"digits": "1" * 5000, "deep": DEEP, "half": "0.5", "long": json.dumps("x" * 10_000)},
}
"""What stands where a value should stand, as JSON text."""


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    disable_progress_bar()
    set_verbosity_error()


def sentence(work: Callable[[], Any]) -> str | None:
    """What a piece of work is refused with, None where it succeeds; anything else fails."""
    start = time.process_time()
    said = None
    try:
        work()
    except InputError as error:
        said = str(error)
    assert said is None or ("\n" not in said and len(said) <= 500)
    assert time.process_time() - start < 10
    return said


def variants(file: Path, every: int = 1) -> Iterator[tuple[str, str]]:
    """A JSON file with each of its keys, one level down too, set to each of the values, or to ``every`` n-th of them.

    Sixteen values: where n is odd, the keys take turns in which of them they get.
    """
    tree = json.loads(file.read_text())
    keys: list[tuple[str, ...]] = [(key,) for key in tree]
    keys += [(key, inner) for key, value in tree.items() if isinstance(value, dict) for inner in value]
    pairs = [(key, name) for key in keys for name in VALUES]
    for key, name in pairs[::every]:
        changed = json.loads(json.dumps(tree))
        (changed if len(key) == 1 else changed[key[0]])[key[-1]] = "HERE"
        yield f"{'.'.join(key)} {name}", json.dumps(changed).replace('"HERE"', VALUES[name])


def build(folder: Path) -> None:
    """Read, count and encode a prompt; all but the weights."""
    mask_token = None if (folder / "tokenizer.json").is_file() else 157  # else nothing may name one
    blueprint = read_blueprint(Model(path=str(folder), mask_token=mask_token), text=False)
    empty_network(blueprint)
    if blueprint.chat is not None:
        blueprint.chat.encode([{"role": "user", "content": "1"}])


NATIVE = ("config.json", "generation_config.json", "tokenizer_config.json")
FILES = [
    *(pytest.param(ASSETS / "tiny", name, 13, id=f"tiny-{name}") for name in NATIVE),
    *(pytest.param(ASSETS / "tiny", name, 1, id=f"tiny-{name}-all", marks=pytest.mark.slow) for name in NATIVE),
    *(pytest.param(ORIGINAL / name / "single", "config.json", 41, id=name) for name in FAMILIES),
    *(
        pytest.param(ORIGINAL / name / "single", file, 1, id=f"{name}-{file}-all", marks=pytest.mark.slow)
        for name in FAMILIES
        for file in NATIVE[:2]
    ),
]


@pytest.mark.parametrize(("source", "name", "every"), FILES)
def test_any_value_of_a_small_file_is_read_or_refused(tmp_path: Path, source: Path, name: str, every: int):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    for what, text in variants(folder / name, every):
        (folder / name).write_text(text)
        said = sentence(lambda: build(folder))
        if what.endswith((" infinite", " NaN", " deep", " digits")):
            assert said is not None, what
            assert name in said or what == "model_max_length digits", (what, said)


@pytest.mark.parametrize("value", ["huge", "billion", "minus", "zero", "text", "true", "half"])
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "head_dim"]
)
def test_a_size_that_the_weights_do_not_have_is_refused_before_there_is_room_for_it(
    tmp_path: Path, key: str, value: str
):
    folder = Path(shutil.copytree(ASSETS / "tiny", tmp_path / "tiny"))
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, key: "HERE"}).replace('"HERE"', VALUES[value]))
    assert sentence(lambda: build_policy(Model(path=str(folder)))) is not None


@pytest.mark.parametrize("family", ["llada", *later(*(name for name in FAMILIES if name != "llada"))])
def test_as_many_layers_as_may_be_are_refused_by_the_weight_files(tmp_path: Path, family: str):
    folder = Path(shutil.copytree(ORIGINAL / family / "single", tmp_path / family))
    tree = json.loads((folder / "config.json").read_text())
    key = "n_layers" if "n_layers" in tree else "num_hidden_layers"
    (folder / "config.json").write_text(json.dumps({**tree, key: 60}))
    said = sentence(lambda: build_policy(read_blueprint(Model(path=str(folder), mask_token=157), text=False)))
    assert said is not None
    assert "config.json" in said


def test_a_key_that_is_there_twice_is_named(tmp_path: Path):
    folder = Path(shutil.copytree(ASSETS / "tiny", tmp_path / "tiny"))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 64, ', 1))
    said = sentence(lambda: build(folder))
    assert (
        said == f"{folder}/config.json is not JSON ('hidden_size' occurs twice); restore the checkpoint's config.json"
    )


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_what_is_no_small_file_is_refused(tmp_path: Path, place: str):
    folder = Path(shutil.copytree(ASSETS / "tiny", tmp_path / "tiny"))
    for content in (b"", b"\xff\xfe\x00", b"\x00" * 100, b"[]", b"3", DEEP.encode()):
        (folder / place).write_bytes(content)
        said = sentence(lambda: build(folder))
        assert said is not None, content[:9]
        assert place in said or "tokenizer" in said
    os.truncate(folder / place, 10 * 2**30)
    said = sentence(lambda: build(folder))
    assert said is not None
    assert "larger than" in said


def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ORIGINAL / "llada" / "sharded", tmp_path / "sharded"))


def test_any_value_of_an_index_is_refused(tmp_path: Path):
    folder = sharded(tmp_path)
    file = folder / INDEX_FILE
    whole = file.read_text()
    for what, text in variants(file, 3):
        file.write_text(text)
        said = sentence(lambda: stored_tensors(str(folder)))
        if what.startswith("weight_map"):
            assert said is not None, what
            assert INDEX_FILE in said
    for text in ('{"weight_map": {}}', "{}", "[]", '{"weight_map": ["model.safetensors"]}'):
        file.write_text(text)
        assert INDEX_FILE in str(sentence(lambda: stored_tensors(str(folder))))
    file.write_text(whole)
    assert sentence(lambda: stored_tensors(str(folder))) is None


def test_an_index_leads_nowhere_but_into_the_folder(tmp_path: Path):
    folder = sharded(tmp_path)
    file, shard = folder / INDEX_FILE, "model-00001-of-00002.safetensors"
    outside = Path(shutil.move(folder / shard, tmp_path / "elsewhere.safetensors"))
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "down").mkdir()
    (folder / "up").symlink_to(tmp_path)
    whole = file.read_text()
    for name in (str(outside), "../elsewhere.safetensors", "down/../../elsewhere.safetensors", "link.safetensors"):
        file.write_text(whole.replace(shard, name))
        said = str(sentence(lambda: stored_tensors(str(folder))))
        assert "weight_map names" in said, name
    for name in ("up/elsewhere.safetensors", "config.json", "", "a\\u0000.safetensors", "x" * 5000):
        file.write_text(whole.replace(shard, name))
        assert INDEX_FILE in str(sentence(lambda: stored_tensors(str(folder)))), name
    shutil.move(outside, folder / shard)
    file.write_text(whole)
    assert stored_tensors(str(folder))


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    shutil.copytree(ORIGINAL / "llada" / "sharded", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert len(stored_tensors(str(snapshot))) == len(stored_tensors(str(blobs)))


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content + b"\0" * 64


def one(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        *(header(b"{}", length) for length in (2**60, 2**64 - 1, 2**31, 0, 1, 65)),
        *(header(text) for text in (b"", b"[]", b"no", b"null", DEEP.encode(), b'{"a":' * 5000, b"\xff\xfe")),
        *(header(one(dtype=dtype)) for dtype in ("F33", "", 3, None)),
        *(header(one(shape=shape)) for shape in ([-2], [2**62], [2**32, 2**32], "2", None, [3], [0.5])),
        *(header(one(data_offsets=ends)) for ends in ([8, 0], [0, 2**60], [-8, 0], [4, 12], [0], None)),
        header(one()[:-1] + b', "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}'),
        *(b"", b"\0", b"\0" * 8, b"\xff" * 4096),
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_hostile_header_is_refused(tmp_path: Path, content: bytes):
    folder = Path(shutil.copytree(ASSETS / "tiny", tmp_path / "tiny"))
    (folder / "model.safetensors").write_bytes(content)
    said = sentence(lambda: build_policy(Model(path=str(folder))))
    assert said is not None
    assert "model.safetensors of the checkpoint at" in said


def test_weights_that_are_no_file_are_refused(tmp_path: Path):
    folder = Path(shutil.copytree(ASSETS / "tiny", tmp_path / "tiny"))
    (folder / "model.safetensors").unlink()
    for make in (Path.mkdir, os.mkfifo):
        make(folder / "model.safetensors")
        assert "holds no model.safetensors" in str(sentence(lambda: build_policy(Model(path=str(folder)))))
        (folder / "model.safetensors").rmdir() if make is Path.mkdir else (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("key", ["transformers_weights"])
def test_weights_of_another_name_are_refused(tmp_path: Path, key: str):
    folder = Path(shutil.copytree(ASSETS / "tiny", tmp_path / "tiny"))
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, key: "../other.safetensors"}))
    assert "transformers_weights must be left out" in str(sentence(lambda: build(folder)))


def test_a_folder_that_names_another_model_is_refused(tmp_path: Path):
    folder = Path(shutil.copytree(ASSETS / "tiny", tmp_path / "tiny"))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(ASSETS / "tiny_ar")}))
    assert "holds an adapter_config.json; name the model itself" in str(sentence(lambda: build(folder)))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model."""
    folder = tmp_path_factory.mktemp("adapter")
    policy = build_policy(Model(path="tiny", lora=Lora(rank=2, alpha=4)))
    model: Any = policy.module.model
    model.save_pretrained(folder)
    return folder


ADAPTER_KEYS = ("r", "lora_alpha", "peft_type", "target_modules", "rank_pattern", "modules_to_save", "bias")


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_any_value_of_an_adapters_settings_is_read_or_refused(adapter: Path, tmp_path: Path, every: int):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    lora: Any = build_policy(Model(path="tiny", lora=Lora(rank=2, alpha=4))).module.model
    file = folder / "adapter_config.json"
    whole = file.read_text()
    chosen = [(what, text) for what, text in variants(file) if what.split()[0] in ADAPTER_KEYS]
    must = {"r huge", "r billion", "r text", "r zero", "lora_alpha text", "r deep", "lora_alpha NaN"}
    for place, (what, text) in enumerate(chosen):
        if place % every and what not in must:
            continue
        file.write_text(text)
        sentence(lambda: check_scale(str(folder), lora.peft_config["default"]))
        said = sentence(lambda: load_adapter(build_policy(Model(path="tiny")), str(folder)))
        assert what not in must or "adapter_config.json" in str(said), what
    file.write_text(whole)
    assert sentence(lambda: load_adapter(build_policy(Model(path="tiny")), str(folder))) is None
