"""Exported weights: what plain PEFT, plain transformers and the program itself read back is what the run held."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dllm_sd import InputError, load_policy
from dllm_sd.cli.main import main
from dllm_sd.export import exporting
from dllm_sd.export.exporting import ExportFormat, export_policy, merged_weights, push_folder
from dllm_sd.export.model_card import model_card
from dllm_sd.network.prefix_cache import block_causal
from dllm_sd.network.view import View
from dllm_sd.policies.loading import AnyPolicy, build_policy
from dllm_sd.policies.weights import trained
from dllm_sd.pretrained.blueprint import model_folder, read_blueprint
from dllm_sd.pretrained.families import MARK
from dllm_sd.pretrained.model import Lora, Model
from tests.oracles.fixtures import checkpoints
from tests.tiers import crossed, later

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's own use
FOLDERS = {folder.name: folder for folder in checkpoints()}
FACTS = {name: json.loads((folder / "fixture.json").read_text()) for name, folder in FOLDERS.items()}
LAYOUTS = [(name, layout) for name, facts in FACTS.items() for layout in facts["layouts"]]


def families(*first: str) -> pytest.MarkDecorator:
    """All checkpoints as the cases of a test, of which some are in the first tier, each in some of the tests."""
    cases = [pytest.param(name, marks=() if name in first else pytest.mark.slow) for name in FOLDERS]
    return pytest.mark.parametrize("name", cases)


NATIVE = {
    **{"llada": "LlamaForCausalLM", "dream": "Qwen2ForCausalLM", "sdar": "Qwen3ForCausalLM"},
    **{"a2d_qwen3": "Qwen3ForCausalLM", "llada2": "Glm4MoeForCausalLM"},
}


def tied(name: str) -> bool:
    """Whether one tensor of the checkpoint is embedding and head, as its own config says (`weight_tying`: LLaDA's)."""
    config = json.loads((FOLDERS[name] / "single" / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings", config.get("weight_tying", False)))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    disable_progress_bar()
    set_verbosity_error()


def options_of(name: str) -> dict[str, Any]:
    """What the files of a family's original do not say."""
    facts = FACTS[name]
    found = {} if facts["mask_token_id_in_config"] else {"mask_token": facts["mask_token_id"]}
    return found | ({"block_length": facts["block_length"]} if facts["block_length"] else {})


def model_of(name: str, layout: str = "single", **options: Any) -> Model:
    return Model(path=str(FOLDERS[name] / layout), **options_of(name), **options)


def load(model: Model) -> AnyPolicy:
    return load_policy(model.path, **{key: value for key, value in vars(model).items() if key != "path"})


def stir(policy: AnyPolicy) -> AnyPolicy:
    """Give everything that training would move other values."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in policy.module.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=random).to(value), alpha=0.1)
    return policy


def view_of(policy: AnyPolicy) -> View:
    rows = policy.module.state_dict()[next(n for n in policy.module.state_dict() if "embed_tokens" in n)].shape[0]
    ids = torch.randint(rows, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 6:9] = policy.mask_id
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    return View(ids, mask, mask.clone())


def logits(policy: AnyPolicy, view: View) -> Tensor:
    with torch.no_grad():
        return policy.site_logits(view)


def raw_logits(network: Any, policy: AnyPolicy, view: View) -> Tensor:
    """Logits of a plain transformers or PEFT model, without padding, row i speaking as the network has it."""
    whole = torch.ones_like(view.ids)
    position = whole.cumsum(1) - 1
    length = policy.block_length
    attention = whole if length is None else block_causal(position, whole.bool(), length)
    with torch.no_grad():
        return network.eval()(input_ids=view.ids, attention_mask=attention, position_ids=position).logits


def assert_close(one: Tensor, other: Tensor) -> None:
    """Logits of equal weights: where a tensor lies in memory moves their last bit."""
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def assert_same_weights(one: AnyPolicy, other: AnyPolicy) -> None:
    """All that two policies hold is equal, bit by bit."""
    weights, others = one.module.state_dict(), other.module.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name, value in weights.items() if not same_bytes(value, others[name])] == []


def plain_logits(policy: AnyPolicy, view: View) -> Tensor:
    return raw_logits(policy.module.model, policy, view)


def facts_of(policy: AnyPolicy) -> dict[str, Any]:
    names = ("mask_id", "end_ids", "pad_id", "suppress", "block_length")
    return {name: getattr(policy, name) for name in names} | {"shift": policy.module.shift}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("model*.safetensors") for name, value in load_file(file).items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@cache
def adapted(name: str) -> tuple[AnyPolicy, Model, View, Tensor]:
    """A policy with trained adapters, a view of it and its logits."""
    model = model_of(name, lora=Lora(rank=4, alpha=8))
    policy = stir(load(model))
    view = view_of(policy)
    before, after = logits(load(model_of(name)), view), logits(policy, view)
    assert (before - after).abs().max() > 0.05  # else nothing below would tell an adapter from none
    return policy, model, view, after


@pytest.mark.fixture
@families("sdar")
def test_plain_peft_puts_the_adapter_on_the_native_class(name: str, tmp_path: Path):
    policy, model, view, expected = adapted(name)
    export_policy(policy, model, "peft", tmp_path / "out")
    settings = read(tmp_path / "out" / "adapter_config.json")
    assert settings["base_model_name_or_path"] == str(FOLDERS[name].resolve() / "single")
    assert settings["auto_mapping"]["base_model_class"] == NATIVE[name]
    export_policy(load(model_of(name)), model_of(name), "merged", tmp_path / "base")
    native = getattr(transformers, NATIVE[name]).from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(native, str(tmp_path / "out"))
    assert_close(raw_logits(plain, policy, view), plain_logits(policy, view))
    again = load(model_of(name))
    again.module.model = PeftModel.from_pretrained(again.module.model, str(tmp_path / "out"))  # pyright: ignore
    assert_close(logits(again, view), expected)
    assert_same_weights(again, policy)


@pytest.mark.fixture
@families("dream")
def test_a_merged_model_is_read_by_plain_transformers_and_needs_no_options(name: str, tmp_path: Path):
    policy, model, view, expected = adapted(name)
    kept = {key: value.clone() for key, value in policy.module.state_dict().items()}
    export_policy(policy, model, "merged", tmp_path / "out")
    assert all(torch.equal(value, kept[key]) for key, value in policy.module.state_dict().items())
    config = read(tmp_path / "out" / "config.json")
    assert config["architectures"] == [NATIVE[name]]
    assert config["is_causal"] is False
    assert config["mask_token_id"] == policy.mask_id
    assert (config[MARK]["family"], config[MARK]["block_length"]) == (name, policy.block_length)
    assert read(tmp_path / "out" / "generation_config.json")["eos_token_id"] == list(policy.end_ids)
    again = load_policy(str(tmp_path / "out"))
    assert facts_of(again) == facts_of(policy)
    torch.testing.assert_close(logits(again, view), expected, atol=1e-5, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ == NATIVE[name]
    torch.testing.assert_close(raw_logits(plain, policy, view), plain_logits(policy, view), atol=1e-5, rtol=0)
    assert_close(raw_logits(plain, policy, view), plain_logits(again, view))


@pytest.mark.fixture
@families("llada2")
def test_the_original_layout_holds_what_the_run_learnt(name: str, tmp_path: Path):
    policy, model, view, expected = adapted(name)
    source = FOLDERS[name] / "single"
    export_policy(policy, model, "original", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    stored = (tmp_path / "out" / "generation_config.json").read_bytes()
    assert stored == (source / "generation_config.json").read_bytes()
    again = load_policy(str(tmp_path / "out"), **options_of(name))
    assert facts_of(again) == facts_of(policy)
    torch.testing.assert_close(logits(again, view), expected, atol=1e-5, rtol=0)
    merged = merged_weights(policy.module.model)
    assert all(torch.equal(value, merged[key]) for key, value in again.module.model.state_dict().items())


@pytest.mark.fixture
@pytest.mark.parametrize(("folder", "kind"), crossed(map("/".join, LAYOUTS), ["full", "lora"]))
def test_untrained_weights_come_back_byte_by_byte(folder: str, kind: str, tmp_path: Path):
    name, layout = folder.split("/")
    model = model_of(name, layout, lora=Lora(rank=4) if kind == "lora" else None)
    export_policy(load(model), model, "original", tmp_path / "out")
    source, written = tensors_of(FOLDERS[name] / layout), tensors_of(tmp_path / "out")
    assert written.keys() == source.keys()
    assert [key for key, value in written.items() if not same_bytes(value, source[key])] == []


@pytest.mark.fixture
@families("llada")
def test_fully_trained_weights_are_exported_bit_by_bit(name: str, tmp_path: Path):
    model = model_of(name)
    policy = stir(load(model))
    to: ExportFormat
    for to in ("merged", "original"):
        export_policy(policy, model, to, tmp_path / to)
        options = options_of(name) if to == "original" else {}
        again = load_policy(str(tmp_path / to), **options)
        assert_close(logits(again, view_of(policy)), logits(policy, view_of(policy)))
        assert_same_weights(again, policy)
    message = refusal(lambda: export_policy(policy, model, "peft", tmp_path / "peft"))
    assert message == "the run trained all weights and has no adapter (model.lora); export it --to merged"


@pytest.mark.fixture
@families("a2d_qwen3")
@pytest.mark.parametrize("modules", [("embed_tokens",), pytest.param(("lm_head", "norm"), marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied_target_modules")
def test_modules_trained_whole_are_exported_in_their_place(name: str, modules: tuple[str, ...], tmp_path: Path):
    model = model_of(name, lora=Lora(rank=2, alpha=4, modules_to_save=modules))
    policy = stir(load(model))
    view = view_of(policy)
    expected = logits(policy, view)
    export_policy(policy, model, "merged", tmp_path / "merged")
    torch.testing.assert_close(logits(load_policy(str(tmp_path / "merged")), view), expected, atol=1e-5, rtol=0)
    export_policy(policy, model, "peft", tmp_path / "peft")
    again = load(model_of(name))
    again.module.model = PeftModel.from_pretrained(again.module.model, str(tmp_path / "peft"))  # pyright: ignore
    assert_close(logits(again, view), expected)
    assert_same_weights(again, policy)
    if tied(name):  # the file has one tensor for what are two now
        message = refusal(lambda: export_policy(policy, model, "original", tmp_path / "original"))
        assert message.endswith("has no place for lm_head.weight; use --to merged")
        return
    export_policy(policy, model, "original", tmp_path / "original")
    again = load_policy(str(tmp_path / "original"), **options_of(name))
    torch.testing.assert_close(logits(again, view), expected, atol=1e-5, rtol=0)


@pytest.mark.fixture
@pytest.mark.parametrize("name", [name for name in FOLDERS if tied(name)])
def test_a_tied_source_that_also_holds_the_head_keeps_it(name: str, tmp_path: Path):
    source = Path(shutil.copytree(FOLDERS[name] / "single", tmp_path / "source", copy_function=shutil.copyfile))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = Model(path=str(source), **options_of(name))
    policy = load(model)
    export_policy(policy, model, "original", tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    assert written.keys() == tensors.keys()
    assert all(same_bytes(written[key], value) for key, value in tensors.items())
    export_policy(policy, model, "merged", tmp_path / "merged")
    assert_close(logits(load_policy(str(tmp_path / "merged")), view_of(policy)), logits(policy, view_of(policy)))


@pytest.mark.fixture
@families("llada2")
def test_the_original_is_written_in_the_types_of_its_source_rounded_once(name: str, tmp_path: Path):
    source = Path(shutil.copytree(FOLDERS[name] / "single", tmp_path / "source", copy_function=shutil.copyfile))
    tensors = {
        key: value if key.endswith("expert_bias") else value.to(torch.bfloat16)
        for key, value in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    options = options_of(name)
    plain = Model(path=str(source), **options)
    export_policy(load(plain), plain, "original", tmp_path / "plain")
    assert all(same_bytes(value, tensors[key]) for key, value in tensors_of(tmp_path / "plain").items())
    model = Model(path=str(source), **options, lora=Lora(rank=4, alpha=8))
    policy = stir(load(model))
    export_policy(policy, model, "original", tmp_path / "out")
    assert "(bfloat16); the run computed in float32" in (tmp_path / "out" / "README.md").read_text()
    again = load_policy(str(tmp_path / "out"), **options).module.model.state_dict()
    exact = merged_weights(policy.module.model)
    assert all(torch.equal(value, exact[key].bfloat16().float()) for key, value in again.items() if "bias" not in key)


@pytest.mark.fixture
def test_a_fold_in_bfloat16_is_rounded_once(tmp_path: Path):
    model = model_of("llada", lora=Lora(rank=4, alpha=8), dtype="bfloat16")
    policy = stir(load(model))
    export_policy(policy, model, "merged", tmp_path / "out")
    name = "model.layers.1.mlp.up_proj"
    live = policy.module.model.state_dict()
    a, b, base = (
        live[f"base_model.model.{name}.{part}.weight"].double()
        for part in ("lora_A.default", "lora_B.default", "base_layer")
    )
    written = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert written.dtype == torch.bfloat16
    assert torch.equal(written, (base + 2 * b @ a).bfloat16())
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


@pytest.mark.fixture
def test_a_large_model_is_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exporting, "MAX_SHARD_SIZE", "60KB")
    policy, model, view, expected = adapted("llada2")
    to: ExportFormat
    for to in ("merged", "original"):
        export_policy(policy, model, to, tmp_path / to)
        assert len(list((tmp_path / to).glob("model-0*.safetensors"))) > 1
        again = load_policy(str(tmp_path / to), **(options_of("llada2") if to == "original" else {}))
        torch.testing.assert_close(logits(again, view), expected, atol=1e-5, rtol=0)


# With a tokenizer: what else a merged model must remember, and the command


def test_template_thinking_and_end_tokens_of_the_run_survive(tmp_path: Path):
    template = "{{ messages[0].content }}{% if enable_thinking %}?{% endif %}"
    options = {"chat_template": template, "thinking": True, "end_tokens": ("3", "2"), "block_length": 4}
    model = Model(path="tiny", **options)
    policy = build_policy(model)
    export_policy(policy, model, "merged", tmp_path / "out")
    again = load_policy(str(tmp_path / "out"))
    assert facts_of(again) == facts_of(policy)
    assert again.chat
    assert policy.chat
    assert again.encode([{"role": "user", "content": "12"}]) == policy.encode([{"role": "user", "content": "12"}])
    assert again.chat.thinking is True
    assert again.chat.end_id == policy.chat.end_id
    assert again.chat.tokenizer.get_vocab() == policy.chat.tokenizer.get_vocab()


@pytest.fixture
def grown(tmp_path: Path) -> Model:
    """An autoregressive model whose tokenizer is given a mask token that the embedding has no row for."""
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = Path(str(exporting.find_file("tiny", "tokenizer.json"))).parent
    source = tmp_path / "source"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=25, bos_token_id=None, eos_token_id=None, intermediate_size=64, **shape)
    ).save_pretrained(source)
    (source / "tokenizer.json").write_text((tiny / "tokenizer.json").read_text().replace("<|mask|>", "<|other|>"))
    settings = read(tiny / "tokenizer_config.json") | {"mask_token": None}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    return Model(path=str(source), as_="diffusion", lora=Lora(rank=2, alpha=4))


def test_the_row_of_an_added_mask_token_is_exported(grown: Model, tmp_path: Path):
    policy = stir(build_policy(grown))
    view = view_of(policy)
    assert policy.mask_id == 25
    (tmp_path / "merged").mkdir()  # an empty folder may be there
    export_policy(policy, grown, "merged", tmp_path / "merged")
    again = load_policy(str(tmp_path / "merged"))
    assert facts_of(again) == facts_of(policy)
    torch.testing.assert_close(logits(again, view), logits(policy, view), atol=1e-5, rtol=0)
    export_policy(policy, grown, "peft", tmp_path / "peft")
    assert "The base needs `resize_token_embeddings(26)` first." in (tmp_path / "peft" / "README.md").read_text()
    config = LlamaConfig.from_pretrained(str(grown.path))
    config.is_causal = False
    native = LlamaForCausalLM.from_pretrained(str(grown.path), config=config)
    native.resize_token_embeddings(26)
    plain = PeftModel.from_pretrained(native, str(tmp_path / "peft"))
    assert_close(raw_logits(plain, policy, view), plain_logits(policy, view))
    message = refusal(lambda: export_policy(policy, grown, "original", tmp_path / "original"))
    assert message.endswith("is autoregressive and cannot hold model.as; use --to merged")


def test_four_bit_weights_are_not_folded(grown: Model, tmp_path: Path):
    policy = build_policy(grown)
    message = refusal(lambda: export_policy(policy, replace(grown, quantization="4bit"), "merged", tmp_path / "out"))
    assert "4-bit base (model.quantization)" in message
    assert "use --to peft, or add model.quantization=null" in message


def test_the_card_names_a_base_on_the_hub_and_the_license_that_is_known(tmp_path: Path):
    model = Model(path="tiny")
    policy, blueprint = build_policy(model), read_blueprint(model)
    named = replace(blueprint, model=replace(model, path="someone/some-model"))
    card = yaml.safe_load(model_card(policy, named, "merged", "mine").split("---")[1])
    assert card["base_model"] == "someone/some-model"
    assert "license" not in card
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    local = replace(blueprint, model=replace(model, path=str(tmp_path)))
    text = model_card(policy, local, "merged", "mine")
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    assert "No results were measured." in text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two updates with adapters, whose best weights are not its last."""
    home = tmp_path_factory.mktemp("home")
    tree = {
        **{"run": str(home / "run"), "updates": 2, "optim": {"lr": 1e-2}, "log": {"progress": False}},
        "model": {"path": "tiny", "lora": {"rank": 4, "alpha": 8}},
        "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"},
        "decode": {"length": 16, "block_length": 4, "tokens_per_step": 4},
        "method": {"name": "sft", "rollout": {"problems": 4}},
        "eval": {"every": 1, "problems": 8, "final_problems": 8},
    }
    (home / "tiny.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["train", str(home / "tiny.yaml")]) == 0
    return home / "run"


@pytest.mark.parametrize("to", ["merged", *later("peft", "original")])
def test_a_run_is_exported_and_evaluated(to: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "parent" / "out"
    assert main(["export", str(run), "--to", to, str(out)]) == 0
    assert "written to" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == ("peft" if to == "peft" else "transformers")
    assert front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front  # a folder is no name on the hub
    assert "| before | 8 |" in card
    assert "Method: `sft` with settings of its own (rollout demonstrations, " in card
    assert "Do not call `generate()`" in card
    assert (out / "tokenizer.json").is_file()
    if to != "original":
        schedule = ["decode.block_length=4", "decode.length=16", "decode.tokens_per_step=4", "eval.final_problems=8"]
        model = [str(out)] if to == "merged" else ["tiny", "--adapter", str(out), *schedule]
        assert main(["eval", *model, "--out", str(tmp_path / "eval")]) == 0
        measured, stored = read(tmp_path / "eval" / "report.json"), read(run / "report.json")
        assert measured["accuracy"] == stored["best"]["trained"]["accuracy"]


def test_best_and_last_weights_can_be_told_apart(run: Path, tmp_path: Path):
    written = {}
    for weights, folder in (("best", run / "checkpoints" / "best"), ("last", run / "checkpoints" / "000002")):
        out = tmp_path / weights
        assert main(["export", str(run), "--to", "peft", str(out), "--weights", weights]) == 0
        saved = load_file(folder / "model.safetensors")
        written[weights] = load_file(out / "adapter_model.safetensors")
        stored = {name.removeprefix("model.").replace(".default", ""): value for name, value in saved.items()}
        assert written[weights].keys() == stored.keys()
        assert all(torch.equal(value, stored[name]) for name, value in written[weights].items())


def test_what_cannot_be_exported_ends_with_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def words(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    assert "exists and is not an empty folder" in words(str(run), "--to", "merged", str(tmp_path / "full"))
    assert "exists and is not an empty folder" in words(str(run), "--to", "merged", str(tmp_path / "file"))
    assert "cannot write to" in words(str(run), "--to", "merged", str(tmp_path / "file" / "out"))
    assert "give the folder that dllm-sd train wrote" in words("tiny", "--to", "merged", str(tmp_path / "out"))
    assert "not the name of a repository" in words(str(run), "--to", "peft", str(tmp_path / "out"), "--push", "a/b/c")
    random = ["model.random_init=true", "model.path=null", "model.tokenizer=tiny", "model.shape.intermediate_size=170"]
    for to in ("peft", "original"):
        assert "use --to merged" in words(str(run), "--to", to, str(tmp_path / "out"), *random)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    message = words(str(run), "--to", "merged", str(tmp_path / "out"))
    assert message.endswith("out': No space left on device; give another DIR\n")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file"}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_an_upload_happens_only_when_asked_for(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []

    class Hub:
        def create_repo(self, repository: str, exist_ok: bool) -> None:
            calls.append((repository, exist_ok))

        def upload_folder(self, folder_path: Path, repo_id: str) -> None:
            calls.append((folder_path, repo_id))

    monkeypatch.setattr(exporting, "HfApi", Hub)
    assert main(["export", str(run), "--to", "peft", str(tmp_path / "a")]) == 0
    assert calls == []
    assert main(["export", str(run), "--to", "peft", str(tmp_path / "b"), "--push", "someone/something"]) == 0
    assert calls == [("someone/something", True), (tmp_path / "b", "someone/something")]
    assert "# someone/something\n" in (tmp_path / "b" / "README.md").read_text()

    def refused(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token")

    monkeypatch.setattr(Hub, "create_repo", refused)
    assert "(--push) failed: no token" in refusal(lambda: push_folder(tmp_path / "b", "someone/something"))


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8)], ids=["full", "lora"])
def test_an_autoregressive_model_comes_out_as_what_transformers_takes_it_for(tmp_path, lora):
    model = Model(path="tiny_ar", lora=lora)
    policy = build_policy(model)
    with torch.no_grad():  # a fresh adapter does nothing
        for value in trained(policy).values():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    to: ExportFormat = "merged" if lora is None else "peft"
    export_policy(policy, model, to, tmp_path / "out")
    base = tmp_path / "out" if lora is None else read_blueprint(model).folder
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    plain = plain if lora is None else PeftModel.from_pretrained(plain, str(tmp_path / "out"))
    prompt = policy.encode([{"role": "user", "content": "1030002403014000:"}])
    sites = torch.ones(1, len(prompt), dtype=torch.bool)
    view = View(torch.tensor([prompt]), sites, sites & (torch.arange(len(prompt)) > 0))
    expected = plain(input_ids=view.ids).logits[0, :-1]
    torch.testing.assert_close(policy.site_logits(view), expected, atol=1e-5, rtol=0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "an autoregressive language model" in card
    assert "diffusion" not in card
    assert "generate()" not in card
    if lora is None:
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert MARK not in written
        assert "mask_token_id" not in written
        assert load_policy(str(tmp_path / "out")).causal


@pytest.mark.parametrize("apart", [False, True], ids=["beside the weights", "in a folder of its own"])
def test_the_original_layout_keeps_chat_templates_of_every_name(apart: bool, tmp_path: Path):
    source = shutil.copytree(model_folder("tiny_ar"), tmp_path / "source", copy_function=shutil.copyfile)
    place = tmp_path / "tokenizer" if apart else source
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "T", "rag": "R"}
    tokenizer.save_pretrained(place)
    assert {path.name for path in (place / "additional_chat_templates").iterdir()} == {"tool_use.jinja", "rag.jinja"}
    model = Model(path=str(source), tokenizer=str(place) if apart else None)
    export_policy(load(model), model, "original", tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template


def test_a_template_that_is_named_as_a_place_elsewhere_is_not_followed(tmp_path: Path):
    source = shutil.copytree(model_folder("tiny_ar"), tmp_path / "a" / "source", copy_function=shutil.copyfile)
    (tmp_path / "outside.jinja").write_text("secret")
    (source / "additional_chat_templates").mkdir()
    settings = read(source / "tokenizer_config.json")
    named = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "../../../outside", "template": "x"},
    ]
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    model = Model(path=str(source))
    export_policy(load(model), model, "original", tmp_path / "b" / "c" / "out")
    assert [path.name for path in (tmp_path / "b").rglob("*.jinja")] == []
