"""The program of the process in which a user's grader and regular expressions run.

It is started by its path, so that it imports nothing but the standard library and the user's file. Requests and replies
are JSON, one object on a line; what the user's code prints goes to stderr.
"""

import importlib.util
import json
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

LONGEST = 10_000
"""Characters of an answer that is sent back."""


def main() -> None:
    """Serve until the input ends; the arguments are the file, the function, its seconds and MiB, and a descriptor."""
    file, name, seconds, memory, lifeline = sys.argv[1:]
    replies, requests = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with_parent, args=(int(lifeline),), daemon=True).start()
    _limit_memory(int(memory) << 20)

    def reply(tree: dict[str, Any]) -> None:
        replies.write(json.dumps(tree) + "\n")
        replies.flush()

    function: Callable[..., Any] | None = None
    try:
        if file:
            function = getattr(_module(Path(file)), name)
        reply({"ready": True})
    except BaseException as error:  # whatever the user's file does, the parent is told
        reply({"error": _words(error, file)})
        return
    for line in requests:
        request = json.loads(line)
        _limit_time(float(seconds))
        try:
            answer = _search(**request) if function is None else _score(function, **request)
        except BaseException as error:  # as above
            answer = {"error": _words(error, file)}
        reply(answer)


def _module(file: Path) -> ModuleType:
    """Import the user's file; modules beside it can be imported by it."""
    sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"own_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _score(function: Callable[..., Any], problem: dict[str, Any], completion: str) -> dict[str, Any]:
    result = function(problem, completion)
    score, parsed = result if isinstance(result, tuple | list) else (result, None)
    return {"score": float(score), "parsed": None if parsed is None else str(parsed)[:LONGEST]}


def _search(pattern: str, text: str) -> dict[str, Any]:
    """Return the first group, or else the whole, of the last match."""
    found = None
    for match in re.finditer(pattern, text):
        found = match
    if found is None:
        return {"parsed": None}
    return {"parsed": (found[1] if found.re.groups else found[0] or "")}


def _words(error: BaseException, file: str) -> str:
    """The type and message of an exception, and the last line of the user's file that it passed."""
    trace, line = error.__traceback__, 0
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else line
        trace = trace.tb_next
    text = " ".join(str(error).split())[:200]
    where = f" in line {line}" if line else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _limit_memory(additional: int) -> None:
    """Limit the address space to what is used now and ``additional`` bytes; on Linux only."""
    used = Path("/proc/self/statm")
    if used.exists():
        pages = int(used.read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + additional, hard))


def _limit_time(seconds: float) -> None:
    """Let the kernel end this process if it computes on although its parent, which limits the time, is gone."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + 16 * seconds) + 16, hard))


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
