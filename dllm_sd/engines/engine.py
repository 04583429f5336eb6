"""The protocol of an engine, the local one, and the keys that all engines on servers share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Any, ClassVar, Protocol
from urllib.parse import urlsplit

from dllm_sd.errors import InputError
from dllm_sd.http_client import LONGEST_TRY, LONGEST_WAIT, check_key_variable, check_url
from dllm_sd.parts import Part
from dllm_sd.ranges import Count, Natural, NonNegative, Range, Ranged
from dllm_sd.trajectory import NO_MASK, Trajectory

KEY = "decode.engine"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Names of this machine."""
TOLERANCES = {"exact": 0.001, "rounded": 0.05}
"""Defaults of `RemoteEngine.tolerance`. In float32 servers and trainer differ by 1e-5 to 1e-4 nats a token
(docs/benchmarks.md), and a few updates move an adapter further than 0.001; bfloat16 keeps 8 bits, so that a logit of 10
is rounded by up to 0.03."""


@dataclass(frozen=True)
class CompletionRequest:
    """One completion that a server is asked for."""

    prompt: tuple[int, ...]
    """Token ids; never text, which the server would tokenise in its own way."""
    key: int
    """Seeds its random numbers."""
    model: str
    """Name of the weights on the server."""
    version: str
    """Which weights of the run these are, with a hash of them; it stays when the run is started again, unlike the
    name."""
    decode: Mapping[str, Any]
    """The keys of `decode` but the engine."""
    steps: int
    """Most tokens of an autoregressive completion."""
    stop_after: Mapping[str, Any] | None
    """``unit`` and ``count`` of a horizon, or None."""
    end_ids: tuple[int, ...]
    pad_id: int
    banned: tuple[int, ...]
    """Ids that are never sampled."""
    vocabulary: int
    """``v``; no id reaches it."""
    mask_id: int = NO_MASK
    block_length: int = 1
    blocks_of_prompt: bool = False
    causal: bool = True
    """With the three above as in `Trajectory`, whose values an answer must have; the defaults are autoregressive."""


class Engine(Part, Protocol):
    """Which machine decodes, and how it is asked."""

    remote: ClassVar[bool]
    """Whether servers decode; then the engine is a `RemoteEngine`."""


@dataclass(frozen=True)
class Local:
    """The network of the trainer decodes."""

    remote: ClassVar[bool] = False


@dataclass(frozen=True)
class RemoteEngine(Ranged, ABC, key=KEY):
    """One or several servers decode; they share the completions that are to be made.

    Every request holds token ids and gets token ids back. At every update some rollouts are scored again by the
    trainer, and a run whose servers decode with other weights than the student's is stopped.
    """

    url: tuple[str, ...] = ()
    """Base URLs, such as ``http://host:8000``."""
    model: str = ""
    """Name under which the servers know the model at `model.path`."""
    key_variable: str = "DLLM_SD_ENGINE_KEY"
    """Environment variable with the API key; if it is not set, no key is sent."""
    timeout: Annotated[float, Range(above=0, most=LONGEST_TRY)] = 600.0
    """Most seconds for one attempt at a request, from the connection to the last byte."""
    retries: Natural = 4
    """Number of retries of a request after a temporary failure, on any server that is left."""
    backoff: Annotated[float, Range(least=0, most=LONGEST_WAIT)] = 1.0
    """Most seconds until the first retry; they double with every retry."""
    concurrency: Annotated[int, Range(least=1, most=4096)] = 64
    """Requests in flight at each server, of all processes together; those of a server that is down go to the others."""
    checked: Count = 4
    """Rollouts of every batch that the trainer scores again (`engine/logp_gap`), spread evenly over the servers that
    took part; at least one of each."""
    tolerance: NonNegative | None = None
    """Largest mean difference, in nats a token, between the log-probabilities of engine and trainer. null: 0.001 where
    the trainer computes in float32 or float64, 0.05 where it rounds to 16 bits or fewer (`TOLERANCES`)."""
    remote: ClassVar[bool] = True
    denoises: ClassVar[bool] = False
    """Whether it decodes masked-diffusion models."""
    takes_all_weights: ClassVar[bool] = False
    """Whether it takes the weights of full fine-tuning, not only LoRA adapters."""
    loading: ClassVar[str]
    """How a server is started so that it takes weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.url:
            raise InputError(f"{KEY}.url is empty; list the base URLs of the servers, such as [http://host:8000]")
        for i, url in enumerate(self.url):
            check_url(url, f"{KEY}.url.{i}", "http://host:8000")
        first = dict[str, int]()
        for i, url in enumerate(self.url):
            if (former := first.setdefault(server_of(url), i)) != i:
                raise InputError(f"{KEY}.url.{i} names the same server as {KEY}.url.{former}; name each once")
        check_key_variable(self.key_variable, f"{KEY}.key_variable")
        if not self.model:
            raise InputError(f"{KEY}.model is empty; give the name under which the servers know the model")

    def path(self, url: str, route: str) -> str:
        """The address of a route; a base URL may end with ``/v1``."""
        return f"{url.rstrip('/').removesuffix('/v1')}{route}"

    @abstractmethod
    def check(self, decode: Mapping[str, Any], key: str) -> None:
        """Refuse settings of `decode` that stand at ``key`` and that the engine does not have.

        Raises:
            InputError: naming the key, and the remedy.
        """

    @abstractmethod
    def ask(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        """Return the route and the JSON body of a request."""

    @abstractmethod
    def read(self, answer: Any, request: CompletionRequest) -> Trajectory:
        """Return the completion in the JSON of an answer, as a batch of one.

        Raises:
            ValueError: saying what is wrong with the answer.
        """

    @abstractmethod
    def load(self, name: str, folder: str, adapter: bool) -> tuple[str, dict[str, Any]]:
        """Return the route and the JSON body that load weights from a folder under a name."""

    @abstractmethod
    def unload(self, name: str, adapter: bool) -> tuple[str, dict[str, Any]] | None:
        """Return the route and the JSON body that remove weights; None if loading others has removed them."""


def server_of(url: str) -> str:
    """Return a base URL in one spelling for each server, by which two are compared; requests go to the URL as given."""
    parts = urlsplit(url)
    host, port = (parts.hostname or "").rstrip("."), parts.port or {"http": 80, "https": 443}[parts.scheme]
    with suppress(ValueError):  # a name
        host = str(ip_address(host))
    if host in LOOPBACK:
        host = "localhost"
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


def integers(value: Any, name: str) -> list[int]:
    """Check a list of integers of an answer.

    Raises:
        ValueError: if it is something else, or holds a negative number.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list of token ids, but {type(value).__name__}")
    if wrong := [x for x in value if type(x) is not int or x < 0]:
        raise ValueError(f"{name} holds {wrong[0]!r:.40}, which is not a token id")
    return value


def same_prompt(sent: Sequence[int], returned: Any) -> None:
    """Check that the server read the prompt as it was sent.

    Raises:
        ValueError: if it did not say so, or read another.
    """
    tokens = integers(returned, "the returned prompt")
    if tokens != list(sent):
        raise ValueError(
            f"the prompt came back with other tokens ({len(sent)} were sent, {len(tokens)} came back); the server "
            "tokenises it again"
        )
