"""Known causes of a run that did not learn, each recognised by the run's own numbers, with the flags that help.

A cause is a function of the evidence: it returns a Cause, or None if the numbers do not show it. Each threshold has its
reason beside it. tests/training/test_verdict.py has a real run that was made to fail for each cause.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grpo_ds.models.presets import LORA_RATE, PRESETS
from grpo_ds.report.evidence import AFTER, BEFORE, Evidence
from grpo_ds.report.metric_names import CLIPPED_RATIO
from grpo_ds.report.run_files import as_label
from grpo_ds.settings.config import TrainConfig
from grpo_ds.task.grading import FEWEST_TO_COLLAPSE, FEWEST_TO_COMPARE
from grpo_ds.task.statistics import wilson_interval
from grpo_ds.task.worked_examples import worked_examples

MOST_CAUSES = 3  # shown: the first ones explain the later ones more often than the other way round
FLAT = 0.5  # share of groups without a gradient: above it most of the sampling, the dearest part, teaches nothing
ALWAYS = 0.99  # share: a run whose groups are all flat, but for a stray one
SOLVED = 0.9  # accuracy in training: groups that agree on the right answer are the aim, not a fault
CUT = 0.25  # share of completions: at a quarter, a group of four has on average one that could not answer
LEAN = 0.25  # share of answers beyond the label's share of the questions, or of mean p(label): half-way to one label
# Nats per token. A choice between two equally likely labels has 0.69 nats: below 0.69 / 35 not even the label of an
# answer of 35 tokens is open.
NO_ENTROPY = 0.02
# Nats per token above the floor. By Pinsker's inequality at most 14 of 100 answers of 40 tokens are then other ones.
KL_STILL = 0.001
KL_FAR = 1.0  # nats per token above the floor: the reference thinks each token e times less likely than the policy
STRONG_BETA = 0.4  # ten times the default: the pull to the reference outweighs the reward
CLIPPED = 0.05  # share of tokens without a gradient; a healthy run has a few in a thousand (GSPO, Zheng et al. 2025)
BROKE = 0.3  # of the samples that lost their form since the first step; chance has 0.1 with 16 completions a step
MOVED = 0.05  # share of weights; with bf16 alone about 0.02 can move at a rate of 1e-6 (docs/not_learning.md)
PASSES = 4  # over the questions; up to four passes old data is nearly as good as new (Muennighoff et al. 2023)
OVERFIT = 0.2  # accuracy in training above held-out accuracy; 20 to 40 questions have an interval of 0.15 to 0.2
FEWEST_STEPS = 60  # in 15 to 40 steps a small model learns the form (docs/results.md); the task comes after it
LONGER, LONG_RUN = 4, 100  # times as many steps as now, up to this number; twice beyond it, which already takes hours
KEEPS_GRADIENT = ("gspo", "luspo", "cispo")  # losses in which many clipped tokens are normal


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause that the run's numbers show."""

    name: str
    found: str  # the numbers, in a sentence
    flags: tuple[str, ...]  # that help, best first

    def __str__(self) -> str:
        return f"{self.found} Try {' or '.join(self.flags)}."


def causes(known: Evidence) -> tuple[Cause, ...]:
    """Return the causes that the numbers show, without those that follow from another one, the first ones first."""
    found = [cause for shows in CAUSES if (cause := shows(known))]
    follow = {name for cause in found for name in EXPLAINS.get(cause.name, ())}
    return tuple(cause for cause in found if cause.name not in follow)[:MOST_CAUSES]


def completions_cut(known: Evidence) -> Cause | None:
    share = known.late(CLIPPED_RATIO)
    if share is None or share < CUT or not _pays_form(known):
        return None
    length = known.setting("max_completion_length")
    return Cause(
        "completions cut",
        f"{share:.0%} of the last completions were cut at {length} tokens, before an answer, which earns nothing then.",
        (f"--max_completion_length {2 * max(length, 24)}", f"--overlong_buffer {max(1, length // 4)}"),
    )


def weights_stand_still(known: Evidence) -> Cause | None:
    """The learning rate is too small for the number format of the weights."""
    moved = known.values("weights_moved")
    if not moved or moved[-1] >= MOVED:
        return None
    precision, rate = as_label(known.summary.get("precision", "the model's precision")), known.setting("learning_rate")
    found = f"At a learning rate of {rate:g} only {moved[-1]:.1%} of the weights have changed in {precision}"
    if known.summary.get("keeps_small_steps") is False:
        why = "smaller steps are lost, because this DeepSpeed JSON keeps bf16 masters without a remainder."
        return Cause("weights stand still", f"{found}: {why}", ("--ds ds_configs/zero2_lowram.json", *_faster(known)))
    why = "the small steps add up in fp32, but few have reached the next number yet."
    return Cause("weights stand still", f"{found}: {why}", _faster(known))


