"""Write docs/metrics.md from the table of metrics: python tools/make_metrics_page.py"""

from pathlib import Path

from dllm_sd.reports.metrics_page import metrics_page

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

if __name__ == "__main__":
    PAGE.write_text(metrics_page(), encoding="utf-8")
