"""Write docs/methods.md and docs/which_method.md from the table of methods and what was measured of them:
python -m tools.make_methods_page"""

from dllm_sd.reports.method_page import methods_page
from tools.method_choice import DOCS, choice_page

PAGES = {DOCS / "methods.md": methods_page, DOCS / "which_method.md": choice_page}

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
