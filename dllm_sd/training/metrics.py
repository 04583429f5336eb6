"""What a run writes while it trains: metrics.jsonl, samples.jsonl, TensorBoard."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from dllm_sd.errors import InputError
from dllm_sd.files.reading import damaged_file, open_regular, read_own
from dllm_sd.files.typed_json import own_json
from dllm_sd.files.writing import write_file
from dllm_sd.objective.equation import Graded
from dllm_sd.objective.plan import Plan
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.training.advantage import GradedPlans, advantage_picture
from dllm_sd.training.left_out import is_left_out, left_out
from dllm_sd.trajectory import NEVER

LOG_FILES = ("metrics.jsonl", "samples.jsonl")
REMEDY = "correct it, remove the file, or discard the run with resume=fresh"


class MetricsLog:
    """Appends one JSON object per update; a resumed run first removes the lines after its checkpoint."""

    def __init__(self, run: Path, update: int, tensorboard: bool) -> None:
        """Continue after ``update`` finished updates (-1 starts new files).

        Raises:
            InputError: if a file was not written by a run; then nothing is changed.
        """
        self.metrics, self.samples = (run / name for name in LOG_FILES)
        ends = {file: end_of(file, update) for file in (self.metrics, self.samples) if file.exists()}
        self.board = SummaryWriter(str(run / "tb"), purge_step=update + 1) if tensorboard else None
        for file, end in ends.items():
            os.truncate(file, end)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append the metrics of an update; numbers also go to TensorBoard."""
        _append(self.metrics, values)
        if self.board is not None:
            for name, value in values.items():
                if name != "update" and isinstance(value, int | float):
                    self.board.add_scalar(name, value, values["update"])
            self.board.flush()

    def summed_up(self, passes: int) -> tuple[dict[str, int], bool]:
        """What the run left out (`left_out`), and whether it has made optimizer steps, none of which changed a weight.

        Args:
            passes: updates that share their rollouts.

        Raises:
            InputError: naming the file and the line that was not written by a run.
        """
        changed: list[bool] = []

        def lines() -> Iterator[dict[str, Any]]:
            for line in read_log(self.metrics):
                if line["update"] > 0:  # update 0 is the evaluation before training; a skipped update has no loss
                    changed.append(line.get("loss") is not None and "weights_unchanged" not in line)
                yield line

        return left_out(lines(), passes), bool(changed) and not any(changed)

    def write_sample(self, sample: Mapping[str, Any], slot: int) -> None:
        """Append one rollout with its text; TensorBoard shows it as ``samples/{slot}``."""
        _append(self.samples, sample)
        if self.board is not None:
            text = "\n\n".join(f"**{key}**: {value}" for key, value in sample.items() if key != "update")
            self.board.add_text(f"samples/{slot}", text, sample["update"])

    def write_pictures(self, pictures: Mapping[str, Tensor], update: int) -> None:
        """Show RGB pictures ``[3 h w]`` in TensorBoard."""
        if self.board is not None:
            for name, picture in pictures.items():
                self.board.add_image(name, picture, update)

    def close(self) -> None:
        """Flush and close TensorBoard."""
        if self.board is not None:
            self.board.close()


SITE_MEANS = {
    "divergence": "value",
    "student/entropy": "student_entropy",
    "teacher/entropy": "teacher_entropy",
    "teacher/agreement": "agreement",
    "teacher/advantage": "advantage",
}
"""Logged name: field of `Graded`, averaged over all sites of an update."""


def site_sums(graded: Sequence[Graded], measured: Sequence[str], device: torch.device) -> Tensor:
    """Sums over the sites of this process, float64, to be added over processes.

    In order: loss, number of sites, `Graded.clipped`, the fields of `SITE_MEANS`, the ``measured`` quantities.
    """
    total = torch.zeros(3 + len(SITE_MEANS) + len(measured), dtype=torch.float64, device=device)
    for part in graded:
        values = [part.clipped, *(getattr(part, name) for name in SITE_MEANS.values())]
        fields = [value.double().sum() for value in (*values, *(part.measures[name] for name in measured))]
        total += torch.stack([part.loss.detach().double(), part.value.new_tensor(part.value.numel()).double(), *fields])
    return total


