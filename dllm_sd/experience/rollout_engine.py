"""The engine of a run: which decoder makes its rollouts, with which weights, and whether they can be trained on."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from dllm_sd.config import Config
from dllm_sd.decoding.decoder import Decoder
from dllm_sd.decoding.queue import Queue
from dllm_sd.decoding.remote import RemoteDecoder, TokenIds, makers_of
from dllm_sd.decoding.settings import Decoding
from dllm_sd.engines import RemoteEngine
from dllm_sd.engines.engine import TOLERANCES
from dllm_sd.engines.servers import TRAINED, Servers
from dllm_sd.errors import Stopped
from dllm_sd.files.writing import remove
from dllm_sd.network.swapping import swapped
from dllm_sd.parallel.processes import on_main, together
from dllm_sd.parallel.sharding import gathered
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.saving import write_adapter, write_weights
from dllm_sd.policies.weight_hash import weight_hash
from dllm_sd.policies.weights import trained
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.journal import RolloutJournal
from dllm_sd.rollouts.rescoring import rescore
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.trajectory import StopAfter, Trajectory

FOLDER = "engine"
"""Folder in the run folder, with the weights that servers load and the completions since the last checkpoint."""
IMPROBABLE = math.log(1e-9)
"""Log-probability of equal attempts, by chance, below which the servers are taken to ignore seeds or temperature."""


def folder_of(config: Config) -> Path:
    """The folder of weights and completions, by the path that is sent to the servers."""
    return Path(config.run).resolve() / FOLDER


def weights_prefix(config: Config) -> str:
    """How the names of a run's weights begin on the servers, while its folder is where it is."""
    return f"{TRAINED}{sha256(str(folder_of(config)).encode()).hexdigest()[:8]}-"


def tolerance(config: Config) -> float:
    """`tolerance` of a run's engine, by default that of the type in which the trainer computes."""
    engine: Any = config.decode.engine
    if engine.tolerance is not None:
        return engine.tolerance
    rounds = config.optim.autocast or config.model.quantization or config.model.dtype in ("bfloat16", "float16")
    return TOLERANCES["rounded" if rounds else "exact"]


def check_servers(config: Config) -> list[str]:
    """Refuse servers that do not answer or cannot serve the run, before weights are read.

    Returns:
        What is to be said of them before the run begins.

    Raises:
        InputError: naming the server, and the remedy.
    """
    if isinstance(engine := config.decode.engine, RemoteEngine):
        lengths = [config.decode.length, *(config.held_out(name).length for name in (None, *config.eval.schedules))]
        folder, prefix = folder_of(config), weights_prefix(config)
        own = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
        return Servers(engine).check(
            config.max_prompt, max(lengths), lambda name: name.startswith(prefix) or name in own
        )
    return []


