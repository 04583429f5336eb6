"""Loading: whole checkpoints in the right format only, bidirectional, with a tokenizer that fits."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import dllm_sd
from dllm_sd import load_policy
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.network.view import View
from dllm_sd.policies.loading import AnyPolicy, build_policy, check_adapter
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.pretrained import blueprint
from dllm_sd.pretrained.model import Lora, Model, Shape
from tests.tiers import crossed

ORIGINAL = Path(__file__).parents[1] / "fixtures" / "checkpoints"
"""Checkpoints in the layouts that the families publish."""
SHAPE = Shape(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    **{"vocab_size": 25, "bos_token_id": None, "eos_token_id": None},
}
TINY = Path(dllm_sd.__file__).parent / "assets" / "tiny"


def random_policy(**options: Any) -> MaskedDiffusion:
    policy = build_policy(Model(**{"random_init": True, "tokenizer": "tiny", "shape": SHAPE, **options}))
    assert isinstance(policy, MaskedDiffusion)
    return policy


def weights(policy: AnyPolicy) -> dict[str, torch.Tensor]:
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


@pytest.fixture
def original(tmp_path: Path) -> Callable[..., Path]:
    """Copies of checkpoints in a family's own layout, to be damaged."""
    return lambda name, layout="single": Path(shutil.copytree(ORIGINAL / name / layout, tmp_path / name / layout))


