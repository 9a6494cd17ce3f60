"""Log-probs of given tokens, computed without a [tokens, vocabulary] tensor.

The outer loop goes over blocks of the vocabulary, with a running log-sum-exp. Only two tiles [N, block] are allocated,
and reused. Backward computes the logits again; it writes each row of the head's gradient once, in the head's own
dtype, and the matmul sums it over tokens in fp32. (Other implementations loop over tokens outside, which needs an fp32
accumulator [vocabulary, hidden].)

N tokens, H hidden size, V vocabulary rows of the head.
"""

from collections.abc import Iterator
from typing import Literal, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

MIB = 2**20
ALIGNED = 64  # rows; on a card matmuls whose sizes are multiples of it are fastest
MIN_BLOCK = 128  # rows; smaller matmuls are mostly overhead, and these tiles fit 64 MiB up to 65,536 tokens


@runtime_checkable
class HeadRows(Protocol):
    """A head with rows `head[start:stop]` [rows, H]: a weight tensor, or a weight stored in 8 bits."""

    def __getitem__(self, rows: slice) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Float[Tensor, "N H"],
    head: HeadRows,
    targets: Int[Tensor, " N"],
    *,
    vocab_size: int,
    temperature: float = ...,
    chunk_mib: float = ...,
    entropy: Literal[False] = ...,
) -> Float[Tensor, " N"]: ...


