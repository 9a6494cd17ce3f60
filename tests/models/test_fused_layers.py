"""Decoding in few kernels: the same logits as the model's own, in buffers that never move."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.decode_count import Shape, of_layers, on_meta
from grpo_ds.memory.activations import GRAPH_OF_A_LAYER, GRAPH_WORKSPACES, ActivationMemory
from grpo_ds.models import shared_prompt
from grpo_ds.models.fused_layers import _gate_and_up, can_capture, can_fuse
from grpo_ds.models.lora import add_adapter
from grpo_ds.models.shapes import PRESET_CONFIGS, shape_of
from grpo_ds.models.shared_prompt import SharedPrompts, can_share_prompts
from grpo_ds.settings.config import TrainConfig
from grpo_ds.training.sampling import LOOK

SIZE = dict(  # large weights, so that one key too few or too many shows
    vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, pad_token_id=257, bos_token_id=None, eos_token_id=256,
)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-yarn": {"rope_parameters": YARN},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen2-untied": {"tie_word_embeddings": False},
}
OTHERS = {"mistral": {}, "llama-dynamic": {"rope_parameters": DYNAMIC}, "qwen2-gelu": {"hidden_act": "gelu"}}
PROMPTS = [[5, 6, 7], list(range(20)), [9, 1]]


def model_of(kind, dtype=torch.float32):
    """A model of random weights; norms and biases are random too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.partition("-")[0], **{**SIZE, **{**KINDS, **OTHERS}[kind]})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, float("norm" in name), 0.3)
    return model.to(dtype).requires_grad_(False)


def decoded(decode, tokens):
    """Logits of one token after another [B V], and what each row has read; rows leave in the middle."""
    rows = [list(prompt) for prompt in PROMPTS for _ in range(3)]
    for t, column in enumerate(tokens):
        last = [row[-1] for row in rows]
        logits = decode(torch.tensor(last), torch.tensor([len(row) - 1 for row in rows]))
        yield logits.float(), [list(row) for row in rows]
        if t == 5:
            decode.keep(torch.tensor([2, 0, 7, 8]), group_size=2)
            rows = [rows[b] for b in (2, 0, 7, 8)]
        rows = [[*row, int(token)] for row, token in zip(rows, column, strict=False)]


def error(decode, model, tokens):
    """Largest relative distance to logits of the model's own single pass over each row."""
    return max(
        float((ours - alone).norm() / alone.norm())
        for logits, rows in decoded(decode, tokens)
        for ours, row in zip(logits, rows, strict=True)
        for alone in [model(torch.tensor([row])).logits[0, -1]]
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_layers_compute_what_the_models_own_layers_compute(kind, fixed, monkeypatch):
    monkeypatch.setattr(shared_prompt, "WIDTH", 3)
    model = model_of(kind)
    assert can_fuse(model) and can_share_prompts(model, fused=True)
    decode = SharedPrompts(model, PROMPTS, group_size=3, columns=12, fused=True, cuda_graphs=fixed)
    assert error(decode, model, torch.randint(0, 256, (12, 9))) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_in_bf16_the_fused_layers_are_as_exact_as_the_models_own(kind):
    exact, model = model_of(kind, torch.bfloat16).float(), model_of(kind, torch.bfloat16)
    tokens = torch.randint(0, 256, (12, 9))
    ours, own = (
        error(SharedPrompts(model, PROMPTS, group_size=3, columns=12, fused=fused), exact, tokens)
        for fused in (True, False)
    )
    assert ours < 1.5 * own


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_keep_their_own_layers(kind):
    assert not can_fuse(model_of(kind))


@pytest.mark.parametrize(
    ("change", "captures"), [("adapter", True), ("forward", True), ("hook", True), ("quant", False)]
)
def test_a_changed_module_is_not_passed_over(change, captures):
    model = model_of("qwen2")
    layer = model.model.layers[1].mlp
    if change == "adapter":
        add_adapter(model, r=2, alpha=4, targets=["all-linear"], base="tiny")
    elif change == "forward":
        layer.down_proj.forward = lambda x: x @ layer.down_proj.weight.T
    elif change == "hook":
        layer.register_forward_hook(lambda *_: None)
    else:
        layer.down_proj = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})(128, 64)
    assert not can_fuse(model) and can_capture(model) is captures


def test_the_probe_sees_layers_that_compute_something_else():
    model = model_of("qwen2")
    forward = type(model.model.norm).forward
    model.model.norm.forward = lambda x: 2 * forward(model.model.norm, x) + x.mean()
    assert not can_share_prompts(model, fused=True)


def test_what_16_bits_round_behind_a_texts_first_tokens_is_no_other_attention(monkeypatch):
    """As Qwen2.5-0.5B in bf16: logits 26 % apart behind 3 tokens, 1 % behind 64."""

    class Rounded(SharedPrompts):
        def __init__(self, model, prompts, **options):
            super().__init__(model, prompts, **options)
            self.error = 0.78 / len(prompts[0])

        def __call__(self, tokens, positions):
            return super().__call__(tokens, positions) * (1 + self.error)

    monkeypatch.setattr(shared_prompt, "SharedPrompts", Rounded)
    model = model_of("qwen2", torch.bfloat16)
    assert can_share_prompts(model)
    monkeypatch.setattr(shared_prompt, "PROBED", 3)
    assert not can_share_prompts(model)