def refused_original(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_policy(str(folder), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert refusal(path=str(checkpoint)).startswith(
        f"model.safetensors of the checkpoint at {str(checkpoint)!r} is damaged"
    )


def test_a_pickled_checkpoint_is_refused(checkpoint: Path):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert "holds pickled weights, which can run code" in refusal(path=str(checkpoint))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "lla', "config.json is not JSON (Unterminated string"),
        ("{}", "config.json names no model_type; restore"),
        ("3", "config.json holds no JSON object; restore"),
        ('{"model_type": "nothing"}', "model_type 'nothing' of '"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "num_attention_heads must be a whole number from 1 to"),
        (
            '{"model_type": "llama", "is_causal": false, "hidden_size": "big"}',
            "config.json: hidden_size must be a whole number from 1 to 2^31, not 'big'; restore the checkpoint's",
        ),
        ('{"model_type": "llama", "hidden_act": []}', "no usable config.json at"),
    ],
)
def test_a_damaged_config_is_refused(checkpoint: Path, content: str, message: str):
    (checkpoint / "config.json").write_text(content)
    assert message in refusal(path=str(checkpoint))


def test_a_checkpoint_without_a_config_is_refused(checkpoint: Path):
    (checkpoint / "config.json").unlink()
    assert refusal(path=str(checkpoint)).startswith("there is no config.json at")


@pytest.mark.parametrize("layers", [1, 3])
def test_a_config_of_another_depth_than_the_checkpoint_is_refused(checkpoint: Path, layers: int):
    change_config(checkpoint, num_hidden_layers=layers)
    assert "keys, first model.layers." in refusal(path=str(checkpoint))


def test_code_that_comes_with_a_checkpoint_is_never_run(checkpoint: Path):
    (checkpoint / "configuration_mine.py").write_text("raise SystemExit('run')")
    change_config(checkpoint, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"})
    assert "would run code that comes with the checkpoint, which dllm-sd never does" in refusal(path=str(checkpoint))


def test_an_embedding_smaller_than_the_tokenizer_is_refused():
    message = "model.shape has 20 embedding rows, but the tokenizer knows 25 tokens and the mask id is 0"
    assert refusal(random_init=True, shape=Shape(**{**vars(SHAPE), "vocab_size": 20})).startswith(message)


def test_rows_that_the_tokenizer_does_not_know_are_never_sampled():
    assert random_policy(shape=Shape(**{**vars(SHAPE), "vocab_size": 28})).suppress == (25, 26, 27)


def test_a_missing_folder_or_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    assert refusal(path="./nowhere") == "model.path './nowhere' is not a folder; give a checkpoint folder or a hub name"
    assert refusal() == "model.path is missing; name a checkpoint, or set model.random_init to true"
    assert refusal(random_init=True, tokenizer=None).startswith("model.tokenizer is missing")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal(path="nobody/nothing").startswith("there is no config.json at 'nobody/nothing'")


@pytest.mark.parametrize(
    ("start", "remedy"),
    [
        ("runs/tiny_opcod_specialist_easy/checkpoints/000100", "dllm-sd train tiny_opcod_specialist_easy makes it"),
        ("runs/mine/checkpoints/000100", "give that of a run's checkpoint, or of a PEFT adapter"),
        ("nowhere", "give that of a run's checkpoint, or of a PEFT adapter"),
    ],
)
def test_a_missing_adapter_is_refused_with_the_command_that_makes_it(
    start: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(f"model.lora.start {start!r} is no folder; {remedy}")):
        check_adapter(blueprint.read_blueprint(Model(path="tiny", lora=Lora(start=start))))


def test_an_unknown_option_of_load_policy_is_refused():
    with pytest.raises(InputError, match=r"^unknown model option 'device_map'; choose from as_, attention, "):
        load_policy("tiny", device_map="auto")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "no usable tokenizer at"),
        ("tokenizer.json", "[]", "no usable tokenizer at"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON (Expecting property name"),
        ("tokenizer_config.json", "{}", "has no end token; set eos_token in its tokenizer_config.json"),
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


@pytest.mark.parametrize(("name", "attention"), crossed(ARCHITECTURES, ["sdpa", "eager"]))
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


REQUIRED = {
    "llada": "n_heads d_model n_layers max_sequence_length rms_norm_eps rope_theta weight_tying",
    "dream": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "rms_norm_eps tie_word_embeddings rope_theta",
    "llada2": "num_experts partial_rotary_factor n_group topk_group routed_scaling_factor first_k_dense_replace",
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in REQUIRED.items() for key in keys.split()])
def test_an_original_config_that_lacks_a_key_is_refused(original: Callable[..., Path], name: str, key: str):
    folder = original(name)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k != key}))
    refused = refused_original(folder, mask_token=157)
    assert refused == f"config.json of {str(folder)!r} lacks {key!r}; restore the checkpoint's file"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llada", {"alibi": True}, "sets alibi to True; dllm-sd loads llada checkpoints with False only"),
        ("llada", {"rope": False}, "sets rope to False; dllm-sd loads llada checkpoints with True only"),
        (
            "dream",
            {"use_sliding_window": True},
            "sets use_sliding_window to True; dllm-sd loads dream checkpoints with",
        ),
        ("sdar", {"rope_scaling": {"factor": 4}}, "sets rope_scaling to {'factor': 4}; dllm-sd loads sdar checkpoints"),
        (
            "llada2",
            {"use_qk_norm": False},
            "sets use_qk_norm to False; dllm-sd loads llada2 checkpoints with True only",
        ),
        ("dream", {"hidden_size": "big"}, "config.json: hidden_size must be a whole number from 1 to 2^31, not"),
        ("dream", {"num_attention_heads": 0}, "config.json: num_attention_heads must be a whole number from"),
        ("llada", {"n_heads": 5}, "The hidden size (32) is not a multiple of the number of attention heads (5)"),
        ("llada", {"rope_theta": "big"}, "config.json: rope_theta must be a number above 0, not 'big'; restore"),
        ("llada", {"n_layers": 3}, "tensor model.transformer.blocks.2.attn_norm.weight of"),
        ("sdar", {"head_dim": 8}, "k_norm.weight of the checkpoint"),
        ("sdar", {"block_size": 0}, "the attention block length must be at least 1, not 0; set model.block_length"),
        ("dream", {"mask_token_id": None}, "has no mask token; name it in model.mask_token"),
        ("dream", {"mask_token_id": 160}, "has 160 embedding rows, but there is no tokenizer and the mask id is 160"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_original_config_with_another_value_is_refused(
    original: Callable[..., Path], name: str, values: dict[str, Any], message: str
):
    folder = original(name)
    change_config(folder, **values)
    options = {} if "mask" in next(iter(values)) else {"mask_token": 157}
    assert message in refused_original(folder, **options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llada",
            lambda tensors: tensors.update({"model.transformer.blocks.1.ff_out.weight": torch.zeros(3, 4)}),
            "does not fit: the files have (3, 4), its config.json asks for (32, 64); download it again",
        ),
        (
            "llada",
            lambda tensors: tensors.pop("model.transformer.blocks.1.ff_out.weight"),
            "tensor model.transformer.blocks.1.ff_out.weight of the checkpoint",
        ),
        (
            "llada2",
            lambda tensors: tensors.pop("model.layers.1.mlp.gate.expert_bias"),
            "tensor model.layers.1.mlp.gate.expert_bias of the checkpoint",
        ),
        (
            "llada2",
            lambda tensors: tensors.pop("model.layers.1.attention.query_key_value.weight"),
            "the files have None, its config.json asks for (128, 32)",
        ),
        (
            "llada2",
            lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
            "experts.3.up_proj.weight of",
        ),
        ("dream", lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias of the checkpoint"),
        ("sdar", lambda tensors: tensors.pop("lm_head.weight"), "tensor lm_head.weight of the checkpoint"),
    ],
    ids=["shape", "missing", "router bias", "fused attention", "expert", "bias", "head"],
)
def test_an_original_checkpoint_whose_tensors_do_not_fit_is_refused(
    original: Callable[..., Path], name: str, change: Callable[[dict[str, torch.Tensor]], Any], message: str
):
    folder = original(name)
    change_tensors(folder, change)
    assert message in refused_original(folder, mask_token=157)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model-00002-of-00002.safetensors", None, "model-00002-of-00002.safetensors"),
        (
            "model-00002-of-00002.safetensors",
            5000,
            "is damaged (Error while deserializing header",
        ),
        ("model.safetensors.index.json", 0, "Expecting value"),
        ("model.safetensors.index.json", None, "holds no model.safetensors; convert or download it"),
    ],
)
def test_a_sharded_checkpoint_that_is_not_whole_is_refused(
    original: Callable[..., Path], file: str, content: int | None, message: str
):
    path = original("llada", "sharded") / file
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[:content])
    assert message in refused_original(path.parent)


