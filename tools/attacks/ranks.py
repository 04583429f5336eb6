"""Kills one of two processes before a file operation of the first, then starts both again.

Outcome ok: the run ends like an undisturbed one of two processes, bit for bit. This module is also the program that
each of the two processes runs: `python -m tools.attacks.ranks ARGUMENTS`.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tools.attacks.cases import CASES, CONFIG, add_task
from tools.attacks.contents import contents, differences
from tools.attacks.findings import Finding, spread
from tools.attacks.watch import Operation, Watch

NUMBER, VICTIM, PIDS = "ATTACKS_NUMBER", "ATTACKS_VICTIM", "ATTACKS_PIDS"
ROOT = Path(__file__).parents[2]


def attack(folder: Path, points: int | None = None) -> Iterator[Finding]:
    """Kill each of the two at a few operations of the first."""
    before, pids, case = folder / "before", folder / "pids", CASES["plain"]
    case.prepare(before, "")
    pids.mkdir()
    whole = folder / "whole"
    shutil.copytree(before, whole)
    if status := _launch(whole, {PIDS: str(pids)}):
        raise RuntimeError(f"two undisturbed processes ended with status {status}")
    wanted, count = contents(whole), int((pids / "count").read_text())
    for number in spread(count, points or 4):
        for victim in ("0", "1"):
            work = folder / "work"
            shutil.copytree(before, work)
            _launch(work, {NUMBER: str(number), VICTIM: victim, PIDS: str(pids)})
            status = _launch(work, {PIDS: str(pids)})
            wrong = differences(wanted, contents(work)) + ([f"status {status}"] if status else [])
            name = f"process {victim} before operation {number} of the first"
            yield Finding("ranks", case.name, name, "FAULT" if wrong else "ok", "; ".join(wrong[:3]))
            shutil.rmtree(work)


def _launch(work: Path, environment: Mapping[str, str]) -> int | None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "-m", "tools.attacks.ranks", "train", CONFIG, "run=run"]
    common = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        launcher,
        cwd=work,
        env={**os.environ, **common, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(300)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for pid in [process.pid, *map(int, (path.read_text() for path in Path(environment[PIDS]).glob("[01]")))]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def main() -> int:
    """One of the two processes."""
    from dllm_sd.parallel.processes import close_process_group
    from tools.attacks import child

    rank, pids, number = os.environ["RANK"], Path(os.environ[PIDS]), int(os.environ.get(NUMBER, -1))
    (pids / rank).write_text(str(os.getpid()))

    def stop(operation: Operation) -> None:
        (pids / "count").write_text(str(operation.number + 1))
        if operation.number == number:
            os.kill(int((pids / os.environ[VICTIM]).read_text()), signal.SIGKILL)

    add_task()
    if rank == "0":
        Watch(Path.cwd(), stop)
    status = child.command(sys.argv[1:])()
    if status == 0:
        close_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
