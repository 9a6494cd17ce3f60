"""An adapter under real ZeRO-2 offload, and one complete step of every model family."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.report.console import Console
from grpo_ds.training.engine import DEEPSPEED_CLASSES
from grpo_ds.training.rehearsal import rehearse
from grpo_ds.training.run import Run
from tests.conftest import make_tokenizer, tiny_config
from tests.models.test_lora import BITS, rows, trained
from tests.training.test_training import ROOT, launch, scores_by_hand, tiny_trainer

ADAPTER = {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "num_steps": 2, "max_completion_length": 6}


@pytest.mark.parametrize("bits", BITS)
def test_a_run_trains_the_adapter_alone_and_writes_it(tiny_folder, tmp_path, bits):
    trainer, train, held_out = tiny_trainer(tiny_folder, **ADAPTER, **BITS[bits], num_iterations=2, merge_adapter=True)
    policy = trainer.engine.policy
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    Run(trainer, train, held_out, tmp_path / "run").run()
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(policy).keys()
    kl = [json.loads(line)["kl"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Remade for the second iteration, exactly the policy of that time; LLM.int8 rounds differently in training mode.
    assert max(kl[0], kl[2]) <= (1e-6 if bits == 8 else 0) < 1e-5 < min(kl[1], kl[3])
    written = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= written and "model.safetensors" not in written
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template
    # The quantised base of training is not the base that is merged: the numbers are close, not equal.
    found, wanted = LogprobModel(merged, **policy.options)(rows()), policy.eval()(rows())
    torch.testing.assert_close(found, wanted, rtol=0, atol={16: 1e-5, 8: 0.1, 4: 0.6}[bits])
    trainer.engine.close()
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32).eval()
    found, wanted = (model(torch.tensor([[1, 2, 3]])).logits for model in (adapted, merged))
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=1e-5
    )  # the adapter is added to the output there, to the weights here
    assert ModelCard.load(tmp_path / "run" / "README.md").data.library_name == "peft"


def test_a_run_continues_from_an_adapter_with_all_parameters(tiny_folder, tmp_path):
    """`--model RUN --lora_r 0` trains what RUN's adapter and its base make together."""
    trainer, train, held_out = tiny_trainer(tiny_folder, **ADAPTER, merge_adapter=True)
    Run(trainer, train, held_out, tmp_path / "adapter").run()
    trainer.engine.close()
    trainer, train, held_out = tiny_trainer(tmp_path / "adapter", **{**ADAPTER, "lora_r": 0, "num_steps": 1})
    before = {name: p.detach().clone() for name, p in trainer.engine.model.named_parameters()}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "merged", dtype=torch.float32)
    assert all(torch.equal(before[name], weight) for name, weight in merged.named_parameters())
    Run(trainer, train, held_out, tmp_path / "full").run()
    assert [n for n, p in trainer.engine.model.named_parameters() if torch.equal(p, before[n])] == []
    trainer.engine.close()
    assert (tmp_path / "full" / "model.safetensors").exists()


@pytest.mark.peer("lm_eval")
def test_lm_eval_loads_an_adapter_and_scores_with_it(tiny_folder, tmp_path):
    trainer, train, held_out = tiny_trainer(tiny_folder, **ADAPTER, merge_adapter=True)
    Run(trainer, train, held_out, tmp_path / "run").run()
    trainer.engine.close()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32).eval()
    scores_by_hand(tiny_folder, merged, peft=str(tmp_path / "run"))


def steps(folder, train_on, tmp_path, **changes):
    """Metrics and the adapter after the steps of ADAPTER."""
    trainer, train, _ = tiny_trainer(folder, **{**ADAPTER, **changes})
    tmp_path.mkdir()
    Run(trainer, train[:train_on], [], tmp_path).train()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    weights = {name: p.detach().clone() for name, p in trained(trainer.engine.policy).items()}
    trainer.engine.close()
    return metrics, weights


def test_splitting_the_step_changes_nothing_for_an_adapter(tiny_folder, tmp_path):
    (whole, one), (split, two) = (
        steps(tiny_folder, 4, tmp_path / str(tokens), pack_tokens=tokens, num_steps=1) for tokens in (0, 500)
    )
    assert whole[0]["grad_norm"] == pytest.approx(split[0]["grad_norm"], rel=1e-4) and whole[0]["grad_norm"] > 0
    for name, weight in one.items():
        # Adam's first step is the sign of a gradient, and a gradient near 0 may have either sign.
        assert ((two[name] - weight).abs() < 1e-4).double().mean() > 0.99


