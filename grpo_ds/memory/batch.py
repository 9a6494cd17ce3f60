"""Bytes that grow with tokens: activations, attention masks, KV cache, logits.

The worst case: every prompt has max_prompt_length tokens, every completion max_completion_length.
w is the bytes of a weight and of an activation: 2 in bf16, 4 in fp32.

The factors of a layer were counted with torch's memory profiler on Qwen2 layers in fp32 and bf16 (docs/memory.md);
they are those of a gated MLP with SDPA attention under a mask. GPT-2's MLP, half as wide but with a GELU that
keeps more, comes to about as much.
"""

from dataclasses import dataclass

from grpo_ds.config import TrainConfig
from grpo_ds.memory.shape import ModelShape

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step of `config` computes at once, and what that takes for a model of this shape."""

    shape: ModelShape
    config: TrainConfig
    w: int
    on_gpu: bool

    @property
    def rows(self) -> int:
        """Packed rows of one backward: a row a question."""
        return min(self.config.micro_groups or self.config.batch_size, self.config.batch_size)

    @property
    def backwards(self) -> int:
        """Of one optimizer step (update.backwards_per_step)."""
        return -(-self.config.batch_size // self.rows)

    @property
    def width(self) -> int:
        """Tokens of a packed row; a completion's last token is a target, but no input."""
        return self.config.max_prompt_length + self.config.num_generations * (self.config.max_completion_length - 1)

    @property
    def tokens(self) -> int:
        return self.rows * self.width

    @property
    def hidden(self) -> int:
        """The wider of the residual stream and of all heads together."""
        return max(self.shape.hidden, self.shape.heads * self.shape.head_dim)

    def masks(self) -> dict[str, int]:
        """The boolean mask, and SDPA's copies of it as numbers: on a card a second one, padded to whole vectors."""
        cells = self.rows * self.width**2
        return {"attention mask": cells * (1 + self.w * (2 if self.on_gpu else 1))}

    def checkpoints(self) -> int:
        """What forward leaves for backward: each layer's input, or without checkpointing all that it computed."""
        a_layer = self.tokens * self.shape.hidden * self.w
        if not self.config.gradient_checkpointing:
            a_layer = self._saved() + self.rows * self.width**2 * self.w
        return a_layer * self.shape.layers

    def _saved(self) -> int:
        """Four MLP-wide tensors; of hidden width six in w and, in the two norms, three in fp32."""
        return self.tokens * (4 * self.w * self.shape.mlp + (6 * self.w + 12) * self.hidden)

    def layer_backward(self) -> int:
        """One layer at its fullest: computed again, with the gradients on their way through it."""
        return self._saved() + self.tokens * self.w * (2 * self.shape.mlp + 2 * self.hidden)

    def layer_forward(self, tokens: int) -> int:
        """One layer without gradients: gate, up and their product beside the residual stream."""
        return tokens * self.w * (3 * self.shape.mlp + 3 * self.hidden)

    def logprobs(self) -> int:
        """The chunk of core/logprobs.py and its [tokens, hidden] tensors in fp32 and w."""
        targets = self.rows * self.config.num_generations * self.config.max_completion_length
        return int(self.config.logprob_chunk_mib * MIB) + targets * self.shape.hidden * (4 + 4 + 2 * self.w)

    def scoring(self) -> dict[str, int]:
        """A forward pass over the packed rows without gradients, as the reference does it."""
        heaviest = max(self.layer_forward(self.tokens), self.logprobs())
        return {"activations": heaviest + self.tokens * self.shape.hidden * self.w, **self.masks()}

    def sampling(self) -> dict[str, int]:
        """The last step of sampling, or of evaluation where that has more rows; a layer's cache grows by copying."""
        config, shape = self.config, self.shape
        prompts = max(config.batch_size, config.eval_batch_size)
        rows = max(config.batch_size * config.num_generations, config.eval_batch_size)
        layer_cache = 2 * shape.kv_heads * shape.head_dim * self.w * (
            rows * (config.max_prompt_length + config.max_completion_length)
        )  # fmt: skip
        # Logits in w and fp32, divided by the temperature, as probabilities, and one more while they are drawn from.
        logits = rows * shape.vocab * (self.w + 4 * 4)
        prefill = self.layer_forward(prompts * config.max_prompt_length)
        return {"KV cache": (shape.layers + 1) * layer_cache, "activations": max(logits, prefill)}
