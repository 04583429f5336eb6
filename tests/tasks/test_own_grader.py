"""A user's own grader may hang, crash or lie: the verdict is then wrong and counted, and the run goes on."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from dllm_sd.errors import InputError, Stopped
from dllm_sd.tasks import Grade, Jsonl, Problem, own_grader
from dllm_sd.tasks.own_grader import Worker, file_and_function, worker

REWARD = """
import math, os, sys, time

def score(problem, completion):
    print("a word of the function's own")
    sys.stdout.flush()
    if completion == "hang":
        time.sleep(60)
    if completion == "loop":
        while True:
            pass
    if completion == "die":
        os._exit(0)
    if completion == "eat":
        return len(" " * 10**11)
    if completion == "exit":
        sys.exit()
    if completion == "nan":
        return math.nan
    if completion == "text":
        return "high"
    if completion == "none":
        return None
    if completion.startswith("{"):
        return eval(completion)
    if completion == "pair":
        return 0.75, problem["answer"]
    return completion == problem["answer"]

def broken(problem, completion):
    return missing + 1
"""
LINE = 1 + REWARD.splitlines().index("    return missing + 1")


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "reward.py").write_text(REWARD)
    started: list[Worker] = []
    monkeypatch.setattr(own_grader, "atexit", SimpleNamespace(register=lambda close: started.append(close.__self__)))
    yield str(tmp_path / "reward.py")
    worker.cache_clear()
    for one in started:
        one.close()


def own(reward: str, function: str = "score") -> Jsonl:
    return Jsonl(grader=f"{reward}:{function}", grader_seconds=0.4, grader_memory=512)


PROBLEM = Problem("x", {"question": "2 + 3", "answer": "5"})


def test_a_function_in_a_file_grades(reward: str):
    task = own(reward)
    assert task.grade(PROBLEM, "5") == Grade(True, 1.0, "5")
    assert task.grade(PROBLEM, "it is\n 6") == Grade(False, 0.0, "it is 6")
    assert task.grade(PROBLEM, "pair") == Grade(True, 0.75, "5")
    assert not Jsonl(grader=task.grader, threshold=0.8).grade(PROBLEM, "pair").correct
    assert task.grade(PROBLEM, "5" * 100_000).score == 0


@pytest.mark.parametrize(
    "completion", ["hang", "loop", "die", "eat", "exit", "nan", "text", "none", "{}", "{2}", "{}['x']", "{}.x"]
)
def test_what_a_function_does_wrong_is_a_count_and_the_next_completion_is_graded(reward: str, completion: str):
    task = own(reward)
    before = time.monotonic()
    assert task.grade(PROBLEM, completion) == Grade(False, 0.0, None, failed=True)
    assert time.monotonic() - before < 5
    right = task.grade(PROBLEM, "5")
    assert right == Grade(True, 1.0, "5")
    assert task.summary([(PROBLEM, Grade(False, 0.0, None, failed=True)), (PROBLEM, right)]) == {"grader_failed": 1}


def test_the_first_failure_is_said_and_a_function_that_always_fails_ends_the_run(
    reward: str, capfd: pytest.CaptureFixture[str]
):
    task = own(reward, "broken")
    for _ in range(19):
        assert task.grade(PROBLEM, "5").failed
    with pytest.raises(Stopped, match=r"failed on each of the first 20 completions \(NameError: name 'missing' is not"):
        task.grade(PROBLEM, "5")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dllm-sd:")]
    assert len(said) == 1
    assert f"NameError: name 'missing' is not defined in line {LINE}" in said[0]


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("none.py:score", r"none\.py:score: there is no such file; name one, as in task\.grader=my_reward\.py:score"),
        ("reward.py:other", r"reward\.py:other cannot be imported \(AttributeError: .*'other'"),
        ("syntax.py:score", r"syntax\.py:score cannot be imported \(SyntaxError"),
        ("reward.py:broken", r"reward\.py:broken fails on .*a\.jsonl, line 1 \(NameError: .*in line [0-9]+\); correct"),
    ],
)
def test_a_function_that_cannot_grade_the_first_row_is_refused_when_the_data_is_read(
    reward: str, monkeypatch: pytest.MonkeyPatch, grader: str, message: str
):
    folder = Path(reward).parent
    (folder / "syntax.py").write_text("def score(:\n")
    (folder / "a.jsonl").write_text(json.dumps(PROBLEM.fields) + "\n")
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=message):
        Jsonl(data_test="a.jsonl", grader=grader).problems("test")


def test_rows_need_no_answer_for_a_function(reward: str):
    data = Path(reward).with_name("a.jsonl")
    data.write_text('{"question": "1"}\n')
    task = Jsonl(data_test=str(data), grader=f"{reward}:free")
    Path(reward).write_text("def free(problem, completion):\n    return len(completion) / 10\n")
    (problem,) = task.problems("test")
    assert task.grade(problem, "12345").score == 0.5


def test_threads_share_one_process_and_each_gets_its_own_reply(reward: str):
    held = Worker(reward, "score", 30.0, 512)
    fields = [{"answer": str(n)} for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: held.score(fields[n], str(n - n % 2)), range(40)))
    assert found == [(float(n % 2 == 0), str(n - n % 2)) for n in range(40)]


def test_the_process_ends_with_its_parent(reward: str):
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # a parent that is killed
        held = Worker(reward, "score", 5.0, 512)
        held.score({"answer": "1"}, "1")
        os.write(write, str(held._process.pid if held._process else 0).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    status = Path(f"/proc/{int(os.read(read, 20))}/stat")
    os.close(read)
    os.close(write)
    end = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_pattern_reads_the_answer(reward: str):
    first = Jsonl(grader="regex", pattern=r"answer: *(\w+)")
    assert first.grade(PROBLEM, "answer: 4, no: answer:  5.") == Grade(True, 1.0, "5")
    assert first.grade(PROBLEM, "5") == Grade(False, 0.0, None)
    assert Jsonl(grader="regex", pattern=r"\d").grade(PROBLEM, "4 or 5").parsed == "5"


def test_a_pattern_that_would_take_for_ever_is_given_up():
    before = time.monotonic()
    task = Jsonl(grader="regex", pattern="(a+)+$", grader_seconds=0.3)
    assert task.grade(PROBLEM, "a" * 60 + "b") == Grade(False, 0.0, None)
    assert task.grade(Problem("y", {"answer": "aa"}), "aa").correct
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grader": "regex"}, r"^task\.grader=regex and task\.pattern belong together; set both"),
        ({"pattern": "x"}, r"^task\.grader=regex and task\.pattern belong together"),
        ({"grader": "regex", "pattern": "(a"}, r"^task\.pattern is not a regular expression \(missing \)"),
        ({"grader": "reward.py"}, r"^task\.grader is 'reward\.py'; choose exact, .* as in my_reward\.py:score$"),
        ({"grader": "module:score"}, r"^task\.grader is 'module:score'; choose"),
        ({"threshold": 0.0}, r"^task\.threshold is 0; give"),
        ({"grader_seconds": 0.0}, r"^task\.grader_seconds is 0; give"),
    ],
)
def test_a_grader_that_cannot_be_meant_is_refused(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        Jsonl(**fields)


def test_a_file_and_a_function_are_told_apart():
    assert file_and_function("/a:b/c.py:score") == ("/a:b/c.py", "score")
    assert file_and_function("c.py:") is file_and_function("c.txt:score") is file_and_function("number") is None
