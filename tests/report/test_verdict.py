"""The verdict as a pure function: headline and words for each outcome, what old runs lack, and the next command.

tests/training/test_verdict.py has a real run for every cause.
"""

import re
import shlex
from pathlib import Path

import pytest

from grpo_ds.commands.settle import settle
from grpo_ds.models.presets import PRESETS
from grpo_ds.report.evidence import Evidence
from grpo_ds.report.lean import Lean
from grpo_ds.report.remedies import more_steps, pull
from grpo_ds.report.verdict import EASY, FORM, FORM_ONLY, NOTHING, PAID, PART, RIGHT, TASK, WORSE, judge
from grpo_ds.settings.config import TrainConfig
from grpo_ds.settings.saved_config import write_config
from tests.conftest import check_example


def grades(formed: float, accuracy: float, *, answers=(50, 50), **more):
    half = 0.1  # of the interval, with 100 questions at a half
    return {
        "count": 100, "well_formed": formed, "accuracy": accuracy, "majority_baseline": 0.5, "macro_f1": 0.5,
        "accuracy_interval": [accuracy - half, accuracy + half], "collapsed": False,
        "predicted": dict(zip(("yes", "no"), answers, strict=True)), **more,
    }  # fmt: skip


def known(before, after, *, steps=(), config=None, summary=None, **outcome) -> Evidence:
    return Evidence(steps, {"before": before, "after": after, **outcome}, config or {}, summary or {})


RISES = dict(p_right_change=0.06, p_right_p_value=0.01)
OUTCOMES = [  # (form, accuracy) before and after, tests, headline
    ((1.0, 0.5), (1.0, 0.7), dict(mcnemar=0.001), TASK),
    ((0.2, 0.1), (1.0, 0.7), dict(mcnemar=0.001), TASK),
    ((0.2, 0.1), (1.0, 0.5), dict(mcnemar=0.001), FORM),  # right answers came with the form; a coin has as many
    ((0.2, 0.1), (0.9, 0.4), dict(mcnemar=0.001), FORM),
    ((0.2, 0.1), (0.9, 0.4), {}, FORM),  # an older run, without a test
    ((1.0, 0.5), (1.0, 0.55), dict(mcnemar=0.3), NOTHING),
    ((1.0, 0.95), (1.0, 0.97), dict(mcnemar=0.6), EASY),
    ((1.0, 0.5), (1.0, 0.7), dict(mcnemar=0.3), NOTHING),  # chance, whatever the difference
    ((0.6, 0.3), (0.65, 0.35), dict(mcnemar=0.5), NOTHING),  # 65 % is inside 60 %'s interval
    ((1.0, 0.6), (1.0, 0.4), dict(mcnemar=0.01), WORSE),
    ((0.2, 0.1), (1.0, 0.5), dict(mcnemar=0.001, p_right_change=-0.1, p_right_p_value=0.001), FORM_ONLY),
    ((1.0, 0.5), (0.5, 0.45), dict(mcnemar=0.3), WORSE),  # the form was lost
    ((1.0, 0.5), (1.0, 0.55), dict(mcnemar=0.3, **RISES), PART),  # p(right) shows what 0 or 1 hides
    ((1.0, 0.5), (1.0, 0.7), dict(mcnemar=0.001, **RISES), TASK),
    ((1.0, 0.75), (1.0, 0.7), dict(mcnemar=0.3, **RISES), PART),  # above the majority, but no more right than before
    ((1.0, 0.5), (1.0, 0.5), dict(mcnemar=1.0, p_right_change=-0.1, p_right_p_value=0.001), WORSE),
    ((1.0, 0.5), (1.0, 0.5), dict(mcnemar=1.0, p_right_change=0.01, p_right_p_value=0.4), NOTHING),
]


@pytest.mark.parametrize(("before", "after", "tests", "headline"), OUTCOMES)
def test_the_headline_says_what_was_learned(before, after, tests, headline):
    found = judge(known(grades(*before), grades(*after), **tests))
    assert found.headline == headline and len(found.aspects) == 4
    assert [aspect.partition(":")[0] for aspect in found.aspects] == ["Form", "Accuracy", "Lean", "Reasoning"]


def right(accuracy, well_formed=1.0):
    interval = [accuracy - 0.1, accuracy + 0.1]
    return {"count": 100, "accuracy": accuracy, "accuracy_interval": interval, "well_formed": well_formed}


def paid(reward):
    return {"count": 100, "mean_reward": reward, "mean_reward_interval": [0, 1], "mean_rewards": {"brief": reward}}


