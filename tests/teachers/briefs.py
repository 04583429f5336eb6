"""What the teachers of a rollout are told, context by context."""

from dllm_sd.rollouts.rollout import Rollout


def prompts_of(rollout: Rollout) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(brief.prompt for brief in rollout.briefs)


def weights_of(rollout: Rollout) -> tuple[float, ...]:
    return tuple(brief.weight for brief in rollout.briefs)


def texts_of(rollout: Rollout) -> tuple[str | None, ...]:
    return tuple(brief.text for brief in rollout.briefs)
