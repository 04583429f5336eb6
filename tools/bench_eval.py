"""Measures tokens per second of `evaluate`, of decoding alone, and of the published procedure.

    python -m tools.bench_eval [--body tiny|100m] [--problems 64] [--naive-problems 8] [--attempts 1] [--record]
    python -m tools.bench_eval --problems 4 --length 32 --naive-problems 2        # seconds

All three decode the same prompts greedily in one run. The difference of the first two is what an evaluation adds:
prompts, texts, grades, and with ``--record`` the file of attempts. Tokens count up to the end of a completion.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from dllm_sd.evaluation.evaluate import evaluate
from dllm_sd.evaluation.recording import Record, begin
from dllm_sd.randomness import make_key
from tools import naive


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    naive.add_options(parser)
    parser.add_argument("--attempts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="of ours; the best counts")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}")
    policy, settings = naive.body(options, options.vocabulary), naive.decoding(options)
    task = naive.StandIn(options.problems, options.rate)
    problems = task.problems()
    jobs = [(problem, attempt) for problem in problems for attempt in range(options.attempts)]
    prompts = [policy.encode(task.messages(problem)) for problem, _ in jobs]
    keys = [make_key(0, problem.id, attempt, "evaluate") for problem, attempt in jobs]
    trajectory = policy.decode(prompts, settings, keys)  # warm

    alone, whole, results = [], [], []
    for _ in range(options.repeats):
        start = naive.clock(policy)
        policy.decode(prompts, settings, keys)
        alone.append(naive.clock(policy) - start)
        with tempfile.TemporaryDirectory() as folder:
            record = None
            if options.record:
                begin(Path(folder), {})
                record = Record(Path(folder), "trained", 0)
            start = naive.clock(policy)
            result = evaluate(
                policy, task, problems, settings, attempts=options.attempts, max_prompt=10**6, record=record
            )
        whole.append(naive.clock(policy) - start)
        results.append(result)
    report, items = results[-1]
    tokens = int(trajectory.length.sum())
    texts = [policy.text(trajectory.tokens[i, : int(trajectory.length[i])].tolist()) for i in range(len(jobs))]
    assert texts == [text for item in items for text in item.texts], "evaluate and decode differ"

    count = options.problems if options.naive_problems is None else min(options.naive_problems, options.problems)
    print(f"{'':>12} {'tokens':>8} {'seconds':>9} {'tokens/s':>9}")
    for name, seconds in (("evaluate", min(whole)), ("decode alone", min(alone))):
        print(f"{name:>12} {tokens:>8} {seconds:>9.3f} {tokens / seconds:>9.1f}")
    print(f"evaluate takes {min(whole) / min(alone):.3f} times the time of decoding alone; slots busy ", end="")
    print(f"{report.occupancy:.1%}")
    if count:
        start, same, written = naive.clock(policy), 0, 0
        for i in range(count):
            row, length = i * options.attempts, int(trajectory.length[i * options.attempts])
            tokens_of_naive = naive.generate(policy, prompts[row], settings).cpu()
            same += int((tokens_of_naive[:length] == trajectory.tokens[row, :length]).sum())
            written += length
        seconds = naive.clock(policy) - start
        print(f"{'naive':>12} {written:>8} {seconds:>9.3f} {written / seconds:>9.1f}")
        print(f"ratio of tokens per second, evaluate to naive: {tokens / min(whole) / (written / seconds):.2f}")
        print(f"greedy tokens equal: {same} of {written}")


if __name__ == "__main__":
    main()
