"""The page docs/which_method.md: what each method needs, what it costs and what it gained, from declarations of its
parts and from measurements."""

import re
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_sd.methods import METHODS, Method
from dllm_sd.parts import name_of
from dllm_sd.policies.weights import WEIGHTS
from dllm_sd.reports.method_page import is_premise_missing, measured
from dllm_sd.teachers import HINTS
from dllm_sd.teachers.writing import WRITERS
from tools.lab.claims import Row, read_laboratory
from tools.lab.records import results_of
from tools.lab.verdicts import gain

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD = """# Which method when

Start with what your data has:

| your data | begin with | then try |
|---|---|---|
| questions and answers that can be graded, masked-diffusion model | `rft_trajectory`, `d_opsd` | `d_demo_psd` |
| questions and worked solutions, autoregressive model | `opsd` | `opsd_paper`, `d_opsd_prompt` |
| questions and answers that can be graded, autoregressive model | `sdpo`, `grpo` | `demo_psd` |
| questions, worked solutions, and little time | `sft` | `opsd` |
| questions only | `later_step` (masked diffusion), `self_distillation` | `spd` |
| a stronger model with the same tokenizer | `topd`, `opd` | `popd` |
| rubrics | `rcsd` | `rcsd_reference` |
| a model that can criticise solutions | `step_align` | `op_co_distill` |

This table follows from what the methods need, and from what [the laboratory](results.md) measured with tuned settings
on models of 0.2 to 1.1 million weights and one of 135 million ([what was learnt](results.md#what-was-learnt)):

- **Worked solutions**: `opsd` gains more than `sft`, `rft_trajectory` and `grpo` at equal tokens on the tiny model, and
  nothing without the reference. On the pretrained one it gains too, but `sft` gains far more. So train `sft` as well.
- **Answers, masked diffusion**: `d_opsd` gains on Sudoku and Countdown, only by the answer that the teacher sees, and
  more than `diffu_grpo`. `rft_trajectory`, hard labels on the same canvases, gains more still.
- **A stronger model**: `opd` and `popd` gain most, and come near `sft` on worked solutions without needing any. Cutting
  rollouts short (`topd`) loses: 4 points at three quarters of a completion, most of the gain at a fifth.
- **Bare answers behind which a model leaves out its steps**: `opsd_reference` learns that shortcut at higher rates
  and loses nearly everything; `opsd_pmi` keeps steps and accuracy at the same rate, and gains nothing.
- **Siblings in the prompt** (`sdpo`, `demo_psd`): where the model reads them well (Countdown) as good as `grpo`, and
  `demo_psd` keeps more accuracy on larger numbers than `sdpo`; on Sudoku both lost accuracy.
- **Rubrics, critiques, skills**: where the model uses the hint and is weak without it, a rubric teaches about as much
  as a solution, and `sgsd` gains without knowing which skill is right. Where it is strong already, none of these
  gained.
- **Two specialists** (`op_co_distill`): both gained on Countdown, and more still by what their own siblings teach
  (`peers.tolerance=null`, or `sdpo` for each), since a peer's comment there is right only as often as the peer is.
- **Training domain and beyond**: on Countdown with hints `sft` on worked solutions gained most in its own domain, and
  lost half of its accuracy on larger numbers, where methods on the model's own rollouts gained.

Always train `sft` or `rft` on the same problems as well: another method is worth its cost only if it gains more, or
keeps more of what `sft` forgets.
`dllm-sd eval --compare RUN RUN` compares two runs.

## All methods

- *Data*: what a problem must have besides the question. *Answers* are graded by the task; *solutions* are written out.
- *Correct rollouts*: whether the method needs them. "Needed": a problem that is never solved is left out. "In the
  group": a rollout needs a correct sibling. "Both": a group whose rewards are all equal gives no gradient. "Judged":
  correct and wrong rollouts are both used. "No": the outcome is not used.
- *Cost*: seconds of rollouts and learning relative to `sft` on the same tiny model, masked diffusion / autoregressive,
  with equal numbers of updates. `sft` decodes nothing, so the numbers show mainly the cost of rollouts.
- *Tuned*: percentage points of greedy accuracy gained in [the laboratory](results.md), the mean and its 95 % interval
  over the seeds, each row at its best setting, with equal generated tokens within a claim. Claims have
  different models and tasks: compare a number with those of the same claim only.
- *Gain*: percentage points of greedy accuracy on 1,024 test puzzles (4x4 Sudoku), last weights minus initial weights,
  mean of three seeds after 30 updates at one learning rate for all methods, not tuned for any. The models are the
  shipped `tiny` / `tiny_ar` / a reader of rubrics and critiques. Where only a variant was measured, it is named (as in
  [the table of measurements](methods.md#measured)). In brackets: the model lacks what the method needs, as [the
  remarks](methods.md#measured) explain, so the number says nothing about the method. These models have 0.2 million
  parameters; nothing here was measured on a model of billions.

| method | backbone | data | correct rollouts | also needs | cost | tuned | gain |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
This page is generated by `python -m tools.make_methods_page` from what the parts of each method declare, from
`dllm_sd/assets/measured.json` and from the laboratory's data. Settings, learning curves and seeds:
[methods](methods.md#measured).
"""
LABORATORY = read_laboratory()
BACKBONES = ("diffusion", "autoregressive", "autoregressive reader")


