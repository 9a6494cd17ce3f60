"""Known causes of a run that did not learn, each recognised by the run's own numbers, with the flags that help.

A cause is a function of the evidence: it returns a Cause, or None if the numbers do not show it. Each threshold has its
reason beside it. tests/training/test_verdict.py has a real run that was made to fail for each cause.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from grpo_ds.models.presets import far_below
from grpo_ds.report.evidence import AFTER, BEFORE, Evidence
from grpo_ds.report.lean import lean_of
from grpo_ds.report.metric_names import CLIPPED_RATIO
from grpo_ds.report.remedies import (
    STRONG_BETA,
    faster,
    form_flags,
    gentler,
    more_steps,
    pays_form,
    pull,
    rate_reached,
    spread_flags,
    stronger,
    usual_learning_rate,
)
from grpo_ds.report.run_files import as_label
from grpo_ds.task.grading import FEWEST_TO_COMPARE

FEW_STEPS = 8  # two for each quarter; fewer compare the questions of single steps rather than the policy
MOST_CAUSES = 3  # shown
FLAT = 0.5  # share of groups without a gradient: above it most of the sampling, the dearest part, teaches nothing
ALWAYS = 0.99  # share: a run whose groups are all flat, but for a stray one
SOLVED = 0.9  # accuracy in training: groups that agree on the right answer are the aim, not a fault
CUT = 0.25  # share of completions: at a quarter, a group of four has on average one that could not answer
# Nats per token. A choice between two equally likely labels has 0.69 nats: below 0.69 / 35 not even the label of an
# answer of 35 tokens is open.
NO_ENTROPY = 0.02
# Nats per token above the floor. By Pinsker's inequality at most 14 of 100 answers of 40 tokens are then other ones.
KL_STILL = 0.001
KL_FAR = 1.0  # nats per token above the floor: the reference thinks each token e times less likely than the policy
CLIPPED = 0.05  # share of tokens without a gradient; a healthy run has a few in a thousand (GSPO, Zheng et al. 2025)
BROKE = 0.3  # of the samples that lost their form since the first step; chance has 0.1 with 16 completions a step
MOVED = 0.05  # share of weights; with bf16 alone about 0.02 can move at a rate of 1e-6 (docs/not_learning.md)
PASSES = 4  # over the questions; up to four passes old data is nearly as good as new (Muennighoff et al. 2023)
OVERFIT = 0.2  # accuracy in training above held-out accuracy; 20 to 40 questions have an interval of 0.15 to 0.2
KEEPS_GRADIENT = ("gspo", "luspo", "cispo")  # losses in which many clipped tokens are normal


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause that the run's numbers show."""

    name: str
    found: str  # the numbers, in a sentence
    flags: tuple[str, ...]  # that help, best first

    def __str__(self) -> str:
        return f"{self.found} Try {' or '.join(self.flags)}." if self.flags else self.found


def causes(known: Evidence) -> tuple[Cause, ...]:
    """Return the causes that the numbers show, without those that follow from another one, the first ones first."""
    found = [cause for shows in CAUSES if (cause := shows(known))]
    follow = {name for cause in found for name in EXPLAINS.get(cause.name, ())}
    return _agreeing(known, [cause for cause in found if cause.name not in follow])[:MOST_CAUSES]


def few_steps(known: Evidence) -> bool:
    """Return True if the run had too few steps to compare its end with its beginning."""
    return 0 < len(known.steps) < FEW_STEPS


def _agreeing(known: Evidence, found: list[Cause]) -> tuple[Cause, ...]:
    """Leave out flags that pull the policy the other way than those of an earlier cause."""
    agreeing, way = list[Cause](), 0
    for cause in found:
        flags = tuple(flag for flag in cause.flags if pull(known, flag) * way >= 0)
        way = way or next((pulls for flag in flags if (pulls := pull(known, flag))), 0)
        agreeing.append(replace(cause, flags=flags))
    return tuple(agreeing)


def rewards_failed(known: Evidence) -> Cause | None:
    """Reward functions failed in most steps, which --on_reward_error zero ignores."""
    found, share = _failed_rewards(known)
    return Cause("rewards failed", f"{found} Fix them first.", ("--on_reward_error stop",)) if share >= FLAT else None


def rewards_failed_at_times(known: Evidence) -> Cause | None:
    """A rare failure is no reason for rewards that are all equal, and none to end the next run."""
    found, share = _failed_rewards(known)
    return Cause("rewards failed at times", found, ()) if 0 < share < FLAT else None


def _failed_rewards(known: Evidence) -> tuple[str, float]:
    """Return a sentence, and the share of the steps."""
    errors = known.values("reward_errors")
    steps = sum(count > 0 for count in errors)
    found = (
        f"Reward functions failed in {steps} of {len(errors)} steps (reward_errors: {sum(errors):.0f}) and paid "
        "nothing there; the first error of each is in the run's output."
    )
    return found, steps / max(1, len(errors))


