"""A model loaded to answer questions, outside any engine."""

import torch

from grpo_ds.models.policy import load_policy, load_tokenizer
from grpo_ds.settings.config import AskConfig
from grpo_ds.training.rollout import PromptStyle
from grpo_ds.training.sampling import Sampler


def load_for_asking(config: AskConfig, *, bf16: bool) -> tuple[Sampler, PromptStyle]:
    """The model on the GPU if there is one, and how it is to be asked."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trust = config.trust_remote_code
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = load_policy(config.model, dtype=dtype, checkpointing=False, trust_remote_code=trust)
    model.to(device).eval()  # type: ignore[arg-type]  # transformers hides the signature of .to
    stop = config.answer_format.stop
    sampler = Sampler(model, tokenizer, max_completion_length=config.max_completion_length, stop=stop)
    return sampler, prompt_style(config)


def prompt_style(config: AskConfig) -> PromptStyle:
    """How this config puts questions to the model."""
    return PromptStyle(
        config.answer_format, config.few_shot, config.prefill, config.max_prompt_length, config.system_prompt_text
    )
