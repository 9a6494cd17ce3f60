"""Memory that grows with tokens: activations, attention masks, KV cache, logits.

The worst case: every prompt has max_prompt_length tokens, every completion max_completion_length. w is the bytes of a
weight and of an activation: 2 in bf16, 4 in fp32.

The factors of a layer count the tensors of a Qwen2 layer with a gated MLP, attention by the kernels of a card, and
packed rows. They are compared with a simulated card, tensor by tensor (tests/card, docs/memory.md). GPT-2's MLP needs
about as much: it is half as wide, but its GELU keeps more.
"""

from dataclasses import dataclass

from grpo_ds.models.shapes import ModelShape
from grpo_ds.settings.config import TrainConfig

MIB = 2**20
GRAPH_WORKSPACES = 33 * MIB  # of the graphs' stream: cuBLAS's 32 (CUBLAS_WORKSPACE_CONFIG=:4096:8), cuBLASLt's 1
GRAPH_OF_A_LAYER = 2**18  # of the driver, for 20 kernels: an estimate, 13 KiB a kernel, not measured
ALIGNED = 8  # elements: a mask's rows begin at multiples of it (models/attention.py)


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
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.shape.heads * self.shape.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together."""
        return self.shape.kv_heads * self.shape.head_dim

    @property
    def in_completions(self) -> int:
        """Completions of one backward, in all its rows."""
        return self.rows * self.completions

    def masks(self) -> dict[str, int]:
        """Attention mask of the completions, repeated for the heads that share a key (models/attention.py)."""
        inputs, shared = self.config.max_completion_length - 1, self.shape.heads // self.shape.kv_heads
        keys = -(-(self.config.max_prompt_length + inputs) // ALIGNED) * ALIGNED
        return {"attention mask": self.in_completions * shared * inputs * keys * self.w}

    def checkpoints(self) -> int:
        """Tensors that forward keeps for backward: each layer's input, or, without checkpointing, all its tensors."""
        if self.config.gradient_checkpointing is False:
            return self._saved() * self.shape.layers
        return self.tokens * self.shape.hidden * self.w * self.shape.layers

    def _saved(self) -> int:
        """Bytes that a layer keeps for its backward.

        Per token: four MLP-wide tensors; in each of two norms two in w and one in fp32; queries, keys, values and the
        attention's result.
        """
        shape, w = self.shape, self.w
        in_a_norm = 4 + (w if self.config.lora_r else 2 * w)  # the second is for the gradient of the norm's weight
        a_token = 4 * w * shape.mlp + 2 * in_a_norm * shape.hidden + 2 * w * (self.queries + self.keys)
        return self.tokens * a_token + self._attention()

    def _attention(self) -> int:
        """Bytes that the two calls of attention keep for backward: PackedAttention of models/attention.py.

        The result for the prompts; folded queries, keys, values and the result for the completions, where keys and
        values hold the prompt once for each completion; a logarithm in fp32 for each query and head.
        """
        prompts, config = self.rows * self.config.max_prompt_length, self.config
        inputs = self.in_completions * (config.max_completion_length - 1)
        gathered = self.in_completions * config.max_prompt_length + inputs
        widths = prompts * self.queries + inputs * 2 * self.queries + gathered * 2 * self.keys
        return widths * self.w + self.tokens * self.shape.heads * 4

    def layer_backward(self) -> int:
        """Bytes at the peak of one layer's backward, beside the kept tensors of the other layers.

        It is in the MLP, where three gradients are alive and one kept tensor is gone.
        """
        recomputed = 0 if self.config.gradient_checkpointing is False else self._saved()
        return recomputed + self.tokens * self.w * (2 * self.shape.mlp + self.shape.hidden)

    def layer_forward(self, tokens: int, dequantised: int = 0) -> int:
        """One layer without gradients: gate, up and their product, and four tensors of the residual stream.

        An adapter adds its output to that of `up`, out of place, and needs one more. dequantised: bytes of a weight
        that is converted for its product; it is gone when gate and up are multiplied.
        """
        shape, more = self.shape, 2 if self.config.lora_r else 1
        wide = tokens * self.w * shape.mlp
        return 2 * wide + tokens * self.w * 4 * shape.hidden + max(more * wide, dequantised)

    def logprobs(self, *, backward: bool = False) -> int:
        """The chunk of core/logprobs.py and its [tokens, hidden] tensors.

        A card's backward has one of the chunk's two tiles in w; hidden states and their gradient exist in fp32 twice.
        """
        targets = self.in_completions * self.config.max_completion_length
        chunk, fp32 = self.config.logprob_chunk_mib * MIB, 0
        if backward:
            chunk, fp32 = chunk * ((4 + self.w) / 8 if self.on_gpu else 1), 2 * 4
        return int(chunk) + targets * self.shape.hidden * (2 * self.w + fp32)

    def behind_layers(self) -> int:
        """Bytes that the last norm keeps in fp32, and the hidden states of the targets with their gradient."""
        targets = self.in_completions * self.config.max_completion_length
        return self.shape.hidden * (4 * self.tokens + 2 * self.w * targets)

    def forward(self, dequantised: int = 0) -> dict[str, int]:
        """Forward pass of the reference over the packed rows, without gradients."""
        head = self.logprobs() + self.tokens * self.shape.hidden * self.w
        return {"activations": max(self.layer_forward(self.tokens, dequantised), head), **self.masks()}

    def sampling(self, dequantised: int = 0) -> list[dict[str, int]]:
        """Sampling a step's completions, as many groups at once as --generation_batch_size allows."""
        prompts, rows = self._sampled_at_once()
        # Logits in w; then probabilities in fp32, the same and their sum in fp64.
        return self._decoding(prompts, rows, a_logit=self.w + 4 + 8 + 8, dequantised=dequantised)

    def _sampled_at_once(self) -> tuple[int, int]:
        """Prompts and completions."""
        config = self.config
        at_once = config.generation_batch_size or config.batch_size * config.num_generations
        prompts = max(1, min(at_once // config.num_generations, config.batch_size))
        return prompts, prompts * config.num_generations

    def answering(self, dequantised: int = 0) -> list[dict[str, int]]:
        """Sampling the likeliest answer to each held-out question."""
        rows = self.config.generation_batch_size or 1
        return self._decoding(rows, rows, a_logit=self.w, dequantised=dequantised)

    def _decoding(self, prompts: int, rows: int, *, a_logit: int, dequantised: int) -> list[dict[str, int]]:
        """The moments of the last layer's prefill and of the last token. a_logit: bytes of a logit and what follows it.

        The cache holds each prompt once, and all columns of each row, which are allocated after prefill. On a CPU
        the weights exist a second time (models/packed_linear.py).
        """
        config, shape = self.config, self.shape
        packed = 0 if self.on_gpu else shape.parameters * self.w
        a_token = 2 * self.keys * self.w * shape.layers
        tokens = prompts * config.max_prompt_length
        prefill = {"KV cache": tokens * a_token, "activations": self.layer_forward(tokens, dequantised)}
        cache = (tokens + rows * config.max_completion_length) * a_token
        last = {"KV cache": cache, "activations": max(rows * shape.vocab * a_logit, dequantised)}
        return [moment | {"packed weights": packed} for moment in (prefill, last)]

    def graphs(self) -> int:
        """Memory of models/cuda_graph.py, kept for the whole run: tensors of a token, workspaces, the driver's graph.

        Of the tensors the heaviest are alive together: gate and up and their product, or scores of all keys as they
        are and as weights; logits of this token and, while the next graph is captured, of the last one; a rotation
        matrix for each block of queries or keys; and the queries that every layer stores before its cache.
        """
        config, shape = self.config, self.shape
        if not (self.on_gpu and config.cuda_graphs):
            return 0
        prompts, rows = self._sampled_at_once()
        scores = 2 * shape.heads * (config.max_prompt_length + config.max_completion_length)
        layer = rows * (max(scores, 4 * shape.mlp) + 6 * max(shape.hidden, self.queries))
        queries = rows * self.queries * shape.layers
        rotation = 3 * prompts * (shape.heads // shape.kv_heads + 1) * shape.head_dim**2
        return (
            self.w * (layer + queries + rotation + 2 * rows * shape.vocab)
            + GRAPH_WORKSPACES
            + GRAPH_OF_A_LAYER * shape.layers
        )