def site_metrics(sums: Tensor, measured: Sequence[str]) -> dict[str, float]:
    """Metrics from the sums over all processes; a mean that is not defined (no teacher) is left out."""
    loss, sites, clipped, *rest = sums.tolist()
    totals = dict(zip([*SITE_MEANS, *measured], rest, strict=True))
    means = {name: total / sites for name, total in totals.items()}
    means["clip_share"] = clipped_share(totals["divergence"], clipped)
    return {"loss": loss, "sites": int(sites), **{name: mean for name, mean in means.items() if not math.isnan(mean)}}


def clipped_share(unclipped: float, clipped: float) -> float:
    """The share of the divergence that the clip removes, from the sums over all sites before and after the clip.

    A clip per vocabulary entry lowers positive summands only, so the clipped sum can be negative and the share above 1.
    The clip of a policy gradient's importance ratio can raise the surrogate, and then the share is negative. NaN if the
    unclipped sum is 0 and the clipped one is not.
    """
    removed = unclipped - clipped
    if not removed:
        return 0.0
    return removed / unclipped if unclipped else math.nan


WRITING = ("written", "cached", "damaged")
"""Counts of the texts of hint writers that become metrics."""


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Metrics of the rollouts of an update; rates are shares of problems."""
    counts = rollouts.counts
    problems, attempts = max(1.0, counts["problems"]), max(1.0, counts["attempts"])
    return {
        "rollouts/problems": int(counts["problems"]),
        "rollouts/attempts": int(counts["attempts"]),
        "rollouts/decoded": int(counts["decoded"]),
        "rollouts/pass_rate": counts["solved"] / problems,
        "rollouts/first_try": counts["first_try"] / problems,
        "rollouts/kept": int(counts["kept"]),
        "rollouts/rejected": int(counts["rejected"]),
        "rollouts/no_hint": int(counts["no_hint"]),
        "rollouts/long_hint": int(counts["long_hint"]),
        "rollouts/cut_hint": int(counts.get("cut_hint", 0)),
        "rollouts/generated": int(counts["generated"]),
        "rollouts/length": counts["tokens"] / attempts,
        "rollouts/steps": counts["steps"] / attempts,
        **_behind_end(rollouts),
        **{f"rollouts/{name}": int(counts[name]) for name in ("long_reference",) if name in counts},
        **{f"writers/{name}": int(n) for name, n in counts.items() if name in WRITING or name.startswith("dropped/")},
    }


def _behind_end(rollouts: Rollouts) -> dict[str, float]:
    """The share of the revealed tokens of kept rollouts that follow the end token; empty if none was kept."""
    if not rollouts.size:
        return {}
    trajectory = rollouts.trajectory
    revealed = trajectory.reveal_step != NEVER
    after_end = revealed & trajectory.is_behind_end
    return {"rollouts/behind_end": float(after_end.sum() / revealed.sum().clamp(min=1))}


def sample_entry(update: int, rollout: Rollout) -> dict[str, Any]:
    """One line of samples.jsonl: the problem's fields, the generation and its grade."""
    grade = rollout.grade
    return {
        **rollout.problem.fields,
        "update": update,
        "problem": rollout.problem.id,
        "occurrence": rollout.occurrence,
        "attempt": rollout.attempt,
        "correct": grade.correct,
        "score": grade.score,
        "parsed": grade.parsed,
        "generation": rollout.text,
    }


