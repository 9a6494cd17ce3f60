"""CUDA graphs of a decoding step: all its kernels launched at once.

`torch.cuda.graph` is not used: at each capture it waits for the card and gives all cached memory back to the driver.
All graphs of a process are captured on one stream into one memory pool, so each uses the memory of the one before.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch


class GraphPool:
    """Stream and memory of all captures on one card.

    cuBLAS makes its workspace for this stream in the first capture, so it is in this memory too.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.handle = torch.cuda.graph_pool_handle()
        self.latest: torch.cuda.CUDAGraph | None = None  # a pool without graphs could not be used again

    def capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record the kernels of `step`, which run at each replay, not now.

        Tensors outside the step must keep their addresses. It must have run before without a capture: the first call
        of a kernel may do what a capture does not allow.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()  # the graph before this one, which ends here, may still run
        with torch.cuda.stream(self.stream):
            # Only calls of this thread can break the capture: others may pin or free memory meanwhile.
            graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                with suppress(RuntimeError):  # the stream must leave the capture; the first error is the cause
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.latest = graph
        return graph


@cache
def graph_pool(device: torch.device) -> GraphPool:
    """Return the one pool of a card."""
    return GraphPool(device)