def choice_page() -> str:
    """The text of docs/which_method.md."""
    pages = {name: page for page in sorted((DOCS / "methods").glob("*.md")) for name in _names(page)}
    rows = [" | ".join(_cells(name, f"methods/{pages[name].name}")) for name in METHODS]
    return HEAD + "".join(f"| {row} |\n" for row in rows) + TAIL


def _names(page: Path) -> list[str]:
    """The methods that the title of a page names."""
    return re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8").splitlines()[0])


def _cells(name: str, page: str) -> Iterator[str]:
    method = METHODS[name].method
    yield f"[`{name}`]({page})"
    yield "masked diffusion" if any(context.reveals for context in method.contexts) else "both"
    yield ", ".join(needed_data(method)) or "-"
    yield correct_rollouts(method)
    yield ", ".join(other_needs(method)) or "-"
    yield " / ".join(_cost(name, backbone) for backbone in BACKBONES[:2])
    yield ", ".join(_tuned(name)) or "-"
    yield " / ".join(_gain(name, backbone) for backbone in BACKBONES)


def needed_data(method: Method) -> list[str]:
    """What the problems must hold besides the question."""
    hints = [context.hint for context in method.contexts if context.hint is not None]
    solutions = not method.rollout.decodes or any(hint.needs_reference == "solution" for hint in hints)
    graded = method.rollout.needs_outcome or correct_rollouts(method) != "no"
    rubrics = any(name_of(HINTS, hint) == "rubric" and hint.writing is None for hint in hints)
    return [word for word, holds in (("answers", graded), ("solutions", solutions), ("rubrics", rubrics)) if holds]


def correct_rollouts(method: Method) -> str:
    """What becomes of a problem without a correct rollout, in a word that the page explains."""
    if method.gate.needs_outcome:
        return "needed"
    if any(context.hint is not None and context.hint.needs_outcome for context in method.contexts):
        return "in the group"
    if method.trust.needs_group:
        return "both"
    return "judged" if method.trust.needs_outcome or _criticises(method) else "no"


def _criticises(method: Method) -> bool:
    return any(context.hint is not None and context.hint.marks_regions for context in method.contexts)


def other_needs(method: Method) -> list[str]:
    """Models and texts besides the student and its data."""
    needs = [] if method.skill_bank is None else ["bank of skills (the model makes one)"]
    needs += ["a second student"] if any(context.by_peer for context in method.contexts) else []
    needs += (
        ["another checkpoint"] if any(name_of(WEIGHTS, weights) == "checkpoint" for weights in method.weights()) else []
    )
    for writing in (context.hint.writing for context in method.contexts if context.hint is not None):
        if writing is not None and not any(context.by_peer for context in method.contexts):
            needs.append(f"a writer (default: {name_of(WRITERS, writing.writer)} weights)")
    return needs


def _cost(name: str, backbone: str) -> str:
    """Seconds of a run relative to those of `sft`, of the first setting that was measured."""
    seconds = {of: record["seconds"] for of in (name, "sft") if (record := _record(of, backbone)) is not None}
    return f"{seconds[name] / seconds['sft']:.0f}" if name in seconds else "-"


def _tuned(name: str) -> Iterator[str]:
    """The gain of a method in each claim of the laboratory that has finished its row, with a link to the claim."""
    for title, claim in LABORATORY.claims.items():
        records = results_of(title)
        rows = [row for row, one in claim.rows.items() if one.method == name and _is_tested(row, one)]
        gained = gain(claim, records, rows[0]) if rows else None
        if gained is not None and isfinite(gained.half):
            yield f"{gained.value:+.1f} ± {gained.half:.1f} [{title}](results.md#{title})"


def _is_tested(name: str, row: Row) -> bool:
    """Whether a row tests its method with all of the tokens, and is no control that stands beside another method."""
    return (row.gated or name == row.method) and row.like is None and row.share == 1


def _gain(name: str, backbone: str) -> str:
    if (record := _record(name, backbone)) is None:
        return "-"
    gain = f"{mean(record['after']) - mean(record['before']):+.1f}"
    variant = record["method"].removeprefix(name).strip()
    told = f"{gain} with {variant}" if variant else gain
    return f"({told})" if is_premise_missing(record) else told


def _record(name: str, backbone: str) -> Mapping[str, Any] | None:
    """The first measurement of a method on a tiny model."""
    return next((record for record in measured(name) if record["backbone"] == backbone), None)