def broken_sites(plan: Plan, graded: Graded, rollouts: Rollouts) -> list[dict[str, Any]]:
    """The sites whose loss is not finite, each with its rollout; positions below 0 are in the prompt."""
    canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
    sites = []
    for i in (~torch.isfinite(graded.term)).nonzero()[:, 0].tolist():
        rollout = rollouts.kept[int(plan.rows[canvas[i]])]
        sites.append(
            {
                "problem": rollout.problem.id,
                "occurrence": rollout.occurrence,
                "attempt": rollout.attempt,
                "step": int(plan.steps[canvas[i]]),
                "position": int(position[i]) - _prompt_columns(graded, rollout),
                "loss": str(float(graded.term[i])),
            }
        )
    return sites


def write_broken_sites(file: Path, update: int, sites: Sequence[Mapping[str, Any]], rollouts: Rollouts) -> None:
    """Write the `broken_sites` of all processes, and all rollouts of the update, as JSON."""
    kept = [{"problem": one.problem.id, "occurrence": one.occurrence, "attempt": one.attempt} for one in rollouts.kept]
    write_file(file, json.dumps({"update": update, "sites": sites, "rollouts": kept}, indent=1))


def problems_of(sites: Sequence[Mapping[str, Any]], rollouts: Rollouts) -> str:
    """The first problems of broken sites, or of all rollouts if there are none, as words."""
    names = sorted({site["problem"] for site in sites} or {rollout.problem.id for rollout in rollouts.kept})
    return f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"


def _prompt_columns(graded: Graded, rollout: Rollout) -> int:
    """How many columns of `Graded.sites` belong to the prompt: 0 unless the prompt is graded too."""
    return graded.sites.shape[1] - rollout.trajectory.tokens.shape[1]


def divergence_table(parts: GradedPlans, rollouts: Rollouts) -> tuple[Tensor, Tensor] | None:
    """Of the first rollout: `reveal_step` int64 ``[l]`` and the divergence ``[k l]``.

    The divergence is NaN where this process graded no site. None if it graded none of the rollout.
    """
    trajectory = rollouts.kept[0].trajectory
    table = torch.full((int(trajectory.num_steps), trajectory.tokens.shape[1]), torch.nan)
    for plan, graded in parts:
        canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
        rows, steps = plan.rows[canvas], plan.steps[canvas]
        position = position - _prompt_columns(graded, rollouts.kept[0])
        in_first = (rows == 0) & (steps >= 0) & (position >= 0)
        table[steps[in_first], position[in_first]] = graded.value.float().cpu()[in_first]
    return None if bool(table.isnan().all()) else (trajectory.reveal_step[0], table)


def pictures(parts: GradedPlans, regions: Tensor | None, rollouts: Rollouts) -> dict[str, Tensor]:
    """Pictures of the first rollout by name: its trajectory, and the teacher's advantage if ``regions`` are known."""
    table, bars = divergence_table(parts, rollouts), advantage_picture(parts, regions)
    return ({"trajectory": trajectory_picture(*table)} if table else {}) | ({} if bars is None else {"advantage": bars})


def end_of(file: Path, update: int) -> int:
    """The byte offset after the last line of ``update`` in a JSON-lines file whose updates never decrease.

    An incomplete line at the end is ignored. Only the lines after that offset, and the one before it, are parsed.

    Raises:
        InputError: if the file was not written by a run.
    """
    content = read_own(file, REMEDY, sys.maxsize) if update >= 0 else b""
    end = content.rfind(b"\n") + 1  # what follows the last newline is an incomplete line
    _refuse_foreign_lines(file, content[:end])
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        if _update_in(file, content, start, end) <= update:
            break
        end = start
    return end


def log_sums(run: Path, update: int) -> dict[str, str]:
    """Flush the logs to disk; return the SHA-256 of each up to ``update``, which a checkpoint stores, by file name."""
    return {name: _sum(run / name, update, flush=True) for name in LOG_FILES if (run / name).exists()}


