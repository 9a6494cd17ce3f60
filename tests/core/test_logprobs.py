"""Chunked log-probs against log_softmax and gather, in value, gradient and memory."""

import pytest
import torch

from grpo_ds.core import logprobs
from grpo_ds.core.logprobs import token_logprobs
from grpo_ds.models.quantized import Int8Rows


def naive(hidden, head, targets, vocab_size, temperature):
    logits = (hidden.double() @ head.double().T)[:, :vocab_size] / temperature
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def inputs(dtype=torch.float32, tokens=37, width=48, rows=1000, vocab=900):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g).to(dtype).requires_grad_()
    head = torch.randn(rows, width, generator=g).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, vocab, (tokens,), generator=g), vocab


@pytest.mark.parametrize("block", [7, 128, 450, 900, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_log_softmax_and_gather_in_value_and_gradient(block, temperature, monkeypatch):
    hidden, head, targets, vocab = inputs()
    monkeypatch.setattr(logprobs, "MIN_BLOCK", block)
    ours = token_logprobs(hidden, head, targets, vocab_size=vocab, temperature=temperature, chunk_mib=0)
    theirs = naive(hidden, head, targets, vocab, temperature)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)

    upstream = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((ours * upstream).sum(), (hidden, head))
    expected = torch.autograd.grad((theirs * upstream).sum(), (hidden, head))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-4)


def test_bf16_inputs_keep_an_fp32_log_sum_exp():
    hidden, head, targets, vocab = inputs(torch.bfloat16)
    ours = token_logprobs(hidden, head, targets, vocab_size=vocab, chunk_mib=0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), naive(hidden, head, targets, vocab, 1.0), atol=1e-5, rtol=1e-5)


