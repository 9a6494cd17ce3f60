"""Whether the model hub answers: its own clients retry for up to a minute before they say no."""

import os
from urllib.error import HTTPError
from urllib.request import Request, urlopen

HUB = "https://huggingface.co"
PROBE_SECONDS = 5


def check_hub() -> None:
    """Raise OSError (ValueError where HF_ENDPOINT is no address) at once if the hub does not answer.

    Silent when the user set HF_HUB_OFFLINE: then only the local cache is looked into.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "TRUE", "ON", "YES"}:
        return
    try:
        urlopen(Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD"), timeout=PROBE_SECONDS).close()
    except HTTPError:
        return  # an answer, if an unfriendly one
