"""Whether a method and a model belong together, decided before any weight is read."""

from collections.abc import Sequence
from dataclasses import fields, replace
from string import Formatter

from dllm_sd.canvases import CANVASES
from dllm_sd.config import Config
from dllm_sd.decoding.denoising import check_denoising
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError, NotAtHand
from dllm_sd.parts import name_of
from dllm_sd.policies.teacher_weights import Weights
from dllm_sd.pretrained.blueprint import Blueprint, known_blueprint, read_blueprint
from dllm_sd.rollouts.rules import needed_length
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import CONTEXTS, HINTS, Hint

REFERENCES_CHECKED = 1000
"""References that are read before a run begins."""
PROMPTS_CHECKED = 100
"""Prompts of which it is found out before a run begins whether the tokenizer knows their words."""


def check_model_offline(config: Config) -> tuple[Blueprint, str | None]:
    """As `check_model`, but for a checkpoint that is not at hand from what is known of its shape, if that is.

    Returns:
        The blueprint, and a sentence on what is not at hand, so that something was not checked; None if all was.

    Raises:
        InputError: naming the key, and the remedy.
    """
    try:
        return check_model(config), None
    except NotAtHand as error:
        known = known_blueprint(config.model)
        if known is None:
            raise
        return check_model(config, known), str(error)


def other_blueprints(config: Config) -> dict[Weights, Blueprint | None]:
    """What is known of the shapes of other checkpoints that teach or write; None where nothing is."""
    outlines: dict[Weights, Blueprint | None] = {}
    for weights in config.method.models():
        if (model := weights.other_model(config.model)) is None:
            continue
        try:
            outlines[weights] = None if model.path is None else read_blueprint(model)
        except NotAtHand:
            outlines[weights] = known_blueprint(model)
    return outlines


def check_model(config: Config, known: Blueprint | None = None) -> Blueprint:
    """Read what the checkpoint says without its weights, and refuse what this model cannot do.

    Args:
        config: the run.
        known: an outline to judge by, instead of reading the files of the model and those of other teachers.

    Raises:
        InputError: naming the key, and the remedy.
    """
    _check_precision(config)
    blueprint = known or read_blueprint(config.model)
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
                "method.contexts reveals later blocks, which a block-causal model never sees, so the teacher would "
                "know no more than the student; set the suffix context's scope to active_block"
            )
    return blueprint


def _check_precision(config: Config) -> None:
    """Refuse weights whose type loses what an update adds to them, on any number of processes and however sharded.

    In float16 small gradients are zero, adapters' too, and no loss scaling prevents it. A bfloat16 number has 8 bits:
    a step of less than 1/512 of a weight rounds to nothing, which is nearly every step at the rates of fine-tuning.
    Adapters are float32 in any case (PEFT), so that only weights trained whole are meant.
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
    other = "leave out model.lora.modules_to_save" if lora else "set model.lora"
    raise InputError(
        f"model.dtype bfloat16 would train {what} without float32 master weights, where most steps of an update round "
        f"to nothing; {remedy}, or {other}, or set optim.pure_bfloat16 to true if you want that"
    )


def check_decodings(config: Config, blueprint: Blueprint) -> None:
    """Refuse ways to decode, the run's own and other schedules, that this model does not have.

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
    """Refuse a method that needs what the task's data does not have, judged by its first problem.

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
    for context in config.method.contexts:
        hint = context.hint
        needed = None if hint is None else hint.needs_reference
        if needed is not None:
            found = task.reference(problem) if needed == "solution" else task.final_answer(problem)
            if found is None:
                raise InputError(
                    f"method.contexts {name_of(CONTEXTS | HINTS, hint)} needs the {needed} of each problem, but the "
                    "task's data has none; name other data, or another source"
                )


def check_references(config: Config, blueprint: Blueprint, problems: Sequence[Problem]) -> str | None:
    """Read the references that demonstrations imitate, or the first `REFERENCES_CHECKED`, with the tokenizer alone.

    Returns:
        A sentence on those that are longer than `decode.length`, None if there are none.

    Raises:
        InputError: if none fits, or a problem has none.
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
    seen, limit = len(lengths), config.decode.length
    of = f"the {seen:,} references" if seen == len(problems) else f"the first {seen:,} of {len(problems):,} references"
    long = sum(length > limit for length in lengths)
    if long == seen:
        raise InputError(
            f"none of {of} of the training split fits decode.length {limit}; the longest needs {max(lengths)}: set "
            "decode.length to that or more"
        )
    return (
        f"{long:,} of {of} of the training split are longer than decode.length {limit} and are left out "
        f"(rollouts/long_reference counts them); the longest needs {max(lengths)}"
        if long
        else None
    )


