"""The report in a real browser: it opens from a file without a network, the viewer moves, and its numbers are right.

Needs Chromium and playwright (extra `browser`); `DLLM_SD_BROWSER` names another executable.
"""

import json
import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd import load_policy
from dllm_sd.config import build_config
from dllm_sd.network.view import View
from dllm_sd.reports.report_page import write_report
from dllm_sd.training.trainer import Trainer
from tests.reports.folders import HOSTILE, site, trace, write_run

pytestmark = pytest.mark.slow
SUDOKU = {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"}
DENOISING: dict[str, Any] = {
    "seed": 3,
    "updates": 2,
    "model": {"path": "tiny", "dtype": "float64"},
    "task": SUDOKU,
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 1},
    "method": {
        "name": "d_opsd",
        "rollout": {"problems": 4, "attempts": 4},
        "contexts": [{"name": "suffix", "ratio": 1.0}],
        "divergence": {"name": "jsd", "beta": 0.5, "clip": "token", "clip_at": 0.01},
    },
    "eval": {"every": 1, "problems": 8, "final_problems": 8},
    "log": {"progress": False, "trackers": [], "samples": 4, "samples_every": 1},
}
AUTOREGRESSIVE: dict[str, Any] = {
    **DENOISING,
    "model": {"path": "tiny_ar", "dtype": "float64"},
    "task": {**SUDOKU, "prompt": "{puzzle}:", "answer": "{steps}\n{solution}"},
    "decode": {"length": 72},
    "method": {
        "name": "opsd",
        "rollout": {"problems": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        "contexts": [{"name": "reference", "template": "({hint}){question}"}],
        "divergence": {"name": "jsd", "beta": 0.5},
        "temperature": 1.0,
    },
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    reason = "the report is tried in a browser by playwright: pip install -e '.[browser]'"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    names = (os.environ.get("DLLM_SD_BROWSER"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed; install one, or name it in DLLM_SD_BROWSER")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a report without a network; at the end nothing but the file was requested, and no complaint was made."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def open_page(file: Path, width: int = 1280, scheme: str = "light") -> Any:
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, offline=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.extend([] if r.url == file.as_uri() else [r.url]))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, `tiny` and `tiny_ar`, and the report of each and of both."""
    home = tmp_path_factory.mktemp("runs")
    for name, tree in (("tiny", DENOISING), ("tiny_ar", AUTOREGRESSIVE)):
        Trainer(build_config({**tree, "run": str(home / name)})).train()
        write_report([home / name], home / f"{name}.html")
    write_report([home / "tiny", home / "tiny_ar"], home / "both.html")
    return home


def graded(run: Path) -> dict[str, Any]:
    """The first traced rollout of update 1, whose weights are the initial ones, that has sites."""
    lines = [json.loads(line) for line in (run / "traces.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["update"] == 1 and line["sites"])


def choose(page: Any, entry: dict[str, Any]) -> None:
    """Select the update and the rollout of a trace."""
    page.get_by_label("update", exact=True).select_option(str(entry["update"]))
    page.locator(".rollouts button").nth(entry["slot"]).click()


def go_to(page: Any, step: int) -> None:
    page.keyboard.press("Home")
    for _ in range(step):
        page.keyboard.press("ArrowRight")


def numbers_of(page: Any, key: str) -> list[float]:
    """The numbers of the panel that are marked with a key; percent as shares."""
    texts = page.locator(f".site-panel [data-number={key}]").all_inner_texts()
    return [float(t.removesuffix(" %")) / (100 if t.endswith("%") else 1) for t in texts]


def probabilities(policy: Any, prompt: list[int], completion: list[int], position: int) -> Tensor:
    """The distribution ``[v]`` at a position of the completion."""
    ids = torch.tensor([[*prompt, *completion]])
    sites = torch.zeros_like(ids, dtype=torch.bool)
    sites[0, len(prompt) + position] = True
    with torch.no_grad():
        return policy.site_logits(View(ids, torch.ones_like(sites), sites))[0].double().softmax(-1)


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    mixture = (p + q) / 2
    return float(sum(0.5 * (x * (x / mixture).log()).nan_to_num(0).sum() for x in (p, q)))


def canvas_of(entry: dict[str, Any], step: int, mask_id: int) -> list[int]:
    return [t if 0 <= at < step else mask_id for t, at in zip(entry["tokens"], entry["reveal_step"], strict=True)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["tiny", "tiny_ar", "both"])
def test_a_report_opens_from_a_file_and_fits_the_screen(
    trained: Path, show: Callable[..., Any], name: str, width: int, scheme: str
) -> None:
    page = show(trained / f"{name}.html", width, scheme)
    assert page.locator(".chart:visible .uplot canvas").count() >= 9
    assert page.locator("#canvas .token").count() > 0
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width


def test_the_slider_shows_the_canvas_that_the_decoder_saw(trained: Path, show: Callable[..., Any]) -> None:
    entry = graded(trained / "tiny")
    page = show(trained / "tiny.html")
    choose(page, entry)
    last = max(entry["reveal_step"])
    for step in (0, 5, last, last + 1):
        page.get_by_label("decoding step", exact=True).fill(str(step))
        for position, at in enumerate(entry["reveal_step"]):
            token = page.locator(f"#canvas .token[data-position='{position}']")
            names, piece = set(token.get_attribute("class").split()), entry["pieces"][str(entry["tokens"][position])]
            hidden = at >= step
            assert ("now" in names) == (at == step)
            assert ("masked" in names or "shown" in names or "now" in names) == hidden
            assert token.inner_text().strip() == ("" if "masked" in names else piece)
        shown = [r for canvas in entry["canvases"] if canvas["step"] == step for r in canvas["shown"]]
        expected = [p for r in shown for a, b in zip(r[::2], r[1::2], strict=True) for p in range(a, b)]
        assert page.locator("#canvas .shown").count() == len(expected)
    page.keyboard.press("Home")
    assert page.locator("output").inner_text() == f"step 1 of {last + 1}"
    page.keyboard.press("End")
    assert page.locator("output").inner_text() == "finished"


def test_pointing_at_a_token_shows_the_numbers_of_the_policy(trained: Path, show: Callable[..., Any]) -> None:
    entry, policy = graded(trained / "tiny"), load_policy("tiny", dtype="float64")
    page = show(trained / "tiny.html")
    choose(page, entry)
    for chosen in entry["sites"][::5]:
        step, position = chosen["step"], chosen["position"]
        student_canvas = canvas_of(entry, step, policy.mask_id)
        teacher_canvas, block = list(student_canvas), position // 4
        for p in range(4 * (block + 1), 16):  # the whole suffix after the active block
            teacher_canvas[p] = entry["tokens"][p]
        student, teacher = (
            probabilities(policy, entry["prompt"], canvas, position) for canvas in (student_canvas, teacher_canvas)
        )
        value = jensen_shannon(student, teacher)
        go_to(page, step)
        page.locator(f"#canvas .token[data-position='{position}']").hover()
        assert page.locator(".site-panel h3").inner_text() == f"position {position + 1}, step {step + 1}"
        assert numbers_of(page, "divergence") == pytest.approx([value], rel=1e-3, abs=1e-12)
        assert numbers_of(page, "clipped") == pytest.approx([min(value, 0.01)], rel=1e-3, abs=1e-12)
        token = entry["tokens"][position]
        expected = [float(student[token]), float(teacher[token])]
        assert numbers_of(page, "drawn") == pytest.approx(expected, rel=0.06, abs=6e-5)


def test_an_autoregressive_rollout_shows_its_numbers_and_the_hint(trained: Path, show: Callable[..., Any]) -> None:
    entry, policy = graded(trained / "tiny_ar"), load_policy("tiny_ar", dtype="float64")
    page = show(trained / "tiny_ar.html")
    choose(page, entry)
    (brief,) = entry["teachers"]
    assert page.locator(".teacher-prompt mark").inner_text() == brief["hint"]
    for chosen in entry["sites"][3:20:8]:
        position = chosen["position"]
        student, teacher = (
            probabilities(policy, prompt, entry["tokens"][: position + 1], position)
            for prompt in (entry["prompt"], brief["prompt"])
        )
        page.keyboard.press("End")
        page.locator(f"#canvas .token[data-position='{position}']").hover()
        value = jensen_shannon(student, teacher)
        assert numbers_of(page, "divergence") == pytest.approx([value], rel=1e-3, abs=1e-12)
        shown = numbers_of(page, "drawn")
        assert shown[0] == pytest.approx(float(student[entry["tokens"][position]]), rel=0.06, abs=6e-5)


def test_a_legend_shows_the_last_values_until_the_pointer_is_on_its_chart(
    tmp_path: Path, show: Callable[..., Any]
) -> None:
    lines = [
        {"update": 0, "eval/accuracy": 0.25},
        {"update": 1, "eval/accuracy": 0.5, "loss": 2},
        {"update": 2, "loss": 1},
    ]
    write_report([write_run(tmp_path / "run", metrics=lines)], tmp_path / "run.html")
    page = show(tmp_path / "run.html")
    charts = page.locator(".chart:visible")
    values = [charts.nth(i).locator(".u-legend .u-value").all_inner_texts() for i in range(2)]
    assert values == [["2 (last)", "50 %"], ["2 (last)", "1"]]
    plot = charts.nth(1).locator(".u-over")
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] / 2, "y": box["height"] / 2})
    assert charts.nth(1).locator(".u-legend .u-value").all_inner_texts() == ["1", "2"]
    page.mouse.move(0, 0)
    assert charts.nth(1).locator(".u-legend .u-value").all_inner_texts() == ["2 (last)", "1"]


def test_one_outlier_does_not_take_the_colour_of_the_other_sites(tmp_path: Path, show: Callable[..., Any]) -> None:
    values = [0.01 * (i + 1) for i in range(19)] + [50.0]
    changes = {"tokens": [1] * 20, "reveal_step": [*range(20)], "length": 20, "blocks": [0], "graded": 20}
    canvases = [{"step": step, "masked": [step, 20], "shown": [[]]} for step in range(20)]
    entry = trace(1, sites=[site(i, d) for i, d in enumerate(values)], canvases=canvases, **changes)
    write_report([write_run(tmp_path / "run", traces=[entry])], tmp_path / "run.html")
    page = show(tmp_path / "run.html")
    page.keyboard.press("End")
    colors = page.eval_on_selector_all("#canvas .token", "all => all.map(t => t.style.backgroundColor)")
    shades = [float(color.rstrip(")").split(",")[3]) for color in colors]
    assert shades == pytest.approx([0.85 * math.sqrt(min(1, d / 0.19)) for d in values], abs=4e-3)
    assert "0.19 or more (the highest 5 % of the sites)" in page.locator(".legend").inner_text()
    page.get_by_label("colour", exact=True).select_option("trust")
    assert "Trust is the weight of a site in the loss" in page.locator(".legend").inner_text()


def test_the_step_that_a_critique_blames_is_marked(tmp_path: Path, show: Callable[..., Any]) -> None:
    student = ["<step_1>", "2", "</step_1>", "<step_2>", "7", "</step_2>", "<answer>", "9", "</answer>"]
    critique = ["<step_1>", "2", "</step_1>", "<step_2>", "3", "</step_2>", "<answer>", "5", "</answer>"]
    ids = {text: i for i, text in enumerate(dict.fromkeys(["puzzle", *student, *critique]))}
    prompt, tokens, hint = [ids["puzzle"]], [ids[x] for x in student], [ids[x] for x in critique]
    entry = trace(
        1,
        causal=True,
        correct=False,
        prompt=prompt,
        tokens=tokens,
        reveal_step=[*range(9)],
        length=9,
        blocks=[],
        canvases=[{"step": 0, "masked": [0, 9], "shown": [[]]}],
        sites=[site(p, canvas=0, step=p, token=tokens[p]) for p in range(9)],
        graded=9,
        teachers=[{"prompt": [*hint, *prompt], "hint": "".join(critique), "weight": 1.0}],
        pieces={str(i): text for text, i in ids.items()},
        blamed=[3, 6],
    )
    write_report([write_run(tmp_path / "run", traces=[entry])], tmp_path / "run.html")
    page = show(tmp_path / "run.html")
    assert page.locator("#canvas .blamed").count() == 0  # nothing is generated yet
    page.keyboard.press("End")
    assert page.locator("#canvas .blamed").all_inner_texts() == student[3:6]
    assert page.locator(".teacher-prompt mark").inner_text() == "".join(critique)
    note = page.locator(".site-panel .blame")
    page.locator("#canvas .token[data-position='4']").hover()
    assert note.inner_text() == "In the first wrong step, according to the critique."
    page.locator("#canvas .token[data-position='2']").hover()
    assert note.count() == 0


def test_a_click_pins_a_token_and_the_keyboard_reaches_it(trained: Path, show: Callable[..., Any]) -> None:
    entry = graded(trained / "tiny")
    page = show(trained / "tiny.html")
    choose(page, entry)
    page.keyboard.press("End")
    tokens = [page.locator(f"#canvas .token[data-position='{p}']") for p in (2, 9)]
    tokens[0].click()
    tokens[1].hover()
    assert page.locator(".site-panel").get_attribute("data-position") == "2"
    tokens[0].click()
    tokens[1].focus()
    assert page.locator(".site-panel").get_attribute("data-position") == "9"


def test_rollouts_are_chosen_by_run_verdict_and_score(tmp_path: Path, show: Callable[..., Any]) -> None:
    scores = [0.25, 1.0, 0.5]
    lines = [trace(1, i, problem=f"p{i}", score=s, correct=s == 1) for i, s in enumerate(scores)]
    folders = [write_run(tmp_path / "one", traces=lines), write_run(tmp_path / "two", traces=lines[:1])]
    write_report(folders, tmp_path / "both.html")
    page = show(tmp_path / "both.html")

    def listed() -> list[str]:
        return [text.split(",")[0] for text in page.locator(".rollouts button").all_inner_texts()]

    assert listed() == ["p0", "p1", "p2"]
    page.get_by_label("order", exact=True).select_option("score")
    assert listed() == ["p1", "p2", "p0"]
    page.get_by_label("rollouts", exact=True).select_option("wrong")
    assert listed() == ["p2", "p0"]
    page.get_by_label("run", exact=True).select_option("1")
    assert listed() == ["p0"]


def test_tokens_are_coloured_by_what_is_chosen(tmp_path: Path, show: Callable[..., Any]) -> None:
    sites = [site(i, d, trust=[t]) for i, (d, t) in enumerate(((0.0, -1.0), (0.05, 0.0), (0.1, 0.5), (0.4, 1.0)))]
    write_report([write_run(tmp_path / "run", traces=[trace(1, sites=sites)])], tmp_path / "run.html")
    page = show(tmp_path / "run.html")
    page.keyboard.press("End")

    def opacity() -> list[float]:
        colors = page.eval_on_selector_all("#canvas .token", "all => all.map(t => t.style.backgroundColor)")
        return [0.0 if not c else float(c.rstrip(")").split(",")[3]) if c.startswith("rgba") else 1.0 for c in colors]

    def chosen(color: str) -> list[float]:
        page.get_by_label("colour", exact=True).select_option(color)
        return opacity()

    assert chosen("divergence") == pytest.approx([0.85 * math.sqrt(d / 0.4) for d in (0, 0.05, 0.1, 0.4)], abs=2e-3)
    assert chosen("clip") == pytest.approx([0, 0, 0.85 * 0.5, 0.85 * 0.875], abs=2e-3)
    assert chosen("trust") == pytest.approx([0.7, 0, 0.4, 0.7], abs=2e-3)
    order = chosen("order")
    assert order == sorted(order)
    assert order[0] < order[-1]


@pytest.mark.parametrize("spelled", [True, False])
def test_a_hint_that_the_tokens_do_not_spell_is_shown_as_it_was_written(
    spelled: bool, tmp_path: Path, show: Callable[..., Any]
) -> None:
    written, pieces = "<step_1>3</step_1>", {"1": "q", "2": "<step_1>3</step_1>" if spelled else "<unk>", "3": "three"}
    entry = trace(1, prompt=[1], pieces=pieces, teachers=[{"prompt": [2, 1], "hint": written, "weight": 1.0}])
    write_report([write_run(tmp_path / "run", traces=[entry])], tmp_path / "run.html")
    page = show(tmp_path / "run.html")
    assert page.locator(".teacher-prompt mark").inner_text() == pieces["2"]
    assert page.locator(".written-hint").all_inner_texts() == ([] if spelled else [written])


def test_references_are_not_called_right(tmp_path: Path, show: Callable[..., Any]) -> None:
    imitating = {"method": {"name": "sft", "rollout": {"name": "demonstrations"}}}
    runs = [write_run(tmp_path / "run"), write_run(tmp_path / "sft", config=imitating)]
    write_report(runs, tmp_path / "both.html")
    page = show(tmp_path / "both.html")
    page.get_by_label("rollouts", exact=True).select_option("wrong")
    page.get_by_label("run", exact=True).select_option("1")
    buttons = page.locator(".rollouts button")
    assert buttons.count() > 0
    assert {text.rpartition(", ")[2] for text in buttons.all_inner_texts()} == {"reference"}
    assert page.locator(".rollouts .right, .rollouts .wrong").count() == 0
    assert page.get_by_label("rollouts", exact=True).count() == 0


@pytest.mark.parametrize(
    ("shares", "ends"), [((1.0, 1.0), (0, 100)), ((0.0, 0.0), (0, 100)), ((0.5, 1.0), (None, 100))]
)
def test_an_axis_of_shares_ends_at_all_of_them(
    shares: tuple[float, float], ends: tuple[float | None, float], tmp_path: Path, show: Callable[..., Any]
) -> None:
    lines = [{"update": i, "loss": 0.5, "eval/accuracy": share} for i, share in enumerate(shares)]
    write_report([write_run(tmp_path / "run", metrics=lines)], tmp_path / "run.html")
    page = show(tmp_path / "run.html")
    low, high = page.evaluate("['min', 'max'].map(end => document.querySelector('.chart').chart.scales.y[end])")
    assert high == ends[1]
    assert (low == ends[0]) if ends[0] is not None else 0 < low < 50


def test_text_of_a_model_does_no_harm(tmp_path: Path, show: Callable[..., Any]) -> None:
    pieces = {"1": HOSTILE, "2": HOSTILE, "3": "three"}
    hint = [{"prompt": [1, 2], "hint": HOSTILE, "weight": 1.0}]
    entry = trace(1, problem=HOSTILE, pieces=pieces, teachers=hint)
    config = {"task": {"name": "sudoku", "prompt": "{puzzle}" + HOSTILE, "answer": "{solution}"}}
    folder = write_run(tmp_path / "<script>alert(1)<", traces=[entry], config=config)
    write_report([folder], tmp_path / "run.html")
    page = show(tmp_path / "run.html")
    page.keyboard.press("End")
    page.locator("#canvas .token").first.hover()
    assert page.evaluate("window.harmed") is None
    assert page.locator("img").count() == 0
    assert HOSTILE.split("\u2028")[0] in page.locator(".rollouts button").first.inner_text()


def test_a_long_trajectory_moves_without_stutter(tmp_path: Path, show: Callable[..., Any]) -> None:
    length, steps = 256, 64
    order = [p * steps // length for p in range(length)]
    canvases = [{"step": k, "masked": [4 * k, length], "shown": [[4 * k + 4, length]]} for k in range(steps)]
    sites = [site(p, 0.01 * (p % 7), canvas=order[p], step=order[p]) for p in range(length)]
    changes = {"tokens": [1] * length, "reveal_step": order, "length": length, "blocks": [*range(0, length, 32)]}
    entry = trace(1, canvases=canvases, sites=sites, graded=length, **changes)
    write_report([write_run(tmp_path / "long", traces=[entry])], tmp_path / "long.html")
    page = show(tmp_path / "long.html")
    times = page.evaluate(
        """async () => {
          const slider = document.querySelector(".stepper input"), times = [];
          for (let step = 0; step <= 64; step++) {
            const start = performance.now();
            slider.value = step;
            slider.dispatchEvent(new Event("input"));
            document.body.offsetHeight;  // layout included
            times.push(performance.now() - start);
            await new Promise(requestAnimationFrame);
          }
          return times;
        }"""
    )
    print(f"milliseconds a step: median {statistics.median(times):.1f}, most {max(times):.1f}")
    assert statistics.median(times) < 50
