"""Tests that need a GPU (`make test-gpu`): code that a CPU never runs. benchmarks/card.py runs them one by one."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from grpo_ds.core.logprobs import token_logprobs
from grpo_ds.core.packing import PackedRows, pack_groups
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.shapes import PRESET_CONFIGS
from grpo_ds.system.determinism import deterministic_kernels, fix_workspaces
from grpo_ds.training.sampling import Sampler
from tests.sdpa import KernelsChosen

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card; `make test-gpu` on one"),
]


def policy_of(
    shape: dict, device: str, *, checkpointing: bool = False, dtype: torch.dtype = torch.bfloat16
) -> LogprobModel:
    """Two layers of a model of this shape, random weights, in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**shape, "num_hidden_layers": 2})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return LogprobModel(model, vocab_size=config.vocab_size, temperature=1.0, chunk_mib=64).train()


def packed_rows(vocab: int, device: str) -> PackedRows:
    """Two prompts of unequal length with four completions each, of unequal lengths up to 96."""
    torch.manual_seed(1)
    prompts = [torch.randint(0, vocab, (length,), device=device) for length in (200, 131)]
    mask = torch.arange(96, device=device) < torch.tensor([96, 70, 33, 90, 12, 96, 64, 81], device=device)[:, None]
    return pack_groups(prompts, torch.randint(0, vocab, mask.shape, device=device), mask, pad_id=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_attention_of_a_packed_row_takes_the_math_kernel(dtype):
    policy, rows = policy_of(PRESET_CONFIGS["qwen2.5-1.5b"], "cuda", dtype=dtype), packed_rows(4096, "cuda")
    # RTX 30 and 40 ask cuDNN last, after the math kernel; without it another card chooses as they do.
    without_cudnn = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    chosen = {}
    for card, mode in {"this card": nullcontext(), "without cuDNN": without_cudnn}.items():
        with KernelsChosen() as seen, mode:
            policy(rows).sum().backward()
        chosen[card] = seen.kernels
    print(f"\n{json.dumps(chosen)}")
    assert all(kernels and "MATH" not in kernels.values() for kernels in chosen.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_gradient_twice_has_the_same_bits(checkpointing):
    policy = policy_of(PRESET_CONFIGS["qwen2.5-1.5b"], "cuda", checkpointing=checkpointing)
    rows = packed_rows(policy.options["vocab_size"], "cuda")
    fix_workspaces()
    with deterministic_kernels():
        once, again = (torch.autograd.grad(policy(rows).sum(), list(policy.parameters())) for _ in range(2))
    names = [name for (name, _), a, b in zip(policy.named_parameters(), once, again, strict=True) if (a != b).any()]
    assert not names


def test_bf16_logprobs_on_the_tensor_cores_equal_float64():
    torch.manual_seed(0)
    hidden = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 5000, (300,), device="cuda")
    ours = token_logprobs(hidden, head, targets, vocab_size=5000, chunk_mib=1)
    exact = (hidden.double() @ head.double().T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-5)
    got = torch.autograd.grad(ours.sum(), (hidden, head))
    for a, b in zip(got, torch.autograd.grad(exact.sum(), (hidden, head)), strict=True):
        assert (a - b).norm() / b.norm() < 0.01  # both gradients are stored in bf16, which has 8 bits


def test_whole_runs_and_runs_resumed_in_their_middle(tmp_path):
    command = [sys.executable, "benchmarks/card.py", "--stage", "1", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=700)
    assert result.returncode == 0, result.stdout + (tmp_path / "stage1.jsonl").read_text()


def test_cuda_graphs_sample_what_single_kernels_do(tiny_model, tokenizer, monkeypatch):
    """Two rollouts, as the second one captures into the memory of the first; rows end while others continue."""
    monkeypatch.setattr("grpo_ds.models.shared_prompt.WIDTH", 5)
    sampler = Sampler(tiny_model.cuda(), tokenizer, max_completion_length=44)
    sampler.eos_ids = list(range(0, 259, 24))
    for seed in (2, 3):
        runs = []
        for sampler.cuda_graphs in (False, True):
            runs.append(sampler([[1, 2, 3], list(range(30))], group_size=6, temperature=1.0, seed=seed))
        assert sampler.fused and torch.equal(runs[0].ids, runs[1].ids) and len(set(runs[0].lengths().tolist())) > 4


FULL_CARD = """
import torch
from grpo_ds.commands.train import main
from grpo_ds.system.script import run_script
from grpo_ds.training.trainer import Trainer

preflight = Trainer.preflight

def then_fill_the_card(trainer):
    preflight(trainer)
    taken = trainer.profiler.uses()["preflight"].gpu_reserved + ROOM
    torch.cuda.set_per_process_memory_fraction(taken / torch.cuda.get_device_properties(0).total_memory)

Trainer.preflight = then_fill_the_card
run_script(main)
"""
ROOM = 160 * 2**20  # bytes beyond what preflight took: by the plan all rows of a step need more, the fewest less
MANY_ROWS = {"batch_size": 64, "num_generations": 2, "max_prompt_length": 480, "max_completion_length": 16}


def run_on_a_full_card(model: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    sizes = [word for name, value in MANY_ROWS.items() for word in (f"--{name}", str(value))]
    words = ["--model", str(model), "--data", "sample", "--num_steps", "1", "--eval_limit", "2", *sizes, *flags]
    words += ["--gradient_checkpointing", "false", "--output_dir", str(folder / "run")]
    script = FULL_CARD.replace("ROOM", str(ROOM))
    return subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_a_run_on_a_full_card_ends_with_its_message(tiny_folder, tmp_path):
    result = run_on_a_full_card(tiny_folder, tmp_path)
    assert result.returncode == 5 and "Out of GPU memory in phase" in result.stderr and "Traceback" not in result.stderr


def test_a_run_on_a_full_card_continues_with_oom_retry(tiny_folder, tmp_path):
    result = run_on_a_full_card(tiny_folder, tmp_path, "--oom_retry")
    assert result.returncode == 0 and "Out of memory in phase" in result.stdout, result.stdout + result.stderr
