"""Whether the Hugging Face hub answers, found out once and within seconds."""

import ssl
from functools import cache
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

LONGEST_WAIT = 5.0
"""Seconds in which the hub must answer."""


def why_offline() -> str | None:
    """The reason why only the local cache of the hub is read, as a clause; None if the hub answers.

    Its client tries each file six times, with pauses of 23 seconds in all, before it reads the cache. So a hub that
    does not answer is not asked again: the client is told that it is offline, as ``HF_HUB_OFFLINE=1`` does.
    """
    from huggingface_hub import constants  # imported here, since commands that ask no hub need not wait for it

    if constants.HF_HUB_OFFLINE and not _unanswered.cache_info().currsize:
        return "HF_HUB_OFFLINE forbids asking the hub; unset it"
    if (why := _unanswered(constants.ENDPOINT)) is not None:
        constants.HF_HUB_OFFLINE = True
    return why


@cache
def _unanswered(endpoint: str) -> str | None:
    """Why the hub at ``endpoint`` does not answer; None if it does, whatever it says."""
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=LONGEST_WAIT):
            return None
    except HTTPError:
        return None
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLError):  # it is there, and the client has certificates of its own
            return None
        words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return f"the hub does not answer ({endpoint}: {words:.80}); connect to the network"