def completions_cut(known: Evidence) -> Cause | None:
    share = known.late(CLIPPED_RATIO)
    if share is None or share < CUT or not pays_form(known):
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
    if not moved or moved[-1] >= MOVED or few_steps(known):
        return None
    sgd = known.summary.get("optimizer") == "SGD"  # moves few weights, those with large gradients, and learns
    if sgd and not far_below(known.setting("learning_rate"), usual_learning_rate(known)):
        return None
    precision = as_label(known.summary.get("precision", "the model's precision"))
    found = f"At a learning rate of {_rate(known)} only {moved[-1]:.1%} of the weights have changed in {precision}"
    if known.summary.get("keeps_small_steps") is False:
        why = "smaller steps are lost, because this DeepSpeed JSON keeps bf16 masters without a remainder."
        return Cause("weights stand still", f"{found}: {why}", ("--ds ds_configs/zero2_lowram.json", *faster(known)))
    why = "the small steps add up in fp32, but few have reached the next number yet."
    return Cause("weights stand still", f"{found}: {why}", faster(known))


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
        return Cause("rewards all 0", found, form_flags(known))
    if share >= ALWAYS:
        found = f"All completions of a question always earned the same (mean {rewards[-1]:.2f}): nothing to prefer."
        return Cause("rewards all equal", found, spread_flags(known))
    found = f"In {share:.0%} of the groups all completions earned the same, so these groups had no gradient."
    return Cause("groups without a gradient", found, spread_flags(known))


def kl_at_its_floor(known: Evidence) -> Cause | None:
    """The policy has not moved away from the reference."""
    if not _is_still(known) or (known.mean("frac_reward_zero_std") or 0) >= FLAT:
        return None
    beta = known.setting("beta")
    strong = beta >= STRONG_BETA
    if few_steps(known) and not strong:
        return None
    reason = f"beta {beta:g} holds it there" if strong else f"{len(known.steps)} steps at {_rate(known)} are too little"
    found = (
        f"The KL stayed at its floor ({known.late('kl') or 0:.4f} nats per token): the policy has not moved; {reason}."
    )
    return Cause("KL at its floor", found, ("--beta 0.04",) if strong else faster(known))


def kl_ran_away(known: Evidence) -> Cause | None:
    """The policy is far away from the model that it began as."""
    above = _kl_above_floor(known)
    if not above or max(above) < KL_FAR:
        return None
    found = (
        f"The KL ran away, to {max(above):.1f} nats per token above its floor: the policy has forgotten its language."
    )
    return Cause("KL ran away", found, gentler(known))


def policy_broke_down(known: Evidence) -> Cause | None:
    """The policy lost the form that its samples had: seen without a reference too."""
    formed, late = known.values("well_formed"), known.late("well_formed")
    if not formed or late is None or formed[0] - late < BROKE or _keeps_form(known, formed[0]) or _is_still(known):
        return None
    found = f"{formed[0]:.0%} of the first samples had the required form, {late:.0%} of the last: the updates broke it."
    return Cause("policy broke down", found, gentler(known))


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
    return Cause("entropy gone", found, (f"--learning_rate {known.setting('learning_rate') / 2:g}", *stronger(known)))


def leans_to_one_label(known: Evidence) -> Cause | None:
    if (lean := lean_of(known, AFTER)) is None:
        return None
    found = f"The model leans to “{lean.label}”: {lean}."
    if not known.setting("balance_classes"):
        return Cause("lean to one label", found, ("--balance_classes true",))
    if known.setting("few_shot") == 1:
        return Cause("lean to one label", f"{found} The one worked example is copied.", ("--few_shot 2",))
    slower = (f"--learning_rate {known.setting('learning_rate') / 2:g}", *stronger(known))
    as_before = (before := lean_of(known, BEFORE)) is not None and before.label == lean.label
    found += " It did so before training." if as_before else ""
    longer = (f"--num_steps {more_steps(known)}",)
    return Cause("lean to one label", found, longer if as_before or few_steps(known) else slower)


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
    return Cause("data too small", found, ("--data FILE with more questions", *stronger(known)))


# The first ones explain the later ones more often than the other way round, and rest on the stronger evidence.
CAUSES: tuple[Callable[[Evidence], Cause | None], ...] = (
    rewards_failed,
    kl_ran_away,
    policy_broke_down,
    completions_cut,
    rewards_flat,
    weights_stand_still,
    kl_at_its_floor,
    entropy_gone,
    ratio_clipped,
    leans_to_one_label,
    data_too_small,
    rewards_failed_at_times,
)


FLAT_NAMES = ("rewards all 0", "rewards all equal", "groups without a gradient")
EXPLAINS: Mapping[str, tuple[str, ...]] = {  # a cause -> causes that follow from it
    "rewards failed": (*FLAT_NAMES, "weights stand still", "KL at its floor"),
    "KL ran away": ("policy broke down", "completions cut", "entropy gone", *FLAT_NAMES),
    "policy broke down": ("completions cut", "entropy gone", *FLAT_NAMES),
    "entropy gone": FLAT_NAMES,
    "rewards all 0": ("weights stand still",),
    "rewards all equal": ("weights stand still",),
    "weights stand still": ("KL at its floor",),
}


def _kl_above_floor(known: Evidence) -> list[float]:
    """KL above its floor in each quarter; [] without a reference."""
    floors = known.values("kl_floor")
    if not floors or not known.setting("beta"):
        return []
    return [kl - floors[-1] for kl in known.quarters("kl")]


def _is_still(known: Evidence) -> bool:
    """Return True if the KL never left its floor."""
    above = _kl_above_floor(known)
    return bool(above) and max(above) < KL_STILL


def _keeps_form(known: Evidence, sampled: float) -> bool:
    """Return True if the held-out answers keep the form; then samples without it are due to their questions.

    sampled: share of the first samples in form. It is compared with if too few held-out answers had the form before
    training, unless the steps are too few.
    """
    before, after = known.grade(BEFORE, "well_formed") or 0.0, known.grade(AFTER, "well_formed")
    had = before if before >= BROKE or few_steps(known) else sampled
    return after is not None and had - after < BROKE


def _rate(known: Evidence) -> str:
    rate, reached = known.setting("learning_rate"), rate_reached(known)
    return f"{rate:g}" if reached == rate else f"{reached:g} and less (the run ended inside its warm-up to {rate:g})"