@pytest.mark.parametrize("bits", BITS)
def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_bit_by_bit(tiny_folder, tmp_path, bits):
    def make():
        return tiny_trainer(tiny_folder, **ADAPTER, **BITS[bits], beta=0.0)

    def step(trainer, questions, number):
        trainer.step(number, questions)
        return [p.detach().clone() for p in trained(trainer.engine.policy).values()]

    trainer, train, _ = make()
    step(trainer, train, 0)
    trainer.engine.save_checkpoint(tmp_path, "first")
    straight = step(trainer, train, 1)
    trainer.engine.close()
    with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
        saved = torch.load(tmp_path / "first" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert saved.keys() == trained(trainer.engine.policy).keys()  # neither a tied head nor constants of 4 bits
    resumed, _, _ = make()
    resumed.engine.load_checkpoint(tmp_path, "first")
    assert all(torch.equal(a, b) for a, b in zip(step(resumed, train, 1), straight, strict=True))
    resumed.engine.close()


def test_an_adapter_on_four_bits_learns(tmp_path):
    """Use a base with a larger head: with the initial 0.02 all logits lie within 1.3 of each other."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config())
    model.get_input_embeddings().weight.data.mul_(5)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    changes = {"lora_r": 8, "lora_alpha": 32, "num_steps": 20, "max_completion_length": 8, "load_in_4bit": True}
    metrics, _ = steps(tmp_path, 200, tmp_path / "run", **changes)
    rewards = [step["reward"] for step in metrics]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


SYNCED = [({"reference": "bf16"}, 0.5), ({"reference": "auto"}, 1.0), ({"lora_r": 4}, 1.0)]


@pytest.mark.parametrize(("flags", "alpha"), SYNCED)
def test_a_synced_reference_follows_the_policy(tiny_folder, tmp_path, flags, alpha):
    flags = {"lora_r": 0, "num_steps": 4, "ref_model_mixup_alpha": alpha, "ref_model_sync_steps": 2, **flags}
    plain, synced = (
        [step["kl"] for step in steps(tiny_folder, 4, tmp_path / str(sync), **flags, sync_ref_model=sync)[0]]
        for sync in (False, True)
    )
    assert synced[:2] == plain[:2]  # not yet
    assert (
        synced[2] < 0.6 * plain[2]
    )  # half the way leaves a quarter of the KL, which is of second order; remade leaves the floor


SIZE = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"eos_token_id": 256, "pad_token_id": 257, "bos_token_id": None}
FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(tiny_config()),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, **IDS, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, **IDS, num_key_value_heads=2, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=64, n_layer=2, n_head=4, **IDS)),
}


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory):
    """The tokenizers have no chat template, as GPT-2's and DialoGPT's."""
    made = {}
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(made[name])
        tokenizer = make_tokenizer()
        tokenizer.chat_template = None
        tokenizer.save_pretrained(made[name])
    return made


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_take_the_same_step_as_packed_ones(family_folders, tmp_path, family, lora_r, monkeypatch):
    changes = {"num_steps": 1, "lora_r": lora_r, "max_prompt_length": 900, "num_generations": 3}
    folder = family_folders[family]
    packed, weights = steps(folder, 4, tmp_path / "packed", **changes)
    monkeypatch.setattr("grpo_ds.training.trainer.why_not_packed", lambda *_, **__: "told so")
    padded, padded_weights = steps(folder, 4, tmp_path / "padded", **changes)
    for name in ("loss", "kl", "grad_norm", "reward"):
        assert packed[0][name] == pytest.approx(padded[0][name], rel=1e-3, abs=1e-5), name
    for name, weight in weights.items():
        assert ((padded_weights[name] - weight).abs() < 1e-4).double().mean() > 0.99


def test_a_model_that_cannot_pack_says_so_in_a_line_and_trains(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 272, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 8}
    GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], **IDS)).save_pretrained(
        tmp_path
    )
    make_tokenizer().save_pretrained(tmp_path)
    metrics, _ = steps(tmp_path, 4, tmp_path / "run", num_steps=1, beta=0.1)
    assert metrics[0]["grad_norm"] > 0 and metrics[0]["kl"] == 0
    trainer, _, _ = tiny_trainer(tmp_path, dry_run_worst_case=True, **{**ADAPTER, "lora_r": 0})
    trainer.console = Console(speaks=True)
    trainer.choose_rows()
    assert capsys.readouterr().out.count("Padded rows") == 1
    rehearse(trainer)
    trainer.engine.close()


@pytest.mark.parametrize("ds", ["zero2", "zero2_lowram"])
def test_the_scripts_train_an_adapter_on_four_bits_and_ask_it(tiny_folder, tmp_path, ds):
    """Train in bf16, as on a GPU, with fp32 masters and with bf16 masters."""
    folder, settings = tmp_path / "run", json.loads((ROOT / "ds_configs" / f"{ds}.json").read_text())
    settings["bf16"]["enabled"] = True
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    flags = {
        "ds": tmp_path / "ds.json", "model": tiny_folder, "data": "sample", "output_dir": folder, "num_steps": 2,
        "num_generations": 2, "max_prompt_length": 700, "max_completion_length": 4, "eval_limit": 2,
        "lora_r": 4, "load_in_4bit": True, "num_iterations": 2,
    }  # fmt: skip
    assert launch(sys.executable, **flags).count("Reference: adapter, 0 MiB; its KL to the policy it was made") == 2
    asked = {"question": "Does it help?", "context": "It helped 9 of 10."}
    for script, more in ("ask.py", asked), ("evaluate_model.py", {"data": "sample", "eval_limit": 2}):
        words = [word for name, value in more.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, f"launch/{script}", "--model", str(folder), *words]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr[-2000:]
        assert "Answer:" in result.stdout or "accuracy" in result.stdout