def rewards_flat(known: Evidence) -> Cause | None:
    """Groups whose completions all earned the same have no advantage, so no gradient."""
    share, rewards = known.mean("frac_reward_zero_std"), known.values("reward")
    if share is None or share < FLAT or not rewards or (known.late("accuracy") or 0) >= SOLVED:
        return None
    if (known.late(CLIPPED_RATIO) or 0) >= ALWAYS:
        return None  # none ended, so none could earn: completions_cut says so
    if share >= ALWAYS and not any(rewards) and known.kind == "none":
        found = "Every completion of the run earned 0, so the rewards ask for what the model never does."
        return Cause("rewards all 0", found, ("--reward_funcs with one that pays a part of it", "a larger --model"))
    if share >= ALWAYS and not any(rewards):
        found = "Every completion of the run earned 0: none had the required form, so no answer was ever paid."
        return Cause("rewards all 0", found, _form_flags(known))
    if share >= ALWAYS:
        found = f"All completions of a question always earned the same (mean {rewards[-1]:.2f}): nothing to prefer."
        return Cause("rewards all equal", found, _spread_flags(known))
    found = f"In {share:.0%} of the groups all completions earned the same, so these groups had no gradient."
    return Cause("groups without a gradient", found, _spread_flags(known))


def kl_at_its_floor(known: Evidence) -> Cause | None:
    """The policy has not moved away from the reference."""
    above = _kl_above_floor(known)
    if not above or max(above) >= KL_STILL or (known.mean("frac_reward_zero_std") or 0) >= FLAT:
        return None
    beta, rate = known.setting("beta"), known.setting("learning_rate")
    strong = beta >= STRONG_BETA
    reason = f"beta {beta:g} holds it there" if strong else f"{len(known.steps)} steps at {rate:g} are too little"
    found = (
        f"The KL stayed at its floor ({known.late('kl') or 0:.4f} nats per token): the policy has not moved; {reason}."
    )
    return Cause("KL at its floor", found, ("--beta 0.04",) if strong else _faster(known))


def kl_ran_away(known: Evidence) -> Cause | None:
    """The policy is far away from the model that it began as."""
    above = _kl_above_floor(known)
    if not above or max(above) < KL_FAR:
        return None
    found = (
        f"The KL ran away, to {max(above):.1f} nats per token above its floor: the policy has forgotten its language."
    )
    return Cause("KL ran away", found, _gentler(known))


def policy_broke_down(known: Evidence) -> Cause | None:
    """The policy lost the form that its samples had: seen without a reference too."""
    formed, late = known.values("well_formed"), known.late("well_formed")
    if not formed or late is None or formed[0] - late < BROKE:
        return None
    found = f"{formed[0]:.0%} of the first samples had the required form, {late:.0%} of the last: the updates broke it."
    return Cause("policy broke down", found, _gentler(known))


def ratio_clipped(known: Evidence) -> Cause | None:
    share = known.late("clip_ratio/region_mean")
    if share is None or share < CLIPPED or known.setting("loss_type") in KEEPS_GRADIENT:
        return None
    found = f"{share:.0%} of the tokens were clipped: the policy moves so far in an update that they have no gradient."
    slower = f"--learning_rate {known.setting('learning_rate') / 4:g}"
    return Cause("ratio clipped", found, (slower, "--mu 1") if known.setting("mu") > 1 else (slower,))


def entropy_gone(known: Evidence) -> Cause | None:
    entropy = known.late("entropy")
    if entropy is None or entropy >= NO_ENTROPY:
        return None
    found = f"The entropy is gone ({entropy:.3f} nats per token): all samples of a question are the same text."
    if known.setting("temperature") < 1:
        return Cause("entropy gone", found, ("--temperature 1",))
    return Cause("entropy gone", found, (f"--learning_rate {known.setting('learning_rate') / 2:g}", *_stronger(known)))


def leans_to_one_label(known: Evidence) -> Cause | None:
    if (lean := lean_of(known, AFTER)) is None:
        return None
    label, share, of_questions = lean
    found = f"The model leans to “{label}”: {share:.0%} there, against {of_questions:.0%} of the questions."
    if not known.setting("balance_classes"):
        return Cause("lean to one label", found, ("--balance_classes true",))
    if known.setting("few_shot") == 1:
        return Cause("lean to one label", f"{found} The one worked example is copied.", ("--few_shot 2",))
    slower = (f"--learning_rate {known.setting('learning_rate') / 2:g}", *_stronger(known))
    if (before := lean_of(known, BEFORE)) and before[0] == label:
        slower, found = (f"--num_steps {more_steps(known)}",), f"{found} It did so before training."
    return Cause("lean to one label", found, slower)


def data_too_small(known: Evidence) -> Cause | None:
    """The questions of training were learned by heart."""
    passes, trained, held_out = known.values("epoch"), known.late("accuracy"), known.grade(AFTER, "accuracy")
    if not passes or passes[-1] < PASSES or trained is None or held_out is None or known.count < FEWEST_TO_COMPARE:
        return None
    if trained - held_out < OVERFIT:
        return None
    found = (
        f"It answers {trained:.0%} of the questions of training right, {held_out:.0%} of the held-out ones, after "
        f"{passes[-1]:.0f} passes: it learned them by heart."
    )
    return Cause("data too small", found, ("--data FILE with more questions", *_stronger(known)))


