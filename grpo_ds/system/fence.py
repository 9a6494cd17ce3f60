"""The fence around users' code: it may change the state of this process, and afterwards the run has its own again.

Only what the run relies on is put back; docs/reliability.md lists it. Random numbers continue, as users expect, but for
a trial (random_kept).
What code does in other threads, to the process itself (os._exit, limits) or to functions of libraries is not undone.
This module does not import torch: a user's file may be the first to load it.
"""

import gc
import locale
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import Context
from io import TextIOWrapper
from typing import Any, TypeVar

from grpo_ds.system.signals import SecondCtrlC

Result = TypeVar("Result")
# Variables that say which rank this is and with which cards and threads it computes: beginnings of names.
RELIED_ON = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_"),
    *("CUDA_", "CUBLAS_", "NCCL_", "PYTORCH_", "OMP_", "GOMP_", "MKL_"),
)
DESCRIPTORS = {"stdout": 1, "stderr": 2}
KERNELS = ("flash", "mem_efficient", "math", "cudnn")
AUTOCAST = ("cpu", "cuda")
MOST_MODES = 100  # that are entered within one another
# Context variables of all users' code, from import to the last call: decimal's precision, NumPy's error handling.
USERS = Context()


def fenced(call: Callable[[], Result]) -> Result:
    """Return call(); what it changed of the state that the run relies on is put back, also if it raises."""
    with _torch_kept(), _streams_kept(), _process_kept(), _signals_kept(), _interpreter_kept():
        return USERS.run(call)


@contextmanager
def random_kept() -> Iterator[None]:
    """Keep the random numbers of Python, NumPy and torch as they are, for a call that is no part of the run."""
    python, numpy, torch = random.getstate(), sys.modules.get("numpy"), sys.modules.get("torch")
    of_numpy, of_torch = numpy and numpy.random.get_state(), torch and torch.get_rng_state()
    of_cards = torch.cuda.get_rng_state_all() if torch is not None and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(of_numpy)
        if torch:
            torch.set_rng_state(of_torch)
            if of_cards:
                torch.cuda.set_rng_state_all(of_cards)
        elif torch := sys.modules.get("torch"):  # loaded by the call: back to where its numbers begin
            torch.manual_seed(torch.initial_seed())


def by_ctrl_c(error: BaseException) -> bool:
    """Return True if Ctrl-C raised this; a KeyboardInterrupt that users' code raises itself is an error like others."""
    ours = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    return isinstance(error, SecondCtrlC if ours else KeyboardInterrupt)


# --- the process ------------------------------------------------------------------------------------------------


def _set_cores(cores: set[int]) -> None:
    with suppress(OSError):  # they may be taken from this process by now
        os.sched_setaffinity(0, cores)


def _set_collection(state: tuple[bool, tuple[int, ...]]) -> None:
    (gc.enable if state[0] else gc.disable)()
    gc.set_threshold(*state[1])


# (read, write); a debugger or a profiler of the user's first: it would follow the other writes
INTERPRETER: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (sys.gettrace, sys.settrace),
    (sys.getprofile, sys.setprofile),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (lambda: (gc.isenabled(), gc.get_threshold()), _set_collection),
    (lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)),
    (lambda: os.sched_getaffinity(0), _set_cores),
]


@contextmanager
def _interpreter_kept() -> Iterator[None]:
    """Keep what decides how Python runs, and on which cores."""
    before = [read() for read, _ in INTERPRETER]
    try:
        yield
    finally:
        for (read, write), value in zip(INTERPRETER, before, strict=True):
            if read() != value:
                write(value)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep handlers, mask and alarm: a signal must still stop the run, and a forgotten alarm must not."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    mask, alarm = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # first: it must not ring between its handler and ours
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None: not Python's
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.setitimer(signal.ITIMER_REAL, *alarm)


@contextmanager
def _process_kept() -> Iterator[None]:
    """Keep working folder, umask, arguments and some of the environment, and do not turn later warnings into errors."""
    folder, argv, filters = os.open(".", os.O_PATH), list(sys.argv), list(warnings.filters)
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    environ = {name: value for name, value in os.environ.items() if name.startswith(RELIED_ON)}
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be closed to us by now, or its descriptor closed
            os.fchdir(folder)
            os.close(folder)
        os.umask(umask)
        for name in {name for name in os.environ if name.startswith(RELIED_ON)} - environ.keys():
            del os.environ[name]
        # Only what differs: a thread in C may be reading the environment.
        os.environ.update({name: value for name, value in environ.items() if os.environ.get(name) != value})
        sys.argv = argv
        warnings.filters[:] = [it for it in warnings.filters if it[0] != "error" or it in filters]  # type: ignore[index]


@contextmanager
def _streams_kept() -> Iterator[None]:
    """Keep stdout and stderr, open, and where they lead to."""
    streams = {name: getattr(sys, name) for name in DESCRIPTORS}
    copies = {}
    for descriptor in DESCRIPTORS.values():
        with suppress(OSError):  # the run itself may have none
            copies[descriptor] = os.dup(descriptor)
    try:
        yield
    finally:
        for descriptor, copy in copies.items():
            with suppress(OSError):  # it was closed: then the stream itself is left as it is
                os.dup2(copy, descriptor)
                os.close(copy)
        for name, stream in streams.items():
            setattr(sys, name, stream)  # a wrapper that replaced it may now end, and close what it wrapped
            for it in (stream, getattr(sys, f"__{name}__")):
                _open_again(it, DESCRIPTORS[name])


def _open_again(stream: Any, descriptor: int) -> None:
    """Open a stream that was closed or detached, in place: others hold it too."""
    if not isinstance(stream, TextIOWrapper):
        return
    with suppress(ValueError):  # its buffer was detached
        if not stream.closed:
            return
    with suppress(OSError):  # there is nothing to write to
        buffer = open(descriptor, "wb", closefd=False)  # noqa: SIM115
        stream.__init__(buffer, errors="backslashreplace", line_buffering=True)  # type: ignore[misc]


