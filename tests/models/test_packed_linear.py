"""Linear layers with packed weights: the same products, and unchanged layers afterwards."""

import pytest
import torch

from grpo_ds.models.packed_linear import packed_linears


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows", [1, 8, 33])
def test_packed_layers_compute_what_the_layers_do(tiny_model, rows, dtype, tolerance):
    """bf16 rounds every layer's output: 0.004 of it, and a sum in another order may round to the other side."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported() and dtype == torch.bfloat16:
        pytest.skip("this processor has no bf16")
    ids, tiny_model = torch.arange(rows)[:, None], tiny_model.to(dtype)
    with torch.no_grad():
        plain = tiny_model(ids).logits
        with packed_linears(tiny_model):
            assert any("forward" in vars(module) for module in tiny_model.modules())
            packed = tiny_model(ids).logits
        after = tiny_model(ids).logits
    assert (packed - plain).norm() <= tolerance * plain.norm()
    assert torch.equal(after, plain) and not any("forward" in vars(module) for module in tiny_model.modules())


def test_layers_come_back_after_an_error_and_biases_count():
    layer = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="midway"), packed_linears(layer), torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
        raise RuntimeError("midway")
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_layers_are_left_alone_where_the_processor_does_not_compute_in_them(tiny_model, dtype, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with packed_linears(tiny_model.to(dtype)):
        assert not any("forward" in vars(module) for module in tiny_model.modules())
