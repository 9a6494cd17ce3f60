"""The attention of every model here: transformers' SDPA, or the function `attend` of the caller.

Registered with transformers' AttentionInterface, so a model's own code runs unchanged. `PackedAttention` computes
packed rows without a mask over them: it computes only the scores that such a mask would keep.

R rows of L tokens, prompts of at most P; B completions of at most C input tokens. H heads of queries, K heads of keys,
of width D.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_ds.core.packing import PROMPT, PackedRows
from grpo_ds.core.pick import NOWHERE, Pick

NAME = "grpo_ds"
# Keywords with which some models extend plain attention in transformers; `attend` does not support them.
UNKNOWN = ("softcap", "s_aux")
# Errors of models whose attention is not written for transformers' AttentionInterface; the probes catch them.
NOT_MADE_FOR_US = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
ALIGNED = 8  # columns: on a card memory-efficient attention copies a mask unless its rows begin at multiples of 8
FLASH_SINCE = (8, 0)  # compute capability


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


def ordinary_ids(model: PreTrainedModel, count: int) -> list[int]:
    """Return ids for a probe, from the middle of the vocabulary.

    The first ids are special tokens in many models, with activations so large that 16 bits round them coarsely.
    """
    middle: int = model.config.get_text_config().vocab_size // 2
    return list(range(middle, middle + count))


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
        device, (r, length) = rows.input_ids.device, rows.input_ids.shape
        prompts = (rows.segments == PROMPT).sum(dim=1)  # [R] tokens
        row = rows.sources[:, 0] // length  # [B] the row of each completion
        self.dtype, self.prompts = dtype, prompts[row]  # [B] tokens
        self.longest = int(prompts.max())
        self.group_sizes: list[int] = torch.bincount(row, minlength=r).tolist()  # completions in each row
        # A completion's inputs are the positions that predict its tokens, without the first position.
        own = torch.where(rows.mask, rows.sources, NOWHERE)[:, 1:]
        self.inputs = own.shape[1]
        place, first = torch.arange(self.longest, device=device), torch.arange(r, device=device)[:, None] * length
        of_prompts = torch.where(place < prompts[:, None], first + place, NOWHERE)
        self.completions = Pick(own.flatten(), length=r * length)
        # Both results, [R * P + B * C tokens], back to [R * L tokens].
        self.back = Pick(torch.cat([of_prompts.flatten(), own.flatten()]), length=r * length).inverse()
        self.masks: dict[tuple[bool, int], Tensor] = {}

    def __call__(
        self, layer: int, query: Float[Tensor, "R H L D"], key: Tensor, value: Tensor, scaling: float
    ) -> Float[Tensor, "R L H D"]:
        shared = query.shape[1] // key.shape[1]
        asked, keys, values = (part[:, :, : self.longest] for part in (query, key, value))
        if shared == 1 or _flash_runs(query):
            result = F.scaled_dot_product_attention(
                asked, keys, values, is_causal=True, scale=scaling, enable_gqa=shared > 1
            )
            result = result.transpose(1, 2).flatten(0, 1)  # [R * P, H, D]
        else:
            result = _folded(asked, keys, values, self._mask(shared, of_prompts=True), scaling)
        if self.inputs:
            keys, values = self._continued(keys, key), self._continued(values, value)
            theirs = _folded(self._of_completions(query), keys, values, self._mask(shared), scaling)
            result = torch.cat([result, theirs])
        return self.back(result).view(query.transpose(1, 2).shape)

    def _of_completions(self, part: Float[Tensor, "R X L D"]) -> Float[Tensor, "B X C D"]:
        """Gather the tokens of the completions, padded with 0."""
        return self.completions(part.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, self.inputs)).transpose(1, 2)

    def _continued(self, prompts: Float[Tensor, "R K P D"], part: Float[Tensor, "R K L D"]) -> Tensor:
        """Append each completion to its prompt: [B K P+C D].

        The backward of repeat_interleave adds in a random order on a card; that of expand has a fixed order.
        """
        own, sizes = self._of_completions(part), self.group_sizes
        if len(set(sizes)) == 1:
            groups = prompts[:, None].expand(-1, sizes[0], -1, -1, -1)
            return torch.cat([groups, own.unflatten(0, (-1, sizes[0]))], dim=3).flatten(0, 1)
        rows = zip(prompts.split(1), own.split(sizes), strict=True)
        return torch.cat([torch.cat([one.expand(len(its), -1, -1, -1), its], dim=2) for one, its in rows])

    def _mask(self, shared: int, *, of_prompts: bool = False) -> Tensor:
        """Return the mask of one part, for `shared` heads folded together; the first layer makes it."""
        if (of_prompts, shared) not in self.masks:
            seen = self._causal(self.longest)[None] if of_prompts else self._seen_by_completions()
            self.masks[of_prompts, shared] = _additive(seen, shared, self.dtype)
        return self.masks[of_prompts, shared]

    def _seen_by_completions(self) -> Bool[Tensor, "B C P+C"]:
        of_prompt = torch.arange(self.longest, device=self.prompts.device) < self.prompts[:, None]
        of_itself = self._causal(self.inputs).expand(len(of_prompt), -1, -1)
        return torch.cat([of_prompt[:, None].expand(-1, self.inputs, -1), of_itself], dim=2)

    def _causal(self, tokens: int) -> Bool[Tensor, "tokens tokens"]:
        return torch.ones(tokens, tokens, dtype=torch.bool, device=self.prompts.device).tril()


def _flash_runs(query: Tensor) -> bool:
    """Return True if flash attention takes such a query: a card's one fast kernel for shared keys (torch 2.13)."""
    old_card = torch.cuda.is_available() and torch.cuda.get_device_capability() < FLASH_SINCE
    return not query.is_cuda or (query.dtype != torch.float32 and not old_card)


def _additive(seen: Bool[Tensor, "X C S"], shared: int, dtype: torch.dtype) -> Float[Tensor, "X 1 shared*C S"]:
    """Return 0 where seen and -inf elsewhere, repeated for `shared` heads."""
    x, c, s = seen.shape
    mask = torch.full((x, shared, c, -(-s // ALIGNED) * ALIGNED), -torch.inf, dtype=dtype, device=seen.device)
    mask[..., :s].masked_fill_(seen[:, None], 0)
    return mask.flatten(1, 2)[:, None, :, :s]


def _folded(
    query: Float[Tensor, "X H C D"],
    keys: Float[Tensor, "X K S D"],
    values: Float[Tensor, "X K S D"],
    mask: Float[Tensor, "_ 1 n*C S"],
    scaling: float,
) -> Float[Tensor, "X*C H D"]:
    """Attention in which the n = H / K heads that share a key are n times as many queries of one head.

    With a mask, memory-efficient attention is the only fast kernel of most cards, and up to torch 2.13 it does not let
    heads share keys: `enable_gqa` would mean the math kernel, with all scores in fp32.
    """
    c = query.shape[2]
    query = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    result = F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)  # [X K n*C D]
    return result.unflatten(2, (-1, c)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
