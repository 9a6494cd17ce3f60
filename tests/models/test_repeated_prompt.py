"""Decoding with repeated prompts: logits of the last position alone, for prompts of any length."""

import torch

from grpo_ds.models.repeated_prompt import RepeatedPrompts
from tests.models.test_fused_layers import model_of

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


def test_the_head_computes_one_position_a_row_also_of_a_long_prompt():
    model, rows = model_of("qwen2"), []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    decode = RepeatedPrompts(model, PROMPTS, group_size=2)
    lengths = torch.tensor([5, 5, 2, 2])
    logits = decode(torch.tensor([10, 10, 13, 13]), lengths)
    assert rows == [1, 1]  # the prompts but their last tokens, then these
    for row, prompt in zip(logits, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], strict=True):
        torch.testing.assert_close(row, model(torch.tensor([prompt])).logits[0, -1], rtol=1e-4, atol=1e-4)
