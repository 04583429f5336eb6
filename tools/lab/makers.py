"""What the laboratory takes from the makers of the tiny models, scripts that import each other by file name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.make_tiny_asset import word_tokenizer
from tools.make_tiny_reader import corrected

__all__ = ["corrected", "word_tokenizer"]