@overload
def token_logprobs(
    hidden: Float[Tensor, "N H"],
    head: HeadRows,
    targets: Int[Tensor, " N"],
    *,
    vocab_size: int,
    temperature: float = ...,
    chunk_mib: float = ...,
    entropy: Literal[True],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]: ...


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    head: HeadRows,
    targets: Int[Tensor, " N"],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_mib: float = 64.0,
    entropy: bool = False,
) -> Float[Tensor, " N"] | tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return log softmax(hidden @ head[:vocab_size].T / temperature) at `targets`, in fp32 and nats.

    Differentiable in `hidden`, and in `head` if it is a tensor.

    vocab_size: rows of the head that count. Later rows are padding without a token: they are never sampled.
    chunk_mib: memory for one block, MiB: its tiles, and its rows if they must be converted.
    entropy: return (log-probs, entropies in nats). Both are differentiable, in the same two tiles.
    """
    logprobs, entropies = _TokenLogprobs.apply(hidden, head, targets, vocab_size, temperature, chunk_mib, entropy)
    return (logprobs, entropies) if entropy else logprobs


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, vocab_size, temperature, chunk_mib, entropy):
        chosen = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        log_total = torch.full_like(chosen, -torch.inf)
        mean_logit = torch.zeros_like(chosen)  # under the softmax over the blocks so far
        for start, _, logits, spare in _tiles(hidden, head, vocab_size, temperature, chunk_mib, torch.float32):
            inside, column = _columns(targets, start, logits.shape[1])
            chosen = torch.where(inside, logits.gather(1, column).squeeze(1), chosen)
            # One fused kernel; logsumexp takes four passes over the tile and a temporary of its size.
            block_logprobs = torch.log_softmax(logits, dim=1, out=spare)
            block_total = logits[:, 0] - block_logprobs[:, 0]
            log_total = torch.logaddexp(log_total, block_total)
            if entropy:
                block_entropy = -torch.exp(block_logprobs, out=logits).mul_(block_logprobs).sum(dim=1)
                mean_logit = mean_logit.lerp(block_total - block_entropy, (block_total - log_total).exp())
        logprobs = chosen - log_total
        entropies = log_total - mean_logit if entropy else None
        ctx.set_materialize_grads(False)  # None: the loss has no entropy in it, and backward does less
        tensor = isinstance(head, Tensor)
        ctx.save_for_backward(hidden, head if tensor else None, targets, logprobs, log_total, entropies)
        ctx.options = None if tensor else head, vocab_size, temperature, chunk_mib
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, entropy_grad):
        hidden, weight, targets, logprobs, log_total, entropies = ctx.saved_tensors
        rows_only, vocab_size, temperature, chunk_mib = ctx.options
        head = rows_only if weight is None else weight
        dtype = _factor_dtype(hidden)
        # d logprob / d logit = [token is the target] - p, d entropy / d logit = -p (log p + entropy). The tile holds
        # the negative, and the factor of each row is applied to the [N, H] tensors, which are smaller.
        grad = torch.zeros_like(logprobs) if grad is None else grad.float()
        target_error = logprobs.expm1()  # p - 1, exact even if p rounds to 1
        if entropy_grad is not None:
            # One factor for both, so that 16 bits hold the tile: of_logprob and of_entropy are at most 1.
            both = grad.abs() + entropy_grad.abs()
            of_logprob, of_entropy = ((part / both).nan_to_num() for part in (grad, entropy_grad))  # 0 / 0: 0
            target_error = of_logprob * target_error + of_entropy * logprobs.exp() * (logprobs + entropies)
            grad = both
        scale = (grad / -temperature)[:, None]
        scaled_hidden = (hidden * scale).to(dtype)
        target_error = target_error.to(dtype)[:, None]
        hidden_grad = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        head_grad = None
        if ctx.needs_input_grad[1]:
            head_grad = torch.empty_like(weight)
            head_grad[vocab_size:] = 0
        for start, rows, logits, spare in _tiles(hidden, head, vocab_size, temperature, chunk_mib, dtype):
            error = torch.exp(logits.sub_(log_total[:, None]), out=spare)
            if entropy_grad is not None:
                error.mul_(logits.add_(entropies[:, None]).mul_(of_entropy[:, None]).add_(of_logprob[:, None]))
            inside, column = _columns(targets, start, len(rows))
            error.scatter_(1, column, torch.where(inside[:, None], target_error, error.gather(1, column)))
            _matmul(error, rows, out=hidden_grad, add=True)
            if head_grad is not None:
                _matmul(error.T, scaled_hidden, out=head_grad[start : start + len(rows)])
        return hidden_grad.mul_(scale).to(hidden.dtype), head_grad, None, None, None, None, None


def _tiles(
    hidden: Tensor, head: HeadRows, vocab_size: int, temperature: float, chunk_mib: float, spare_dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield (first row, rows of the head, fp32 logits [N, block], a spare tile [N, block]) of each vocabulary block."""
    dtype = _factor_dtype(hidden)
    tokens, width = hidden.shape
    converted = not isinstance(head, Tensor) or head.dtype != dtype
    row_bytes = 8 * tokens + 8 * width * converted  # two tiles; two fp32 copies of the rows, or rows and gradient
    fitting = int(chunk_mib * MIB) // max(1, row_bytes)
    block = min(vocab_size, max(MIN_BLOCK, fitting // ALIGNED * ALIGNED))
    tile = torch.empty(tokens * block, dtype=torch.float32, device=hidden.device)
    spare = torch.empty(tokens * block, dtype=spare_dtype, device=hidden.device)
    hidden = hidden.to(dtype)
    for start in range(0, vocab_size, block):
        rows = head[start : min(start + block, vocab_size)].to(dtype)
        shape = tokens, len(rows)
        logits = _matmul(hidden, rows.T, out=tile[: tokens * len(rows)].view(shape))
        if temperature != 1:  # a pass over the tile
            logits.div_(temperature)
        yield start, rows, logits, spare[: tokens * len(rows)].view(shape)


def _columns(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return a mask of the targets in this block [N], and their columns [N, 1] (any column for the others)."""
    column = targets - start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]


def _factor_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the matmuls' factors: a GPU uses its tensor cores for 16 bits; a CPU gains nothing from rounding."""
    return hidden.dtype if hidden.is_cuda else torch.float32


def _matmul(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> Tensor:
    """Compute out = a @ b (+ out), summed in fp32: 16-bit logits give log-probs that are off by 1e-2, fp32 by 1e-6."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if a.is_cuda and out.dtype == torch.float32:
        # addmm with out_dtype would save a pass, but some torch versions since 2.8 refuse an fp32 summand.
        if add:
            return out.add_(torch.mm(a, b, out_dtype=torch.float32))
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return out.add_(a @ b) if add else out.copy_(a @ b)