def test_padding_rows_of_the_head_get_no_probability_and_no_gradient():
    hidden, head, targets, vocab = inputs()
    head.data[vocab:] = 100.0  # would win every softmax
    ours = token_logprobs(hidden, head, targets, vocab_size=vocab, chunk_mib=0)
    torch.testing.assert_close(ours.double(), naive(hidden, head, targets, vocab, 1.0), atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(ours.sum(), head)[0][vocab:].abs().max() == 0


def test_huge_logits_neither_overflow_nor_vanish():
    hidden, head, targets, vocab = inputs()
    with torch.no_grad():
        ours = token_logprobs(hidden * 1e3, head, targets, vocab_size=vocab, chunk_mib=0)
    torch.testing.assert_close(ours.double(), naive(hidden * 1e3, head, targets, vocab, 1.0), rtol=1e-5, atol=0.1)


def test_no_tokens_give_no_logprobs_and_no_gradient():
    hidden, head, targets, vocab = inputs()
    ours = token_logprobs(hidden[:0], head, targets[:0], vocab_size=vocab)
    assert ours.shape == (0,)
    assert torch.autograd.grad(ours.sum(), head)[0].abs().max() == 0


def test_a_token_that_is_nearly_certain_still_has_a_gradient_in_16_bits(monkeypatch):
    """p - 1 is rounded, not p: 16 bits would round p to 1."""
    monkeypatch.setattr(logprobs, "_factor_dtype", lambda hidden: hidden.dtype)  # as on a GPU
    hidden = torch.tensor([[7.0]], dtype=torch.bfloat16, requires_grad=True)  # logits 7 and 0: 1 - p is 9e-4
    head = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    ours = token_logprobs(hidden, head, torch.tensor([0]), vocab_size=2)
    exact = torch.sigmoid(torch.tensor(-7.0)).item()  # (1 - p) times the difference of the rows, 1
    assert torch.autograd.grad(ours.sum(), hidden)[0].item() == pytest.approx(exact, rel=2**-7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block", [7, 450, 5000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])  # nearly uniform, model-like, nearly certain
def test_entropies_equal_those_of_the_full_softmax(scale, block, temperature, monkeypatch):
    hidden, head, targets, vocab = inputs()
    hidden.data *= scale
    monkeypatch.setattr(logprobs, "MIN_BLOCK", block)
    options = {"vocab_size": vocab, "temperature": temperature, "chunk_mib": 0}
    values, entropies = token_logprobs(hidden, head, targets, **options, entropy=True)
    full = ((hidden.double() @ head.double().T)[:, :vocab] / temperature).log_softmax(-1)
    # an entropy is a difference of logits, which reach 1,000 here; the error of fp32 is 1e-7 of that
    torch.testing.assert_close(
        entropies.double(), -(full.exp() * full).sum(-1), atol=3e-6 * max(10, 30 * scale), rtol=0
    )
    assert torch.equal(values, token_logprobs(hidden, head, targets, **options))


def test_asking_for_entropies_changes_no_gradient():
    hidden, head, targets, vocab = inputs()
    plain = token_logprobs(hidden, head, targets, vocab_size=vocab, chunk_mib=0)
    values, _ = token_logprobs(hidden, head, targets, vocab_size=vocab, chunk_mib=0, entropy=True)
    expected = torch.autograd.grad(plain.square().sum(), (hidden, head))
    got = torch.autograd.grad(values.square().sum(), (hidden, head))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def entropy_loss(values, entropies, kind):
    """Weights of either sign for each token; the first token has none."""
    weigh = torch.linspace(0, 1, len(entropies), dtype=values.dtype)
    return {
        "entropy": (weigh * entropies).sum(),
        "both": (weigh * (entropies.square() - 3 * values)).sum(),
        "one each": (weigh * torch.where(torch.arange(len(values)) % 2 == 0, values, -entropies)).sum(),
    }[kind]


@pytest.mark.parametrize("kind", ["entropy", "both", "one each"])
@pytest.mark.parametrize(("block", "temperature"), [(7, 0.7), (450, 1.0), (5000, 0.7)])
@pytest.mark.parametrize("scale", [0.02, 0.2, 0.8])  # nearly uniform, model-like, nearly certain
def test_gradients_of_entropies_are_those_of_the_full_softmax(kind, scale, block, temperature, monkeypatch):
    hidden, head, targets, vocab = inputs()
    hidden.data *= scale
    monkeypatch.setattr(logprobs, "MIN_BLOCK", block)
    options = {"vocab_size": vocab, "temperature": temperature, "chunk_mib": 0}
    ours = entropy_loss(*token_logprobs(hidden, head, targets, **options, entropy=True), kind)
    full = ((hidden.double() @ head.double().T)[:, :vocab] / temperature).log_softmax(-1)
    theirs = entropy_loss(full.gather(1, targets[:, None]).squeeze(1), -(full.exp() * full).sum(-1), kind)
    got, expected = (torch.autograd.grad(loss, (hidden, head)) for loss in (ours, theirs))
    for a, b in zip(got, expected, strict=True):
        # relative to the largest: a factor log p + entropy is a difference of logits up to 30, in fp32
        torch.testing.assert_close(a, b.float(), atol=2e-5 * float(b.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_entropies_in_16_bits_are_off_by_roundings_only(dtype, monkeypatch):
    """Also with a loss scale, whose product with a probability 16 bits could not hold."""
    monkeypatch.setattr(logprobs, "_factor_dtype", lambda hidden: hidden.dtype)  # as on a GPU
    hidden, head, targets, vocab = inputs(dtype)
    hidden.data *= 0.3
    values, entropies = token_logprobs(hidden, head, targets, vocab_size=vocab, chunk_mib=0, entropy=True)
    full = (hidden.float() @ head.float().T)[:, :vocab].log_softmax(-1)
    chosen, exact = full.gather(1, targets[:, None]).squeeze(1), -(full.exp() * full).sum(-1)
    scale = 2.0**16 if dtype == torch.float16 else 1.0
    got, expected = (
        torch.autograd.grad(scale * (0.01 * h.sum() + v.mean()), hidden)[0].float() / scale
        for v, h in ((values, entropies), (chosen, exact))
    )
    # two roundings of 2^-9 or 2^-12 for each of 900 columns; those of the sum over columns do not grow
    assert (got - expected).norm() < 2e-2 * expected.norm()


def test_a_tied_head_collects_the_gradient_of_both_its_uses():
    _, head, targets, vocab = inputs()
    embedded = torch.nn.functional.embedding(targets.roll(1), head).tanh()
    ours = token_logprobs(embedded, head, targets, vocab_size=vocab, chunk_mib=0)
    theirs = naive(embedded, head, targets, vocab, 1.0)
    got, want = (torch.autograd.grad(t.sum(), head, retain_graph=True)[0] for t in (ours, theirs))
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_8_bits_gives_the_logprobs_and_the_hidden_gradient_of_its_rows(dtype):
    hidden, head, targets, vocab = inputs(dtype)
    rows = Int8Rows(head)
    ours, entropies = token_logprobs(hidden, rows, targets, vocab_size=vocab, chunk_mib=0, entropy=True)
    theirs = naive(hidden, rows[:], targets, vocab, 1.0)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    assert entropies.min() >= 0
    got, want = (torch.autograd.grad(t.sum(), hidden)[0] for t in (ours, theirs))
    torch.testing.assert_close(got, want)  # in bf16 both are rounded from nearly the same value


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Size of the largest tensor that any operator returns, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Sizes of every product of two matrices."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.sizes.append([*args[-2].shape, args[-1].shape[1]])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [100, 300, 600])  # 64 MiB would hold 83,886, 27,962 and 13,981 columns
def test_blocks_of_the_vocabulary_are_as_wide_as_a_matmul_likes_but_for_the_last(tokens):
    hidden, head = torch.randn(tokens, 4), torch.randn(100_000, 4)
    with Products() as products:
        token_logprobs(hidden, head, torch.zeros(tokens, dtype=torch.long), vocab_size=100_000)
    *widths, last = [columns for _, _, columns in products.sizes]
    assert widths and not any(width % 64 for width in widths) and sum(widths) + last == 100_000
    assert max(widths) > 64 * 2**20 / 8 / tokens - 64  # and no narrower than that


def test_no_tensor_of_tokens_by_vocabulary_exists_beyond_one_chunk():
    tokens, width, vocab = 512, 16, 20_000
    hidden, head = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    with LargestTensor() as ours:
        token_logprobs(hidden, head, targets, vocab_size=vocab, chunk_mib=1).sum().backward()
    with LargestTensor() as naive_way:
        (hidden @ head.T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    # 1 MiB holds two fp32 tiles of 131,072 elements; the head and its gradient are 320,000
    assert ours.elements == vocab * width
    assert naive_way.elements == tokens * vocab  # the check itself works: it sees the full tensor of the naive way


def test_the_gradient_of_an_entropy_takes_no_more_memory_than_that_of_a_logprob():
    tokens, width, vocab = 512, 16, 20_000
    hidden, head = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    watches = []
    for weight in (0.0, 0.1):
        with LargestTensor() as watch:
            values, entropies = token_logprobs(hidden, head, targets, vocab_size=vocab, chunk_mib=1, entropy=True)
            (values + weight * entropies if weight else values).sum().backward()
        watches.append(watch.elements)
    assert watches == [vocab * width] * 2
