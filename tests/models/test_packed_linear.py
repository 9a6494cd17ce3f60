"""Linear layers with packed weights: the same products, and unchanged layers afterwards."""

import pytest
import torch

from grpo_ds.models.packed_linear import packed_linears


@pytest.mark.parametrize("rows", [1, 8, 33])
def test_packed_layers_compute_what_the_layers_do(tiny_model, rows):
    ids = torch.arange(rows)[:, None]
    with torch.no_grad():
        plain = tiny_model(ids).logits
        with packed_linears(tiny_model):
            assert any("forward" in vars(module) for module in tiny_model.modules())
            packed = tiny_model(ids).logits
        after = tiny_model(ids).logits
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(after, plain) and not any("forward" in vars(module) for module in tiny_model.modules())


def test_layers_come_back_after_an_error_and_biases_count():
    layer = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="midway"), packed_linears(layer), torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
        raise RuntimeError("midway")
    assert "forward" not in vars(layer)


def test_16_bit_layers_are_left_alone(tiny_model):
    with packed_linears(tiny_model.bfloat16()):
        assert not any("forward" in vars(module) for module in tiny_model.modules())
