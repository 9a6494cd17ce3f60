"""Both implementations of a step in RAM."""

import pytest

from grpo_ds.optim import native, slices


@pytest.fixture(params=["native", "slices"])
def engine(request, monkeypatch):
    """The compiled step and the one in slices, which has to cross several of them."""
    if request.param == "native" and native.library() is None:
        pytest.skip("no C++ compiler on this machine")
    if request.param == "slices":
        monkeypatch.setattr(native, "library", lambda: None)
        monkeypatch.setattr(slices, "SLICE", 16 * 256)
    return request.param
