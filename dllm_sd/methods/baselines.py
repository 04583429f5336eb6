"""Methods without privileged information: imitation, policy gradients, training on the model's own text."""

from dataclasses import replace

from dllm_sd.canvases import AllMaskedCanvas, RandomMasks
from dllm_sd.losses.divergences import TokenNLL
from dllm_sd.losses.sites import AllMaskedSites
from dllm_sd.losses.targets import Sampled
from dllm_sd.losses.trust import GroupAdvantage
from dllm_sd.methods.method import Method
from dllm_sd.methods.named_method import GROUP, SELF_TRAINING, NamedMethod
from dllm_sd.policies.weights import BaseWeights
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.rules import Demonstrations, PassAtK
from dllm_sd.teachers import (
    Nothing,
)

BASELINES: dict[str, NamedMethod] = {
    "sft": NamedMethod(
        Method(
            rollout=Demonstrations(),
            gate=All(),
            canvases=RandomMasks(),
            contexts=(),
            sites=AllMaskedSites(),
            target=Sampled(),
            divergence=TokenNLL(),
            average="canvases",
        ),
        "LLaDA, arXiv 2502.09992, Eq. 3 and Alg. 2",
        "Cross-entropy on the references of the data; on masked diffusion with random masks and 1/t weights.",
    ),
    "rft": NamedMethod(
        Method(
            canvases=RandomMasks(draws=8),
            contexts=(),
            sites=AllMaskedSites(),
            target=Sampled(),
            divergence=TokenNLL(),
            average="canvases",
        ),
        "rejection fine-tuning (arXiv 2308.01825) with the loss of LLaDA",
        "Cross-entropy on the model's own correct rollouts, with random masks on masked diffusion.",
        parent="sft",
    ),
    "rft_trajectory": NamedMethod(
        Method(contexts=(), target=Sampled(), divergence=TokenNLL()),
        "rejection fine-tuning on the decoder's canvases",
        "Cross-entropy on the sampled tokens, on exactly the canvases and sites of d_opsd: a strong baseline.",
    ),
    "diffu_grpo": NamedMethod(
        Method(
            rollout=PassAtK(keep="all", until_solved=False),
            gate=All(),
            canvases=AllMaskedCanvas(),
            contexts=(Nothing(),),
            sites=AllMaskedSites(),
            target=Sampled(),
            divergence=TokenNLL(),
            trust=GroupAdvantage(normalise=False, kl=0.04),
        ),
        "d1, arXiv 2504.12216, Sec. 3.2 and github.com/dllm-reasoning/d1",
        "Group advantage, not divided by its standard deviation, as in the code; a one-step estimate of the "
        "likelihood with 15 % of the prompt masked; KL penalty to the initial weights. For d1's reuse of "
        "rollouts set rollout.passes above 1 and add a snapshot context.",
    ),
    "grpo": NamedMethod(
        Method(
            rollout=GROUP,
            gate=All(),
            contexts=(Nothing(),),
            target=Sampled(),
            divergence=TokenNLL(),
            trust=GroupAdvantage(ratio_clip=0.2, kl=0.04),
        ),
        "GRPO, arXiv 2402.03300",
        "Group advantage on the likelihood of each token at the step where it was chosen, with a KL penalty "
        "to the initial weights. On masked diffusion this is the likelihood along the decoder's own path.",
        parent="diffu_grpo",
    ),
    "spd": NamedMethod(
        SELF_TRAINING,
        "SPD, arXiv 2605.22675, Eq. 6 to 14, and github.com/gh540-svg/hahaha, commit e249fec",
        "Cross-entropy on the model's own text, correct or wrong. The text is written by the initial weights "
        "with keys and values projected onto the subspace on which correct answers depend. One text is drawn "
        "for each problem, and later epochs train on it again. Prompts are not trained on; in the paper they "
        "are (method.sites.prompt).",
    ),
    "self_distillation": NamedMethod(
        replace(SELF_TRAINING, rollout=replace(SELF_TRAINING.rollout, policy=BaseWeights())),
        "the comparison SSD of arXiv 2605.22675",
        "spd without the projection.",
        parent="spd",
    ),
    "self_retraining": NamedMethod(
        replace(SELF_TRAINING, rollout=replace(SELF_TRAINING.rollout, policy=BaseWeights(), top_p=1.0)),
        "the comparison PSR of arXiv 2605.22675",
        "spd without the projection and without top-p.",
        parent="self_distillation",
    ),
}