class RolloutEngine:
    """Gives the decoder of rollouts and evaluations; to be used by all processes together."""

    def __init__(self, config: Config, policy: AnyPolicy, module: nn.Module, accelerator: Accelerator) -> None:
        """For a run whose policy is wrapped in ``module``.

        Raises:
            InputError: if the completions of a killed run are damaged.
        """
        self.config, self.policy, self.module, self.accelerator = config, policy, module, accelerator
        self.engine: Any = config.decode.engine
        self.gather: Callable[[Any], list[Any]] = gather_object if accelerator.num_processes > 1 else list
        self.folder = folder_of(config)
        """The folder as this process sees it; the servers get the path of the main process."""
        self.decoder: Decoder = policy.decoder
        self._frozen: str | None = None
        """A hash of the weights below the adapter, once it was needed."""
        self.version = self.name = self.digest = ""
        if self.engine.remote:
            self.start, self.shared = on_main(lambda: (f"{weights_prefix(config)}{token_hex(3)}-", str(self.folder)))
            rank, processes = accelerator.process_index, accelerator.num_processes
            with together():
                self.servers = Servers(self.engine, rank)
                self.journal = RolloutJournal(self.folder, rank)
            ids = TokenIds(
                *(policy.end_ids, policy.pad_id, tuple(policy.suppress), policy.vocabulary, policy.mask_id),
                blocks_of_prompt=policy.block_length is not None,
                causal=policy.causal,
            )
            remote = RemoteDecoder(self.servers, ids, lambda: (self.name, self.digest), self.journal, processes)
            self.decoder, self.makers = remote, remote.makers

    @property
    def notes(self) -> list[str]:
        """Sentences to print before the run begins."""
        if not self.engine.remote or not self.journal.found:
            return []
        return [
            f"{self.journal.found} completions since the last checkpoint are kept; those of the same weights are not "
            "made again (engine/found)"
        ]

    def use(self, version: str) -> None:
        """Let the servers decode with the student's weights of now, which are called ``version``.

        On the servers their name holds when the run was started too: a server may still have those of an earlier start,
        which need not be equal, and vLLM refuses a name that it knows.

        Raises:
            Stopped: if no server takes them.
        """
        if not self.engine.remote or version == self.version:
            return
        name = f"{self.start}{version}"
        folder, adapter = f"{self.shared}/{name}", self.config.model.lora is not None
        with gathered(self.accelerator, self.module):
            self.digest = on_main(lambda: self._written(Path(folder), version))
        taken = on_main(lambda: self.servers.load(name, folder, adapter))
        if not self.accelerator.is_main_process:
            self.servers.note(name, folder, adapter, taken)
        self.name, self.version = name, version
        self.makers.turn()
        on_main(self._forget_former_weights)

    def begin(self, queue: Queue, decode: Decoding, stop_after: StopAfter | None) -> Callable[[], None]:
        """Let servers begin the jobs of a queue, with the weights of now; what is returned completes the queue."""
        assert isinstance(self.decoder, RemoteDecoder)
        return self.decoder.begin(queue, decode, stop_after).finish

    def end(self) -> None:
        """Let the servers forget the adapter of a run that has ended, so that another run can use them."""
        if self.engine.remote:
            on_main(self.servers.unload)

    def cancel(self) -> None:
        """Cancel the requests in flight of a run that ends with an error."""
        if self.engine.remote:
            self.servers.cancel()

    def check(
        self, tried: Sequence[Sequence[Rollout]], decode: Decoding, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Compare the log-probabilities of servers and trainer on some rollouts of a batch.

        Args:
            tried: the attempts at each problem.
            decode: how they were decoded.
            weights: the trained weights that decoded them; None for those of now.

        Returns:
            Metrics; none where the trainer's own network decodes.

        Raises:
            Stopped: if they differ by more than `tolerance` nats a token in the mean, or if attempts at a problem are
                equal that should not be. These completions are not kept then.
        """
        if not self.engine.remote:
            return {}
        rollouts = [rollout.trajectory for attempts in tried for rollout in attempts]
        held = swapped(self.policy.module, weights) if weights else nullcontext()
        with self._forgetting(), held, gathered(self.accelerator, self.module):  # once for all of them
            _refuse_equal(tried, decode.temperature)
            makers = makers_of(rollouts, self.gather(self.makers.entries))
            gap = self._compare(self._gaps(self._sample(rollouts, makers), decode.temperature))
        metrics = {"engine/retried": float(self.servers.retried), "engine/found": float(self.journal.used)}
        return metrics | ({} if gap is None else {"engine/logp_gap": gap[0], "engine/logp_gap_max": gap[1]})

    def check_evaluation(self, done: Sequence[Trajectory], decode: Decoding) -> dict[str, float]:
        """Compare the log-probabilities of servers and trainer on some completions of an evaluation, as in `check`.

        To be called where the weights are whole on every process.

        Args:
            done: what this process decoded.
            decode: how.
        """
        if not self.engine.remote or decode.guidance:  # the log-probabilities know no guidance
            return {}
        in_order = sorted(done, key=lambda one: (one.prompt_ids.tolist(), one.tokens.tolist()))
        makers = makers_of(in_order, self.makers.entries)
        gaps = self._gaps(self._sample(in_order, makers), decode.temperature)
        with self._forgetting():
            gap = self._compare(self.gather(gaps))
        return {} if gap is None else {"engine/eval_logp_gap": gap[0]}

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """A context in which completions are looked at; those that must not be trained on are not kept."""
        try:
            yield
        except Stopped:
            self.saved()
            raise

    def _compare(self, gaps: Sequence[tuple[str, list[float]]]) -> tuple[float, float] | None:
        """Return the mean and the largest of the differences of some completions (`_gaps`), None of none.

        Raises:
            Stopped: if the mean of one server is beyond the tolerance.
        """
        of_server: dict[str, list[float]] = {}
        for server, values in gaps:
            of_server.setdefault(server, []).extend(values)
        means = {server: sum(values) / len(values) for server, values in of_server.items() if values}
        for server, mean in means.items():
            if not mean <= (most := tolerance(self.config)):
                raise Stopped(
                    f"{f'the server at {server}' if server else 'a server'} of decode.engine does not decode with the "
                    f"student's weights {self.name}: its log-probabilities differ from the trainer's by {mean:.3g} "
                    f"nats a token in the mean, more than decode.engine.tolerance {most:g}; look whether the adapter "
                    "is active, the model and its type are the same, and log-probabilities are those of the sampling "
                    "temperature"
                )
        every = [value for values in of_server.values() for value in values]
        return (sum(every) / len(every), max(every)) if every else None

    def saved(self) -> None:
        """Forget the completions, which a checkpoint has replaced."""
        if self.engine.remote:
            with together():
                self.journal.forget()

    def _sample(self, rollouts: Sequence[Trajectory], makers: Sequence[str]) -> list[tuple[str, Trajectory]]:
        """Some completions of many with their servers, drawn at random: as many of each server as of the others.

        They are `checked`, or one of each server if these are more.
        """
        generator = torch.Generator().manual_seed(make_key(self.config.seed, self.version, "checked"))
        drawn: dict[str, list[int]] = {}
        for i in map(int, torch.randperm(len(rollouts), generator=generator)):
            drawn.setdefault(makers[i], []).append(i)
        in_turns = [i for turn in zip_longest(*drawn.values()) for i in turn if i is not None]
        chosen = in_turns[: max(self.engine.checked, len(drawn))]
        return [(makers[i], rollouts[i]) for i in sorted(chosen)]

    def _gaps(self, completions: Sequence[tuple[str, Trajectory]], temperature: float) -> list[tuple[str, list[float]]]:
        """Differences between the log-probabilities of engine and trainer, in nats, for the tokens that have both.

        Returns:
            The server and the differences of each completion.
        """
        gaps = list[tuple[str, list[float]]]()
        for server, one in completions:
            if one.logp is not None:
                gap = (rescore(self.policy.module, one, temperature) - one.logp).abs()
                gaps.append((server, gap[~gap.isnan()].tolist()))
        return gaps

    def _forget_former_weights(self) -> None:
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name != self.name:
                remove(folder)

    def _written(self, folder: Path, version: str) -> str:
        """Write the weights of now; return their version with a hash, so that completions of others are not reused."""
        if self._frozen is None:
            every = self.policy.module.named_parameters()  # adapters that are not trained are teachers'
            self._frozen = weight_hash({n: x for n, x in every if not x.requires_grad and "lora_" not in n})
        self._write(folder)
        return f"{version} {self._frozen} {weight_hash(trained(self.policy))}"

    def _write(self, folder: Path) -> None:
        remove(folder)
        folder.mkdir(parents=True)
        if self.config.model.lora is None:
            write_weights(trained(self.policy), folder)
        else:
            write_adapter(self.policy, str(self.config.model.path), folder)


def _refuse_equal(tried: Sequence[Sequence[Rollout]], temperature: float) -> None:
    """Refuse attempts at one problem that are equal far more often than independent draws are.

    Of ``m`` attempts at a problem ``m (m - 1) / 2`` pairs may be equal, each with the mean probability of a completion,
    which the attempts estimate. The number of attempts that repeat an earlier one is compared with the expected number
    of equal pairs by Chernoff's bound of the Poisson distribution, which is exceeded by chance less often than that.
    """
    if not temperature:
        return
    expected, repeated = 0.0, 0
    for attempts in tried:
        logps = [rollout.trajectory.logp for rollout in attempts]
        mean = sum(1.0 if logp is None else math.exp(float(logp.nansum())) for logp in logps) / max(1, len(logps))
        expected += mean * len(attempts) * (len(attempts) - 1) / 2
        repeated += len(attempts) - len({tuple(rollout.trajectory.tokens[0].tolist()) for rollout in attempts})
    if repeated <= expected:
        return
    chance = repeated - expected + repeated * math.log(max(expected, 1e-300) / repeated)
    if chance < IMPROBABLE:
        raise Stopped(
            f"{repeated} attempts of a batch are equal to earlier ones at the same problem, which has a probability of "
            f"e^{chance:.0f} at temperature {temperature:g}; the servers of decode.engine ignore the seed or the "
            "temperature"
        )
