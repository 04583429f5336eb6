"""The page docs/metrics.md: what every metric means and what trackers call it, from the table of the code."""

from dllm_sd.training.metric_table import FIGURES, GROUPS, METRICS, RESULTS, meaning, shown_name

INTRODUCTION = f"""# Metrics

`metrics.jsonl` has one line an update, with the names of the first column. Trackers (`log.trackers`) show the same
numbers in groups that sort well: {", ".join(f"`{group}/`" for group in GROUPS)}.
TensorBoard shows the meaning of a curve beside it. A name that ends in `/` stands for all that begin with it.

Counts of rare events are sent to trackers once they are above 0, and values that follow from the config once they
change, so that no curve stays flat for a whole run; `metrics.jsonl` has them all.

| in metrics.jsonl | in trackers | meaning | sent |
|---|---|---|---|
"""
TRACKERS = """
Test results have no line in `metrics.jsonl`; `report.json` has them. Results of `eval.schedules` have the schedule's
name at the end.

| in trackers | meaning |
|---|---|
"""


def metrics_page() -> str:
    """The text of docs/metrics.md."""
    rows = [
        f"| `{name}` | `{shown_name(name)}` | {metric.meaning} | {metric.sent} |" for name, metric in METRICS.items()
    ]
    results = [f"{start}{figure}" for start in RESULTS for figure in FIGURES]
    return "\n".join(
        [
            INTRODUCTION + "\n".join(rows),
            TRACKERS + "\n".join(f"| `{name}` | {meaning(name)} |" for name in results),
            "",
        ]
    )
