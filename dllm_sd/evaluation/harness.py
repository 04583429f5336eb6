"""A policy as a model of EleutherAI's lm-eval.

``python -m dllm_sd.evaluation.harness --model dllm-sd --model_args pretrained=X`` starts it.

Texts are decoded by the sampler of training; likelihoods are computed by `likelihood`.
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from rich.console import Console
from rich.progress import track
from torch import Tensor

from dllm_sd.decoding.denoising import check_denoising
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.evaluation.likelihood import batches, log_likelihoods, written_greedily
from dllm_sd.parallel.processes import close_process_group
from dllm_sd.policies.loading import DTYPES, AnyPolicy, load_adapter, load_policy
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.pretrained.chat import Chat
from dllm_sd.randomness import make_key

T = TypeVar("T")
_log = logging.getLogger(__name__)

_LM: Any = object
if find_spec("lm_eval") is not None:
    _LM = import_module("lm_eval.api.model").LM


def cut_at_stop(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((text.index(stop) for stop in until if stop and stop in text), default=len(text))]


class HarnessModel(_LM):
    """The model ``dllm-sd`` of lm-eval; it reads only the ``args`` of a request."""

    cache_hook: Any = None

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        policy: MaskedDiffusion | None = None,
        adapter: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        mc_samples: int = 128,
        check_greedy: bool = True,
        add_bos_token: bool | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Load a policy.

        Args:
            pretrained: a checkpoint folder, a hub name, or ``tiny``.
            policy: instead of it, a policy that is loaded already.
            adapter: folder of a PEFT adapter to put on the model.
            device: the device. The harness passes cuda by default; without CUDA accelerate's choice is taken.
            batch_size: prompts decoded, or canvases read, together. It changes no result.
            max_batch_size: without effect; the harness passes it on.
            mc_samples: masks drawn for a likelihood (`log_likelihoods`).
            check_greedy: whether to find out ``is_greedy`` (`written_greedily`); otherwise it is false.
            add_bos_token: put the BOS token before texts that do not begin with it; None does so where the tokenizer
                itself begins texts with one.
            seed: of all random numbers, which are keyed by the texts and, in generation, the number of times that the
                same prompt came before.
            **options: keys of `decode` (`Decoding`) and of `model` (`Model`, whose own block length is
                ``model_block_length``). Without ``length`` a task's `max_gen_toks` counts, filled up to whole blocks,
                else 256; without ``temperature`` the task's (`do_sample` and `temperature`), else 0.

        Raises:
            InputError: if the checkpoint or an argument is unusable.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or mc_samples < 1:
            raise InputError("--batch_size and the model arg mc_samples must be whole numbers of 1 or more")
        if options.get("dtype", "float32") not in DTYPES:
            raise InputError(f"the model arg dtype must be one of {', '.join(DTYPES)}")
        known = {f.name for f in fields(Decoding)} - {"batch_size"}
        decode = {name: options.pop(name) for name in known & options.keys()}
        if "model_block_length" in options:
            options["block_length"] = options.pop("model_block_length")
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        chosen = state.device or torch.device("cpu")
        if device is not None and state.num_processes == 1:
            requested = torch.device(device)
            chosen = chosen if requested.type == "cuda" and not torch.cuda.is_available() else requested
        self._device = chosen
        if policy is None and pretrained is None:
            raise InputError("the model arg pretrained is missing; name a checkpoint folder, a hub name, or tiny")
        self.policy = policy or _denoiser(load_policy(pretrained, device=chosen, **options))
        self.name = str(pretrained or "policy")
        if adapter is not None:
            load_adapter(self.policy, adapter)
        decode.setdefault("block_length", self.policy.block_length or Decoding.block_length)
        self.decode, self.batch_size, self.mc_samples = decode, int(batch_size), mc_samples
        self.check_greedy, self.add_bos_token, self.seed = check_greedy, add_bos_token, seed
        self._settings({})  # refuse invalid settings before any request

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """Called by the harness; a model arg takes precedence over an option of its command line."""
        extra = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**extra, **arg_dict})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.policy.device

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts in answer to ``(prompt, settings)`` requests, cut before the first stop string of `until`."""
        seen, texts = Counter[str](), [""] * len(requests)
        groups: dict[Decoding, list[tuple[int, list[int], int]]] = {}
        for i, request in enumerate(requests):
            context, wanted = request.args
            settings = self._settings(wanted)
            key = make_key(self.seed, "harness", context, seen[context])
            groups.setdefault(settings, []).append((i, self._prompt(context, settings.length), key))
            seen[context] += 1
        parts = [
            (settings, batch)
            for settings, rows in groups.items()
            for batch in batches(sorted(rows, key=lambda row: -len(row[1])), 8 * self.batch_size)  # cached when done
        ]
        for settings, batch in self._watched(parts, "texts", disable_tqdm):
            done = self.policy.decode([prompt for _, prompt, _ in batch], settings, [key for *_, key in batch])
            for (i, _, _), tokens, length in zip(batch, done.tokens.tolist(), done.length.tolist(), strict=True):
                texts[i] = self._text(tokens[:length], requests[i].args[1].get("until") or [])
                self._remember("generate_until", requests[i], texts[i])
        return texts

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """``(log-probability, is greedy)`` for ``(context, continuation)`` requests."""
        pairs = [self._pair(*request.args) for request in requests]
        keys = [make_key(self.seed, "likelihood", *request.args) for request in requests]
        results = [(0.0, False)] * len(requests)
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # largest first
        how: dict[str, Any] = {"batch_size": self.batch_size, "guidance": self._settings({}).guidance}
        for batch in self._watched(list(batches(order, self.batch_size)), "likelihoods", disable_tqdm):
            batch_pairs = [pairs[i] for i in batch]
            values = log_likelihoods(self.policy, batch_pairs, [keys[i] for i in batch], samples=self.mc_samples, **how)
            greedy = (
                written_greedily(self.policy, batch_pairs, **how) if self.check_greedy else [False] * len(batch_pairs)
            )
            for i, result in zip(batch, zip(values, greedy, strict=True), strict=True):
                results[i] = result
                self._remember("loglikelihood", requests[i], result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused."""
        raise InputError(
            "a masked diffusion model bounds the likelihood of a whole text and has no rolling one to compare with the "
            "perplexity of other models; leave out tasks that ask for loglikelihood_rolling"
        )

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the policy's own renderer writes it; an answer begun by the task is left open."""
        begun = not add_generation_prompt and chat_history[-1]["role"] == "assistant"
        return self._chat.render(chat_history, add_generation_prompt, continued=begun)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template, for the harness's records."""
        if isinstance(chat_template, str):
            raise InputError("--apply_chat_template takes no name here; give a template as the model arg chat_template")
        return self._chat.written_by or ""

    @property
    def tokenizer_name(self) -> str:
        """The key under which the harness caches rendered prompts."""
        return f"{self.name}-{make_key(self.chat_template())}"

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's records."""
        decode = asdict(self._settings({}))
        return {"decode": decode, "mc_samples": self.mc_samples, "seed": self.seed, "check_greedy": self.check_greedy}

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all processes."""
        gathered: Any = gather(tensor.to(self._device)) if self._world_size > 1 else tensor
        return gathered

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes on process ``dst``, None elsewhere."""
        objects = gather_object([obj]) if self._world_size > 1 else [obj]
        return objects if self._rank == dst else None

    def barrier(self) -> None:
        """Wait for all processes."""
        PartialState().wait_for_everyone()

    @property
    def _chat(self) -> Chat:
        if self.policy.chat is None:
            raise InputError("the model has no tokenizer; name one in the model arg tokenizer")
        return self.policy.chat

    def _settings(self, wanted: Mapping[str, Any]) -> Decoding:
        """Return the decoding settings of a request: the user's, completed by the task's."""
        decode = dict(self.decode)
        if decode.get("length") is None:
            blocks = -(-int(wanted.get("max_gen_toks") or Decoding.length) // decode["block_length"])
            decode["length"] = blocks * decode["block_length"]
        if decode.get("temperature") is None:
            sampled = wanted.get("do_sample", "temperature" in wanted)
            decode["temperature"] = float(wanted.get("temperature", 1.0) or 0.0) if sampled else 0.0
        settings = Decoding(batch_size=self.batch_size, **decode)
        check_denoising(self.policy.block_length, settings)
        return settings

    def _text(self, tokens: list[int], until: str | Sequence[str]) -> str:
        """Completion tokens as text before the first stop, which may be a special token."""
        until = [until] if isinstance(until, str) else until
        tokenizer = self._chat.tokenizer
        special = [tokenizer.convert_tokens_to_ids(stop) for stop in until if stop in tokenizer.all_special_tokens]
        ends = [place for place, token in enumerate(tokens) if token in special]
        return cut_at_stop(self.policy.text(tokens[: ends[0] if ends else None]), until)

    def _prompt(self, text: str, room: int) -> list[int]:
        """Encode a prompt; cut its beginning if it and ``room`` more tokens do not fit into the model."""
        tokens, first = self._tokens(text), self._chat.tokenizer.bos_token_id
        opening = (
            self._chat.opening
            if self.add_bos_token is None
            else [first]
            if self.add_bos_token and first is not None
            else []
        )
        if tokens[: len(opening)] != opening:
            tokens = [*opening, *tokens]
        if not tokens and self.policy.module.shift:
            raise InputError("this model reads a token's logits off the one before it; set the model arg add_bos_token")
        most = getattr(self.policy.module.model.config, "max_position_embeddings", None)
        if most is not None and len(tokens) + room > most:
            _log.warning("a prompt of %d tokens loses its beginning: the model has %d positions", len(tokens), most)
            tokens = tokens[len(tokens) + room - most :]
        return tokens

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both; spaces between them belong to the continuation, as in the harness's own models.

        Line breaks do not, since they end a chat template.
        """
        start = context.rstrip(" ")
        answer = self._tokens(context + continuation)[len(self._tokens(start)) :]
        return self._prompt(start, len(answer)), answer

    def _tokens(self, text: str) -> list[int]:
        return self.policy.encode_completion(text)[:-1]

    def _remember(self, kind: str, request: Any, result: Any) -> None:
        if self.cache_hook is not None:
            self.cache_hook.add_partial(kind, request.args, result)

    def _watched(self, batches: Sequence[T], what: str, hidden: bool) -> Iterable[T]:
        return track(batches, what, console=Console(stderr=True), disable=hidden or self._rank > 0)


def _denoiser(policy: AnyPolicy) -> MaskedDiffusion:
    if not isinstance(policy, MaskedDiffusion):
        raise InputError("this model is autoregressive; evaluate it with the harness's own model, --model hf")
    return policy


def main() -> int:
    """Run the harness's command line with the model ``dllm-sd`` registered."""
    try:
        if _LM is object:
            raise InputError("lm-eval is not installed; run pip install 'dllm-sd[lm-eval]'")
        register()
        import_module("lm_eval.__main__").cli_evaluate()
        close_process_group()
    except InputError as error:
        print(f"dllm-sd: {error}", file=sys.stderr)
        return 2
    return 0


def register() -> None:
    """Make the model ``dllm-sd`` known to lm-eval, for ``lm_eval.simple_evaluate``."""
    models = import_module("lm_eval.models") and import_module("lm_eval.api.registry").model_registry
    if "dllm-sd" not in models:
        models.register("dllm-sd", target="dllm_sd.evaluation.harness:HarnessModel")


if __name__ == "__main__":
    sys.exit(main())
