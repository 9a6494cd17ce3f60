"""The fence: users' code may change the state of the process, and afterwards it is again what the run relies on."""

import contextlib
import decimal
import gc
import locale
import os
import signal
import subprocess
import sys
import warnings

import pytest

from grpo_ds.system.fence import fenced
from grpo_ds.system.signals import Interruption, SecondCtrlC
from grpo_ds.task.questions import Question
from grpo_ds.task.scoring import score

pytestmark = pytest.mark.faults("users' code that changes the process")

ENTERED = []  # contexts that are entered and never left


def enter(context):
    ENTERED.append(context)
    context.__enter__()


def umask():
    os.umask(before := os.umask(0))
    return before


def ignored(*_):
    """Trace nothing."""


PROCESS = {  # state -> change, read
    "working folder": (lambda: os.chdir("/"), os.getcwd),
    "umask": (lambda: os.umask(0o123), umask),
    "arguments": (lambda: sys.argv.append("--more"), lambda: list(sys.argv)),
    "rank": (lambda: os.environ.update(RANK="7"), lambda: os.environ.get("RANK")),
    "cards": (lambda: os.environ.update(CUDA_VISIBLE_DEVICES="9"), lambda: os.environ.get("CUDA_VISIBLE_DEVICES")),
    "a variable lost": (lambda: os.environ.pop("OMP_NUM_THREADS"), lambda: os.environ.get("OMP_NUM_THREADS")),
    "warnings": (lambda: warnings.simplefilter("error"), lambda: "error" in [it[0] for it in warnings.filters]),
    "Ctrl-C": (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGINT)),
    "SIGTERM": (lambda: signal.signal(signal.SIGTERM, print), lambda: signal.getsignal(signal.SIGTERM)),
    "blocked signals": (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    ),
    "alarm": (lambda: signal.alarm(60), lambda: signal.getitimer(signal.ITIMER_REAL)),
    "decimals": (lambda: setattr(decimal.getcontext(), "prec", 3), lambda: decimal.getcontext().prec),
    "recursion": (lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 7), sys.getrecursionlimit),
    "trace": (lambda: sys.settrace(ignored), sys.gettrace),
    "profile": (lambda: sys.setprofile(ignored), sys.getprofile),
    "garbage": (gc.disable, gc.isenabled),
    "when garbage is collected": (lambda: gc.set_threshold(0), gc.get_threshold),
    "language": (lambda: locale.setlocale(locale.LC_ALL, "C"), lambda: locale.setlocale(locale.LC_ALL)),
    "cores": (lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}), lambda: os.sched_getaffinity(0)),
    "stdout": (lambda: setattr(sys, "stdout", None), lambda: sys.stdout),
    "stderr": (lambda: setattr(sys, "stderr", None), lambda: sys.stderr),
}


def check_put_back(change, read):
    before = read()

    def call(then=lambda: "returned"):
        change()
        assert read() != before
        return then()

    assert fenced(call) == "returned"
    assert read() == before
    with pytest.raises(ZeroDivisionError):
        fenced(lambda: call(lambda: 1 / 0))
    assert read() == before


