"""Prompts to completions: each distinct prompt is prefilled once, its KV cache repeated G times.

Row r draws its t-th token with the t-th number of its own stream, which (seed, r) alone decides: what is sampled
does not depend on how many rows are sampled at once, and no generator has to be saved.

Sampling is from the policy's own distribution at the given temperature and nothing else: no top-k, no
top-p, no penalties, and never an id the tokenizer cannot name. A row ends at EOS or at `stop`.

Q prompts of at most P tokens, G completions each, B = Q * G, C tokens in the longest completion.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

STOP = "</answer>"
SPARE = 3  # tokens looked at beyond the length of `stop`, which is ASCII: a token is at least a byte


@dataclass(frozen=True, slots=True)
class Completions:
    """B completions, padded on the right."""

    ids: Int[Tensor, "B C"]
    mask: Bool[Tensor, "B C"]  # True counts: up to and including the EOS or the last token of `stop`
    ended: Bool[Tensor, " B"]  # by EOS or `stop`, not by the length limit

    def lengths(self) -> Int[Tensor, " B"]:
        return self.mask.sum(dim=1)


class Sampler:
    """Completions from `model`, wherever it lives and however it is wrapped for training."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        stop: str = STOP,
    ) -> None:
        self.model, self.tokenizer, self.stop = model, tokenizer, stop
        self.max_completion_length = max_completion_length
        self.prompts_at_once: int | None = None  # all; fewer take less memory
        self.full_length = False  # no row ends early: for rehearsals and benchmarks
        self.eos_ids = _eos_ids(model, tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.may_close = torch.tensor([stop[-1] in token for token in tokens], device=model.device)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        temperature: float,
        seed: int = 0,
    ) -> Completions:
        """group_size completions for each prompt, a group's rows together; temperature 0 is greedy."""
        draws = _uniforms(seed, len(prompts) * group_size, self.max_completion_length).to(self.model.device)
        was_training = self.model.training
        self.model.eval()  # switches gradient checkpointing off, which the KV cache cannot go with
        try:
            parts = []
            for first in range(0, len(prompts), self.prompts_at_once or len(prompts)):
                some = prompts[first : first + (self.prompts_at_once or len(prompts))]
                its_draws = draws[first * group_size : (first + len(some)) * group_size]
                draw = Draw(its_draws, len(self.tokenizer), temperature, prompt_width=max(map(len, some)))
                parts.append(self._sample(some, group_size, draw))
        finally:
            self.model.train(was_training)
        return _joined(parts, pad_id=self.tokenizer.pad_token_id)

    def _sample(self, prompts: Sequence[Sequence[int]], group_size: int, draw: "Draw") -> Completions:
        ids, attended, cache = self._prefill(prompts)
        cache.batch_repeat_interleave(group_size)
        may_close = self.may_close & (not self.full_length)
        stop = StopAfterAnswer(self.tokenizer, may_close, prompt_width=ids.shape[1], stop=self.stop)
        output = self.model.generate(  # type: ignore[operator]  # its signature is lost in a mixin
            ids.repeat_interleave(group_size, dim=0),
            attention_mask=attended.repeat_interleave(group_size, dim=0),
            past_key_values=cache,
            generation_config=self._settings(),
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        return self._cut(output[:, ids.shape[1] :], stop)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, DynamicCache]:
        """[Q P] ids and mask, padded on the left, and the cache of all but each prompt's last token."""
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        attended = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        cache = DynamicCache(config=self.model.config)
        # generate() takes the last prompt token itself; the head is not needed for the others.
        self.model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=attended[:, :-1],
            position_ids=(attended.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        return ids, attended, cache

    def _settings(self) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,  # Draw leaves one token to take
            max_new_tokens=self.max_completion_length,
            eos_token_id=None if self.full_length else self.eos_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _cut(self, ids: Tensor, stop: "StopAfterAnswer") -> Completions:
        """Mask by where each row ended. Not by `ids != pad`: pad may be EOS, which must be trained."""
        width = ids.shape[1]
        is_eos = torch.isin(ids, torch.tensor(self.eos_ids, device=ids.device))
        at_eos = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1) + 1, width + 1)
        at_stop = stop.length if stop.length is not None else torch.full_like(at_eos, width + 1)
        end = torch.minimum(at_eos, at_stop)
        mask = torch.arange(width, device=ids.device) < end[:, None]
        return Completions(ids.clone(), mask, end <= width)


class Draw(LogitsProcessor):
    """Each row's next token, the only one left with a score: by its own uniform number through the inverse of the
    cumulative distribution, or the most likely one at temperature 0.

    The head's padding rows have no probability (Qwen: 151,936 rows, 151,665 tokens).
    """

    def __init__(self, uniforms: Float[Tensor, "B C"], known: int, temperature: float, *, prompt_width: int) -> None:
        self.uniforms, self.known, self.temperature, self.prompt_width = uniforms, known, temperature, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[:, : self.known].float()
        if self.temperature:
            # In fp64: at 150,000 tokens the rounding of an fp32 sum is as large as the rare tokens' probabilities.
            cumulative = (logits / self.temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
            number = self.uniforms[:, input_ids.shape[1] - self.prompt_width, None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, number, right=True)
        else:
            token = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.clamp_(max=self.known - 1), 0.0)


class StopAfterAnswer(StoppingCriteria):
    """Ends a row at `stop`, however the tokenizer cuts it up.

    Text is looked at only where the newest token holds a ">", which is rare: transformers' own
    stop_strings matches all rows at every step.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        may_close: Bool[Tensor, " V"],
        *,
        prompt_width: int,
        stop: str = STOP,
    ) -> None:
        self.tokenizer, self.may_close, self.prompt_width, self.stop = tokenizer, may_close, prompt_width, stop
        self.length: Int[Tensor, " B"] | None = None  # of each completion when it met `stop`; huge before

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        if self.length is None:
            self.length = torch.full((len(input_ids),), torch.iinfo(torch.long).max, device=input_ids.device)
        width = input_ids.shape[1] - self.prompt_width
        for row in (self.may_close[input_ids[:, -1]] & (self.length > width)).nonzero().flatten().tolist():
            tail = input_ids[row, -min(len(self.stop) + SPARE, width) :]
            if self.stop in self.tokenizer.decode(tail, skip_special_tokens=False):
                self.length[row] = width
        return self.length <= width


def seed_at(seed: int, step: int, rank: int) -> int:
    """Seeds that never meet: neighbouring steps and ranks share no draw, and no state has to be saved."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=4).digest(), "big")


def _uniforms(seed: int, rows: int, columns: int) -> Float[Tensor, "B C"]:
    """Numbers in [0, 1): each row from a stream of its own, the same on every device."""
    streams = []
    for row in range(rows):
        digest = hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        streams.append(torch.rand(columns, generator=generator, dtype=torch.float64))
    return torch.stack(streams)


def _joined(parts: list[Completions], *, pad_id: int) -> Completions:
    """Completions sampled apart, as one batch."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.ids.shape[1] for part in parts)
    ids = torch.cat([F.pad(part.ids, (0, width - part.ids.shape[1]), value=pad_id) for part in parts])
    mask = torch.cat([F.pad(part.mask, (0, width - part.mask.shape[1])) for part in parts])
    return Completions(ids, mask, torch.cat([part.ended for part in parts]))


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn: the tokenizer's and all that the model's generation config names."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({id for id in (*listed, tokenizer.eos_token_id) if id is not None})
