"""The public names: adding or removing one is a decision, so it shows here."""

import dllm_sd
from dllm_sd import Decoding


def test_the_public_names_are_frozen():
    assert sorted(dllm_sd.__all__) == [
        "Decoding",
        "InputError",
        "METHODS",
        "Policy",
        "TASKS",
        "Trajectory",
        "View",
        "grade",
        "load_policy",
        "train",
    ]


def test_every_public_name_can_be_imported():
    for name in dllm_sd.__all__:
        assert getattr(dllm_sd, name) is not None


def test_the_named_methods_are_frozen():
    assert sorted(dllm_sd.METHODS) == [
        "d_demo_psd",
        "d_opsd",
        "d_opsd_paper",
        "d_opsd_pmi",
        "d_opsd_prompt",
        "d_opsd_reference",
        "d_rcsd",
        "d_step_align",
        "demo_psd",
        "diffu_grpo",
        "grpo",
        "later_step",
        "op_co_distill",
        "opd",
        "opd_sampled",
        "opsd",
        "opsd_paper",
        "opsd_pmi",
        "opsd_reference",
        "opsd_v3",
        "popd",
        "rcsd",
        "rcsd_reference",
        "rcsd_writer",
        "rft",
        "rft_trajectory",
        "sdpo",
        "sdpo_paper",
        "self_distillation",
        "self_retraining",
        "sft",
        "sgsd",
        "spd",
        "step_align",
        "topd",
    ]


def test_the_version_is_a_release_number():
    assert all(part.isdigit() for part in dllm_sd.__version__.split("."))


def test_the_shipped_model_decodes_and_is_graded_through_the_public_names():
    policy = dllm_sd.load_policy("tiny")
    problem = dllm_sd.TASKS["sudoku"]().problems("dev")[0]
    prompt = policy.encode([{"role": "user", "content": problem.fields["puzzle"]}])
    trajectory = policy.decode([prompt], Decoding(length=16, block_length=4, tokens_per_step=1), [0])
    text = policy.text(trajectory.tokens[0].tolist())
    assert len(text) == 16
    assert 0 <= dllm_sd.grade("sudoku", problem, text).score <= 1
