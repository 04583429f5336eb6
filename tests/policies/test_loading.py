"""Loading: whole checkpoints in the right format only, bidirectional, with a tokenizer that fits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import dllm_sd
from dllm_sd import load_policy
from dllm_sd.errors import InputError
from dllm_sd.policies.loading import Lora, Model, Shape, build_policy
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.policies.policy import View

SHAPE = Shape(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    **{"vocab_size": 25, "bos_token_id": None, "eos_token_id": None},
}
TINY = Path(dllm_sd.__file__).parent / "assets" / "tiny"


def random_policy(**options: Any) -> MaskedDiffusion:
    return build_policy(Model(**{"random_init": True, "tokenizer": "tiny", "shape": SHAPE, **options}))


def weights(policy: MaskedDiffusion) -> dict[str, torch.Tensor]:
    return policy.module.state_dict()


def refusal(**options: Any) -> str:
    with pytest.raises(InputError) as caught:
        build_policy(Model(**{"tokenizer": "tiny", **options}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    disable_progress_bar()
    set_verbosity_error()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    model: Any = random_policy(seed=1).module.model
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_whole_checkpoint_gives_the_weights_that_were_saved(saved: Path):
    policy, expected = build_policy(Model(path=str(saved), tokenizer="tiny")), weights(random_policy(seed=1))
    assert weights(policy).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights(policy).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "has missing keys, first model.norm.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), "has missing keys, first lm_head.weight"),
        (lambda tensors: tensors.update(more=torch.zeros(2)), "has unexpected keys, first more"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}),
            "has mismatched keys, first ('model.norm.weight', torch.Size([7]), torch.Size([32]))",
        ),
        (lambda tensors: tensors["model.norm.weight"].fill_(torch.nan), "logits are not finite after loading"),
    ],
    ids=["missing", "missing head", "extra", "shape", "not finite"],
)
def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(
    checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
):
    change_tensors(checkpoint, change)
    assert message in refusal(path=str(checkpoint))


@pytest.mark.parametrize("size", [0, 4, 1000, -8])
def test_a_truncated_checkpoint_is_refused(checkpoint: Path, size: int):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert refusal(path=str(checkpoint)).startswith(f"no usable model at {str(checkpoint)!r} (model.path): ")


def test_a_pickled_checkpoint_is_refused(checkpoint: Path):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(path=str(checkpoint))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "lla', "config.json is not JSON (Unterminated string"),
        ("{}", "config.json names no model_type; restore"),
        ("3", "config.json names no model_type; restore"),
        ('{"model_type": "nothing"}', "model type `nothing` but Transformers does not recognize"),
        ('{"model_type": "llama", "hidden_size": "big"}', "Field 'hidden_size' expected int, got str"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "no usable config.json at"),
    ],
)
def test_a_damaged_config_is_refused(checkpoint: Path, content: str, message: str):
    (checkpoint / "config.json").write_text(content)
    assert message in refusal(path=str(checkpoint))


def test_a_checkpoint_without_a_config_is_refused(checkpoint: Path):
    (checkpoint / "config.json").unlink()
    assert refusal(path=str(checkpoint)).startswith("no usable config.json at")


@pytest.mark.parametrize("layers", [1, 3])
def test_a_config_of_another_depth_than_the_checkpoint_is_refused(checkpoint: Path, layers: int):
    change_config(checkpoint, num_hidden_layers=layers)
    assert "keys, first model.layers." in refusal(path=str(checkpoint))


def test_code_that_comes_with_a_checkpoint_is_never_run(checkpoint: Path):
    (checkpoint / "configuration_mine.py").write_text("raise SystemExit('run')")
    change_config(checkpoint, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"})
    assert "contains custom code" in refusal(path=str(checkpoint))


def test_an_embedding_smaller_than_the_tokenizer_is_refused():
    message = "the tokenizer of model.path knows 25 tokens (mask id 0) but the embedding has 20 rows"
    assert refusal(random_init=True, shape=Shape(**{**vars(SHAPE), "vocab_size": 20})).startswith(message)


def test_rows_that_the_tokenizer_does_not_know_are_never_sampled():
    assert random_policy(shape=Shape(**{**vars(SHAPE), "vocab_size": 28})).suppress == (25, 26, 27)


def test_a_missing_folder_or_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    assert refusal(path="./nowhere") == "model.path './nowhere' is not a folder; give a checkpoint folder or a hub name"
    assert refusal() == "model.path is missing; name a checkpoint, or set model.random_init to true"
    assert refusal(tokenizer=None).startswith("model.tokenizer is missing")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal(path="nobody/nothing").startswith("no usable config.json at 'nobody/nothing' (model.path): ")


def test_an_unknown_option_of_load_policy_is_refused():
    with pytest.raises(InputError, match=r"^unknown model option 'device_map'; choose from attention, dtype, "):
        load_policy("tiny", device_map="auto")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "no usable tokenizer at"),
        ("tokenizer.json", "[]", "no usable tokenizer at"),
        ("tokenizer_config.json", "{", "no usable tokenizer at"),
        ("tokenizer_config.json", "{}", "has no end token; set eos_token in its tokenizer_config.json"),
        ("tokenizer_config.json", '{"eos_token": "<|end|>"}', "has no mask token; name it in model.mask_token"),
    ],
)
def test_an_unusable_tokenizer_is_refused(tmp_path: Path, name: str, content: str, message: str):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, tmp_path)
    (tmp_path / name).write_text(content)
    assert message in refusal(random_init=True, tokenizer=str(tmp_path))


def test_the_mask_token_can_be_named(tmp_path: Path):
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    policy = random_policy(tokenizer=str(tmp_path), mask_token="<|mask|>")
    assert policy.mask_id == random_policy().mask_id
    assert policy.pad_id == policy.end_ids[0]  # the tokenizer names no padding


ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=1),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=25, bos_token_id=None, eos_token_id=None),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_position_sees_every_other_whatever_the_architecture(tmp_path: Path, name: str, attention: str):
    ARCHITECTURES[name].save_pretrained(tmp_path)
    policy = random_policy(path=str(tmp_path), attention=attention, dtype="float64")
    ids = torch.randint(5, 20, (1, 6), generator=torch.Generator().manual_seed(0))
    sites = torch.ones_like(ids, dtype=torch.bool)
    policy.module.eval()
    before = policy.site_logits(View(ids, sites, sites))
    for changed in range(6):
        other = ids.clone()
        other[0, changed] += 1
        moved = (policy.site_logits(View(other, sites, sites)) != before).any(1)
        assert moved.all()


def test_a_model_that_stays_causal_is_refused(monkeypatch: pytest.MonkeyPatch):
    from_config = AutoModelForCausalLM.from_config

    def causal(config: Any, **options: Any) -> Any:
        config.is_causal = True
        return from_config(config, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", causal)
    assert refusal(random_init=True, shape=SHAPE) == (
        "the model ignores later positions; it still attends causally and cannot denoise"
    )


def test_random_weights_follow_from_their_seed_and_leave_no_trace():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, same, other = (weights(random_policy(seed=seed, lora=Lora(rank=2))) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_weights_have_the_type_that_is_asked_for(saved: Path, dtype: str):
    policy = load_policy(str(saved), tokenizer="tiny", dtype=dtype)
    assert {value.dtype for value in policy.module.parameters()} == {getattr(torch, dtype)}


def test_adapters_train_and_the_base_does_not():
    policy = random_policy(lora=Lora(rank=2))
    trained = [name for name, value in policy.module.named_parameters() if value.requires_grad]
    assert len(trained) == 2 * 7 * 2  # two matrices for each of seven linear layers in each of two blocks
    assert all("lora_" in name for name in trained)
    assert "model.lora.targets names 'c_attn'" in refusal(random_init=True, shape=SHAPE, lora=Lora(targets=("c_attn",)))