def check_logs(run: Path, update: int, sums: Mapping[str, str] | None) -> None:
    """Refuse logs whose content up to ``update`` has changed since the checkpoint of ``update`` was saved.

    Args:
        run: the run folder.
        update: number of finished updates.
        sums: the result of `log_sums` at that time. With None (a checkpoint of an earlier version, or resume=force) it
            is only checked that every line is one of a run.

    Raises:
        InputError: naming the file. Nothing is changed.
    """
    for name in LOG_FILES if sums is None else ():
        if (run / name).exists():
            for _ in read_log(run / name):
                pass
    current = {name: _sum(run / name, update) for name in LOG_FILES if (run / name).exists()}
    for name, saved in (sums or {}).items():
        if current.get(name) != saved:
            raise InputError(
                f"{run / name} does not hold what it held after update {update}, when the checkpoint was saved; put it "
                "back, use resume=force to go on without what is missing, or resume=fresh to begin again"
            )


def _sum(file: Path, update: int, flush: bool = False) -> str:
    end = end_of(file, update)
    with file.open("r+b" if flush else "rb") as handle:
        if flush:
            os.fsync(handle.fileno())
        return hashlib.sha256(handle.read(end)).hexdigest()


def _refuse_foreign_lines(file: Path, lines: bytes) -> None:
    """Refuse lines that do not begin and end as JSON objects, by counting over the whole file."""
    count = lines.count(b"\n")
    if lines and (lines.count(b"}\n") < count or lines.count(b"\n{") < count - 1 or not lines.startswith(b"{")):
        wrong = next(i for i, line in enumerate(lines.split(b"\n"), 1) if line[:1] + line[-1:] != b"{}")
        raise _foreign_line(file, wrong)


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the lines of a log; an incomplete one at the end is ignored.

    Raises:
        InputError: naming the file and the line that was not written by a run.
    """
    try:
        with open_regular(file) as content:
            for number, line in enumerate(content, 1):
                if line.endswith(b"\n"):
                    yield _parsed(line) or _refuse(file, number)
    except OSError as error:
        raise damaged_file(file, error, REMEDY) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Parse one line of a log; None unless it is an object whose update and left-out counts are whole numbers."""
    try:
        tree = own_json(line)
    except ValueError:
        return None
    if not isinstance(tree, dict) or type(tree.get("update")) is not int:
        return None
    counts = [tree[name] for name in filter(is_left_out, tree)]
    return tree if all(type(count) is int and count >= 0 for count in counts) else None


def _update_in(file: Path, content: bytes, start: int, end: int) -> int:
    line = _parsed(content[start:end]) or _refuse(file, content.count(b"\n", 0, start) + 1)
    return line["update"]


def _refuse(file: Path, line: int) -> NoReturn:
    raise _foreign_line(file, line)


def _foreign_line(file: Path, line: int) -> InputError:
    return InputError(f"{file}:{line}: this line was not written by a run; {REMEDY}")


def _append(file: Path, values: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(values, ensure_ascii=False) + "\n")


def trajectory_picture(reveal_step: Tensor, value: Tensor, cell: int = 8) -> Tensor:
    """Draw one trajectory: decoding steps downwards, positions to the right.

    Args:
        reveal_step: int64 ``[l]``.
        value: float ``[k l]``, the divergence at graded sites, NaN elsewhere.
        cell: pixels of a cell.

    Returns:
        float32 ``[3 k*cell l*cell]`` in [0, 1]: grey where masked, white where revealed earlier, blue where revealed
        at this step. Graded sites are drawn over that in red, which is stronger where the divergence is larger.
    """
    steps = torch.arange(value.shape[0])[:, None]
    masked = (reveal_step == NEVER) | (reveal_step > steps)
    picture = torch.where(masked, 0.75, 1.0).expand(3, -1, -1).clone()
    now = reveal_step == steps
    picture[:, now] = torch.tensor([0.55, 0.7, 1.0])[:, None]
    graded = ~value.isnan()
    if bool(graded.any()):
        strength = (value[graded] / value[graded].max().clamp(min=1e-12)).clamp(0, 1).float()
        red = torch.stack([torch.full_like(strength, 0.9), 0.1 * (1 - strength), 0.1 * (1 - strength)])
        picture[:, graded] = picture[:, graded] * (1 - strength) + red * strength
    return picture.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
