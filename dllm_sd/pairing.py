"""Checks before any weight is read that method, model, data and tokenizer fit together."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from string import Formatter
from typing import Any

from dllm_sd.canvases import CANVASES
from dllm_sd.config import Config
from dllm_sd.decoding.denoising import check_denoising
from dllm_sd.decoding.generating import check_generating
from dllm_sd.decoding.settings import Decoding
from dllm_sd.engines import ENGINES
from dllm_sd.errors import InputError, Unavailable
from dllm_sd.parts import name_of
from dllm_sd.policies.loading import check_adapter
from dllm_sd.policies.teacher_weights import Weights
from dllm_sd.pretrained.blueprint import Blueprint, known_blueprint, read_blueprint
from dllm_sd.rollouts.rules import needed_length
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import CONTEXTS, HINTS, Hint

REFERENCES_CHECKED = 1000
"""Number of references whose length is checked before a run begins."""
PROBLEMS_CHECKED = 1000
"""Number of problems among which one must have what the contexts of the method need."""
PROMPTS_CHECKED = 100
"""Number of prompts that are searched for unknown tokens before a run begins."""


def check_model_offline(config: Config) -> tuple[Blueprint, str | None]:
    """Check as `check_model` does; for a checkpoint that is not on this machine use its known shape, if there is one.

    Returns:
        The blueprint, and a sentence on the missing files, without which not all could be checked; None if all was.

    Raises:
        InputError: naming the key, and the remedy.
    """
    try:
        return check_model(config), None
    except Unavailable as error:
        known = known_blueprint(config.model)
        if known is None:
            raise
        return check_model(config, known), str(error)


def other_blueprints(config: Config) -> dict[Weights, Blueprint | None]:
    """Descriptions of other checkpoints that teach or write hints; None for those whose shape is not known."""
    blueprints: dict[Weights, Blueprint | None] = {}
    for weights in config.method.models():
        if (model := weights.other_model(config.model)) is None:
            continue
        try:
            blueprints[weights] = None if model.path is None else read_blueprint(model)
        except Unavailable:
            blueprints[weights] = known_blueprint(model)
    return blueprints


def check_model(config: Config, known: Blueprint | None = None) -> Blueprint:
    """Read the small files of the checkpoint, and refuse settings that do not fit this model.

    Args:
        config: the config of the run.
        known: the known shape of the model, which is then used instead of its files and those of other teachers.

    Raises:
        InputError: naming the key, and the remedy.
    """
    _check_precision(config)
    blueprint = known or read_blueprint(config.model)
    check_adapter(blueprint)
    _check_engine(config, blueprint.causal)
    if known is None:
        _check_teachers(config, blueprint)
    check_decodings(config, blueprint)
    if blueprint.causal:
        _check_causal(config)
        return blueprint
    if config.method.sites.prompt:
        raise InputError("method.sites.prompt grades the prompt, which a denoiser never masks; leave it out")
    if blueprint.block_length is None:
        return blueprint
    if config.method.canvases.hides_everything:
        raise InputError(
            f"method.canvases {name_of(CANVASES, config.method.canvases)} hides blocks that a block-causal model "
            "always sees finished; use random_masks"
        )
    for context in config.method.contexts:
        if context.hint is not None:
            raise InputError(
                "method.contexts gives a teacher a prompt of another length, which would move the blocks of this "
                "block-causal model; use suffix in the active block, or a model that sees the whole canvas"
            )
        if context.shows_later_blocks:
            raise InputError(
                "method.contexts reveals later blocks, to which a block-causal model cannot attend, so the teacher "
                "would have no more information than the student; set the suffix context's scope to active_block"
            )
    return blueprint


def _check_precision(config: Config) -> None:
    """Refuse trained weights in a dtype in which updates are lost in rounding.

    In float16 small gradients become zero, also those of adapters, since there is no loss scaling. A bfloat16 number
    has 8 significant bits: a step of less than 1/512 of a weight is lost, which is nearly every step at the learning
    rates of fine-tuning. Adapters are always float32 (PEFT), so this concerns weights that are trained whole.
    """
    model, lora = config.model, config.model.lora
    remedy = "set model.dtype to float32 and optim.autocast to bfloat16"
    if model.dtype == "float16":
        raise InputError(
            "model.dtype float16 is for evaluation: in training small gradients would become zero; "
            f"{remedy}{', or model.dtype to bfloat16' if lora and not lora.modules_to_save else ''}"
        )
    if model.dtype != "bfloat16" or config.optim.pure_bfloat16 or (lora and not lora.modules_to_save):
        return
    what = f"the weights of {lora.modules_to_save[0]:.60} (model.lora.modules_to_save)" if lora else "all weights"
    alternative = "leave out model.lora.modules_to_save" if lora else "set model.lora"
    raise InputError(
        f"model.dtype bfloat16 would train {what} without float32 master weights, where most steps of an update round "
        f"to nothing; {remedy}, or {alternative}, or set optim.pure_bfloat16 to true if you want that"
    )


def _check_engine(config: Config, causal: bool) -> None:
    """Refuse an engine that cannot decode this model, or not with the weights that make the rollouts."""
    engine: Any = config.decode.engine
    name = f"decode.engine {name_of(ENGINES, engine)}"
    if not engine.remote:
        return
    if not causal and not engine.denoises:
        raise InputError(f"{name} decodes autoregressive models only; use dllm_sd or local for one that denoises")
    if config.model.lora is None and not engine.takes_all_weights:
        raise InputError(
            f"{name} takes new weights as LoRA adapters only, without a path between GPUs; set model.lora, or "
            "decode.engine to local"
        )
    if config.model.lora and config.model.lora.modules_to_save:
        raise InputError(f"{name} takes no modules that are trained whole; leave out model.lora.modules_to_save")
    if config.peers or (config.method.rollout.policy and not config.method.rollout.policy.is_student):
        what = "peers" if config.peers else "method.rollout.policy"
        raise InputError(f"{name} decodes with the student's weights alone, not those of {what}; use local")
    rollouts = config.method.rollout.settings(config.decode)
    if rollouts.guidance:
        raise InputError(
            f"decode.guidance is not among the log-probabilities by which rollouts of {name} are checked; set it to 0, "
            "or decode.engine to local"
        )
    held_out = {f"eval.schedules.{name}": config.held_out(name) for name in config.eval.schedules}
    held_out = {"eval.decode": config.held_out(), **held_out}
    engine.check(asdict(rollouts), "method.rollout")
    for key, settings in held_out.items():
        engine.check(asdict(replace(settings, temperature=config.eval.temperature)), key)


def check_decodings(config: Config, blueprint: Blueprint) -> None:
    """Refuse decoding settings, also of evaluation schedules, that this model does not support.

    Raises:
        InputError: naming the key, and the remedy.
    """
    if config.eval.thinking is not None and blueprint.chat and not blueprint.chat.has_switch:
        raise InputError("eval.thinking is set, but the chat template has no thinking switch; leave it out")
    for key, settings in _decodings(config).items():
        settings.check_suppressed(blueprint.config.get_text_config().vocab_size, key)
        if blueprint.causal:
            _check_causal_decoding(config, settings, key)
        else:
            check_denoising(blueprint.block_length, settings, key)


def check_data(config: Config, problems: Sequence[Problem]) -> None:
    """Refuse a method that needs references or fields which none of the first problems of the data has.

    Raises:
        InputError: naming the key, and the remedy.
    """
    if not len(problems):
        return
    task, problem = config.task, problems[0]
    if config.method.skill_bank is not None:
        config.method.skill_bank.check(problems)
    if not config.method.rollout.decodes and task.reference(problem) is None:
        raise InputError(
            f"method.rollout demonstrations needs references, but the task's data has none; {task.reference_remedy}"
        )
    for place, context in enumerate(config.method.contexts):
        if (hint := context.hint) is None:
            continue
        key = f"method.contexts.{place}{'' if hint is context else '.prompt'}"
        lacking = (hint.lacks(task, problems[i], key) for i in range(min(PROBLEMS_CHECKED, len(problems))))
        if (missing := hint.lacks(task, problem, key)) is not None and all(clause is not None for clause in lacking):
            raise InputError(f"method.contexts {name_of(CONTEXTS | HINTS, hint)} {missing}")


def check_references(config: Config, blueprint: Blueprint, problems: Sequence[Problem]) -> str | None:
    """Check the lengths of the first `REFERENCES_CHECKED` references, if the method imitates them.

    Returns:
        A sentence on references that are longer than `decode.length`; None if there are none.

    Raises:
        InputError: if all are too long, or a problem has no reference.
    """
    chat = blueprint.chat
    if config.method.rollout.decodes or chat is None or not len(problems):
        return None
    lengths: list[int] = []
    for i in range(min(REFERENCES_CHECKED, len(problems))):
        reference = config.task.reference(problems[i])
        if reference is None:
            raise InputError(
                f"problem {problems[i].id:.60} has no reference for method.rollout demonstrations; give it one, or "
                "leave it out of the data"
            )
        lengths.append(needed_length(chat.encode_completion(reference)))
    count, limit = len(lengths), config.decode.length
    checked = f"the {count:,} references"
    if count < len(problems):
        checked = f"the first {count:,} of {len(problems):,} references"
    long = sum(length > limit for length in lengths)
    if long == count:
        raise InputError(
            f"none of {checked} of the training split fits decode.length {limit}; the longest needs {max(lengths)}: "
            "set decode.length to that or more"
        )
    return (
        f"{long:,} of {checked} of the training split are longer than decode.length {limit} and are left out "
        f"(rollouts/long_reference counts them); the longest needs {max(lengths)}"
        if long
        else None
    )


def check_tokenizer(config: Config, blueprint: Blueprint, problems: Sequence[Problem]) -> dict[str, str]:
    """Search the first prompts and references, and the templates of hints, for text that the tokenizer does not know.

    Returns:
        Warnings by kind of text: `prompts`, `completions` (references that are imitated), `hints`, and `special` for
        special tokens that prompts and references contain.

    Raises:
        InputError: if the chat template leaves out the system message of a prompt.
    """
    chat, task = blueprint.chat, config.task
    if chat is None:
        return {}
    first_problems = [problems[i] for i in range(min(PROMPTS_CHECKED, len(problems)))]
    conversations = [task.messages(problem) for problem in first_problems]
    if any(message["role"] == "system" for messages in conversations for message in messages):
        chat.check_template(system=True)
    hints = [context.hint for context in config.method.contexts if context.hint is not None]
    shows_references = any(hint.needs_reference for hint in hints)
    references = [text for problem in first_problems if (text := task.reference(problem)) is not None]
    hint_texts = [text for hint in hints for text in _literal_texts(hint)] + (references if shows_references else [])
    warnings = {
        "prompts": chat.warn_of_lost(map(chat.render, conversations), "the prompts"),
        "completions": chat.warn_of_lost([] if config.method.rollout.decodes else references, "the references"),
        "hints": chat.warn_of_lost(hint_texts, "the hints and the words around them (method.contexts)"),
        "special": chat.warn_of_control(
            [*(message["content"] for messages in conversations for message in messages), *references],
            "the first messages and references",
        ),
    }
    return {kind: warning for kind, warning in warnings.items() if warning is not None}


def _literal_texts(hint: Hint) -> list[str]:
    """The text of a hint's templates around their fields, and its instructions for an analysis by the teacher.

    The request to a writer on a server, which has a tokenizer of its own, is not among them, nor one that nobody reads.
    """
    asked = hint.writing is not None and hint.writing.writer.weights is not None
    names = [f.name for f in fields(hint) if asked or f.name != "prompt"]
    values = [*(getattr(hint, name) for name in names), hint.wording]
    texts = dict.fromkeys(value for value in values if isinstance(value, str) and "{" in value)
    texts = ["".join(literal for literal, *_ in Formatter().parse(text)) for text in texts]
    return [*texts, *([hint.reasoning.instruction, hint.reasoning.transition] if hint.reasoning else [])]


def check_peers(config: Config) -> None:
    """Refuse two students that cannot teach each other.

    Raises:
        InputError: naming the key, and the remedy.
    """
    peers, contexts = config.peers, config.method.contexts
    assert peers is not None
    hints = [context.hint for context in contexts if context.by_peer]
    writings = [None if hint is None else hint.writing for hint in hints]
    writers = [None if writing is None else writing.writer.weights for writing in writings]
    if not writers or not all(weights is not None and weights.of_another_run for weights in writers):
        raise InputError(
            "peers comment on each other's rollouts; set method to op_co_distill, or a context to feedback"
        )
    models = [replace(config.model, path=student.path or config.model.path) for student in peers.students]
    if config.model.lora and models[0].path != models[1].path:
        raise InputError("two adapters need one base; leave out the students' paths, or set model.lora to null")
    first, second = (read_blueprint(model) for model in models)
    if (first.causal, first.block_length) != (second.causal, second.block_length):
        raise InputError("peers.students are of different kinds; choose two checkpoints of the same architecture")
    assert first.chat is not None
    assert second.chat is not None
    if first.chat.tokenizer.get_vocab() != second.chat.tokenizer.get_vocab():
        raise InputError("peers.students have different tokenizers; choose two checkpoints with the same one")
    if config.task.problems("dev") and len({*map(str, _domains(config))}) < 2:
        raise InputError(f"all dev problems are of one domain (peers.field {peers.field!r}); give task data of two")


def _domains(config: Config) -> list[str]:
    assert config.peers is not None
    field, problems = config.peers.field, config.task.problems("dev")
    if missing := [problem.id for problem in problems if field not in problem.fields]:
        raise InputError(f"problem {missing[0]} has no field {field!r} (peers.field); name the field of its domain")
    return [str(problem.fields[field]) for problem in problems]


def _decodings(config: Config) -> dict[str, Decoding]:
    """All decoding settings of the run by config key."""
    evaluation = {"eval.decode": config.held_out()} if config.eval.decode else {}
    schedules = {f"eval.schedules.{name}": config.held_out(name) for name in config.eval.schedules}
    return {"decode": config.decode} | evaluation | schedules


def _check_causal_decoding(config: Config, settings: Decoding, key: str) -> None:
    """Refuse decoding settings that an autoregressive model does not support."""
    check_generating(settings, key)
    if settings.continuous and config.optim.autocast not in (None, config.model.dtype):
        dtype = f"model.dtype to {config.optim.autocast}, or " if config.model.lora else ""
        raise InputError(
            f"{key}.continuous under optim.autocast needs weights of that type; set {dtype}{key}.continuous to false"
        )


def _check_causal(config: Config) -> None:
    """Refuse contexts that reveal tokens which an autoregressive model cannot attend to."""
    for context in config.method.contexts:
        if context.reveals:
            raise InputError(
                f"method.contexts {name_of(CONTEXTS, context)} reveals tokens after the graded position, which an "
                "autoregressive model cannot attend to; put a hint into the prompt instead (reference, sibling), or "
                "set model.as=diffusion to train this checkpoint as a masked diffusion model"
            )


def _check_teachers(config: Config, blueprint: Blueprint) -> None:
    """Refuse teachers of another kind or tokenizer than the student's, and writers with unsupported settings."""
    for context in config.method.contexts:
        hint = context.hint
        if hint is not None and hint.thinking is not None and blueprint.chat and not blueprint.chat.has_switch:
            raise InputError("a context sets thinking, but the chat template has no thinking switch; leave it out")
        if hint is not None and hint.reasoning is not None:
            analysis = replace(config.decode, length=hint.reasoning.length, temperature=hint.reasoning.temperature)
            if not blueprint.causal:
                check_denoising(blueprint.block_length, analysis, "the analysis of a context with decode")
        writing = hint.writing if hint is not None else None
        if writing is None or writing.writer.remote is not None:
            continue
        if writing.sampling.thinking is not None and blueprint.chat and not blueprint.chat.has_switch:
            raise InputError("a writer sets thinking, but the chat template has no thinking switch; leave it out")
        if not blueprint.causal:
            text = replace(config.decode, length=writing.sampling.length)
            check_denoising(blueprint.block_length, text, "the text of a context's writer with decode")
    for name, sampling in (config.method.skill_bank.texts() if config.method.skill_bank else {}).items():
        if sampling.thinking is not None and blueprint.chat and not blueprint.chat.has_switch:
            raise InputError(
                f"method.skill_bank.{name} sets thinking, but the chat template has no thinking switch; leave it out"
            )
        if not blueprint.causal:
            text = replace(config.decode, length=sampling.length)
            check_denoising(blueprint.block_length, text, f"the texts of method.skill_bank.{name} with decode")
    for weights in config.method.models():
        if weights.of_another_run and weights.source is None and config.peers is None:
            raise InputError(
                "the writer peer of a context has no path; list two students in peers.students, as the config "
                "tiny_opcod does, or name a checkpoint or adapter of another run in the writer's path"
            )
        model = weights.other_model(config.model)
        if model is None:
            continue
        if model.path is None:
            raise Unavailable("method.teacher.0.path is missing; name the checkpoint that teaches")
        other = read_blueprint(model)
        if other.causal != blueprint.causal or other.block_length != blueprint.block_length:
            raise InputError(
                f"the teacher at {weights.source!r} is not of the student's kind (autoregressive, masked diffusion or "
                "block-causal); choose one of the student's kind"
            )
        assert other.chat is not None
        assert blueprint.chat is not None
        if other.chat.tokenizer.get_vocab() != blueprint.chat.tokenizer.get_vocab():
            raise InputError(
                f"the teacher at {weights.source!r} has another tokenizer than the student; choose one with the same"
            )
