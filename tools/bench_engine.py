"""Measures rollouts per second: servers of an engine against the trainer's own network, on the same prompts.

    python tools/bench_engine.py MODEL --url http://127.0.0.1:8000 [--engine vllm] [--name NAME] [--prompts 8,32]

The servers decode with the weights that they were started with. Every prompt is an addition in words, completions have
``--tokens`` tokens at most. A first batch of two is not counted. Printed: rollouts and tokens per second of each, and
the ratio.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from dllm_sd.decoding.decoder import Decoder, decode
from dllm_sd.decoding.remote import RemoteDecoder, TokenIds
from dllm_sd.decoding.settings import Decoding
from dllm_sd.engines import ENGINES
from dllm_sd.engines.servers import Servers
from dllm_sd.policies.loading import AnyPolicy, load_policy
from dllm_sd.rollouts.journal import RolloutJournal
from dllm_sd.trajectory import Trajectory


def remote(policy: AnyPolicy, options: Any, folder: Path) -> Decoder:
    """The decoder of the servers; its journal is empty."""
    engine = ENGINES[options.engine](url=tuple(options.url), model=options.name or options.model)
    ids = TokenIds(
        *(policy.end_ids, policy.pad_id, tuple(policy.suppress), policy.vocabulary, policy.mask_id),
        blocks_of_prompt=policy.block_length is not None,
        causal=policy.causal,
    )
    return RemoteDecoder(Servers(engine), ids, lambda: (engine.model, "0"), RolloutJournal(folder, 0))


def prompts_of(policy: AnyPolicy, count: int, first: int) -> list[list[int]]:
    """Prompts that differ from each other, and from those of another ``first``."""
    texts = [f"Tom has {first + i} apples and gets {i + 2} more. How many apples has Tom?" for i in range(count)]
    return [policy.encode([{"role": "user", "content": text}]) for text in texts]


def timed(decoder: Decoder, prompts: list[list[int]], settings: Decoding, key: int) -> tuple[float, Trajectory]:
    """Seconds of a batch, and the batch."""
    start = time.perf_counter()
    done = decode(decoder, prompts, settings, [key + i for i in range(len(prompts))])
    return time.perf_counter() - start, done


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--url", nargs="+", required=True)
    parser.add_argument("--engine", choices=["vllm", "dllm_sd"], default="vllm")
    parser.add_argument("--name", help="what the servers call the model")
    parser.add_argument("--prompts", default="8,32")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    policy = load_policy(options.model)
    settings = Decoding(length=options.tokens, temperature=options.temperature, batch_size=32)
    with tempfile.TemporaryDirectory() as folder:
        decoders = {"servers": remote(policy, options, Path(folder)), "local": policy.decoder}
        for decoder in decoders.values():
            timed(decoder, prompts_of(policy, 2, 1000), settings, 0)
        for count in map(int, options.prompts.split(",")):
            rates: dict[str, float] = {}
            for name, decoder in decoders.items():
                seconds, done = timed(decoder, prompts_of(policy, count, 100 * count), settings, 10**6)
                rates[name], tokens = count / seconds, int(done.length.sum())
                print(f"{count} prompts, {name}: {rates[name]:.3f} rollouts/s, {tokens / seconds:.1f} tokens/s")
            print(f"{count} prompts, servers / local: {rates['servers'] / rates['local']:.2f}")


if __name__ == "__main__":
    main()
