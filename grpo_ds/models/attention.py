"""The attention of every model here: transformers' SDPA, or the function `attend` of the caller.

Registered with transformers' AttentionInterface, so a model's own code runs unchanged. `PackedAttention` computes
packed rows without a mask over them: it computes only the scores that such a mask would keep.

R rows of L tokens, prompts of at most P; B completions of at most C input tokens. H heads of queries, K heads of keys,
of width D.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_ds.core.packing import PROMPT, PackedRows

NAME = "grpo_ds"
# Keywords with which some models extend plain attention in transformers; `attend` does not support them.
UNKNOWN = ("softcap", "s_aux")
# Errors of models whose attention is not written for transformers' AttentionInterface; the probes catch them.
NOT_MADE_FOR_US = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
ALIGNED = 8  # columns: on a card memory-efficient attention copies a mask unless its rows begin at multiples of 8


class Attend(Protocol):
    """Attention of one layer: query [R H L D], key and value [R K L D] -> [R L H D]."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor: ...


def use_our_attention(model: PreTrainedModel) -> None:
    """Make `model(..., **attending(attend))` use `attend`; calls without it do not change."""
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)


def attending(attend: Attend, device: torch.device) -> dict[str, Any]:
    """Return the keywords of a model's forward that make it use `attend`."""
    # transformers takes a mask of four dimensions as it is and makes no mask of its own.
    return {"attend": attend, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Attend | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Called by transformers in each layer; the keywords come from the model's forward."""
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if any(options.get(name) is not None for name in UNKNOWN):
        raise NotImplementedError(f"attention with {' or '.join(UNKNOWN)}")
    return attend(module.layer_idx, query, key, value, options["scaling"]), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def sliding_window(config: Any) -> float:
    """Maximum number of tokens that a layer attends to; infinite without a sliding window."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return window if window and slides else float("inf")


class PackedAttention:
    """Attention over packed rows in two parts: prompts over themselves; completions over their prompt and themselves.

    With a mask over complete rows, (P + B C / R)^2 scores per row are computed; here P^2 / 2 + C (P + C) B / R.
    """

    def __init__(self, rows: PackedRows, dtype: torch.dtype) -> None:
        device, (_, length) = rows.input_ids.device, rows.input_ids.shape
        prompts = (rows.segments == PROMPT).sum(dim=1)  # [R] tokens
        row = rows.sources[:, 0] // length  # [B] the row of each completion
        # A completion's inputs are the positions that predict its tokens, without the first position.
        self.own, counts = rows.sources[:, 1:], rows.mask[:, 1:]
        self.longest = int(prompts.max())
        self.completions = torch.bincount(row, minlength=len(prompts))  # [R] number of completions in each row
        b, c = self.own.shape
        width = self.longest + c
        mask = torch.full((b, 1, c, -(-width // ALIGNED) * ALIGNED), -torch.inf, dtype=dtype, device=device)
        self.mask: Float[Tensor, "B 1 C P+C"] = mask[..., :width]
        of_prompt = torch.arange(self.longest, device=device) < prompts[row][:, None]
        of_itself = torch.ones(c, c, dtype=torch.bool, device=device).tril()
        seen = torch.cat([of_prompt[:, None, None].expand(b, 1, c, -1), of_itself.expand(b, 1, c, c)], dim=3)
        self.mask.masked_fill_(seen, 0)
        # Index of each of the R * L tokens in the results [R * P prompt tokens, B * C completion tokens].
        places = torch.arange(length, device=device).expand_as(rows.segments)
        first = torch.arange(len(prompts), device=device)[:, None] * self.longest
        back = torch.where(rows.segments == PROMPT, first + places, 0).flatten()
        back[self.own[counts]] = first.numel() * self.longest + torch.arange(b * c, device=device).view(b, c)[counts]
        self.back = back

    def __call__(
        self, layer: int, query: Float[Tensor, "R H L D"], key: Tensor, value: Tensor, scaling: float
    ) -> Float[Tensor, "R L H D"]:
        r, heads, length, width = query.shape
        shared = key.shape[1] != heads
        asked, keys, values = (part[:, :, : self.longest] for part in (query, key, value))
        result = F.scaled_dot_product_attention(asked, keys, values, is_causal=True, scale=scaling, enable_gqa=shared)
        result = result.transpose(1, 2).flatten(0, 1)  # [R * P, H, D]
        if self.own.shape[1]:
            keys, values = (
                torch.cat([prompt.repeat_interleave(self.completions, dim=0), self._of_completions(part)], dim=2)
                for prompt, part in ((keys, key), (values, value))
            )
            asked = self._of_completions(query)
            theirs = F.scaled_dot_product_attention(asked, keys, values, self.mask, scale=scaling, enable_gqa=shared)
            result = torch.cat([result, theirs.transpose(1, 2).flatten(0, 1)])
        return result.index_select(0, self.back).view(r, length, heads, width)

    def _of_completions(self, part: Float[Tensor, "R X L D"]) -> Float[Tensor, "B X C D"]:
        """Gather the tokens of the completions, padded; the values in the padding have no effect."""
        tokens = part.transpose(1, 2).flatten(0, 1).index_select(0, self.own.flatten())
        return tokens.view(*self.own.shape, *tokens.shape[1:]).transpose(1, 2)
