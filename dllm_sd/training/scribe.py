"""What teachers write: texts for hints, made with a teacher's weights and dealt over the processes."""

from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator
from accelerate.utils import gather_object

from dllm_sd.policies.decoding import Decoding
from dllm_sd.policies.weights import Teacher
from dllm_sd.teachers.context import Reasoning
from dllm_sd.training.sharding import gathered


class Scribe:
    """Lets the teacher of a context answer prompts; to be called by all processes together."""

    def __init__(self, teachers: Sequence[Teacher], decode: Decoding, accelerator: Accelerator) -> None:
        self.teachers, self.decode, self.accelerator = teachers, decode, accelerator

    def __call__(
        self, context: int, prompts: Sequence[Sequence[int]], reasoning: Reasoning, keys: Sequence[int]
    ) -> list[str]:
        """One text for each prompt; every process has all prompts, and gets all texts."""
        teacher, accelerator = self.teachers[context], self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        settings = replace(self.decode, length=reasoning.length, temperature=reasoning.temperature)
        mine = range(rank, len(prompts), world)
        texts: list[tuple[int, str]] = []
        with teacher.present(), gathered(accelerator, teacher.policy.module):
            if mine:
                written = teacher.policy.decode([prompts[i] for i in mine], settings, [keys[i] for i in mine])
                rows = zip(mine, written.tokens, written.length.tolist(), strict=True)
                texts = [(i, teacher.policy.text(tokens[:length].tolist())) for i, tokens, length in rows]
        return [text for _, text in sorted(gather_object(texts) if world > 1 else texts)]