OF_OTHER_ANSWERS = [  # kind, before, after, tests, headline
    ("number", right(0.1), right(0.3), {"mcnemar": 0.001}, RIGHT),  # no majority has to be beaten
    ("text", right(0.1, 0.2), right(0.3), {"mcnemar": 0.001}, RIGHT),
    ("number", right(0.1, 0.2), right(0.15), {"mcnemar": 0.4}, FORM),
    ("number", right(0.3), right(0.1), {"mcnemar": 0.001}, WORSE),
    ("text", right(0.95), right(0.97), {"mcnemar": 0.6}, EASY),
    ("none", paid(0.1), paid(0.4), {"reward_change": 0.3, "reward_p_value": 0.001}, PAID),
    ("none", paid(0.4), paid(0.1), {"reward_change": -0.3, "reward_p_value": 0.001}, WORSE),
    ("none", paid(0.1), paid(0.4), {"reward_change": 0.3, "reward_p_value": 0.2}, NOTHING),
    ("none", paid(0.1), paid(0.1), {}, NOTHING),
]


@pytest.mark.parametrize(("kind", "before", "after", "tests", "headline"), OF_OTHER_ANSWERS)
def test_other_answers_than_labels_are_judged_by_what_fits_them(kind, before, after, tests, headline):
    pay = "rewards/brief/mean" if kind == "none" else "rewards/correctness/mean"
    steps = [{"reward": 0.1, pay: 0.1, "completions/mean_length": 9.0, "frac_reward_zero_std": 1.0}] * 4
    summary = {"parameters": 135_000_000}
    found = judge(known(before, after, steps=steps, config={"answers": kind}, summary=summary, **tests))
    assert found.headline == headline
    names = [aspect.partition(":")[0] for aspect in found.aspects]
    assert names == (["Reward", "Length"] if kind == "none" else ["Form", "Accuracy", "Reasoning"])
    said = " ".join([*found.aspects, *map(str, found.causes), found.outlook, *found.changes])
    assert not any(word in said for word in ("label", "coin", "expected", "correctness"))
    so_far = judge(known(before, {}, config={"answers": kind})).headline
    assert ("mean reward of 100" in so_far) == (kind == "none") and "majority" not in so_far


def test_a_run_that_learned_the_task_has_no_causes_though_its_groups_agree_by_now():
    steps = [{"frac_reward_zero_std": 1.0, "reward": 2.4, "entropy": 0.001, "accuracy": 0.8}]
    learned = judge(known(grades(1.0, 0.5), grades(1.0, 0.8), steps=steps, mcnemar=0.001))
    assert learned.causes == () and learned.note == ""
    same = judge(known(grades(1.0, 0.5), grades(1.0, 0.5), steps=steps, mcnemar=1.0))
    assert [cause.name for cause in same.causes] == ["entropy gone"]  # and so all rewards are equal


def test_what_was_measured_of_p_right_lean_and_reasoning_is_said_and_old_runs_lack_it():
    old = judge(known(grades(1.0, 0.5), grades(1.0, 0.5), mcnemar=1.0))
    assert "p(right)" not in " ".join(old.aspects)
    more = dict(
        mean_p_right=0.6, lean={"yes": 0.9, "no": 0.1}, class_shares={"yes": 0.5, "no": 0.5}, reasoning_gain=0.03
    )
    said = judge(known(grades(1.0, 0.5, mean_p_right=0.5), grades(1.0, 0.5, **more), mcnemar=1.0, **RISES)).aspects
    assert "Mean p(right): 0.500, then 0.600 (paired test p = 0.010)" in said[1]
    assert "To “yes”: mean probability 90%, right for 50% of the questions (answers given: yes 50, no 50)" in said[2]


@pytest.mark.parametrize(("answers", "leans"), [((74, 26), False), ((75, 25), True), ((25, 75), True)])
def test_a_lean_is_a_quarter_more_of_the_answers_than_of_the_questions(answers, leans):
    shares = {"yes": 0.5, "no": 0.5}
    after = grades(1.0, 0.5, answers=answers, class_shares=shares)
    assert ("Lean: To" in judge(known(grades(1.0, 0.5), after, mcnemar=1.0)).aspects[2]) is leans


