"""Load a policy: native transformers classes, safetensors only, no remote code, one copy in memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dllm_sd.config_files import maker_of
from dllm_sd.errors import InputError
from dllm_sd.network.view import View
from dllm_sd.policies.autoregressive import Autoregressive
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.policies.weights import PeerWeights, TeacherModel, Weights, trained, without_peft_warning
from dllm_sd.pretrained.blueprint import Blueprint, read_blueprint
from dllm_sd.pretrained.families import LINEARS
from dllm_sd.pretrained.model import Lora, Model
from dllm_sd.pretrained.small_files import ADAPTER, brief, read_small_file
from dllm_sd.pretrained.weight_files import stored_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
AnyPolicy = MaskedDiffusion | Autoregressive


def load_policy(name_or_path: str | None, *, device: str | torch.device = "cpu", **options: Any) -> AnyPolicy:
    """Load a masked-diffusion or autoregressive model and its tokenizer.

    Args:
        name_or_path: a checkpoint folder in its family's original or in a native format, a hub name, ``"tiny"``, or
            ``"tiny_ar"``.
            Without a tokenizer beside it the policy reads and writes token ids only.
        device: where the weights go.
        **options: fields of `Model`, such as ``dtype="bfloat16"`` or ``lora=Lora(rank=8)``.

    Raises:
        InputError: if the checkpoint or tokenizer is unusable, or an option is unknown.
    """
    known = {f.name for f in fields(Model)} - {"path"}
    if unknown := set(options) - known:
        raise InputError(f"unknown model option {sorted(unknown)[0]!r}; choose from {', '.join(sorted(known))}")
    return build_policy(read_blueprint(Model(path=name_or_path, **options), text=False), device)


def build_policy(source: Blueprint | Model, device: str | torch.device = "cpu") -> AnyPolicy:
    """The policy that a blueprint (or the keys of `model`) describes, on ``device``."""
    blueprint = read_blueprint(source) if isinstance(source, Model) else source
    model = blueprint.model
    network = load_network(blueprint, device)
    if model.gradient_checkpointing:
        network.activation_checkpointing_enable()
    adapted = _with_lora(network, model.lora, blueprint.family.lora_targets, model.seed) if model.lora else network
    rows = network.get_input_embeddings().weight.shape[0]
    known = len(blueprint.chat.tokenizer) if blueprint.chat else rows
    shared: dict[str, Any] = {
        "end_ids": blueprint.end_ids,
        "pad_id": blueprint.pad_id,
        "suppress": tuple(range(known, rows)),
        "merge_rollouts": model.lora is not None and model.lora.merge_rollouts,
    }
    if blueprint.mask_id is None:
        policy = Autoregressive(adapted, blueprint.chat, **shared)
    else:
        policy = MaskedDiffusion(
            adapted,
            blueprint.chat,
            mask_id=blueprint.mask_id,
            block_length=blueprint.block_length,
            shift=blueprint.family.shift,
            **shared,
        )
    if model.lora and model.lora.start:
        with torch.no_grad():
            live = trained(policy)
            for name, value in PeerWeights(model.lora.start).read(policy).items():
                live[name].copy_(value)
        policy.starts_adapted = True
    _check(policy, model)
    return policy


def empty_network(blueprint: Blueprint) -> PreTrainedModel:
    """The network without memory for its weights (meta device), to count them.

    Raises:
        InputError: if transformers cannot build the network.
    """
    network_class: Any = blueprint.family.network
    options = {"attn_implementation": blueprint.model.attention}  # rather than the one in config.json
    with _usable(blueprint.model), torch.device("meta"):
        if network_class:
            return network_class._from_config(blueprint.config, **options)
        return AutoModelForCausalLM.from_config(blueprint.config, **options)


@contextmanager
def _usable(model: Model) -> Iterator[None]:
    """Turn any exception that transformers raises on a damaged checkpoint into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        where = repr(model.path or model.shape)
        raise InputError(f"no usable model at {where} (model.path): {brief(error)}") from error


def load_network(blueprint: Blueprint, device: str | torch.device = "cpu") -> Any:
    """Load the network of a blueprint in eval mode, and check that all its tensors and buffers are right.

    Raises:
        InputError: naming the file or tensor that is missing, misshaped, unexpected or damaged.
    """
    model, config = blueprint.model, blueprint.config
    options: dict[str, Any] = {"dtype": DTYPES[model.dtype], "attn_implementation": model.attention}
    rows = len(blueprint.chat.tokenizer) if blueprint.chat else 0
    with _usable(model):
        if model.random_init:
            with _seeded(model.seed, device), torch.device(device):
                network: Any = AutoModelForCausalLM.from_config(config, **options)
        else:
            network = _read_weights(blueprint, device, options)
        if rows > network.get_input_embeddings().weight.shape[0]:  # the row of an added mask token
            with _seeded(model.seed, device):
                network.resize_token_embeddings(rows)
    network.eval()
    if not blueprint.causal:
        network.generate = _refuse_generate
        for part in network.modules():
            if hasattr(part, "is_causal"):
                part.is_causal = False
    _check_rotary(network, str(model.path))
    return network


