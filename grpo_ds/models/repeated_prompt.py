"""Decoding with the prompt repeated for every row, in transformers' cache: for models with special attention."""

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class RepeatedPrompts:
    """Slower version of models/shared_prompt.py's SharedPrompts, for any causal LM that uses transformers' cache."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, group_size: int) -> None:
        self.model, self.prompts, self.group_size = model, prompts, group_size
        takes = inspect.signature(model.forward).parameters
        self.has_positions = "position_ids" in takes  # else from the mask
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}  # 10 GB for 64 prompts of Qwen
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Compute the cache of the prompts, also again: not every kind of cache can forget its last tokens."""
        prompts, group_size = self.prompts, self.group_size
        width = max(len(prompt) for prompt in prompts) - 1
        padded = [[0] * (width + 1 - len(prompt)) for prompt in prompts]
        ids = torch.tensor([[*pad, *prompt[:-1]] for pad, prompt in zip(padded, prompts, strict=True)])
        seen = torch.tensor([[*pad, *[1] * (width - len(pad))] for pad in padded])
        self.seen = seen.to(self.model.device)
        self.cache = DynamicCache(config=self.model.config)
        self._forward(ids.to(self.model.device), (self.seen.cumsum(dim=1) - 1).clamp(min=0))
        self.cache.batch_repeat_interleave(group_size)
        self.seen = self.seen.repeat_interleave(group_size, dim=0)

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Add `tokens` to the cache and return the logits of the next token."""
        self.seen = torch.cat([self.seen, torch.ones_like(self.seen[:, :1])], dim=1)
        return self._forward(tokens[:, None], positions[:, None])

    def keep(self, rows: Int[Tensor, " B"], *, group_size: int) -> None:
        """Keep only these rows."""
        self.group_size = group_size
        self.cache.batch_select_indices(rows)
        self.seen = self.seen[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        keywords = {"position_ids": positions} if self.has_positions else {}
        return self.model(
            input_ids=ids,
            attention_mask=self.seen,
            past_key_values=self.cache,
            use_cache=True,
            **self.last_only,
            **keywords,
        ).logits[:, -1]
