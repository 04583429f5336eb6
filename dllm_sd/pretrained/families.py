"""The families of checkpoints: one record per family, and how to recognise it from `config.json`.

A family's original tensors are loaded into a class that ships with transformers; where names or layouts differ, a
conversion is registered that transformers applies when it loads and reverses when it saves. Facts come from the
published checkpoints; `auto_map` is ignored, and code that comes with a checkpoint is never run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, Split, WeightConverter, WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dllm_sd.errors import InputError
from dllm_sd.pretrained.small_files import MARK, brief

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven kinds of linear layers of the native classes."""

LLADA_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first -%}{{ bos_token }}{%- endif -%}"
    "{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ message.content | trim ~ '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
"""LLaDA's format. The published template opens the assistant's turn even where none is asked for."""


class LLaDAForCausalLM(LlamaForCausalLM):
    """LLaDA's tensors under Llama's names."""


class LLaDA2ForCausalLM(Glm4MoeForCausalLM):
    """LLaDA2's tensors under GLM-4-MoE's names: query, key and value apart, experts stacked."""


register_checkpoint_conversion_mapping(
    LLaDAForCausalLM.__name__,
    [
        WeightRenaming(source, target)
        for source, target in {
            r"model\.transformer\.wte": "model.embed_tokens",
            r"model\.transformer\.ln_f": "model.norm",
            r"model\.transformer\.ff_out": "lm_head",  # the head; a block's ff_out is its down projection
            r"model\.transformer\.blocks": "model.layers",
            r"\.attn_norm": ".input_layernorm",
            r"\.ff_norm": ".post_attention_layernorm",
            r"\.q_proj": ".self_attn.q_proj",
            r"\.k_proj": ".self_attn.k_proj",
            r"\.v_proj": ".self_attn.v_proj",
            r"\.attn_out": ".self_attn.o_proj",
            r"\.ff_proj": ".mlp.gate_proj",
            r"\.up_proj": ".mlp.up_proj",
            r"\.ff_out": ".mlp.down_proj",
        }.items()
    ],
    overwrite=True,
)
register_checkpoint_conversion_mapping(
    LLaDA2ForCausalLM.__name__,
    [
        WeightRenaming(r"model\.word_embeddings", "model.embed_tokens"),
        WeightRenaming(r"attention\.dense", "self_attn.o_proj"),
        WeightRenaming(r"attention\.query_layernorm", "self_attn.q_norm"),
        WeightRenaming(r"attention\.key_layernorm", "self_attn.k_norm"),
        WeightRenaming(r"mlp\.gate\.expert_bias", "mlp.gate.e_score_correction_bias"),
        WeightConverter(
            "attention.query_key_value.weight",
            ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            [Split(dim=0)],
        ),
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
    ],
    overwrite=True,
)


@dataclass(frozen=True)
class Family:
    """What all checkpoints of one family share."""

    name: str
    checkpoints: str
    """Published checkpoints of the family, for documentation."""
    model_types: tuple[str, ...]
    """`model_type` in config.json."""
    network: type[PreTrainedModel] | None = None
    """Class that holds the weights; None lets transformers choose by `model_type`."""
    config: Callable[[Mapping[str, Any]], PreTrainedConfig] | None = None
    """From the checkpoint's config.json to the native one; None reads it as it is."""
    assumes: Mapping[str, Any] = field(default_factory=dict)
    """Values of config.json that the native class takes for granted."""
    block_causal: bool = False
    """Whether a position attends to its own and earlier blocks only, rather than to all."""
    block_length: int | None = None
    """Positions of an attention block where neither config.json nor the user says."""
    block_causal_names: Mapping[str, int] = field(default_factory=dict)
    """Block lengths by words in a checkpoint's name that say it is block-causal, where its config.json does not."""
    shift: bool = False
    """Whether the logits of position i predict position i + 1."""
    mask_token: str | None = None
    mask_id: int | None = None
    """Where neither config.json nor the tokenizer names the mask."""
    turn_end: str | None = None
    """Token that ends the assistant's turn; completions end with it."""
    tokenizer: Any = None
    """Native tokenizer class where the checkpoint names one that needs its own code."""
    template: str | None = None
    """Chat template instead of the tokenizer's."""
    thinking: bool | None = None
    """The template's thinking switch (`enable_thinking`); None leaves it to the template."""
    lora_targets: tuple[str, ...] = LINEARS

    def native_config(self, written: Mapping[str, Any], where: str) -> PreTrainedConfig:
        """The native config of a checkpoint.

        Raises:
            InputError: if config.json lacks a key or asks for something that the native class does not do.
        """
        assert self.config is not None
        for key, value in self.assumes.items():
            if key in written and written[key] != value:
                raise InputError(
                    f"config.json of {where} sets {key} to {written[key]!r:.60}; dllm-sd loads {self.name} checkpoints "
                    f"with {value!r} only"
                )
        try:
            return self.config(written)
        except KeyError as error:
            raise InputError(f"config.json of {where} lacks {error.args[0]!r}; restore the checkpoint's file") from None
        except Exception as error:  # a damaged value can raise any exception in a config class
            reason = brief(error)
            raise InputError(f"config.json of {where} is unusable: {reason}; restore the checkpoint's file") from error


