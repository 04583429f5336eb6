"""Unknown tokens in what comes up during a run: counted every time, said once."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dllm_sd.methods import METHODS
from dllm_sd.pretrained.blueprint import read_blueprint
from dllm_sd.pretrained.chat import Chat
from dllm_sd.pretrained.model import Model
from dllm_sd.rollouts.rollout import Rollout, Rollouts, TeacherBrief
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.training.unknown import Unknown, told_of

UNKNOWN, ONE = 3, 5


@pytest.fixture(scope="module")
def chat() -> Chat:
    found = read_blueprint(Model(path="tiny")).chat
    assert found is not None
    return found


@pytest.fixture
def rollouts(noise: Any) -> Rollouts:
    """One rollout: a prompt of four tokens, one of them unknown, behind padding; two of three hint tokens unknown."""
    trajectory = noise(b=1)
    tokens = torch.full_like(trajectory.tokens, ONE)
    tokens[0, 0] = UNKNOWN
    prompt = torch.tensor([[UNKNOWN, ONE, ONE, UNKNOWN, ONE]])
    mask = torch.tensor([[False, True, True, True, True]])
    trajectory = replace(trajectory, prompt_ids=prompt, prompt_mask=mask, tokens=tokens)
    one = Rollout(Problem("x", {}), 0, "1", Grade(True, 1.0, None), trajectory)
    return Rollouts((replace(one, briefs=(TeacherBrief((3, ONE, 3), 1.0, "1 is one"), TeacherBrief())),), {}, (one,))


def test_shares_are_of_tokens_without_padding(chat: Chat, rollouts: Rollouts):
    length = rollouts.kept[0].trajectory.tokens.shape[1]
    assert chat.unknown_id == UNKNOWN
    own = {"rollouts/unknown_prompts": 0.25, "rollouts/unknown_hints": 2 / 3}
    assert Unknown(chat, decodes=True)(rollouts) == own
    assert Unknown(chat, decodes=False)(rollouts) == {**own, "rollouts/unknown_completions": 1 / length}
    assert Unknown(None, decodes=True)(rollouts) == {}
    assert Unknown(chat, decodes=True)(Rollouts((), {})) == {}


def test_each_kind_is_said_once_with_an_example(chat: Chat, rollouts: Rollouts, capsys: pytest.CaptureFixture[str]):
    unknown = Unknown(chat, decodes=True, told=["prompts"])
    unknown(rollouts)
    assert capsys.readouterr().err == ""  # another process speaks
    unknown(rollouts, warn=True)
    said = capsys.readouterr().err
    assert said == (
        "66.7% of the tokens of the teachers' prompts are unknown to the tokenizer, such as 'isone' of the hint "
        "'1 is one'; the model cannot read them (rollouts/unknown_hints counts them)\n"
    )
    unknown(rollouts, warn=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "told"), [("opsd", {"prompts", "hints"}), ("step_align", {"prompts"})])
def test_what_is_said_before_a_run_does_not_hide_the_hints_that_are_written_in_it(name: str, told: set[str]):
    assert told_of(METHODS[name].method, ("prompts", "hints")) == told
