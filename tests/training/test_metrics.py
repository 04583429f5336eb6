"""What is written while training: cut where a run goes on, counted over all sites, drawn as it happened."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nan

from dllm_sd.errors import InputError
from dllm_sd.objective.equation import Graded
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks import Grade, Problem
from dllm_sd.training.metrics import (
    LOG_FILES,
    MetricsLog,
    check_logs,
    end_of,
    log_sums,
    rollout_metrics,
    sample_entry,
    site_metrics,
    site_sums,
    trajectory_picture,
)
from dllm_sd.trajectory import NEVER


def write_lines(file: Path, updates: list[int], tail: str = "") -> Path:
    file.write_text("".join(json.dumps({"update": update}) + "\n" for update in updates) + tail, encoding="utf-8")
    return file


def keep_until(file: Path, update: int) -> None:
    os.truncate(file, end_of(file, update))


def updates_in(file: Path) -> list[int]:
    return [json.loads(line)["update"] for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize(
    ("written", "update", "kept"),
    [
        ([0, 1, 2, 3], 2, [0, 1, 2]),
        ([0, 1, 2, 3], 3, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 9, [0, 1, 2, 3]),
        ([0, 1, 1, 2, 2, 3], 2, [0, 1, 1, 2, 2]),  # several samples an update
        ([0, 1, 2], -1, []),
        ([], 3, []),
    ],
)
def test_a_log_is_cut_after_an_update(tmp_path: Path, written: list[int], update: int, kept: list[int]):
    file = write_lines(tmp_path / "metrics.jsonl", written)
    keep_until(file, update)
    assert updates_in(file) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", ['{"upd', '{"update": 2}', '{"update": 2, "loss": 0.', "\x00\x00"])
def test_a_half_written_line_is_dropped(tmp_path: Path, tail: str):
    file = write_lines(tmp_path / "metrics.jsonl", [0, 1], tail)
    keep_until(file, 5)
    assert file.read_text(encoding="utf-8") == '{"update": 0}\n{"update": 1}\n'


def test_a_log_that_does_not_exist_is_not_made(tmp_path: Path):
    MetricsLog(tmp_path, 3, tensorboard=False)
    assert not list(tmp_path.iterdir())


def test_only_the_lines_that_go_and_the_last_that_stays_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, parsed, loads = write_lines(tmp_path / "metrics.jsonl", list(range(20000)), '{"half'), [], json.loads
    monkeypatch.setattr(json, "loads", lambda text, **hooks: parsed.append(text) or loads(text, **hooks))
    keep_until(file, 19996)
    assert len(parsed) == 4
    monkeypatch.undo()
    assert updates_in(file) == list(range(19997))


@pytest.mark.parametrize(
    "line", ["garbage", "[1]", "{1}", "{}", '{"loss": 1}', '{"update": true}', "", "\x00", "[" * 9999]
)
@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_line_that_no_run_wrote_is_refused_by_its_number(tmp_path: Path, line: str, place: int):
    file = write_lines(tmp_path / "samples.jsonl", [0, 1, 2, 3, 4])
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:place], line, *lines[place:]]) + "\n")
    write_lines(tmp_path / "metrics.jsonl", [0, 1, 2, 3, 4])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if line.startswith("{") and place == 0:  # well behind what is looked at
        assert end_of(file, 4) == len(before[file])
        return
    with pytest.raises(InputError) as refused:
        MetricsLog(tmp_path, 2, tensorboard=False)
    assert str(refused.value) == (
        f"{file}:{place + 1}: this line was not written by a run; correct it, remove the file, or discard the run with "
        "resume=fresh"
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_log_is_cut_at_newlines_only(tmp_path: Path):
    log = MetricsLog(tmp_path, -1, tensorboard=False)
    for update in (1, 2):
        log.write_sample({"update": update, "generation": "a\u2028b\u0085c"}, 0)
    keep_until(log.samples, 2)
    assert updates_in(log.samples) == [1, 2]


def test_a_log_goes_on_after_the_checkpoint(tmp_path: Path):
    first = MetricsLog(tmp_path, -1, tensorboard=False)
    for update in range(5):
        first.write({"update": update, "loss": None})
        first.write_sample({"update": update, "problem": "p"}, 0)
    second = MetricsLog(tmp_path, 2, tensorboard=False)
    second.write({"update": 3, "loss": 1.5})
    assert updates_in(tmp_path / "metrics.jsonl") == [0, 1, 2, 3]
    assert updates_in(tmp_path / "samples.jsonl") == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}


def test_tensorboard_gets_the_numbers_the_samples_and_the_picture(tmp_path: Path):
    log = MetricsLog(tmp_path, -1, tensorboard=True)
    log.write({"update": 1, "loss": 0.5, "sites": 3, "note": "text", "empty": None})
    log.write_sample({"update": 1, "problem": "p", "generation": "12"}, 0)
    log.write_pictures({"trajectory": torch.zeros(3, 8, 8)}, 1)
    log.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags: Any = events.Tags()
    assert set(tags["scalars"]) == {"loss", "sites"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5)]
    assert tags["images"] == ["trajectory"]
    assert tags["tensors"] == ["samples/0/text_summary"]


def graded(value: list[float], loss: float, **fields: list[float]) -> Graded:
    m = len(value)
    tensors = {"clipped": torch.tensor(fields.get("clipped", value))}
    tensors |= {"student_entropy": torch.tensor(fields.get("student_entropy", [0.0] * m))}
    tensors |= {
        name: torch.tensor(fields.get(name, [nan] * m)) for name in ("teacher_entropy", "agreement", "advantage")
    }
    measures = {name: torch.tensor(values) for name, values in fields.items() if name.startswith("target/")}
    sites = torch.ones(1, m, dtype=torch.bool)
    return Graded(
        torch.tensor(loss), torch.tensor(value), term=torch.zeros(m), sites=sites, measures=measures, **tensors
    )


def test_losses_add_up_and_the_rest_is_a_mean_over_all_sites():
    parts = [
        graded(
            [1.0, 2.0, 3.0],
            0.25,
            agreement=[1.0, 1.0, 0.0],
            teacher_entropy=[0.0, 1.0, 2.0],
            advantage=[1.0, -4.0, 0.0],
        ),
        graded(
            [10.0],
            0.5,
            agreement=[1.0],
            advantage=[1.0],
            teacher_entropy=[1.0],
            student_entropy=[4.0],
            clipped=[4.0],
        ),
    ]
    metrics = site_metrics(site_sums(parts, (), torch.device("cpu")), ())
    assert metrics == {
        "loss": 0.75,
        "sites": 4,
        "divergence": 4.0,
        "clip_share": 6 / 16,
        "student/entropy": 1.0,
        "teacher/entropy": 1.0,
        "teacher/agreement": 0.75,
        "teacher/advantage": -0.5,
    }
    assert isinstance(metrics["sites"], int)


@pytest.mark.parametrize(
    ("unclipped", "clipped", "share"),
    [
        ([2.0, 6.0], [1.0, 3.0], 0.5),
        ([0.5, 0.5], [0.5, 0.5], 0.0),
        ([0.0], [0.0], 0.0),
        ([1.0, 1.0], [-0.5, -0.5], 1.5),  # a clip of entries makes the sum negative
        ([-1.0], [-0.5], 0.5),
    ],
)
def test_the_clips_share_is_that_of_the_sums_and_not_a_mean_over_sites(unclipped, clipped, share):
    parts = [graded([value], 0.0, clipped=[after]) for value, after in zip(unclipped, clipped, strict=True)]
    assert site_metrics(site_sums(parts, (), torch.device("cpu")), ())["clip_share"] == pytest.approx(share)


def test_there_is_no_share_of_nothing():
    metrics = site_metrics(site_sums([graded([0.0], 0.0, clipped=[-1.0])], (), torch.device("cpu")), ())
    assert "clip_share" not in metrics


def test_without_a_teacher_nothing_is_said_about_it():
    metrics = site_metrics(site_sums([graded([1.0, 2.0], 0.5)], (), torch.device("cpu")), ())
    assert metrics.keys() == {"loss", "sites", "divergence", "clip_share", "student/entropy"}
    assert not any(math.isnan(value) for value in metrics.values())


def test_cutting_an_update_into_parts_does_not_change_its_metrics():
    alpha = "target/alpha"
    clipped = [1.0, 1.5, 0.0]
    whole = graded([1.0, 2.0, 4.0], 0.75, clipped=clipped, agreement=[1.0, 0.0, 1.0], **{alpha: [0.5, 0.25, 0.75]})
    parts = [graded([1.0, 2.0], 0.5, clipped=clipped[:2], agreement=[1.0, 0.0], **{alpha: [0.5, 0.25]})]
    parts += [graded([4.0], 0.25, clipped=clipped[2:], agreement=[1.0], **{alpha: [0.75]})]
    device = torch.device("cpu")
    metrics = site_metrics(site_sums(parts, [alpha], device), [alpha])
    assert metrics == site_metrics(site_sums([whole], [alpha], device), [alpha])
    assert metrics[alpha] == 0.5


def test_rollout_metrics_are_shares_of_problems_and_means_over_attempts():
    counts = {"problems": 4, "attempts": 10, "decoded": 12, "solved": 3, "first_try": 1, "tokens": 50, "steps": 20}
    counts |= {"generated": 60, "no_hint": 2, "long_hint": 1}
    metrics = rollout_metrics(Rollouts((), {**counts, "kept": 3, "rejected": 1}))
    assert metrics == {
        **{"rollouts/problems": 4, "rollouts/attempts": 10, "rollouts/decoded": 12, "rollouts/kept": 3},
        **{"rollouts/rejected": 1, "rollouts/pass_rate": 0.75, "rollouts/first_try": 0.25},
        **{"rollouts/length": 5.0, "rollouts/steps": 2.0, "rollouts/generated": 60},
        **{"rollouts/no_hint": 2, "rollouts/long_hint": 1, "rollouts/cut_hint": 0},
    }


def test_a_sample_holds_the_fields_of_its_problem_and_the_verdict(noise: Any):
    problem = Problem("sudoku/train/3", {"puzzle": "12", "solution": "34"})
    rollout = Rollout(problem, 2, "56", Grade(False, 0.5, "5"), noise(b=1))
    assert sample_entry(7, rollout) == {
        **{"puzzle": "12", "solution": "34", "update": 7, "problem": "sudoku/train/3"},
        **{"occurrence": 0, "attempt": 2},
        **{"correct": False, "score": 0.5, "parsed": "5", "generation": "56"},
    }


def test_the_picture_of_a_trajectory_shows_what_was_masked_revealed_and_graded():
    reveal_step = torch.tensor([0, 1, NEVER])
    value = torch.tensor([[4.0, nan, nan], [nan, 2.0, 0.0]])
    picture = trajectory_picture(reveal_step, value, cell=1)
    grey, white, blue, red = [0.75] * 3, [1.0] * 3, [0.55, 0.7, 1.0], [0.9, 0.0, 0.0]
    half = [(a + b) / 2 for a, b in zip(blue, [0.9, 0.05, 0.05], strict=True)]
    expected = torch.tensor([[red, grey, grey], [white, half, grey]]).permute(2, 0, 1)
    assert torch.allclose(picture, expected, atol=1e-6)


def test_the_picture_has_square_cells_and_legal_colours():
    reveal_step = torch.tensor([1, 0, 2, 2])
    value = torch.full((3, 4), nan)
    value[2] = torch.tensor([nan, nan, 1e-20, 7.0])
    picture = trajectory_picture(reveal_step, value, cell=4)
    assert picture.shape == (3, 12, 16)
    assert picture.dtype == torch.float32
    assert bool(((picture >= 0) & (picture <= 1)).all())
    assert torch.equal(picture[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2), picture)


def test_a_trajectory_that_was_not_graded_still_has_a_picture():
    picture = trajectory_picture(torch.tensor([0]), torch.full((1, 1), nan), cell=1)
    assert picture[:, 0, 0].tolist() == pytest.approx([0.55, 0.7, 1.0])


def test_a_log_holds_what_it_held_when_the_checkpoint_was_saved_or_is_refused_by_name(tmp_path: Path):
    lines = {name: [f'{{"update": {i}, "in": "{name}"}}\n' for i in range(1, 5)] for name in LOG_FILES}
    for name in LOG_FILES:
        (tmp_path / name).write_text("".join(lines[name][:3]))
    saved = log_sums(tmp_path, 2)  # a line of the next update stands there already
    assert saved.keys() == set(LOG_FILES)
    for name in LOG_FILES:
        for last in (2, 3, 4):
            (tmp_path / name).write_text("".join(lines[name][:last]))
            check_logs(tmp_path, 2, saved)
        for wrong in (lines[name][:1], lines[name][1:], [lines[name][1], lines[name][0]], []):
            (tmp_path / name).write_text("".join(wrong))
            with pytest.raises(InputError, match=f"{name} does not hold what it held after update 2, .* resume=force"):
                check_logs(tmp_path, 2, saved)
            check_logs(tmp_path, 2, None)  # earlier checkpoints did not remember it
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match=f"{name} does not hold what it held"):
            check_logs(tmp_path, 2, saved)
        (tmp_path / name).write_text("".join(lines[name]))
