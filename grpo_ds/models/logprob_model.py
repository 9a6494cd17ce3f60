"""A causal LM as one function: packed rows -> log-probs of the completion tokens.

Policy, old policy and reference use it. The head is applied in chunks inside `forward`, so the policy's engine wraps
log-probs, not logits, and no [tokens, vocabulary] tensor exists.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_ds.core.logprobs import HeadRows, token_logprobs
from grpo_ds.core.packing import PADDING, PackedRows, pack_groups
from grpo_ds.errors import UsageError
from grpo_ds.models.attention import (
    NOT_MADE_FOR_US,
    PackedAttention,
    attending,
    ordinary_ids,
    sliding_window,
    use_our_attention,
)
from grpo_ds.models.quantized import Int8Rows

# Config keys of models that change their logits after the head; our chunked log-probs would not.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


class LogprobModel(nn.Module):
    """`model` as a function PackedRows -> [B, C] fp32 log-probs, 0 if masked; [B, C + n] for rows with n labels.

    vocab_size: number of ids of the tokenizer; the head's padding rows above it are left out.
    In training mode `entropies` holds the last call's entropies: [B, C] in nats, 0 if masked; without gradient unless
    the call asks for `entropy_gradient`.
    """

    def __init__(self, model: PreTrainedModel, *, vocab_size: int, temperature: float, chunk_mib: float) -> None:
        super().__init__()
        check_plain_head(model)
        use_our_attention(model)
        self.model = model
        self.entropies = torch.empty(0)
        self.packs = True  # False: each row holds one completion, and the plain causal mask is right
        self.options: dict[str, Any] = {"vocab_size": vocab_size, "temperature": temperature, "chunk_mib": chunk_mib}

    def forward(self, rows: PackedRows, *, entropy_gradient: bool = False) -> Float[Tensor, "B W"]:
        if self.entropies.requires_grad:
            self.entropies = self.entropies.detach()  # those of a call that failed may hold its activations
        if self.packs:
            attend = PackedAttention(rows, self.model.dtype)
            layout = {"position_ids": rows.position_ids, **attending(attend, rows.input_ids.device)}
        else:
            layout = {"attention_mask": rows.segments != PADDING}
        hidden = self.model.base_model(input_ids=rows.input_ids, use_cache=False, **layout).last_hidden_state
        # Only positions that predict a counted token go through the head.
        sources, targets, mask = rows.predicted()
        sources, targets = sources[mask], targets[mask]
        # A prompt's last position predicts the first token of all G completions. The backward of plain indexing adds
        # these gradients in a random order of threads; the backward of an embedding adds them in a fixed order.
        chosen = F.embedding(sources, hidden.flatten(0, 1))
        if not self.training:
            return _at_mask(token_logprobs(chosen, self.head, targets, **self.options), mask)
        # Kept here, not returned: DeepSpeed would hook the gradient of a second output, which most losses do not give.
        logprobs, entropies = token_logprobs(chosen, self.head, targets, **self.options, entropy=True)
        entropies = entropies if entropy_gradient else entropies.detach()
        self.entropies = _at_mask(entropies, mask)[:, : rows.mask.shape[1]]
        return _at_mask(logprobs, mask)

    @property
    def head(self) -> HeadRows:
        """Output embedding: its weight, or a module that keeps the weight in 8 bits."""
        head = self.model.get_output_embeddings()
        return head if isinstance(head, Int8Rows) else head.weight


def _at_mask(values: Float[Tensor, " N"], mask: Bool[Tensor, "B W"]) -> Float[Tensor, "B W"]:
    """Place `values` where the mask is True, 0 elsewhere."""
    return torch.zeros(mask.shape, device=values.device).masked_scatter(mask, values)


# Tolerance, as a share of the log-probs' norm: the two ways sum in different orders, and in 16 bits every layer rounds
# its output. smollm2-135m has 0.007 in bf16; if a completion sees the one beside it, 0.13 and more.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


@torch.no_grad()
def why_not_packed(policy: LogprobModel, *, longest: int) -> str | None:
    """Return the reason why this model cannot use packed rows, None if it can.

    Tested on one row: it must give the same log-probs as separate rows. longest: tokens of a prompt with its
    completion.
    """
    device = policy.model.device
    if (window := sliding_window(policy.model.config)) < longest:
        return f"its attention window of {window} tokens is smaller than the {longest} of a prompt and its completion"
    prompt, *rows = torch.tensor(ordinary_ids(policy.model, 9), device=device).split(3)
    ids, mask = torch.stack(rows), torch.ones(2, 3, dtype=torch.bool, device=device)
    policy.packs = False
    alone = policy(pack_groups([prompt, prompt], ids, mask, pad_id=0))
    policy.packs = True
    try:
        beside = policy(pack_groups([prompt], ids, mask, pad_id=0))
    except NOT_MADE_FOR_US as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:100]
    seen = float((alone - beside).norm() / alone.norm())
    return None if seen <= PROBE_TOLERANCE[policy.model.dtype] else "its attention is more than plain SDPA"


def check_plain_head(model: PreTrainedModel) -> None:
    """Raise UsageError for models whose logits are more than hidden @ head.T."""
    changes = [key for key in LOGIT_CHANGES if getattr(model.config, key, None) not in (None, 1.0)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        changes.append("a bias on the output embedding")
    if changes:
        raise UsageError(
            f"This model changes its logits after the head ({', '.join(changes)}), which the chunked log-probs "
            "do not support.\nUse a Qwen2, Llama, Mistral, SmolLM or GPT-2 model."
        )