def _llada_config(written: Mapping[str, Any]) -> LlamaConfig:
    heads = written["n_heads"]
    return LlamaConfig(
        vocab_size=written.get("embedding_size") or written["vocab_size"],
        hidden_size=written["d_model"],
        intermediate_size=written.get("mlp_hidden_size") or written["mlp_ratio"] * written["d_model"],
        num_hidden_layers=written["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=1 if written.get("multi_query_attention") else written.get("n_kv_heads") or heads,
        max_position_embeddings=written["max_sequence_length"],
        rms_norm_eps=written["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": written["rope_theta"]},
        tie_word_embeddings=written["weight_tying"],
        initializer_range=written.get("init_std", 0.02),
        **_token_ids(written),
    )


def _llada2_config(written: Mapping[str, Any]) -> Glm4MoeConfig:
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
        *("tie_word_embeddings", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace"),
        *("norm_topk_prob", "routed_scaling_factor", "use_qk_norm"),
    )
    rope = {"rope_type": "default", "rope_theta": written["rope_theta"]}
    return Glm4MoeConfig(
        **{key: written[key] for key in same},
        n_routed_experts=written["num_experts"],
        n_shared_experts=written["num_shared_experts"],
        rope_parameters={**rope, "partial_rotary_factor": written["partial_rotary_factor"]},
        num_mtp_layers=0,
        initializer_range=written.get("initializer_range", 0.02),
        **_token_ids(written),
    )


def _qwen_config(native: Any) -> Callable[[Mapping[str, Any]], PreTrainedConfig]:
    """Dream, SDAR and A2D keep Qwen's keys; what is not Qwen's own is dropped."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    needed += ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    known = {f.name for f in fields(native)} - {"rope_parameters", "layer_types", "use_cache", "architectures", "dtype"}

    def build(written: Mapping[str, Any]) -> PreTrainedConfig:
        kept = {key: written[key] for key in needed} | {k: written[k] for k in known & written.keys()}
        kept |= _token_ids(written)
        rope = written.get("rope_parameters") or {"rope_type": "default", "rope_theta": written["rope_theta"]}
        return native(**kept, rope_parameters=rope)

    return build


def _token_ids(written: Mapping[str, Any]) -> dict[str, Any]:
    return {key: written.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


_LLADA = Family(
    name="llada",
    checkpoints="LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5 (arXiv 2502.09992, 2505.19223)",
    model_types=("llada",),
    network=LLaDAForCausalLM,
    config=_llada_config,
    assumes={
        **{"activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "rope": True, "alibi": False},
        **{"include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False, "scale_logits": False},
        **{"input_emb_norm": False, "attention_layer_norm": False, "clip_qkv": None, "block_group_size": 1},
    },
    mask_token="<|mdm_mask|>",
    turn_end="<|eot_id|>",
    template=LLADA_TEMPLATE,
)
_QWEN_PLAIN = {"use_sliding_window": False, "rope_scaling": None, "hidden_act": "silu"}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _LLADA,
        replace(
            _LLADA,
            name="illada",
            checkpoints="iLLaDA-8B (arXiv 2606.25331); its config.json was not seen, LLaDA's keys are inferred",
            model_types=("illada",),
            mask_id=5,
        ),
        Family(
            name="dream",
            checkpoints="Dream-v0-7B, Dream-Coder-7B (arXiv 2508.15487), DiffuCoder-7B (arXiv 2506.20639)",
            model_types=("Dream", "dream"),
            network=Qwen2ForCausalLM,
            config=_qwen_config(Qwen2Config),
            assumes={**_QWEN_PLAIN, "use_mrope": False},
            shift=True,
            mask_token="<|mask|>",
            turn_end="<|im_end|>",
            tokenizer=Qwen2Tokenizer,
        ),
        Family(
            name="sdar",
            checkpoints="SDAR-1.7B/4B/8B (arXiv 2510.06303), TraDo, DiRL-8B; not the 30B-A3B mixture of experts",
            model_types=("sdar",),
            network=Qwen3ForCausalLM,
            config=_qwen_config(Qwen3Config),
            assumes=_QWEN_PLAIN,
            block_causal=True,
            block_length=4,
            mask_token="<|MASK|>",
            turn_end="<|im_end|>",
            tokenizer=Qwen2Tokenizer,
        ),
        Family(
            name="a2d_qwen3",
            checkpoints="Qwen3-0.6B-diffusion-mdlm-v0.1 and -bd3lm-v0.1 (dllm); bd3lm is block-causal, block 32",
            model_types=("a2d-qwen3",),
            network=Qwen3ForCausalLM,
            config=_qwen_config(Qwen3Config),
            assumes=_QWEN_PLAIN,
            block_causal_names={"bd3lm": 32},
            mask_token="<|mask|>",
            turn_end="<|im_end|>",
            thinking=False,
        ),
        Family(
            name="a2d_qwen2",
            checkpoints="Qwen2.5-0.5B-diffusion and Qwen2.5-Coder-0.5B-diffusion (dllm), mdlm and bd3lm",
            model_types=("a2d-qwen2",),
            network=Qwen2ForCausalLM,
            config=_qwen_config(Qwen2Config),
            assumes=_QWEN_PLAIN,
            block_causal_names={"bd3lm": 32},
            mask_token="<|mask|>",
            turn_end="<|im_end|>",
        ),
        Family(
            name="llada2",
            checkpoints="LLaDA2.0-mini, LLaDA2.1-mini (arXiv 2512.15745); LoRA on the attention only",
            model_types=("llada2_moe",),
            network=LLaDA2ForCausalLM,
            config=_llada2_config,
            assumes={
                **{"score_function": "sigmoid", "norm_head": False, "norm_softmax": False, "use_qkv_bias": False},
                **{"use_bias": False, "use_rmsnorm": True, "rope_scaling": None, "hidden_act": "silu"},
                **{"use_sliding_window": False, "moe_router_enable_expert_bias": True, "router_dtype": "fp32"},
                **{"using_split_qkv_in_self_attention": False, "use_qk_norm": True},
            },
            block_causal=True,
            block_length=32,
            mask_token="<|mask|>",
            mask_id=156895,
            turn_end="<|role_end|>",
            lora_targets=LINEARS[:4],  # peft moves the others to the routed experts
        ),
    )
}
CAUSAL = Family(
    name="causal_lm",
    checkpoints="any causal language model of transformers: autoregressive, or bidirectional (model.as: diffusion)",
    model_types=(),
    mask_token="<|mask|>",
)


def recognise(written: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json belongs to.

    A native folder written by `dllm-sd export` carries `MARK`; it belongs to its family but needs no conversion.

    Raises:
        InputError: if no class of transformers holds such a model.
    """
    model_type = written.get("model_type")
    by_type = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}
    if family := by_type.get(str(model_type)):
        name = where.rpartition("/")[2].lower()
        for word, length in family.block_causal_names.items():
            if word in name:
                return replace(family, block_causal=True, block_length=length)
        return family
    if model_type in CONFIG_MAPPING and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        mark = written.get(MARK)
        if not isinstance(mark, Mapping):
            return CAUSAL
        name = str(mark.get("family"))
        if name not in {*FAMILIES, CAUSAL.name}:
            raise InputError(f"config.json of {where} names an unknown family {name!r} under {MARK}; restore the file")
        family, length = FAMILIES.get(name, CAUSAL), mark.get("block_length")
        return replace(
            replace(family, network=None, config=None, assumes={}),
            block_causal=length is not None,
            block_length=length,
            thinking=mark.get("thinking", family.thinking),
            template=None if "thinking" in mark else family.template,  # an exported tokenizer carries it
        )
    remote = " and would run code that comes with the checkpoint, which dllm-sd never does" * ("auto_map" in written)
    raise InputError(
        f"model_type {model_type!r} of {where} is not among the causal language models of transformers{remote}; "
        f"use one of those, or a checkpoint of type {', '.join(sorted(by_type))}"
    )
