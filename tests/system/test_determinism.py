"""Deterministic kernels: strict around the policy's passes, and nowhere else."""

import os

import torch

from grpo_ds.system.determinism import STRICT, deterministic_kernels, fix_workspaces
from tests.training.layouts import make_engine, rollout_of, take_step


def test_a_step_runs_forward_and_backward_in_strict_mode_and_leaves_it(tiny_folder, tmp_path, monkeypatch):
    """`warn_only` would leave flash and memory-efficient attention their atomics."""
    monkeypatch.setattr("grpo_ds.system.determinism._has_card", lambda: True)
    engine, modes = make_engine(tiny_folder, tmp_path, "offload"), {"forward": set(), "backward": set()}
    embedding = engine.policy.model.get_input_embeddings()

    def in_forward(module, inputs, output):
        modes["forward"].add(torch.get_deterministic_debug_mode())
        output.register_hook(lambda grad: modes["backward"].add(torch.get_deterministic_debug_mode()))

    embedding.register_forward_hook(in_forward)
    take_step(engine, rollout_of())
    assert modes == {"forward": {STRICT}, "backward": {STRICT}} and torch.get_deterministic_debug_mode() == 0


def test_a_cpu_needs_no_strict_mode():
    with deterministic_kernels():
        assert torch.get_deterministic_debug_mode() == 0


def test_workspaces_that_the_user_chose_stay(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fix_workspaces()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    fix_workspaces()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
