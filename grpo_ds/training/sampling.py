"""Prompts to completions: each distinct prompt is prefilled once and shared by its G completions.

Row r draws its t-th token with the t-th number of its own random stream, which depends on (seed, r) alone. So the
samples do not depend on the batch size or on rows that have left the batch, and there is no state to save.

Samples come from the policy's own distribution at the given temperature: no top-k, no top-p, no penalties, and never
an id that the tokenizer does not know. A row ends at EOS or at `stop`.

transformers' generate() is not used: it cannot keep a prompt once for its group, remove finished rows from the batch,
or give each row its own stream. benchmarks/step.py compares the two.

Q prompts of at most P tokens, G completions each, B = Q * G, C tokens in the longest completion.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_ds.models.attention import sliding_window
from grpo_ds.models.fused_layers import can_capture, can_fuse
from grpo_ds.models.native_layers import NativeWeights, can_decode_natively
from grpo_ds.models.packed_linear import packed_linears
from grpo_ds.models.repeated_prompt import RepeatedPrompts
from grpo_ds.models.shared_prompt import SharedPrompts, can_share_prompts
from grpo_ds.training.draws import draw, uniforms

Prompts = Sequence[Sequence[int]]  # token ids
Decoder = SharedPrompts | RepeatedPrompts

STOP = "</answer>"
SPARE = 3  # tokens decoded beyond the length of `stop`, which is ASCII: a token has at least one byte
SHRINK = 0.75  # share of rows left at which a batch is made smaller, which copies the cache of these rows
SHRINK_GRAPH = 0.5  # the same with CUDA graphs, where it also captures a new one
LOOK = 8  # tokens between two looks at ended rows, on a card: each look waits for the card


@dataclass(frozen=True, slots=True)
class Completions:
    """B completions, padded on the right.

    Example: two completions, one cut at max_completion_length 3, one ended by EOS (id 2)
        ids    [[11, 12, 13], [14, 2, 0]]
        mask   [[True, True, True], [True, True, False]]
        ended  [False, True]
    """

    ids: Int[Tensor, "B C"]
    mask: Bool[Tensor, "B C"]  # True: the token counts; up to and including EOS or the end of `stop`
    ended: Bool[Tensor, " B"]  # by EOS or `stop`; False: cut at the length limit
    label_logprobs: Float[Tensor, "B C n"] | None = None  # of n label tokens instead of this one, among themselves
    forced_logprobs: Float[Tensor, "B F n"] | None = None  # the same behind each of F forced beginnings

    def lengths(self) -> Int[Tensor, " B"]:
        """Tokens of each completion."""
        return self.mask.sum(dim=1)


@dataclass(slots=True)
class PartialCompletion:
    """A completion while it is sampled."""

    ids: list[int] = field(default_factory=list)
    ended: bool = False
    label_logprobs: list[list[float]] = field(default_factory=list)
    forced_logprobs: list[list[float]] = field(default_factory=list)


class Sampler:
    """Samples completions from `model`, on any device, while an engine may train it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        stop: str = STOP,
        label_ids: Sequence[int] = (),
        cuda_graphs: bool = True,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        """max_completion_length: tokens. stop: text that ends a completion; "": none.

        poll: called before every token; may raise.
        label_ids: tokens whose log-probs are recorded at every token.
        cuda_graphs: on a GPU, launch all kernels of a token at once, if the model is of a kind known to work so.
        """
        self.model, self.tokenizer, self.stop = model, tokenizer, stop
        self.max_completion_length, self.label_ids = max_completion_length, list(label_ids)
        self.cuda_graphs, self.poll = cuda_graphs, poll
        self.rows_at_once: int | None = None  # None: all; a smaller number takes less memory
        self.shares: bool | None = None  # keeps a prompt once for its group; None: not known before the first call
        self.fused = False  # decodes with few kernels a layer
        self.one_call: bool | None = None  # computes a token in one call, on a CPU; None: not known yet
        self.native: NativeWeights | None = None  # packed for that, while it samples
        self.full_length = False  # True: no row ends early, for rehearsals and benchmarks
        self.eos_ids = _eos_ids(model, tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.may_close = {id for id, token in enumerate(tokens) if stop and stop[-1] in token}

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        temperature: float,
        seed: int = 0,
        forced: Sequence[Sequence[int]] = (),
        advance: Callable[[int, int], None] = lambda done, tokens: None,
    ) -> Completions:
        """Return group_size completions for each prompt, the rows of a group side by side; temperature 0 is greedy.

        forced: F token sequences; behind each of them label log-probs are recorded too.
        advance: called after every token with the numbers of completions that ended and of tokens drawn by it.
        """
        draws = uniforms(seed, len(prompts) * group_size, self.max_completion_length).to(self.model.device)
        draws = draws.view(len(prompts), group_size, -1)
        at_once = max(1, (self.rows_at_once or len(prompts) * group_size) // group_size)
        by_length = sorted(range(len(prompts)), key=lambda q: -len(prompts[q]))  # little padding, the largest first
        groups: dict[int, list[PartialCompletion]] = {}
        with self._ready():
            for some in (by_length[first : first + at_once] for first in range(0, len(prompts), at_once)):
                drawn = draws[some].flatten(0, 1)
                rows = self._sample([prompts[q] for q in some], group_size, drawn, temperature, forced, advance)
                groups |= {q: rows[i * group_size : (i + 1) * group_size] for i, q in enumerate(some)}
        return self.pad_rows([row for q in range(len(prompts)) for row in groups[q]])

    @contextmanager
    def to_full_length(self) -> Iterator[None]:
        """Let no row end early, for the worst case of a step."""
        self.full_length = True
        try:
            yield
        finally:
            self.full_length = False

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Put the model in evaluation mode, which turns gradient checkpointing off: it does not work with a cache."""
        was_training = self.model.training
        self.model.eval()
        try:
            if self._in_one_call():
                self.native = NativeWeights(self.model)
                yield
            else:
                with packed_linears(self.model):
                    yield
        finally:
            self.native = None
            self.model.train(was_training)

    def _sample(
        self,
        prompts: Prompts,
        group_size: int,
        draws: Float[Tensor, "B C"],
        temperature: float,
        forced: Prompts,
        advance: Callable[[int, int], None],
    ) -> list[PartialCompletion]:
        """Sample the completions of one batch of prompts."""
        rows = batch = [PartialCompletion() for _ in draws]  # rows that have ended leave the batch
        tokens = torch.tensor([prompt[-1] for prompt in prompts], device=draws.device).repeat_interleave(group_size)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=draws.device).repeat_interleave(group_size)
        longest = max([self.max_completion_length, *(len(ids) + 1 for ids in forced)])
        decode, look = self._decoder(prompts, group_size, longest), LOOK if on_card(self.model) else 1
        for ids in forced:
            logits = self._follow(decode, tokens, lengths, ids)
            for row, logprobs in zip(rows, self._label_logprobs(logits, temperature).tolist(), strict=True):
                row.forced_logprobs.append(logprobs)
        shrink = SHRINK_GRAPH if self._graphs() else SHRINK
        for first in range(0, self.max_completion_length, look):
            block, labels = [], []
            for t in range(first, min(first + look, self.max_completion_length)):
                self.poll()
                logits = decode(tokens, lengths - 1 + t)
                tokens = draw(logits[:, : len(self.tokenizer)], draws[:, t], temperature)
                block.append(tokens)
                labels.append(self._label_logprobs(logits, temperature))
            # One transfer for both, as each waits for the card; fp64 holds an id exactly.
            drawn = torch.cat([torch.stack(block)[..., None].double(), torch.stack(labels).double()], dim=-1)
            for numbers in drawn.tolist():  # [rows, 1 + n]
                advance(*self._append(batch, numbers))
            if all(row.ended for row in batch):
                break
            stay, width = unfinished([row.ended for row in batch], decode.group_size)
            if len(stay) <= shrink * len(batch):
                batch, chosen = [batch[b] for b in stay], torch.tensor(stay, device=draws.device)
                decode.keep(chosen, group_size=width)
                tokens, lengths, draws = tokens[chosen], lengths[chosen], draws[chosen]
        advance(sum(not row.ended for row in rows), 0)  # cut at the length limit
        return rows

    def _follow(self, decode: Decoder, last: Tensor, lengths: Tensor, ids: Sequence[int]) -> Float[Tensor, "B V"]:
        """Return the logits behind prompt and `ids`, and forget these; last: the last token of each prompt."""
        for t, tokens in enumerate([last, *(torch.full_like(last, id) for id in ids)]):
            self.poll()
            logits = decode(tokens, lengths - 1 + t)
        decode.restart()
        return logits

    def _label_logprobs(self, logits: Tensor, temperature: float) -> Float[Tensor, "B n"]:
        return (logits[:, self.label_ids].float() / (temperature or 1.0)).log_softmax(dim=-1)

    def _append(self, batch: Sequence[PartialCompletion], numbers: Sequence[list[float]]) -> tuple[int, int]:
        """Add a token to each row that has not ended; the others were decoded on in vain.

        numbers: for each row the token's id and the labels' log-probs.
        Returns the number of rows that it ended, and of tokens added.
        """
        going = [(row, of) for row, of in zip(batch, numbers, strict=True) if not row.ended]
        for row, (token, *label_logprobs) in going:
            row.ids.append(int(token))
            row.label_logprobs.append(label_logprobs)
            row.ended = self._ends(row.ids)
        return sum(row.ended for row, _ in going), len(going)

    def _decoder(self, prompts: Sequence[Sequence[int]], group_size: int, columns: int) -> Decoder:
        """Prefill these prompts; return the function that decodes up to `columns` tokens after them."""
        if self.shares is None:
            self.shares = can_share_prompts(self.model)
            self.fused = on_card(self.model) and can_fuse(self.model) and can_share_prompts(self.model, fused=True)
        if not self.shares or max(map(len, prompts)) + columns > sliding_window(self.model.config):
            return RepeatedPrompts(self.model, prompts, group_size=group_size)
        options = {"fused": self.fused, "cuda_graphs": self._graphs()}
        return SharedPrompts(self.model, prompts, group_size=group_size, columns=columns, native=self.native, **options)

    def _in_one_call(self) -> bool:
        if self.one_call is None:
            self.one_call = can_decode_natively(self.model)
            self.one_call = self.one_call and can_share_prompts(self.model, native=NativeWeights(self.model))
        return self.one_call

    def _graphs(self) -> bool:
        return self.cuda_graphs and on_card(self.model) and can_capture(self.model)

    def _ends(self, ids: list[int]) -> bool:
        """Return True if the newest token of a completion ends it.

        Text is decoded only if that token contains a ">", which is rare; transformers' stop_strings checks all
        rows at every step.
        """
        if self.full_length:
            return False
        if ids[-1] in self.eos_ids or ids[-1] not in self.may_close:
            return ids[-1] in self.eos_ids
        return self.stop in self.tokenizer.decode(ids[-len(self.stop) - SPARE :], skip_special_tokens=False)

    def pad_rows(self, rows: list[PartialCompletion]) -> Completions:
        """Pad rows to one batch. The mask comes from each row's length, not from `ids != pad`: pad may be EOS, which
        must be trained."""
        device, width = self.model.device, max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id
        return Completions(
            torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows], device=device),
            torch.tensor([[t < len(row.ids) for t in range(width)] for row in rows], device=device),
            torch.tensor([row.ended for row in rows], device=device),
            self._pad_label_logprobs(rows, width) if self.label_ids else None,
            torch.tensor([row.forced_logprobs for row in rows], device=device) if rows[0].forced_logprobs else None,
        )

    def _pad_label_logprobs(self, rows: Sequence[PartialCompletion], width: int) -> Float[Tensor, "B C n"]:
        spare = [0.0] * len(self.label_ids)
        padded = [row.label_logprobs + [spare] * (width - len(row.ids)) for row in rows]
        return torch.tensor(padded, device=self.model.device)


def on_card(model: PreTrainedModel) -> bool:
    """Return True where launching kernels and waiting for them takes time: on a GPU."""
    return model.device.type == "cuda"


def unfinished(ended: Sequence[bool], group_size: int) -> tuple[list[int], int]:
    """Return the rows to continue and the new group size: all groups keep one size, finished groups leave.

    A group with fewer unfinished rows than another keeps finished rows to match it.
    """
    firsts = range(0, len(ended), group_size)
    groups = [sorted(range(first, first + group_size), key=lambda b: ended[b]) for first in firsts]
    groups = [group for group in groups if not ended[group[0]]]
    width = max(sum(not ended[b] for b in group) for group in groups)
    return [b for group in groups for b in group[:width]], width


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a turn: the tokenizer's EOS and the EOS ids of the model's generation config."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({id for id in (*listed, tokenizer.eos_token_id) if id is not None})
