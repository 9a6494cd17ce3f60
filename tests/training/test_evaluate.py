"""An evaluation beside its greedy answers: label probabilities behind reasoning and without it, and sampled answers."""

import json
from dataclasses import replace

import pytest
import torch

from grpo_ds.run_folder.progress import Progress
from grpo_ds.system.ranks import World
from grpo_ds.task.answers import AnswerFormat
from grpo_ds.task.questions import Question
from grpo_ds.training import sampling
from grpo_ds.training.evaluate import evaluate
from grpo_ds.training.label_tokens import label_tokens
from grpo_ds.training.prompt_style import PromptStyle
from grpo_ds.training.sampling import Sampler

STYLE = PromptStyle(AnswerFormat(), few_shot=0, prefill=False, max_prompt_length=600)
QUESTIONS = [
    Question("1", "Did it fall?", "It fell by a half in all of the wards.", "yes"),
    Question("2", "Was it the rain?", "", "no"),
    Question("3", "Is it safe?", "There was no harm.", "yes"),
]
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
IN_FORM = "<reasoning>It fell.</reasoning>\n<answer> no</answer>"


def evaluated(sampler, style=STYLE, questions=QUESTIONS, **options):
    return evaluate(sampler, style, questions, ALONE, **options)


def oracle(model, tokenizer, style, question, text):
    """Probabilities of the labels' first bytes behind prompt and text, by one forward pass."""
    (prompt,) = style.encode(tokenizer, [question])
    ids = torch.tensor([[*prompt, *tokenizer.encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1, list(label_tokens(tokenizer, style.answer_format))]
    return logits.softmax(-1).tolist()


@pytest.fixture
def sampler(tiny_model, tokenizer):
    torch.nn.init.normal_(tiny_model.model.embed_tokens.weight, std=0.3)  # probabilities that differ
    return Sampler(tiny_model, tokenizer, max_completion_length=60)


@pytest.fixture
def says(monkeypatch, tokenizer):
    """Let the model say a text, byte by byte, whatever its logits are."""

    def plant(text):
        bytes_left = iter(tokenizer.encode(text, add_special_tokens=False))
        monkeypatch.setattr(sampling, "draw", lambda logits, *_: torch.full((len(logits),), next(bytes_left)))

    return plant


@pytest.mark.parametrize("prefill", [False, True])
def test_without_form_the_probability_is_that_behind_the_tags_alone(sampler, tiny_model, tokenizer, prefill):
    style = replace(STYLE, prefill=prefill)
    found = evaluated(sampler, style)
    tags = "<reasoning></reasoning><answer>".removeprefix("<reasoning>" * prefill)
    for probs, question in zip(found.probs, QUESTIONS, strict=True):
        assert probs.reasoned is None
        assert probs.answer == pytest.approx(oracle(tiny_model, tokenizer, style, question, tags), abs=1e-5)
    assert len({probs.empty for probs in found.probs}) == 3 and found.confidence.reasoned == 0


@pytest.mark.parametrize(
    ("text", "up_to"),
    [
        (IN_FORM, IN_FORM.removesuffix("no</answer>")),
        ("<reasoning>It fell.</reasoning><answer>perhaps</answer>", "<reasoning>It fell.</reasoning><answer>"),
        ("<reasoning></reasoning><answer>no</answer>", None),  # no words in it
        ("So: <reasoning>It fell.</reasoning><answer>no</answer>", None),
        ("<answer>no</answer>", None),
        ("<reasoning>It fell.</reasoning><answer></answer>", "<reasoning>It fell.</reasoning><answer>"),
    ],
)
def test_a_completion_in_form_up_to_its_answer_has_the_probability_there(
    sampler, tiny_model, tokenizer, says, text, up_to
):
    says(text)
    (probs,) = evaluated(sampler, questions=QUESTIONS[:1]).probs
    if up_to is None:
        assert probs.reasoned is None
    else:
        assert probs.reasoned == pytest.approx(oracle(tiny_model, tokenizer, STYLE, QUESTIONS[0], up_to), abs=1e-5)


def test_misled_it_is_asked_behind_the_claim_of_a_wrong_label(sampler, tiny_model, tokenizer):
    style = replace(STYLE, answer_format=AnswerFormat(("yes", "no", "maybe")))
    found = evaluated(sampler, style, misled=True)
    for probs, question, wrong in zip(found.probs, QUESTIONS, ("no", "maybe", "no"), strict=True):
        text = f"<reasoning>The answer is {wrong}.</reasoning><answer>"
        assert probs.misled == pytest.approx(oracle(tiny_model, tokenizer, style, question, text), abs=1e-5)
        text = "<reasoning></reasoning><answer>"
        assert probs.empty == pytest.approx(oracle(tiny_model, tokenizer, style, question, text), abs=1e-5)
    said = [("yes", "no", "maybe")[max(range(3), key=probs.misled.__getitem__)] for probs in found.probs]
    right = [answer == question.label for answer, question in zip(said, QUESTIONS, strict=True)]
    assert found.confidence.misled_accuracy == pytest.approx(sum(right) / 3)
    assert evaluated(sampler, style).confidence.misled_accuracy is None


def test_the_greedy_answers_are_those_of_sampling_alone(sampler, tokenizer):
    plain = sampler(STYLE.encode(tokenizer, QUESTIONS), group_size=1, temperature=0.0)
    assert evaluated(sampler, samples=3, misled=True).texts == STYLE.texts(tokenizer, plain)
    assert sampler.label_ids == []


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_batches_change_no_probability(sampler, rows):
    sampler.rows_at_once = rows
    everything, alone = evaluated(sampler), [evaluated(sampler, questions=[q]).probs[0] for q in QUESTIONS]
    for one, other in zip(everything.probs, alone, strict=True):
        assert one.empty == pytest.approx(other.empty, abs=1e-5)


def test_labels_that_begin_alike_are_graded_without_probabilities(sampler):
    style = replace(STYLE, answer_format=AnswerFormat(("yes", "yellow")))
    found = evaluated(sampler, style, [replace(question, label="yes") for question in QUESTIONS])
    assert found.probs is None and found.confidence is None and found.grades.count == 3


def test_weights_that_are_not_finite_have_no_probabilities(sampler, tiny_model):
    torch.nn.init.constant_(tiny_model.model.norm.weight, torch.nan)
    assert evaluated(sampler).probs is None


def test_samples_are_drawn_at_temperature_1_and_counted(sampler, says):
    assert len({answer for answers in evaluated(sampler, samples=2).sampled for answer in answers}) == 1  # all None
    says("<reasoning>It fell.</reasoning><answer>no</answer>" * 2)  # the greedy answers, then the sampled ones
    found = evaluated(sampler, samples=3)
    assert found.sampled == [["no"] * 3] * 3 and found.votes.samples == 3
    assert found.votes.vote_accuracy == pytest.approx(1 / 3)


def test_two_ranks_return_the_evaluation_of_one(sampler):
    """Rank 1's share is computed first; gather puts it beside rank 0's."""

    class Both(World):
        def gather(self, value):
            return [value, second] if self.rank == 0 else [value]

    shares = []
    keep = lambda phase, work: shares.append(work()) or shares[-1]  # noqa: E731
    with pytest.raises(IndexError):  # rank 1 alone cannot put all together
        evaluate(sampler, STYLE, QUESTIONS, Both(rank=1, size=2, device=torch.device("cpu")), run=keep)
    (second,) = shares
    both = evaluate(sampler, STYLE, QUESTIONS, Both(rank=0, size=2, device=torch.device("cpu")))
    one = evaluated(sampler)
    assert both.texts == one.texts and len(second) == 1
    for mine, theirs in zip(both.probs, one.probs, strict=True):
        assert mine.empty == pytest.approx(theirs.empty, abs=1e-5)


def test_a_checkpoint_keeps_all_that_was_known_before(sampler, tmp_path):
    before = evaluated(sampler, samples=2, misled=True)
    progress = Progress(max_steps=9)
    progress.keep_before(QUESTIONS, before)
    progress.write(tmp_path)
    again = Progress.read(tmp_path)
    assert again.evaluation_before(again.answered_before(QUESTIONS), STYLE.answer_format) == before
    fewer = QUESTIONS[2:0:-1]
    found = again.evaluation_before(again.answered_before(fewer), STYLE.answer_format)
    assert found == before.of([2, 1], QUESTIONS, STYLE.answer_format)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["grpo_ds"]["before_more"]  # an older version
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    older = Progress.read(tmp_path).evaluation_before(again.answered_before(QUESTIONS), STYLE.answer_format)
    assert older.texts == before.texts and older.probs is None and older.sampled is None