def _read_weights(blueprint: Blueprint, device: str | torch.device, options: dict[str, Any]) -> Any:
    path = str(blueprint.model.path)
    stored = stored_tensors(path)
    empty = empty_network(blueprint)
    _check_size(empty, {tensor.file for tensor in stored.values()}, path)
    if blueprint.family.network is not None:
        _check_tensors(empty, {name: tensor.shape for name, tensor in stored.items()}, path)
    if blueprint.model.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    if blueprint.model.quantization or torch.device(device).type != "cpu":
        options["device_map"] = {"": device}  # load each shard straight to the device
    network_class: Any = blueprint.family.network or AutoModelForCausalLM
    network, report = network_class.from_pretrained(
        blueprint.folder,
        **options,
        config=blueprint.config,
        ignore_mismatched_sizes=True,  # so that the report names them
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors", "error_msgs"):
        if report.get(kind):
            name = sorted(map(str, report[kind]))[0]
            raise InputError(
                f"the checkpoint at {path!r} has {kind.replace('_', ' ')}, first {name}; download it again, or use "
                "the config.json that belongs to it"
            )
    if network.get_input_embeddings().weight is not network.get_output_embeddings().weight:
        network.config.tie_word_embeddings = False  # the head is separate, even if the config says otherwise
    return network


def _check_size(network: PreTrainedModel, files: set[Path], path: str) -> None:
    """Refuse a config.json that asks for far more parameters than the files can hold, before they are allocated.

    No format stores a parameter in less than two bits.
    """
    parts = dict(network.named_parameters()) | dict(network.named_buffers())
    asked, held = sum(part.numel() for part in parts.values()), 4 * sum(file.stat().st_size for file in files)
    if asked > held + 2**24:
        name, largest = max(parts.items(), key=lambda item: item[1].numel())
        raise InputError(
            f"config.json of {path!r} asks for {asked} numbers, {name} of shape {tuple(largest.shape)} among them, and "
            "the weight files cannot hold that many; use the config.json that belongs to them"
        )


def _check_tensors(network: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
    """Compare the names and shapes in the files with those that the network needs, in the names of its family."""
    tied = set(network.all_tied_weights_keys)
    whole = network.state_dict()
    known = revert_weight_conversion(network, whole)
    needed = revert_weight_conversion(network, {name: whole[name] for name in whole.keys() - tied})
    for name in sorted(needed.keys() | shapes.keys()):
        asked = tuple(known[name].shape) if name in known else None
        if asked != shapes.get(name):
            raise InputError(
                f"tensor {name} of the checkpoint at {path!r} does not fit: the files have {shapes.get(name)}, its "
                f"config.json asks for {asked}; download it again, or use the config.json that belongs to it"
            )


@contextmanager
def _seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _refuse_generate(*_: Any, **__: Any) -> NoReturn:
    raise InputError(
        "generate() writes from left to right and this model denoises, so its text would be nonsense; use decode()"
    )


def check_adapter(blueprint: Blueprint) -> None:
    """Refuse what `model.lora` names and the model, or the machine, does not have, before any weight is read.

    Raises:
        InputError: naming the key.
    """
    lora = blueprint.model.lora
    if lora is None:
        return
    if lora.targets is not None or lora.modules_to_save:
        _targets(empty_network(blueprint), lora, blueprint.family.lora_targets)
    if lora.start is not None and not Path(lora.start).is_dir():
        maker = maker_of(lora.start)
        remedy = "give that of a run's checkpoint, or of a PEFT adapter" if maker is None else f"{maker} makes it"
        raise InputError(f"model.lora.start {lora.start!r} is no folder; {remedy}")


def _targets(network: PreTrainedModel, lora: Lora, targets: tuple[str, ...]) -> list[str]:
    """The kinds of linear layers that get adapters; ``targets`` are those of the family."""
    names = {name.rsplit(".", 1)[-1] for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    wanted = targets if lora.targets is None else lora.targets
    if absent := [target for target in wanted if target not in names]:
        raise InputError(
            f"model.lora.targets names {absent[0]!r}; linear layers of this model: {', '.join(sorted(names))}"
        )
    stacked = any(name.endswith("gate_up_proj") for name, _ in network.named_parameters())
    if stacked and set(wanted) & set(LINEARS[4:]):
        raise InputError(
            f"model.lora.targets names {', '.join(LINEARS[4:])}, which PEFT would take for the stacked experts; set it "
            f"to [{', '.join(LINEARS[:4])}]"
        )
    modules = {name.rsplit(".", 1)[-1] for name, _ in network.named_modules()}
    if absent := [name for name in lora.modules_to_save if name not in modules]:
        raise InputError(f"model.lora.modules_to_save names {absent[0]!r}, which this model does not have")
    return list(wanted)


def _with_lora(network: PreTrainedModel, lora: Lora, targets: tuple[str, ...], seed: int) -> PeftModel:
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(network, lora, targets),
        modules_to_save=list(lora.modules_to_save) or None,
    )
    with _seeded(seed), without_peft_warning():
        adapted = get_peft_model(network, settings)
    assert isinstance(adapted, PeftModel)
    return adapted


def make_teacher(weights: Weights, policy: AnyPolicy, adapter: str | None, student: Model) -> TeacherModel:
    """A teacher of the student ``policy`` (see `TeacherModel`); another checkpoint is loaded here, to the same device.

    The output heads may differ only in the number of rows without a token; they are padded or cut to the student's.
    """
    model = weights.other_model(student)
    if model is None:
        return TeacherModel(weights, policy, adapter)
    other = build_policy(model, policy.device)
    other.module.rows = policy.module.network.get_output_embeddings().weight.shape[0]
    other.module.requires_grad_(False)
    return TeacherModel(weights, policy, other=other)


def load_adapter(policy: AnyPolicy, adapter: str) -> None:
    """Let a policy run with a PEFT adapter, frozen (a folder, such as one that ``dllm-sd export --to peft`` wrote).

    Raises:
        InputError: if the adapter is unusable or does not fit, or the policy has one already.
    """
    network = policy.module.model
    if isinstance(network, PeftModel):
        raise InputError("this model has an adapter already; give --adapter with the model that it was made for")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(adapter) / name).is_file():
            raise InputError(f"there is no {name} in {adapter!r}; give the folder of a PEFT adapter")
    read_small_file(Path(adapter) / "adapter_config.json", ADAPTER)
    try:
        with without_peft_warning():
            policy.module.model = PeftModel.from_pretrained(network, adapter).eval()
    except Exception as error:  # damaged values can raise any exception in PEFT
        raise InputError(f"the adapter at {adapter!r} does not fit the model: {brief(error)}") from error


def _check_rotary(network: nn.Module, where: str) -> None:
    """Check the rotary frequencies: they are buffers that no checkpoint holds, and a class may leave them unset."""
    for name, part in network.named_modules():
        inv_freq: Any = getattr(part, "inv_freq", None)
        if not isinstance(inv_freq, torch.Tensor):
            continue
        build: Any = type(part)
        rebuilt: Any = build(part.config)
        if not torch.allclose(inv_freq.float().cpu(), rebuilt.inv_freq.float(), rtol=1e-3, atol=0):
            raise InputError(f"the rotary frequencies of {name} at {where!r} are wrong after loading; report this")


def _check(policy: AnyPolicy, model: Model) -> None:
    """Check what can go wrong silently: the kind of the attention mask, and non-finite weights."""
    length = 2 * (policy.block_length or 2)
    ids = torch.full((3, length), policy.pad_id if policy.causal else policy.mask_id)
    ids[1, length // 2 - 1] = ids[2, -1] = _other_than(int(ids[0, 0]), policy)  # in the first block, and after it
    sites = torch.zeros_like(ids, dtype=torch.bool)
    sites[:, 1 if policy.causal else 0] = True
    with torch.no_grad(), _usable(model):
        plain, near, far = policy.site_logits(View(ids, torch.ones_like(sites), sites))
    if not bool(torch.isfinite(plain).all()):
        raise InputError("the model's logits are not finite after loading; the checkpoint is damaged")
    if policy.causal:
        if not torch.allclose(plain, near, rtol=1e-2, atol=1e-2):
            raise InputError("the model sees later positions; it is not autoregressive, whatever its config.json says")
        return
    blind = bool((plain == near).all()) and policy.block_length != 1
    if blind or (policy.block_length is None and bool((plain == far).all())):
        raise InputError("the model ignores later positions; it still attends causally and cannot denoise")
    if policy.block_length is not None and not torch.allclose(plain, far, rtol=1e-2, atol=1e-2):
        raise InputError("the model sees blocks that come later; its attention is not block-causal")


def _other_than(token: int, policy: AnyPolicy) -> int:
    return next(end for end in (*policy.end_ids, 0, 1) if end != token)