CAUSES: tuple[Callable[[Evidence], Cause | None], ...] = (
    kl_ran_away,
    policy_broke_down,
    completions_cut,
    entropy_gone,
    rewards_flat,
    weights_stand_still,
    kl_at_its_floor,
    ratio_clipped,
    leans_to_one_label,
    data_too_small,
)


FLAT_NAMES = ("rewards all 0", "rewards all equal", "groups without a gradient")
EXPLAINS: Mapping[str, tuple[str, ...]] = {  # a cause -> causes that follow from it
    "KL ran away": ("policy broke down", "completions cut", "entropy gone", *FLAT_NAMES),
    "policy broke down": ("completions cut", "entropy gone", *FLAT_NAMES),
    "entropy gone": FLAT_NAMES,
    "rewards all 0": ("weights stand still",),
    "rewards all equal": ("weights stand still",),
    "weights stand still": ("KL at its floor",),
}


def more_steps(known: Evidence) -> int:
    """Number of steps of a run that learns more."""
    steps = int(known.setting("num_steps"))
    return max(FEWEST_STEPS, LONGER * steps if steps < LONG_RUN else 2 * steps)


def lean_of(known: Evidence, when: str) -> tuple[str, float, float] | None:
    """Return the label that the answers lean to, its share of the answers, and of the questions; None without a lean.

    By the mean p(label) if it was measured, else by the answers given.
    """
    shares, p, answers = known.class_shares(), known.by_label(when, "lean"), known.by_label(when, "predicted")
    given = sum(answers.values())
    if p and shares:
        label = max(p, key=lambda label: p[label] - shares.get(label, 0))
        if p[label] - shares.get(label, 0) >= LEAN:
            return as_label(label), p[label], shares.get(label, 0)
    if not given or not (shares or known.grades(when).get("collapsed")):
        return None
    label = max(answers, key=lambda label: answers[label] / given - shares.get(label, 0))
    share, of_questions = answers[label] / given, shares.get(label, 0)
    collapsed = known.grades(when).get("collapsed") is True and given >= FEWEST_TO_COLLAPSE
    beyond_chance = wilson_interval(round(share * given), round(given))[0] > of_questions
    leans = beyond_chance and given >= FEWEST_TO_COLLAPSE and share - of_questions >= LEAN
    return (as_label(label), share, of_questions) if collapsed or leans else None


def _kl_above_floor(known: Evidence) -> list[float]:
    """KL above its floor in each quarter; [] without a reference."""
    floors = known.values("kl_floor")
    if not floors or not known.setting("beta"):
        return []
    return [kl - floors[-1] for kl in known.quarters("kl")]


def _pays_form(known: Evidence) -> bool:
    return bool(known.values("rewards/correctness/mean") or known.values("rewards/format/mean"))


def _form_flags(known: Evidence) -> tuple[str, ...]:
    """Flags that show the model the form of an answer."""
    if not _pays_form(known):
        return ("--reward_funcs correctness,format",)
    examples = len(worked_examples(known.answer_format))
    shown = (f"--few_shot {examples}",) if known.setting("few_shot") < examples else ()
    prefilled = () if known.setting("prefill") else ("--prefill true",)
    return (*shown, *prefilled) or ("--system_prompt FILE that shows the form",)


def _spread_flags(known: Evidence) -> tuple[str, ...]:
    """Flags that make the rewards of a group differ."""
    if not _pays_form(known) and known.kind != "none":
        return ("--reward_funcs correctness,format",)
    sampled = known.setting("answer_reward") == "sampled" and known.values("rewards/correctness/mean")
    sampled = sampled if known.kind == "labels" else []
    expected = ("--answer_reward expected",) if sampled and (known.late("well_formed") or 0) >= FLAT else ()
    redraw = () if known.setting("dynamic_sampling") else ("--dynamic_sampling 2",)
    return (*expected, f"--num_generations {2 * known.setting('num_generations')}", *redraw)


def _stronger(known: Evidence) -> tuple[str, ...]:
    """Flags that hold the policy nearer to the reference."""
    beta = known.setting("beta")
    return (f"--beta {2.5 * beta:g}",) if 0 < beta < STRONG_BETA else () if beta else ("--beta 0.04",)


def _gentler(known: Evidence) -> tuple[str, ...]:
    """Flags that make the updates smaller."""
    once = ("--mu 1",) if known.setting("mu") > 1 else ()
    return (f"--learning_rate {known.setting('learning_rate') / 4:g}", *_stronger(known), *once)


def _faster(known: Evidence) -> tuple[str, ...]:
    """Flags that let the policy move further: the model's usual learning rate, or more steps at it."""
    preset, rate = PRESETS.get(str(known.setting("model"))), known.setting("learning_rate")
    usual = float(str((preset.recipe if preset else {}).get("learning_rate", TrainConfig.learning_rate)))
    usual *= LORA_RATE if known.setting("lora_r") else 1
    steps = f"--num_steps {more_steps(known)}"
    return (f"--learning_rate {usual:g}", steps) if rate < usual else (steps, f"--learning_rate {2 * rate:g}")
