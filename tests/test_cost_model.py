"""The cost model: published sums of the shapes, FLOPs as PyTorch counts them, and what retries cost."""

from dataclasses import replace
from pathlib import Path

import pytest

from tools.cost_model import GPUS, LARGE, LLADA, PASSES, Setting, Shape, attempts, cost, counted, longest, main, table

SCALING = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_shapes_have_the_published_sums():
    assert LLADA.total == pytest.approx(8.015e9, rel=1e-3)
    assert LLADA.active == pytest.approx(6.979e9, rel=1e-3)
    assert LARGE.total == pytest.approx(100e9, rel=0.05)
    assert LARGE.active + 2 * LARGE.vocabulary * LARGE.hidden == pytest.approx(6.1e9, rel=0.01)
    assert LLADA.adapters(128) == 335_544_320


@pytest.mark.parametrize("shape", [Shape(64, 3, 160, 500, 4, 4), Shape(64, 2, 96, 100, 4, 2)])
def test_flops_are_those_that_pytorch_counts(shape: Shape):
    forward, both = counted(shape, 2, 24)
    assert 2 * shape.forward(24, 24, 24) == forward
    assert 3 * forward == both


@pytest.mark.parametrize(
    ("task", "mean", "slowest"), [("gsm8k", 1.63, 3.13), ("math", 4.70, 7.63), ("countdown", 5.10, 7.69)]
)
def test_attempts_are_those_that_the_pass_rates_imply(task: str, mean: float, slowest: float):
    chances = attempts(*PASSES[task])
    assert sum(chances) == pytest.approx(1)
    assert chances[0] == pytest.approx(PASSES[task][0])
    assert longest(chances, 1) == pytest.approx(mean, abs=0.005)
    assert longest(chances, 4) == pytest.approx(slowest, abs=0.01)


def test_of_more_problems_fewer_processes_wait():
    row = Setting(LLADA, 128, False, 8, problems=16)
    few, many = cost(row, GPUS["H100"]), cost(replace(row, problems=128), GPUS["H100"])
    assert many.idle < few.idle
    assert many.flops == pytest.approx(8 * few.flops)


def test_the_page_shows_the_tables_of_the_tool():
    text = SCALING.read_text()
    for line in (*table(GPUS["H100"], "gsm8k", 16), *table(GPUS["H100"], "gsm8k", 1024)):
        assert line in text


def test_the_tool_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["cost_model.py", "--share", str(GPUS["H100"].share)])
    main()
    assert table(GPUS["H100"], "gsm8k", 16)[-1] in capsys.readouterr().out
