"""A tiny Qwen2 with a byte-level tokenizer: the real classes, small enough for two cores. Needs no pytest."""

from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """Byte-level tokenizer: one token for each byte, ChatML, and a pad token that is not EOS, as in Qwen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(**changes):
    """Qwen2 of two layers, width 64, grouped-query attention, tied head, 13 padding rows in the vocabulary."""
    from transformers import Qwen2Config

    settings = dict(
        vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=256, pad_token_id=257, bos_token_id=None,
    )  # fmt: skip
    return Qwen2Config(**{**settings, **changes})


def save_tiny(folder: Path) -> Path:
    """Save the tiny model and its tokenizer as an ordinary transformers folder; return the folder."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(tiny_config()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


FORM = {"reasoning_tag": "r", "answer_tag": "a", "max_completion_length": 24, "max_prompt_length": 400}


def save_formed(folder: Path, tiny: Path) -> Path:
    """Teach the tiny model to write "<r>so</r><a>yes</a>" with several thoughts and both labels; return its folder.

    FORM has the flags with which its completions are in form.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_ds.settings.config import TrainConfig
    from grpo_ds.task.questions import read_questions
    from grpo_ds.training.prompt_style import prompt_style

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    style = prompt_style(TrainConfig(model=str(tiny), **FORM))
    prompts = style.encode(tokenizer, read_questions("sample").questions[:32])
    optimizer, g = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = []
        for prompt in (prompts[int(i)] for i in torch.randint(32, (4,), generator=g)):
            thought, label = (
                words[int(torch.randint(2, (1,), generator=g))] for words in (("so", "it"), ("yes", "no"))
            )
            end = tokenizer.encode(style.answer_format.write(thought, label) + tokenizer.eos_token)
            batch.append((prompt, end))
        loss = sum(_loss(model, *pair) for pair in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _loss(model, prompt, end):
    import torch
    import torch.nn.functional as F

    logits = model(torch.tensor([[*prompt, *end]])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(end))