# --- torch ------------------------------------------------------------------------------------------------------


def _precision(torch: Any) -> tuple[str, ...]:
    """Precision of matrix products; the older functions that read it raise if both kinds were used to set it."""
    backends = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, backends.fp32_precision


def _set_precision(torch: Any, precision: tuple[str, ...]) -> None:
    torch.set_float32_matmul_precision("highest")
    backends = torch.backends
    backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, backends.fp32_precision = precision


def _attention(torch: Any) -> tuple[bool, ...]:
    """Kernels of scaled_dot_product_attention that may be used."""
    return tuple(getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")() for kernel in KERNELS)


def _set_attention(torch: Any, enabled: tuple[bool, ...]) -> None:
    for kernel, on in zip(KERNELS, enabled, strict=True):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(on)


def _modes(torch: Any) -> tuple[list[Any], list[Any], Any]:
    """Modes that are entered, the outermost first: functions' (torch.device is one), dispatched; the default device."""
    functions = torch.overrides._get_current_function_mode_stack()
    dispatched = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return functions, dispatched, getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def _set_modes(torch: Any, modes: tuple[list[Any], list[Any], Any]) -> None:
    """Leave the modes that are not among these. set_default_device would not leave a device that was entered."""
    functions, dispatched, device = modes
    for _ in range(MOST_MODES):  # a user's mode may refuse to end
        *_, mode = _modes(torch)[1] or [None]
        if mode is None or mode in dispatched:
            break
        mode.__exit__(None, None, None)  # has more to put back than its place
    for _ in _modes(torch)[0]:
        torch.overrides._pop_mode()
    for mode in functions:
        torch.overrides._push_mode(mode)
    torch._GLOBAL_DEVICE_CONTEXT.device_context = device
    if compiled_for := sys.modules.get("torch.utils._device"):
        compiled_for.CURRENT_DEVICE = device and device.device  # type: ignore[attr-defined]


def _autocast(torch: Any) -> tuple[Any, ...]:
    """Types and cache of autocast, and how many are entered: at 0 its copies of weights are forgotten."""
    entered = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return (*map(torch.get_autocast_dtype, AUTOCAST), torch.is_autocast_cache_enabled(), entered)


def _set_autocast(torch: Any, state: tuple[Any, ...]) -> None:
    *dtypes, cached, entered = state
    for device, dtype in zip(AUTOCAST, dtypes, strict=True):
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(cached)
    while _autocast(torch)[-1] > entered:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _kernels(torch: Any) -> tuple[bool, ...]:
    """Libraries of kernels that may be used, and how cuDNN chooses."""
    mkldnn, cudnn = torch.backends.mkldnn, torch.backends.cudnn
    return mkldnn.enabled, cudnn.enabled, cudnn.deterministic, cudnn.benchmark


def _set_kernels(torch: Any, state: tuple[bool, ...]) -> None:
    mkldnn, cudnn = torch.backends.mkldnn, torch.backends.cudnn
    mkldnn.enabled, cudnn.enabled, cudnn.deterministic, cudnn.benchmark = state


def _set_cuda_device(torch: Any, device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


# (read, write, value of a torch that was just loaded)
TORCH: list[tuple[Callable[[Any], Any], Callable[[Any, Any], object], Callable[[Any], Any]]] = [
    (_modes, _set_modes, lambda t: ([], [], None)),  # first: with a device entered, other settings cannot be read
    (lambda t: t.is_grad_enabled(), lambda t, on: t.set_grad_enabled(on), lambda t: True),
    (lambda t: t.get_default_dtype(), lambda t, dtype: t.set_default_dtype(dtype), lambda t: t.float32),
    (lambda t: t.get_deterministic_debug_mode(), lambda t, mode: t.set_deterministic_debug_mode(mode), lambda t: 0),
    (lambda t: t.is_anomaly_enabled(), lambda t, on: t.autograd.set_detect_anomaly(on), lambda t: False),
    (_precision, _set_precision, lambda t: ("none", "none", "none")),
    (_attention, _set_attention, lambda t: (True,) * len(KERNELS)),
    (_autocast, _set_autocast, lambda t: (t.bfloat16, t.float16, True, 0)),
    (_kernels, _set_kernels, lambda t: (True, True, False, False)),
    (
        lambda t: t.utils.deterministic.fill_uninitialized_memory,
        lambda t, on: setattr(t.utils.deterministic, "fill_uninitialized_memory", on),
        lambda t: True,
    ),
    # Not known of a torch just loaded: a file that loads torch may choose the run's threads and card.
    (lambda t: t.get_num_threads(), lambda t, count: t.set_num_threads(count), lambda t: t.get_num_threads()),
    (lambda t: t.cuda.current_device() if t.cuda.is_initialized() else None, _set_cuda_device, lambda t: None),
]  # fmt: skip


@contextmanager
def _torch_kept() -> Iterator[None]:
    """Keep what decides how torch computes."""
    torch = sys.modules.get("torch")
    before = [read(torch) for read, _, _ in TORCH] if torch else []
    # It ends what was entered within it and never left: inference mode, autocast's being on.
    guard = torch.inference_mode(torch.is_inference_mode_enabled()) if torch else nullcontext()
    try:
        with guard:
            if torch:
                torch.set_grad_enabled(before[1])
            yield
    finally:
        if torch := sys.modules.get("torch"):
            for (read, write, _), value in zip(TORCH, before or [fresh(torch) for _, _, fresh in TORCH], strict=True):
                if read(torch) != value:
                    write(torch, value)