@pytest.mark.parametrize("state", PROCESS)
def test_state_of_the_process_is_put_back(state, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    if state == "cores" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    check_put_back(*PROCESS[state])


def test_what_users_set_for_themselves_stays(monkeypatch):
    """An API key, a warning that is ignored, a precision: the run does not rely on them."""
    monkeypatch.delenv("KEY_OF_A_JUDGE", raising=False)

    def set_up():
        os.environ["KEY_OF_A_JUDGE"] = "7"
        decimal.getcontext().prec = 5
        warnings.filterwarnings("ignore", message="a judge's own")

    with warnings.catch_warnings():
        fenced(set_up)
        assert os.environ["KEY_OF_A_JUDGE"] == "7" and warnings.filters[0][0] == "ignore"
    assert fenced(lambda: decimal.getcontext().prec) == 5 and decimal.getcontext().prec != 5


STREAMS = [
    "sys.stdout.close()",
    "sys.stdout = sys.__stdout__ = None",
    "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), 'utf-8')",
    "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, 'utf-8')",
    "os.close(1)",
    "os.closerange(3, 256)",
    "os.dup2(os.open(os.devnull, os.O_WRONLY), 1)",
]
PRINTING = """
import io, os, sys
from grpo_ds.system.fence import fenced
held = sys.stdout
for number, change in enumerate({streams}):
    fenced(lambda: exec(change, globals()))
    print(number, flush=True)
    print(number, file=held, flush=True)
"""


def test_stdout_is_open_and_leads_where_it_did():
    script = PRINTING.format(streams=STREAMS)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.stdout.split(), ended.stderr) == ([str(n // 2) for n in range(2 * len(STREAMS))], "")


def modes_of(torch):
    return (
        torch.overrides._get_current_function_mode_stack(),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    )


def settings_of(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    backends = torch.backends
    return {  # setting -> change, read
        "gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
        "inference mode": (lambda: enter(torch.inference_mode()), torch.is_inference_mode_enabled),
        "autocast": (lambda: enter(torch.autocast("cpu")), lambda: torch.is_autocast_enabled("cpu")),
        "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
        "type of autocast": (
            lambda: enter(torch.autocast("cpu", dtype=torch.float16)),
            lambda: torch.get_autocast_dtype("cpu"),
        ),
        "device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
        "device that is entered": (lambda: enter(torch.device("meta")), lambda: torch.ones(1).device),
        "both": (
            lambda: (torch.set_default_device("meta"), enter(torch.device("meta")), enter(torch.device("cpu"))),
            lambda: (modes_of(torch), torch.ones(1).device),
        ),
        "function mode": (lambda: enter(TorchFunctionMode()), lambda: modes_of(torch)),
        "dispatch mode": (lambda: (enter(TorchDispatchMode()), enter(FakeTensorMode())), lambda: modes_of(torch)),
        "oneDNN": (lambda: setattr(backends.mkldnn, "enabled", False), lambda: backends.mkldnn.enabled),
        "cuDNN": (lambda: setattr(backends.cudnn, "deterministic", True), lambda: backends.cudnn.deterministic),
        "unset memory": (
            lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
            lambda: torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
        "determinism": (lambda: torch.use_deterministic_algorithms(True), torch.get_deterministic_debug_mode),
        "anomalies": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
        "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
        "precision, the newer way": (
            lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
            lambda: backends.cuda.matmul.fp32_precision,
        ),
        "attention": (lambda: backends.cuda.enable_flash_sdp(False), backends.cuda.flash_sdp_enabled),
    }


def test_settings_of_torch_are_put_back():
    import torch

    for change, read in settings_of(torch).values():
        check_put_back(change, read)
        assert torch.ones(1).device.type == "cpu" and modes_of(torch) == ([], [])
    torch.set_default_device(None)  # would leave a mode that is not there any more
    assert (torch.ones(2, requires_grad=True) * 2).sum().requires_grad and torch.get_float32_matmul_precision()


def test_a_card_that_was_chosen_is_put_back():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    torch.cuda.init()
    check_put_back(lambda: torch.cuda.set_device(1), torch.cuda.current_device)


LOADING = """
from grpo_ds.system.fence import fenced

def load():
    import torch
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.device("meta").__enter__()
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")

fenced(load)
import torch
print(torch.ones(1, requires_grad=True).exp())
print(torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision())
"""


def test_a_file_that_is_the_first_to_load_torch_leaves_it_as_it_was_made():
    ended = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True)
    assert ended.stdout == "tensor([2.7183], grad_fn=<ExpBackward0>)\n0 highest\n", ended.stderr


# --- Ctrl-C -----------------------------------------------------------------------------------------------------


def earned(function):
    return score(["a"], [Question("1", "Q?", "", "yes")], functions={"it": (function, 1.0)}, on_error="zero")


def raises(error):
    raise error


def test_a_keyboard_interrupt_of_the_functions_own_is_its_error_and_the_users_second_ctrl_c_ends_the_call():
    interruption = Interruption()

    def press_twice(**_):
        for _ in range(2):
            interruption._since -= 60  # as if a minute had passed
            os.kill(os.getpid(), signal.SIGINT)

    with interruption.noted():
        assert "KeyboardInterrupt" in earned(lambda **_: raises(KeyboardInterrupt())).errors["it"]
        with pytest.raises(SecondCtrlC), contextlib.redirect_stderr(sys.__stderr__):
            earned(press_twice)
    assert interruption.signum == signal.SIGINT


def test_without_a_run_every_ctrl_c_ends_the_call():
    with pytest.raises(KeyboardInterrupt):
        earned(lambda **_: os.kill(os.getpid(), signal.SIGINT))
