"""Write docs/methods.md from the table of methods and what was measured of them: python tools/make_methods_page.py"""

from pathlib import Path

from dllm_sd.reports.method_page import methods_page

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"

if __name__ == "__main__":
    PAGE.write_text(methods_page(), encoding="utf-8")
