"""Writes configs/schema.json, the JSON schema of a config, from the dataclasses."""

import json
from pathlib import Path

from dllm_sd.files.writing import write_file
from dllm_sd.schema import config_schema

SCHEMA = Path(__file__).resolve().parent.parent / "configs" / "schema.json"


def schema_text() -> str:
    """The content of the file."""
    return json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_file(SCHEMA, schema_text())
