"""Tests that need a GPU (`make test-gpu`): code that a CPU never runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from grpo_ds.core.logprobs import token_logprobs
from grpo_ds.core.packing import pack_groups
from grpo_ds.models.attention import PackedAttention
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.system.determinism import deterministic_kernels
from grpo_ds.training.sampling import Sampler
from tests.core.test_packing import make_groups
from tests.models.test_attention import Calls, drawn, packed

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card; `make test-gpu` on one"),
]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_attention_of_ours_takes_the_math_kernel(dtype):
    rows = packed("groups of one size").to(torch.device("cuda"))
    with Calls() as calls:
        PackedAttention(rows, dtype)(0, *drawn(rows, 4, 2, dtype=dtype), 0.3)
    for call in calls.seen:
        options = {"attn_mask": call["mask"], "is_causal": call["causal"], "enable_gqa": call["gqa"]}
        assert torch._fused_sdp_choice(*call["parts"], **options) != SDPBackend.MATH.value


def test_the_same_rows_give_the_same_gradients_on_a_card(tiny_model):
    prompts, ids, mask = make_groups([400, 300], [[200] * 8] * 2)
    rows = pack_groups(prompts, ids, mask, pad_id=257).to(torch.device("cuda"))
    policy, seen = LogprobModel(tiny_model.cuda().bfloat16(), vocab_size=259, temperature=1.0, chunk_mib=1), []
    for _ in range(5):
        policy.zero_grad()
        with deterministic_kernels():
            policy(rows).sum().backward()
        seen.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert all(torch.equal(gradient, seen[0]) for gradient in seen)


KINDS = [f"--reference {kind}" for kind in ("int8", "llm.int8", "bf16-cpu")]
KINDS += [f"--lora_r 4 {base}" for base in ("--merge_adapter", "--load_in_4bit", "--load_in_8bit")]


@pytest.mark.parametrize("ds", ["zero2.json", "zero2_gpu.json", "zero2_lowram.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_run_on_the_gpu(tiny_folder, tmp_path, ds, kind):
    flags = ["--ds", f"ds_configs/{ds}", "--model", str(tiny_folder), *kind.split(), "--num_steps", "2"]
    flags += ["--max_completion_length", "8", "--eval_limit", "4", "--output_dir", str(tmp_path / "run")]
    launcher = Path(sys.executable).with_name("deepspeed")
    result = subprocess.run(
        [str(launcher), "launch/train.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["memory/gpu_peak_gib"] > 0 for line in lines)


def test_cuda_graphs_sample_what_single_kernels_do(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr("grpo_ds.models.shared_prompt.WIDTH", 5)
    sampler = Sampler(tiny_model.cuda(), tokenizer, max_completion_length=24)
    sampler.eos_ids = list(range(0, 259, 12))  # rows end while others continue
    runs = []
    for sampler.cuda_graphs in (False, True):
        runs.append(sampler([[1, 2, 3], list(range(30))], group_size=6, temperature=1.0, seed=2))
    assert torch.equal(runs[0].ids, runs[1].ids) and len(set(runs[0].lengths().tolist())) > 4


FULL_CARD = """
import torch
from grpo_ds.commands.train import main
from grpo_ds.system.script import run_script
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(60 * 2**20 / total)  # the tiny model fits, its long rows do not
run_script(main)
"""


@pytest.mark.parametrize("retry", [False, True])
def test_gpu_memory_that_is_really_full(tiny_folder, tmp_path, retry):
    flags = ["--model", str(tiny_folder), "--data", "sample", "--num_steps", "1", "--num_generations", "64"]
    flags += ["--max_completion_length", "64", "--eval_limit", "2", "--output_dir", str(tmp_path / "run")]
    flags += ["--oom_retry"] if retry else []
    result = subprocess.run(
        [sys.executable, "-c", FULL_CARD, *flags], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert "Traceback" not in result.stderr
    if result.returncode == 0:
        assert retry and "Out of memory in phase" in result.stdout
    else:
        assert result.returncode == 5 and "Out of GPU memory in phase" in result.stderr
