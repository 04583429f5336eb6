"""Decodings as JSON: whatever a decoder can give comes back bit for bit, and nothing else is taken for one."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dllm_sd.config import build_config, to_tree
from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.wire import (
    SETTINGS,
    request_to_json,
    settings_to_json,
    stop_after_from_json,
    stop_after_to_json,
)
from dllm_sd.trajectory import StopAfter, Trajectory, left_pad, left_to_right
from dllm_sd.trajectory_json import trajectory_from_json, trajectory_to_json

VOCABULARY = 12
Noise = Callable[..., Trajectory]


def written(noise: Noise) -> list[Trajectory]:
    """Completions of many kinds, one by one: complete and cut, denoised and autoregressive."""
    whole = [
        noise(),
        noise(seed=1, early_end=False),
        noise(seed=2, blocks_of_prompt=True),
        noise(seed=3, steps=27, early_end=False),
        noise(seed=4, length=8, block_length=8, threshold=0.05, order="confidence"),
    ]
    cut = [x.within(StopAfter(unit, count)) for x in whole for unit in ("blocks", "steps") for count in (1, 2)]
    tokens = torch.tensor([[3, 4, 10, 9], [3, 4, 5, 6], [10, 3, 3, 3]])
    logp = torch.tensor([[-0.1, -1e-30, -3.0, torch.nan]] * 3).log_softmax(1).nan_to_num(-1 / 3)
    prompt = left_pad([[1], [2, 3, 4], [5, 6]], 9)
    causal = left_to_right(prompt, tokens, 7, end_ids=(10, 8), pad_id=9, logp=logp)
    every = [*whole, *cut, causal, replace(causal, logp=None), causal.within(StopAfter("steps", 2))]
    return [one for trajectory in every for one in trajectory.unstack()]


def read(trajectory: Trajectory, tree: Any) -> Trajectory:
    """What a client reads that sent the prompt of a trajectory."""
    prompt = trajectory.prompt_ids[0].tolist()
    return trajectory_from_json(json.loads(json.dumps(tree)), prompt, trajectory.tokens.shape[1], VOCABULARY)


def assert_same(ours: Trajectory, theirs: Trajectory) -> None:
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, value in ours.tensors().items():
        other = theirs.tensors()[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        exact = (value.view(torch.int32), other.view(torch.int32)) if value.is_floating_point() else (value, other)
        assert torch.equal(*exact), name
    assert replace(ours, **theirs.tensors()) == theirs


def test_whatever_a_decoder_gives_comes_back_bit_for_bit(noise: Noise):
    every = written(noise)
    for trajectory in every:
        assert_same(trajectory, read(trajectory, trajectory_to_json(trajectory)))
    assert {one.causal for one in every} == {one.blocks_of_prompt for one in every} == {True, False}
    assert any(bool((one.reveal_step >= one.tokens.shape[1]).any()) for one in every)  # idle steps were skipped


WRONG = (None, "x", True, 1.5, [], {}, -2, 10**30, [1], ["x"], [None] * 24, [0] * 24, [-5] * 24, [10**6] * 24)


def test_an_answer_is_refused_in_a_short_sentence_or_means_what_it_says(noise: Noise):
    refused = 0
    for trajectory in (noise().unstack()[0], noise(seed=2, blocks_of_prompt=True).unstack()[1]):
        tree = trajectory_to_json(trajectory)
        for name in tree:
            with pytest.raises(ValueError, match=name):
                read(trajectory, {key: value for key, value in tree.items() if key != name})
            for changed in ({**tree, name: wrong} for wrong in WRONG):
                sentence, accepted = "", None
                try:
                    accepted = trajectory_to_json(read(trajectory, changed))
                except ValueError as error:
                    sentence = str(error)
                refused += accepted is None
                assert accepted in (None, changed)
                assert len(sentence) <= 200
    assert refused > 2 * 10 * len(WRONG)


@pytest.mark.parametrize("tree", [None, [], "x", 3, {}])
def test_what_is_no_answer_is_refused(noise: Noise, tree: Any):
    with pytest.raises(ValueError, match="the answer"):
        read(noise().unstack()[0], tree)


def change(tree: dict[str, Any], name: str, place: int, value: Any) -> dict[str, Any]:
    return {**tree, name: [*tree[name][:place], value, *tree[name][place + 1 :]]}


def test_each_position_must_make_sense(noise: Noise):
    trajectory = noise(seed=1, early_end=False).within(StopAfter("blocks", 2)).unstack()[0]  # open from 16 on
    tree, steps = trajectory_to_json(trajectory), trajectory.reveal_step[0].tolist()
    changes = {
        "holds a token": change(tree, "tokens", 20, 3),
        "or a log-probability": change(tree, "logp", 20, -0.5),
        "holds the mask token": change(tree, "tokens", 3, 11),
        "not a token of a vocabulary": change(tree, "tokens", 3, 12),
        r"logp\[3\] is None": change(tree, "logp", 3, None),
        r"logp\[3\] is 0.5": change(tree, "logp", 3, 0.5),
        r"logp\[3\] is -1e\+300": change(tree, "logp", 3, -1e300),
        "not a step": change(tree, "reveal_step", 3, 2**40),
        "before the one to its left": change(tree, "reveal_step", 3, steps[10]),
        "prompt came back changed": {**tree, "prompt_ids": [*tree["prompt_ids"], 3]},
        "length is": {**tree, "length": tree["length"] - 1},
        "does not divide": {**tree, "block_length": 5},
        "tokens lists 23": {**tree, "tokens": tree["tokens"][:-1]},
    }
    for reason, changed in changes.items():
        with pytest.raises(ValueError, match=reason):
            read(trajectory, changed)


def test_an_autoregressive_answer_is_one_token_after_the_other():
    prompt = left_pad([[1, 2]], 9)
    trajectory = left_to_right(prompt, torch.tensor([[3, 4, 10]]), 6, end_ids=(10,), pad_id=9)
    tree = trajectory_to_json(trajectory)
    for changed, reason in (
        (change(tree, "reveal_step", 1, 2), "one token after the other"),
        ({**tree, "mask_id": 3}, "mask_id is 3"),
        ({**tree, "block_length": 2}, "blocks of one token"),
        ({**change(change(tree, "tokens", 3, 4), "reveal_step", 3, 3)}, "behind its end token"),
        ({**tree, "causal": False}, "mask_id holds -1"),
    ):
        with pytest.raises(ValueError, match=reason):
            read(trajectory, changed)


def test_one_completion_is_written_at_a_time_and_no_infinite_number(noise: Noise):
    with pytest.raises(ValueError, match="not 6"):
        trajectory_to_json(noise())
    trajectory = noise().unstack()[0]
    assert trajectory.logp is not None
    with pytest.raises(ValueError, match="infinite"):
        trajectory_to_json(replace(trajectory, logp=trajectory.logp - torch.inf))


def test_settings_that_decide_what_is_decoded_go_over_the_wire():
    decode = {"length": 64, "steps": 16, "temperature": 0.7, "suppress": [3, 4], "batch_size": 5}
    config = build_config({"task": {"name": "gsm8k"}, "decode": decode})
    tree = json.loads(json.dumps(settings_to_json(config.decode)))
    assert tree == {name: to_tree(config.decode)[name] for name in SETTINGS}
    assert Decoding(**{**tree, "suppress": (3, 4)}, batch_size=5) == config.decode


@pytest.mark.parametrize("stop_after", [None, StopAfter("blocks", 3), StopAfter("steps", 1)])
def test_where_decoding_stops_comes_back(stop_after: StopAfter | None):
    assert stop_after_from_json(json.loads(json.dumps(stop_after_to_json(stop_after)))) == stop_after
    assert request_to_json([1], 5, Decoding(), stop_after)["stop_after"] == stop_after_to_json(stop_after)


def test_what_is_no_reach_is_refused():
    units = ("days", [], None, 1)
    counts = (0, -1, True, 1.0, "1", 2**40, None)
    pairs = [*((unit, 1) for unit in units), *(("steps", count) for count in counts)]
    for tree in [3, "steps", {}, {"unit": "steps"}, *({"unit": unit, "count": count} for unit, count in pairs)]:
        with pytest.raises(ValueError, match="stop_after"):
            stop_after_from_json(tree)
