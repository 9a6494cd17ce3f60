"""A run on a card, simulated: the phases of grpo_ds/memory/plan.py in the order of a run, with the product's own code.

Policy, reference, log-probs, packing, loss and decoding are the real ones. ZeRO (zero.py), 4-bit layers (four_bit.py)
and the sampler's loop are followed here, because they need a card, a kernel or a tokenizer.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo_ds.core.losses import grpo_loss
from grpo_ds.core.packing import PackedRows
from grpo_ds.core.pick import Pick
from grpo_ds.memory.select import Job
from grpo_ds.models.attention import PackedAttention
from grpo_ds.models.fused_layers import can_fuse
from grpo_ds.models.logprob_model import LogprobModel
from grpo_ds.models.lora import add_adapter
from grpo_ds.models.reference import make_reference
from grpo_ds.models.shapes import LARGEST_LAYER, PRESET_CONFIGS
from grpo_ds.models.shared_prompt import SharedPrompts
from grpo_ds.training.draws import draw
from grpo_ds.training.rollout import micro_batches
from grpo_ds.training.sampling import Completions
from tests.card.allocator import CachingAllocator, Event, ExpandableAllocator, smallest_card
from tests.card.four_bit import FourBitLinear
from tests.card.recorder import CARD, Recorder, as_on_a_card
from tests.card.zero import Zero

KNOWN_IDS = 151_665  # of Qwen2.5's tokenizer; the head has more rows
# cuBLAS's workspace of a handle, for deterministic products (CUBLAS_WORKSPACE_CONFIG=:4096:8). The thread of the
# backward pass has a handle of its own.
CUBLAS_WORKSPACE = 8 * 4096 * 1024
MOMENTS_OF_DECODING = 5  # tokens of a completion that are simulated, from the first to the last


@dataclass(frozen=True, slots=True)
class Simulated:
    """Bytes of a simulated run."""

    events: list[Event]
    allocated: dict[str, int]  # by phase, at its peak

    @property
    def peak(self) -> int:
        return max(self.allocated.values())

    def card(self, *, expandable: bool = False) -> int:
        """Return the fewest bytes with which torch gets through this run."""
        return smallest_card(self.events, ExpandableAllocator if expandable else CachingAllocator)


def simulate(job: Job) -> Simulated:
    """Simulate initialisation, two steps in the worst case, and evaluation."""
    with as_on_a_card() as recorder, _host_values(recorder):
        run = _Run(job, recorder)
        for phase in ("initialise", "make_reference", *("sample", "reference", "update", "step") * 2, "evaluate"):
            recorder.begin(phase)
            getattr(run, phase)()
    allocator, allocated = ExpandableAllocator(), dict[str, int]()
    for name, start, end in recorder.phases():
        allocator.peak_allocated = allocator.allocated
        allocator.replay(recorder.events[start:end])
        name = "reference" if name == "make_reference" else name
        allocated[name] = max(allocated.get(name, 0), allocator.peak_allocated)
    return Simulated(recorder.events, allocated)


@contextmanager
def _host_values(recorder: Recorder) -> Iterator[None]:
    """Let code whose shapes depend on values compute them in RAM, and count its tensors as the card's."""

    class Attention(PackedAttention):
        def __init__(self, rows: PackedRows, dtype: torch.dtype) -> None:
            with recorder.host_counts():
                super().__init__(rows.input_ids.on_host, dtype)  # type: ignore[attr-defined]
            _move(self, recorder)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("grpo_ds.models.logprob_model.PackedAttention", Attention))
        stack.enter_context(mock.patch("grpo_ds.models.reference.init_empty_weights", recorder.pause))
        yield


def _move(owner: Any, recorder: Recorder) -> None:
    """Replace the counted tensors of an object by tensors on the card, and those of the objects that it has."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, Tensor):
            setattr(owner, name, recorder.on_card(value))
        elif isinstance(value, Pick):
            _move(value, recorder)


class _Stored:
    """Stored weights without values, in RAM and in the files' bf16."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes = {name: weight.shape for name, weight in model.named_parameters()}

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        return {name: torch.empty(self.shapes[name], dtype=torch.bfloat16) for name in names}


