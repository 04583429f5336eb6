"""``python -m dllm_sd`` and ``accelerate launch -m dllm_sd``: the same as ``dllm-sd``."""

from dllm_sd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