@pytest.mark.parametrize(("interval", "knows"), [((0.5, 0.9), False), ((0.51, 0.9), True)])
def test_a_lean_that_hides_knowledge_is_said_to(interval, knows):
    lean = dict(lean={"yes": 0.9, "no": 0.1}, class_shares={"yes": 0.5, "no": 0.5}, auc=0.7, auc_interval=interval)
    said = judge(known(grades(1.0, 0.5), grades(1.0, 0.5, **lean), mcnemar=1.0)).aspects[2]
    assert ("It hides what the model knows" in said and "in 70% of all pairs" in said) is knows


def answered(text: str, answer: str | None = "yes"):
    return {"text": text, "answer": answer}


def test_reasoning_that_shrank_is_counted_in_words_and_explained():
    long, short = "<reasoning>{}</reasoning><answer>yes</answer>".format("word " * 12), "<reasoning>Yes</reasoning>"
    rows = [{"label": "yes", "before": answered(long), "after": answered(short)}] * 3
    rows.append({"label": "no", "before": answered("no tags at all", None), "after": answered(short)})
    said = judge(known(grades(1.0, 0.5), grades(1.0, 0.5), questions=rows)).aspects[3]
    assert said.startswith("Reasoning: 1 word per answer, 12 before; it shrank")
    assert "--reward_funcs correctness,format,bare_label;" in said
    (accepted,) = re.findall(r"--reward_funcs [\w,]+", said)
    assert settle(["--model", "smollm2-135m", *accepted.split()]).config.reward_funcs.endswith("bare_label")


def test_a_run_that_has_not_ended_says_what_is_known_so_far():
    steps = [{"reward": reward} for reward in (0.0, 0.5, 0.5, 1.0)]
    begun = judge(Evidence(steps, {"before": grades(0.5, 0.25)}, {}, {}))
    assert "25.0% of 100 held-out questions were answered right" in begun.headline and begun.aspects == ()
    assert "0.00 in the first quarter of the steps and 1.00 in the last" in begun.headline
    assert judge(Evidence([], {}, {}, {})).headline == "No held-out answers were compared."


SIZES = [("smollm2-135m", "135M", "form"), ("qwen2.5-0.5b", "494M", "chance"), ("qwen2.5-1.5b", "1.5B", "lean")]


@pytest.mark.parametrize(("model", "size", "expected"), SIZES)
def test_it_says_what_a_model_of_this_size_can_learn(model, size, expected):
    by_name = judge(known(grades(1, 0.5), grades(1, 0.5), config={"model": model})).outlook
    assert size in by_name and expected in by_name
    own = {"parameters": PRESETS[model].parameters}
    assert judge(known(grades(1, 0.5), grades(1, 0.5), config={"model": "mine"}, summary=own)).outlook == by_name
    assert judge(known(grades(1, 0.5), grades(1, 0.5), config={"model": "mine"})).outlook == ""


def test_the_command_that_learns_more_repeats_the_run_with_the_flags_that_help(tmp_path: Path):
    config = TrainConfig(model="smollm2-135m", num_steps=14, learning_rate=5e-6, few_shot=1, balance_classes=False)
    write_config(config, tmp_path)
    steps = [{"kl": 0.004, "kl_floor": 0.004, "completions/clipped_ratio": 0.5, "rewards/format/mean": 0.1}] * 14
    found = judge(
        known(grades(0.6, 0.3), grades(0.6, 0.3), steps=steps, config={"num_steps": 14, "learning_rate": 5e-6})
    )
    assert [cause.name for cause in found.causes] == ["completions cut", "KL at its floor"]
    typed = found.command("grpo-ds train", shlex.quote(str(tmp_path)))
    assert (
        typed.startswith("grpo-ds train --config ")
        and typed == found.lines("grpo-ds train", str(tmp_path))[-1].partition(": ")[2]
    )
    again = settle(shlex.split(typed)[2:]).config
    assert (again.num_steps, again.max_completion_length, again.learning_rate) == (60, 600, 5e-6)
    assert again.few_shot == 1 and not again.balance_classes  # all else as it was


@pytest.mark.parametrize(("steps", "longer"), [(3, 60), (14, 60), (40, 160), (100, 200), (1000, 2000)])
def test_a_longer_run_is_long_enough_for_the_form_and_not_endless(steps, longer):
    assert more_steps(Evidence([], {}, {"num_steps": steps}, {})) == longer


def test_quarters_are_means_of_a_quarter_of_the_steps():
    def quarters(*values):
        return Evidence([{"kl": value} for value in values], {}, {}, {}).quarters("kl")

    assert quarters(1, 2, 3, 4) == [1, 2, 3, 4] and quarters(1, 3) == [1, 3] and quarters() == []
    assert quarters(1, 1, 2, 2, 3, 3, 4, 4, 8) == [1, 2, 3, (4 + 4 + 8) / 3]
    assert quarters(1, None, "x", float("nan"), 2) == [1, 2]  # numbers only