def test_a_head_of_its_own_is_kept_whatever_the_config_says_of_tying(original: Callable[..., Path]):
    expected = load_policy(str(original("llada"))).module.state_dict()
    change_config(folder := original("llada", "sharded"), weight_tying=True)
    found = load_policy(str(folder)).module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_token": -1}, "model.mask_token is -1; give a whole number of at least 0"),
        ({"end_tokens": ("<end>",)}, "has no token '<end>'; fix model.end_tokens"),
        ({"attention": "flash_attention_2"}, "flash_attention_2 has no block-causal mask; set model.attention to sdpa"),
        ({"block_length": 0}, "model.block_length is 0; give a whole number from 1 to"),
    ],
    ids=str,
)
def test_options_that_the_checkpoint_cannot_bear_are_refused(
    original: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
):
    monkeypatch.setattr(blueprint, "find_spec", lambda name: name)  # as if every package were installed
    assert message in refused_original(original("sdar"), **options)


def plain_llama(folder: Path, rows: int, tie: bool) -> int:
    """An autoregressive model as transformers saves it, and a tokenizer without a mask; returns how many tokens it has.

    More tokens than the model is wide: only then does transformers draw new rows at random.
    """
    words = ["<unk>", "<end>", *"0123456789+=?", *map(chr, range(97, 123))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(**{**SIZES, "vocab_size": rows, "eos_token_id": 1}, tie_word_embeddings=tie)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return len(words)


@pytest.mark.parametrize(("room", "tie"), crossed([0, 1, 9], [False, True]))
def test_an_autoregressive_model_gets_a_mask_token_and_a_row_only_where_it_has_no_room(
    tmp_path: Path, room: int, tie: bool
):
    tokens = plain_llama(tmp_path, 41 + room, tie)
    assert tokens == 41
    before = load_file(tmp_path / "model.safetensors")
    policy, again, other = (build_policy(Model(path=str(tmp_path), as_="diffusion", seed=seed)) for seed in (0, 0, 1))
    rows = max(41 + room, 42)
    assert policy.mask_id == 41
    assert policy.end_ids == (1,)
    assert policy.suppress == tuple(range(42, rows))
    network: Any = policy.module.model
    assert network.config.vocab_size == rows
    assert (network.model.embed_tokens.weight is network.lm_head.weight) == tie
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(policy).items())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        stored, found = before["model.embed_tokens.weight" if tie else name], weights(policy)[f"model.{name}"]
        assert found.shape == (rows, 32)
        assert torch.equal(found[: 41 + room], stored)
        if room == 0:  # the row that is made: about the mean of the others, drawn with the seed
            torch.testing.assert_close(found[41], stored.mean(0), atol=1e-4, rtol=0)
            assert not torch.equal(found[41], weights(other)[f"model.{name}"][41])


