"""Log-probs of chosen tokens without ever holding a [tokens, vocabulary] tensor.

The vocabulary is walked in blocks, outermost, with a running log-sum-exp: one fp32 tile
[N, block] is alive at a time, backward computes it again, and each row of the head's gradient
is written once, in the head's own dtype, with its sum over tokens taken in fp32 by the matmul.
(Walking tokens outermost, as others do, needs an fp32 [vocabulary, hidden] accumulator instead.)

N tokens, H hidden size, V vocabulary rows of the head.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

MIB = 2**20
MIN_BLOCK = 128  # rows; below this a matmul is all overhead, and the tile is small anyway


@runtime_checkable
class HeadRows(Protocol):
    """A head whose rows come as `head[start:stop]` [rows, H]: a weight tensor, or one kept in 8 bits."""

    def __getitem__(self, rows: slice) -> Tensor: ...


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    head: HeadRows,
    targets: Int[Tensor, " N"],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_mib: float = 64.0,
) -> Float[Tensor, " N"]:
    """fp32 log softmax(hidden @ head[:vocab_size].T / temperature) at `targets`.

    Differentiable in `hidden`, and in `head` when it is a tensor. Rows of the head from `vocab_size`
    on (padding the tokenizer cannot name) take no part, just as they are never sampled.
    `chunk_mib`: size of the one fp32 tile.
    """
    block = max(MIN_BLOCK, int(chunk_mib * MIB) // (4 * max(1, len(targets))))
    return _TokenLogprobs.apply(hidden, head, targets, vocab_size, temperature, block)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, vocab_size, temperature, block):
        chosen = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        log_total = torch.full_like(chosen, -torch.inf)
        for start in range(0, vocab_size, block):
            logits = _logits(hidden, head[start : min(start + block, vocab_size)], temperature)
            inside, column = _columns(targets, start, logits.shape[1])
            chosen = torch.where(inside, logits.gather(1, column).squeeze(1), chosen)
            peak = logits.amax(dim=1)
            total = logits.sub_(peak[:, None]).exp_().sum(dim=1)
            log_total = torch.logaddexp(log_total, peak + total.log())
        if isinstance(head, Tensor):
            ctx.save_for_backward(hidden, head, targets, log_total)
            ctx.options = vocab_size, temperature, block
        return chosen - log_total

    @staticmethod
    def backward(ctx, grad):
        hidden, head, targets, log_total = ctx.saved_tensors
        vocab_size, temperature, block = ctx.options
        scale = (grad.float() / temperature)[:, None]
        hidden_grad = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        head_grad = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for start in range(0, vocab_size, block):
            rows = head[start : min(start + block, vocab_size)]
            # d logprob / d logit = [token is the target] - softmax, built in place in the tile.
            tile = _logits(hidden, rows, temperature).sub_(log_total[:, None]).exp_().neg_()
            inside, column = _columns(targets, start, len(rows))
            tile.scatter_add_(1, column, inside[:, None].float())
            tile.mul_(scale)
            hidden_grad += _matmul_fp32(tile.to(_matmul_dtype(rows)), rows)
            if head_grad is not None:
                head_grad[start : start + len(rows)] = _matmul_fp32(tile.T.to(_matmul_dtype(rows)), hidden)
        return hidden_grad.to(hidden.dtype), head_grad, None, None, None, None


def _logits(hidden: Tensor, rows: Tensor, temperature: float) -> Tensor:
    return _matmul_fp32(hidden, rows.T).div_(temperature)


def _columns(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets fall into this block, and their column in it [N, 1] (any column where they do not)."""
    column = targets - start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    """On a GPU 16-bit factors run on the tensor cores; a CPU gains nothing from rounding them."""
    return weight.dtype if weight.is_cuda else torch.float32


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32: 16-bit logits are off by 1e-2 in a log-prob, these by 1e-6."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    return a.float() @ b.float()