class _Run:
    def __init__(self, job: Job, recorder: Recorder) -> None:
        self.job, self.config, self.recorder = job, job.config, recorder
        self.reference_model: Any = None
        self.workspaces: list[Any] = []  # cuBLAS's
        with recorder.pause():
            self.model = model_of(job)

    # --- the phases -------------------------------------------------------------------------------------------

    def initialise(self) -> None:
        """Move the model to the card, tensor by tensor, and hand it to ZeRO."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=CARD)
        config = self.config
        options = {"vocab_size": min(KNOWN_IDS, self.job.shape.vocab), "temperature": config.temperature}
        self.policy = LogprobModel(self.model, chunk_mib=config.logprob_chunk_mib, **options)
        self.zero = Zero([p for p in self.policy.parameters() if p.requires_grad], self.job.ds)

    def evaluate(self) -> None:
        rows = self.config.generation_batch_size or 1
        self.decode(prompts=rows, group_size=1, temperature=0.0)

    def make_reference(self) -> None:
        if self.config.beta:
            self.reference_model = make_reference(
                self.policy, self.config.reference_kind, store=lambda: _Stored(self.model)
            )

    def sample(self) -> None:
        config = self.config
        at_once = (config.generation_batch_size or config.batch_size * config.num_generations) // config.num_generations
        prompts = max(1, min(at_once, config.batch_size))
        self.decode(prompts=prompts, group_size=config.num_generations, temperature=config.temperature)

    def reference(self) -> None:
        self.rows = [rows_on_card(rows) for rows in packed(self.job)]
        if self.reference_model:
            self.reference_model.device = CARD
            for rows in self.rows:
                self.reference_model(rows)

    def update(self) -> None:
        self.use_cublas(threads=2)
        self.policy.train()
        for number, rows in enumerate(self.rows):
            self.zero.last = number == len(self.rows) - 1
            self.backward(rows)
            self.zero.epilogue()

    def backward(self, rows: PackedRows) -> None:
        logprobs = self.policy(rows)
        like = torch.zeros(logprobs.shape, device=CARD)
        advantages = torch.zeros(len(logprobs), 1, device=CARD)
        terms = grpo_loss(logprobs, logprobs.detach(), like, advantages, like.clone(), self.config.objective)
        terms.loss.backward()

    def step(self) -> None:
        self.zero.step()

    def use_cublas(self, *, threads: int) -> None:
        while len(self.workspaces) < threads:
            self.workspaces.append(self.recorder.hold(CUBLAS_WORKSPACE))

    # --- parts ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, *, prompts: int, group_size: int, temperature: float) -> None:
        """Prefill, and some of the tokens from the first to the last."""
        config, rows = self.config, prompts * group_size
        self.use_cublas(threads=1)
        self.model.eval()
        decoder = SharedPrompts(
            self.model,
            [[0] * config.max_prompt_length] * prompts,
            group_size=group_size,
            columns=config.max_completion_length,
            fused=can_fuse(self.model),
        )
        tokens = torch.zeros(rows, dtype=torch.long, device=CARD)
        draws = torch.zeros(rows, config.max_completion_length, dtype=torch.float64, device=CARD)
        last = config.max_completion_length - 1
        for t in sorted({last * part // (MOMENTS_OF_DECODING - 1) for part in range(MOMENTS_OF_DECODING)}):
            decoder.cache.written = t
            logits = decoder(tokens, tokens + t)
            tokens = draw(logits[:, :KNOWN_IDS], draws[:, t], temperature)


def model_of(job: Job) -> PreTrainedModel:
    """Return the model of a job without values, as load_policy and trainable_policy would make it."""
    config, shape = job.config, job.shape
    sizes = {**PRESET_CONFIGS[shape.name], "num_hidden_layers": shape.layers}
    with CARD:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.bfloat16)
    if config.gradient_checkpointing is not False:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.base_bits == 4:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module.out_features <= LARGEST_LAYER:
                model.set_submodule(name, FourBitLinear(module))
    if config.lora_r:
        add_adapter(model, r=config.lora_r, alpha=config.lora_alpha, targets=config.lora_targets, base="")
    return model


def packed(job: Job) -> list[PackedRows]:
    """Return the packed rows of a step in the worst case, one for each backward."""
    config = job.config
    count = config.batch_size * config.num_generations
    shape = count, config.max_completion_length
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)
    prompts = [torch.zeros(config.max_prompt_length, dtype=torch.long)] * config.batch_size
    completions = Completions(ids, mask, mask[:, 0])
    return [rows for rows, _ in micro_batches(prompts, completions, config.pack_tokens)]


def rows_on_card(rows: PackedRows) -> PackedRows:
    """Copy rows to the card; the values stay reachable as input_ids.on_host."""
    there = rows.to(CARD)
    there.input_ids.on_host = rows  # type: ignore[attr-defined]
    return there
