"""Check that the model hub answers. Its own clients would retry for up to a minute before they fail."""

import os
from urllib.error import HTTPError
from urllib.request import Request, urlopen

HUB = "https://huggingface.co"
PROBE_SECONDS = 5


def check_hub() -> None:
    """Raise OSError at once if the hub does not answer, ValueError if HF_ENDPOINT is not an address.

    Does nothing if the user set HF_HUB_OFFLINE: then only the local cache is used.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "TRUE", "ON", "YES"}:
        return
    try:
        urlopen(Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD"), timeout=PROBE_SECONDS).close()
    except HTTPError:
        return  # also an answer