def test_gate_and_up_are_one_product_only_where_they_are_neighbours():
    model = model_of("qwen2")
    mlp = model.model.layers[0].mlp
    assert _gate_and_up(mlp) is None
    flat = torch.cat([mlp.gate_proj.weight.flatten(), mlp.up_proj.weight.flatten()])
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = flat.view(2, 128, 64)
    both = _gate_and_up(mlp)
    assert both.data_ptr() == mlp.gate_proj.weight.data_ptr()  # no copy
    assert torch.equal(both, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    mlp.up_proj.weight.data, mlp.gate_proj.weight.data = flat.view(2, 128, 64)
    assert _gate_and_up(mlp) is None  # in the other order


class Recorder:
    """A graph without a card: replays the step only while all that a graph bakes in is as it was."""

    def __init__(self, decode):
        self.decode, self.captured = decode, []

    def baked(self):
        cache = self.decode.cache
        tensors = [*cache.pools, *(x for pair in cache.prompts for x in pair), cache.column, self.decode.inputs]
        rows = self.decode.fused.rows
        places = [x.data_ptr() for x in (*tensors, rows.turns, rows.places, rows.step)]
        return places, cache.shape, cache.width

    def __call__(self, step):
        state = self.baked()
        self.captured.append((state[1][0] * state[1][2], state[2]))
        recorder = self

        class Graph:
            def replay(self):
                assert recorder.baked() == state
                step()

        return Graph()


def test_a_graph_is_captured_for_each_width_and_when_rows_leave_and_addresses_stay(monkeypatch):
    monkeypatch.setattr(shared_prompt, "WIDTH", 2)
    model = model_of("qwen3")
    decode = SharedPrompts(model, PROMPTS, group_size=3, columns=16, fused=True, cuda_graphs=True)
    decode.capture = recorder = Recorder(decode)
    before = recorder.baked()[0]
    assert error(decode, model, torch.randint(0, 256, (14, 9))) < 1e-5
    # Token 0 without a graph; 2, 4, 8 columns; four rows of nine after token 5; all 16 columns.
    assert recorder.captured == [(9, 2), (9, 4), (9, 8), (4, 8), (4, 16)]
    assert recorder.baked()[0][:-3] == before[:-3]  # buffers; the indices belong to the rows


SHAPE = Shape(2, 40, 4, 3 * LOOK)  # two prompts of different lengths


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"])
def test_a_token_takes_at_most_20_kernels_a_layer_and_rarely_waits_for_the_card(name):
    """Counted on shapes; also where gate and up are apart."""
    config = PRESET_CONFIGS[name]
    for flat, kernels in ((True, 19), (False, 20)):
        layer, token = of_layers(config, SHAPE, ours=True, flat=flat)
        assert layer.kernels == kernels and token.syncs == 1 / LOOK
    before, _ = of_layers(config, SHAPE, ours=False)
    assert before.kernels > 50


@pytest.mark.parametrize(("kind", "kernels"), [("llama", 19), ("qwen3", 21)])
def test_kernels_of_other_models(kind, kernels):
    config = {"model_type": kind, **SIZE, **KINDS[kind]}
    assert of_layers(config, SHAPE, ours=True)[0].kernels == kernels


class Live(TorchDispatchMode):
    """Largest number of bytes that tensors made under it take at once."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if torch.is_tensor(x) and not func.is_view):
            if storage._cdata not in self.seen and func._schema.name.split("::")[1][-1] != "_":
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize(("name", "questions", "generations"), [("qwen2.5-0.5b", 1, 8), ("qwen2.5-3b", 4, 8)])
def test_the_plan_has_room_for_the_tensors_of_a_graph(name, questions, generations):
    """Simulated on shapes: the tensors of the second token, while the logits of the first are alive."""
    sizes = {"batch_size": questions, "num_generations": generations}
    config = TrainConfig(**sizes, max_prompt_length=448, max_completion_length=320)
    shape = shape_of(name)
    planned = ActivationMemory(shape, config, 2, True).graphs()
    queries = 2 * questions * generations * shape.heads * shape.head_dim * shape.layers  # in the cache
    model = on_meta(PRESET_CONFIGS[name], 2)
    prompts = [[1] * (449 - q) for q in range(questions)]
    rows = torch.zeros(questions * generations, dtype=torch.long, device="meta")
    decode = SharedPrompts(model, prompts, group_size=generations, columns=320, fused=True, cuda_graphs=True)
    decode.cache.written = 319
    with torch.no_grad(), Live() as live:
        decode._fixed(rows, rows)
        decode.cache.written = 319
        decode._fixed(rows, rows)
    tensors = planned - queries - GRAPH_WORKSPACES - GRAPH_OF_A_LAYER * shape.layers
    assert live.peak <= tensors <= 1.5 * live.peak