@pytest.mark.parametrize("config", [{}, {"beta": "x", "num_steps": None, "labels": 3, "temperature": True}])
def test_settings_that_are_missing_or_damaged_count_as_defaults(config):
    there = Evidence([], {}, config, {})
    assert (there.setting("beta"), there.setting("num_steps"), there.setting("labels")) == (0.04, 100, "yes,no")
    assert there.setting("temperature") == 1.0


@pytest.mark.parametrize("documented", [Evidence, Lean, pull])
def test_the_examples_are_right(documented):
    check_example(documented)


def test_the_next_run_grades_enough_questions_and_needs_data_that_a_command_can_name():
    def changes(**config):
        return judge(known(grades(0.6, 0.3), grades(0.6, 0.3), config=config)).changes

    assert "--eval_limit 20" in changes(eval_limit=4) and changes(eval_limit=4)[0].startswith("--num_steps")
    assert not any("eval_limit" in it for it in (*changes(eval_limit=20), *changes()))
    assert changes(data="records from Python") == ()


def lasting(count: int, **metrics):
    """Metrics of so many steps; a list: its first value in the first half, its last one in the other."""
    halves = [
        {name: value if not isinstance(value, list) else value[half] for name, value in metrics.items()}
        for half in (0, 1)
    ]
    return [*halves[:1] * (count // 2), *halves[1:] * (count - count // 2)]


KEPT, LOST = (grades(1.0, 0.5), grades(1.0, 0.5)), (grades(1.0, 0.5), grades(0.1, 0.1))
UNFORMED = (grades(0.0, 0.0), grades(0.0, 0.0))
LEANS = (grades(1.0, 0.5), grades(1.0, 0.5, lean={"yes": 0.2, "no": 0.8}, class_shares={"yes": 0.5, "no": 0.5}))
STILL, MOVED = dict(kl=0.0037, kl_floor=0.0056), dict(kl=[0.006, 0.2], kl_floor=0.0056)
DROPS = dict(well_formed=[0.5, 0.06])
RECIPE = dict(model="smollm2-135m", learning_rate=1.5e-5, mu=2)
MADE = {  # held-out answers, metrics of the steps, the causes that are named
    "samples of other questions": (KEPT, lasting(3, **STILL, **DROPS, weights_moved=0.01), []),
    "the same in more steps": (KEPT, lasting(22, **MOVED, **DROPS), []),
    "a KL at its floor": (LOST, lasting(22, **STILL, **DROPS), ["KL at its floor"]),
    "form lost": (LOST, lasting(22, **MOVED, **DROPS), ["policy broke down"]),
    "form lost in few steps": (LOST, lasting(3, **MOVED, **DROPS), ["policy broke down"]),
    "form never greedy": (UNFORMED, lasting(22, **MOVED, **DROPS), ["policy broke down"]),
    "few, never greedy": (UNFORMED, lasting(3, **MOVED, **DROPS), []),
    "form lost, few weights moved": (
        LOST, lasting(22, **MOVED, **DROPS, weights_moved=0.01), ["policy broke down", "weights stand still"]
    ),
    "still, but leaning": (
        LEANS, lasting(22, **STILL, weights_moved=0.01), ["weights stand still", "lean to one label"]
    ),
    "leaning": (LEANS, lasting(22, **MOVED, weights_moved=0.5), ["lean to one label"]),
    "leaning after few steps": (LEANS, lasting(3, **STILL, weights_moved=0.01), ["lean to one label"]),
    "still, without entropy": (KEPT, lasting(22, **STILL, entropy=0.001), ["KL at its floor", "entropy gone"]),
    "still, but clipped": (
        KEPT, lasting(22, **STILL, **{"clip_ratio/region_mean": 0.1}), ["KL at its floor", "ratio clipped"]
    ),
    "ran away": (LOST, lasting(22, kl=3.0, kl_floor=0.0, weights_moved=0.01), ["KL ran away", "weights stand still"]),
    "failing rewards": (
        KEPT, lasting(22, reward_errors=1, reward=0.0, frac_reward_zero_std=1.0, weights_moved=0.01), ["rewards failed"]
    ),
    "failing at times": (
        KEPT, [{"reward_errors": 2}, *lasting(21, reward_errors=0, reward=0.0, frac_reward_zero_std=1.0)],
        ["rewards all 0", "rewards failed at times"],
    ),
}  # fmt: skip


@pytest.fixture(params=list(MADE))
def made(request):
    (before, after), steps, causes = MADE[request.param]
    return known(before, after, steps=steps, config=RECIPE), causes


def test_the_causes_are_those_that_the_numbers_bear_out(made):
    there, causes = made
    assert [cause.name for cause in judge(there).causes] == causes


def raised_and_lowered(there: Evidence) -> list[str]:
    """Names of flags that a verdict and its command advise both to raise and to lower."""
    found, ways = judge(there), {"raised": set(), "lowered": set()}
    for flag in [*(flag for cause in found.causes for flag in cause.flags), *found.changes]:
        if number := re.fullmatch(r"--(\w+) (\d\S*)", flag):
            name, value = number.groups()
            ways["raised" if float(value) > there.setting(name) else "lowered"].add(name)
    return sorted(ways["raised"] & ways["lowered"])


def test_no_verdict_advises_both_to_raise_and_to_lower_a_flag(made):
    assert raised_and_lowered(made[0]) == []


def test_sgd_moves_few_weights_and_does_not_stand_still():
    steps = lasting(22, **MOVED, weights_moved=0.01)
    still = ["weights stand still"]
    for optimizer, rate, causes in ("AdamW8bit", 1.5e-5, still), ("SGD", 1.5e-2, []), ("SGD", 1.5e-5, still):
        config = {**RECIPE, "learning_rate": rate}
        found = judge(known(*KEPT, steps=steps, config=config, summary={"optimizer": optimizer}))
        assert [cause.name for cause in found.causes] == causes


@pytest.mark.parametrize(("count", "few"), [(1, True), (3, True), (7, True), (8, False)])
def test_of_few_steps_it_says_first_that_they_are_too_few(count, few):
    found = judge(known(*KEPT, steps=lasting(count, **STILL, weights_moved=0.01), config=RECIPE))
    lines = found.lines("grpo-ds train", "run")
    assert (f"Too few steps to judge by ({count})" in lines[5]) is few
    assert [cause.name for cause in found.causes] == ([] if few else ["weights stand still"])
    assert found.changes[0].startswith("--num_steps")


def test_reward_functions_that_failed_are_counted_and_come_first():
    before, after = paid(0.0), paid(0.0)
    steps = lasting(4, reward_errors=1, reward=0.0, frac_reward_zero_std=1.0)
    found = judge(known(before, after, steps=steps, config={"answers": "none", "on_reward_error": "zero"}))
    assert [cause.name for cause in found.causes] == ["rewards failed"]
    assert "failed in 4 of 4 steps (reward_errors: 4)" in str(found.causes[0])
    assert "--on_reward_error stop" in found.changes and "larger --model" not in str(found.causes)


RISING = [1.5e-6 * step for step in range(1, 10)]  # a warm-up of ten steps
REACHED = [  # rates of the steps, and the rate that is said to have moved too few weights
    ([1.5e-5] * 9, "At a learning rate of 1.5e-05 only"),
    ([*RISING[4:], 1.5e-5, 1e-5, 5e-6, 0.0], "At a learning rate of 1.5e-05 only"),  # warmed up, then falling
    (RISING, "At a learning rate of 1.35e-05 and less (the run ended inside its warm-up to 1.5e-05) only"),
    ([], "At a learning rate of 1.5e-05 only"),  # of an older version
]


@pytest.mark.parametrize(("rates", "said"), REACHED)
def test_the_rate_is_one_that_the_run_reached(rates, said):
    steps = [{"weights_moved": 0.01, "learning_rate": rate} for rate in rates] or lasting(9, weights_moved=0.01)
    (cause,) = judge(known(*KEPT, steps=steps, config=RECIPE)).causes
    assert cause.found.startswith(said)
    assert any("--learning_rate" in flag for flag in cause.flags) == ("warm-up" not in said)


@pytest.mark.parametrize("by_p", [True, False])
def test_a_lean_by_probability_is_not_called_a_share_of_the_answers(by_p):
    p = dict(lean={"yes": 0.24, "no": 0.76}) if by_p else {}
    after = grades(1.0, 0.5, answers=(0, 8), class_shares={"yes": 0.5, "no": 0.5}, **p)
    found = judge(known(grades(1.0, 0.5), after, mcnemar=1.0))
    measured = "“no”: mean probability 76%" if by_p else "“no”: 100% of the answers"
    assert measured in found.aspects[2] and measured in found.causes[0].found
