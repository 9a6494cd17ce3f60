"""Memory that grows with tokens: activations, attention masks, KV cache, logits.

The worst case: every prompt has max_prompt_length tokens, every completion max_completion_length. w is the bytes of a
weight and of an activation: 2 in bf16, 4 in fp32.

The factors of a layer were counted with torch's memory profiler on Qwen2 layers in fp32 and bf16 (docs/memory.md).
They describe a gated MLP with SDPA attention under a mask. GPT-2's MLP needs about as much: it is half as wide, but its
GELU keeps more.
"""

from dataclasses import dataclass

from grpo_ds.models.shapes import ModelShape
from grpo_ds.settings.config import TrainConfig

MIB = 2**20
CUBLAS_WORKSPACE = 33 * MIB  # torch's for one stream: 8 MiB, 32 on an H100; and up to 1 of cuBLASLt
GRAPH_OF_A_LAYER = 2**18  # of the driver, for 20 kernels: an estimate, 13 KiB a kernel, not measured


@dataclass(frozen=True, slots=True)
class ActivationMemory:
    """Tokens that a step of `config` computes at once, and their bytes for a model of this shape."""

    shape: ModelShape
    config: TrainConfig
    w: int
    on_gpu: bool

    @property
    def completions(self) -> int:
        """Completions in a packed row: a complete group, or as many as --pack_tokens allows after one prompt."""
        config = self.config
        room = (config.pack_tokens - config.max_prompt_length) // max(1, config.max_completion_length - 1)
        return max(1, min(room, config.num_generations)) if config.pack_tokens else config.num_generations

    @property
    def width(self) -> int:
        """Tokens of a packed row; the last token of a completion is a target but not an input."""
        return self.config.max_prompt_length + self.completions * (self.config.max_completion_length - 1)

    @property
    def rows(self) -> int:
        """Packed rows of one backward."""
        every = self.config.batch_size * -(-self.config.num_generations // self.completions)
        return min(every, max(1, self.config.pack_tokens // self.width)) if self.config.pack_tokens else every

    @property
    def backwards(self) -> int:
        """Backwards of one optimizer step."""
        return -(-self.config.batch_size * -(-self.config.num_generations // self.completions) // self.rows)

    @property
    def tokens(self) -> int:
        return self.rows * self.width

    @property
    def hidden(self) -> int:
        """Larger width: of the residual stream or of all heads together."""
        return max(self.shape.hidden, self.shape.heads * self.shape.head_dim)

    def masks(self) -> dict[str, int]:
        """Attention mask of the completions (models/attention.py): first as booleans, then in w bytes."""
        cells = self.rows * self.completions * self.config.max_completion_length * self.config.longest
        return {"attention mask": cells * (1 + self.w)}

    def _gathered(self) -> int:
        """Keys and values of a layer, gathered for that mask: the prompt's are repeated for each completion."""
        rows = self.rows * self.completions * self.config.longest
        return rows * 2 * self.shape.kv_heads * self.shape.head_dim * self.w

    def checkpoints(self) -> int:
        """Tensors that forward keeps for backward: each layer's input, or, without checkpointing, all its tensors."""
        a_layer = self.tokens * self.shape.hidden * self.w
        if self.config.gradient_checkpointing is False:
            a_layer = self._saved() + self._gathered()
        return a_layer * self.shape.layers

    def _saved(self) -> int:
        """Per token: four MLP-wide tensors in w; six of hidden width in w, and three in fp32 (in the two norms)."""
        return self.tokens * (4 * self.w * self.shape.mlp + (6 * self.w + 12) * self.hidden)

    def layer_backward(self) -> int:
        """Peak of one layer's backward: its recomputed activations and their gradients."""
        return self._saved() + 2 * self._gathered() + self.tokens * self.w * (2 * self.shape.mlp + 2 * self.hidden)

    def layer_forward(self, tokens: int) -> int:
        """One layer without gradients: gate, up, their product, and the residual stream."""
        return tokens * self.w * (3 * self.shape.mlp + 3 * self.hidden)

    def logprobs(self) -> int:
        """The chunk of core/logprobs.py and its [tokens, hidden] tensors in fp32 and w."""
        targets = self.rows * self.completions * self.config.max_completion_length
        return int(self.config.logprob_chunk_mib * MIB) + targets * self.shape.hidden * (4 + 4 + 2 * self.w)

    def forward(self) -> dict[str, int]:
        """Forward pass of the reference over the packed rows, without gradients."""
        heaviest = max(self.layer_forward(self.tokens), self.logprobs())
        return {"activations": heaviest + self.tokens * self.shape.hidden * self.w, **self.masks()}

    def sampling(self) -> dict[str, int]:
        """Sampling a step's completions, as many groups at once as --generation_batch_size allows."""
        config = self.config
        at_once = config.generation_batch_size or config.batch_size * config.num_generations
        prompts = max(1, min(at_once // config.num_generations, config.batch_size))
        return self._decoding(prompts, prompts * config.num_generations)

    def answering(self) -> dict[str, int]:
        """Sampling one answer to each held-out question."""
        rows = self.config.generation_batch_size or 1
        return self._decoding(rows, rows)

    def _decoding(self, prompts: int, rows: int) -> dict[str, int]:
        """Memory at the last token: the cache of each prompt once, the cache of each row, and logits.

        On a CPU in fp32 the weights exist a second time (models/packed_linear.py).
        """
        config, shape = self.config, self.shape
        a_token = 2 * shape.kv_heads * shape.head_dim * self.w
        cached = prompts * config.max_prompt_length + rows * config.max_completion_length
        # Logits in w and fp32, divided by the temperature, as probabilities, their sum in fp64.
        logits = rows * shape.vocab * (self.w + 3 * 4 + 8)
        prefill = self.layer_forward(prompts * config.max_prompt_length) + a_token * prompts * config.max_prompt_length
        packed = 0 if self.on_gpu or self.w < 4 else shape.parameters * self.w
        cache = shape.layers * a_token * cached
        kept = {"KV cache": cache, "activations": max(logits, prefill), "packed weights": packed}
        return {**kept, "CUDA graphs": self._graphs(prompts, rows)}

    def _graphs(self, prompts: int, rows: int) -> int:
        """Memory of models/cuda_graph.py: tensors of one token, cuBLAS's workspace, and the driver's own of a graph.

        Of the tensors the heaviest are alive together: gate and up and their product, or scores of all keys as they
        are and as weights; logits of this token and, while the next graph is captured, of the last one; a rotation
        matrix for each block of queries or keys; and the queries that every layer stores before its cache.
        """
        config, shape = self.config, self.shape
        if not (self.on_gpu and config.cuda_graphs):
            return 0
        scores = 2 * shape.heads * (config.max_prompt_length + config.max_completion_length)
        layer = rows * (max(scores, 4 * shape.mlp) + 6 * self.hidden)
        queries = rows * shape.heads * shape.head_dim * shape.layers
        rotation = 3 * prompts * (shape.heads // shape.kv_heads + 1) * shape.head_dim**2
        return (
            self.w * (layer + queries + rotation + 2 * rows * shape.vocab)
            + CUBLAS_WORKSPACE
            + GRAPH_OF_A_LAYER * shape.layers
        )