def test_an_autoregressive_model_decodes_as_a_diffusion_model_and_no_longer_generates(tmp_path: Path):
    plain_llama(tmp_path, 41, False)
    policy = build_policy(Model(path=str(tmp_path), as_="diffusion"))
    done = policy.decode([policy.encode([{"content": "1+1="}])], Decoding(length=8, block_length=8), [1])
    assert done.prompt_ids.tolist() == [[3, 12, 3, 13]]
    assert not (done.tokens == policy.mask_id).any()
    assert (done.reveal_step >= 0).sum() >= int(done.length)
    network: Any = policy.module.model
    with pytest.raises(InputError, match=r"^generate\(\) writes from left to right and this model denoises"):
        network.generate(torch.tensor([[3]]))


def test_a_familys_thinking_switch_is_left_alone_by_templates_without_one(tmp_path: Path):
    plain_llama(tmp_path, 41, False)
    model = Model(path=str(ORIGINAL / "a2d_qwen3" / "single"), tokenizer=str(tmp_path), mask_token="?")
    with_switch = replace(model, chat_template="{{ messages[0].content }}{{ enable_thinking is defined }}")
    for given, rendered in (
        (replace(model, chat_template="{{ messages[0].content }}!"), "1+1=!"),
        (with_switch, "1+1=True"),
        (model, "1+1="),
    ):
        chat = blueprint.read_blueprint(given).chat
        assert chat
        assert chat.render([{"content": "1+1="}]) == rendered


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes at import, and of its CPU kernels
def test_four_bit_weights_give_the_logits_of_their_dequantised_values_and_train_adapters(tmp_path: Path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 40, "is_causal": False, "mask_token_id": 39, "eos_token_id": 38, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), quantization="4bit", lora=Lora(rank=4))
    plain = load_policy(str(tmp_path))
    ids = torch.full((2, 12), 39)
    ids[:, :5] = torch.arange(10).view(2, 5)
    view = View(ids, torch.ones_like(ids, dtype=torch.bool), ids == 39)
    exact = plain.site_logits(view).detach()
    quantised = LlamaForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        device_map={"": "cpu"},
    )
    with torch.no_grad():
        for name, part in quantised.named_modules():
            if isinstance(part, bitsandbytes.nn.Linear4bit):
                weight: Any = part.weight
                value = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                linear: Any = plain.module.model.get_submodule(name)
                linear.weight.copy_(value)
    policy.module.train()
    logits = policy.site_logits(view)
    expected = plain.site_logits(view).detach()
    assert (logits - expected).abs().max() < 0.05 * expected.std()
    assert (exact - expected).abs().max() > 0.1 * expected.std()  # what four bits cost
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in policy.module.parameters() if p.requires_grad)