def check_words(config: Config, blueprint: Blueprint, problems: Sequence[Problem]) -> dict[str, str]:
    """Sentences on what the tokenizer does not know: of the first prompts and references, and of what hints add.

    Returns:
        Those that there are, of the prompts, the completions that demonstrations imitate, and the hints; and of
        special tokens that prompts and references spell.

    Raises:
        InputError: if the chat template leaves out the system message of a prompt.
    """
    chat, task = blueprint.chat, config.task
    if chat is None:
        return {}
    some = [problems[i] for i in range(min(PROMPTS_CHECKED, len(problems)))]
    conversations = [task.messages(problem) for problem in some]
    if any(message["role"] == "system" for messages in conversations for message in messages):
        chat.check_template(system=True)
    hints = [context.hint for context in config.method.contexts if context.hint is not None]
    shown = any(hint.needs_reference for hint in hints)
    references = [text for problem in some if (text := task.reference(problem)) is not None]
    hinted = [text for hint in hints for text in _words(hint)] + (references if shown else [])
    told = {
        "prompts": chat.warn_of_lost(map(chat.render, conversations), "the prompts"),
        "completions": chat.warn_of_lost([] if config.method.rollout.decodes else references, "the references"),
        "hints": chat.warn_of_lost(hinted, "the hints and the words around them (method.contexts)"),
        "special": chat.warn_of_control(
            [*(message["content"] for messages in conversations for message in messages), *references],
            "the first messages and references",
        ),
    }
    return {kind: sentence for kind, sentence in told.items() if sentence is not None}


def _words(hint: Hint) -> list[str]:
    """What a hint's templates say around their slots, and what it asks a teacher to reason about."""
    texts = [value for f in fields(hint) if isinstance(value := getattr(hint, f.name), str) and "{" in value]
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
    models = [replace(config.model, path=one.path or config.model.path) for one in peers.students]
    if config.model.lora and models[0].path != models[1].path:
        raise InputError("two adapters need one base; leave out the students' paths, or set model.lora to null")
    first, second = (read_blueprint(model) for model in models)
    if (first.causal, first.block_length) != (second.causal, second.block_length):
        raise InputError("peers.students are of different kinds; choose two checkpoints of the same architecture")
    assert first.chat is not None
    assert second.chat is not None
    if first.chat.tokenizer.get_vocab() != second.chat.tokenizer.get_vocab():
        raise InputError("peers.students have different tokenizers; choose two checkpoints with the same")
    if config.task.problems("dev") and len({*map(str, _domains(config))}) < 2:
        raise InputError(f"all dev problems are of one domain (peers.field {peers.field!r}); give task data of two")


def _domains(config: Config) -> list[str]:
    assert config.peers is not None
    field, problems = config.peers.field, config.task.problems("dev")
    if missing := [problem.id for problem in problems if field not in problem.fields]:
        raise InputError(f"problem {missing[0]} has no field {field!r} (peers.field); name the field of its domain")
    return [str(problem.fields[field]) for problem in problems]


def _decodings(config: Config) -> dict[str, Decoding]:
    """How the run decodes: its own settings and the other schedules, each by its key."""
    own = {"eval.decode": config.held_out()} if config.eval.decode else {}
    schedules = {f"eval.schedules.{name}": config.held_out(name) for name in config.eval.schedules}
    return {"decode": config.decode} | own | schedules


def _check_causal_decoding(config: Config, settings: Decoding, key: str) -> None:
    """Refuse a way to decode that an autoregressive model does not have."""
    for name, meaning in (("threshold", "commits several tokens a step"), ("guidance", "masks the prompt")):
        if getattr(settings, name):
            raise InputError(f"{key}.{name} {meaning}, which an autoregressive model cannot; leave it out")
    if settings.compile is not None:
        raise InputError(f"{key}.compile is for denoising and this model is autoregressive; leave it out")
    if settings.continuous and config.optim.autocast not in (None, config.model.dtype):
        other = f"model.dtype to {config.optim.autocast}, or " if config.model.lora else ""
        raise InputError(
            f"{key}.continuous under optim.autocast needs weights of that type; set {other}{key}.continuous to false"
        )


def _check_causal(config: Config) -> None:
    """Refuse teachers that show what an autoregressive model never reads."""
    for context in config.method.contexts:
        if context.reveals:
            raise InputError(
                f"method.contexts {name_of(CONTEXTS, context)} reveals what stands behind the graded token, where an "
                "autoregressive model never looks; hint in the prompt instead (reference, sibling)"
            )


def _check_teachers(config: Config, blueprint: Blueprint) -> None:
    """Refuse teachers that cannot read what the student reads, and hints that cannot be written."""
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
    for name, how in (config.method.skill_bank.texts() if config.method.skill_bank else {}).items():
        if how.thinking is not None and blueprint.chat and not blueprint.chat.has_switch:
            raise InputError(
                f"method.skill_bank.{name} sets thinking, but the chat template has no thinking switch; leave it out"
            )
        if not blueprint.causal:
            text = replace(config.decode, length=how.length)
            check_denoising(blueprint.block_length, text, f"the texts of method.skill_bank.{name} with decode")
    for weights in config.method.models():
        if weights.of_another_run and weights.source is None and config.peers is None:
            raise InputError("a context's writer peer has no path; name a checkpoint or adapter of another run")
        model = weights.other_model(config.model)
        if model is None:
            continue
        if model.path is None:
            raise NotAtHand("method.teacher.0.path is missing; name the checkpoint that teaches")
        other = read_blueprint(model)
        if other.causal != blueprint.causal or other.block_length != blueprint.block_length:
            raise InputError(
                f"the teacher at {weights.source!r} does not read what the student reads (autoregressive, denoising or "
                "in blocks); choose one of the student's kind"
            )
        assert other.chat is not None
        assert blueprint.chat is not None
        if other.chat.tokenizer.get_vocab() != blueprint.chat.tokenizer.get_vocab():
            raise InputError(
                f"the teacher at {weights.source!r} has another tokenizer than the student; choose one with the same"
            )
