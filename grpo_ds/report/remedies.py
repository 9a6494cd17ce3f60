"""Flags that help a run that did not learn, with the values that suit it; each function returns them best first."""

from grpo_ds.models.presets import PRESETS, usual_rate
from grpo_ds.report.evidence import Evidence
from grpo_ds.task.worked_examples import worked_examples

STRONG_BETA = 0.4  # ten times the default: the pull to the reference outweighs the reward
FEWEST_STEPS = 60  # in 15 to 40 steps a small model learns the form (docs/results.md); the task comes after it
LONGER, LONG_RUN = 4, 100  # times as many steps as now, up to this number; twice beyond it, which already takes hours
PAID = 0.5  # share of samples in form: an answer reward is expected for these alone


def pull(known: Evidence, flag: str) -> int:
    """Return 1 if a flag lets the policy move further than in this run, -1 if it holds it nearer, 0 for any other flag.

    Example:
        >>> known = Evidence([], {}, {"learning_rate": 1e-6, "beta": 0.04}, {})
        >>> [pull(known, flag) for flag in ("--learning_rate 2e-06", "--beta 0.1", "--num_steps 60")]
        [1, -1, 0]
    """
    name, _, value = flag.partition(" ")
    if name not in ("--learning_rate", "--beta", "--mu"):
        return 0
    higher = float(value) > known.setting(name.removeprefix("--"))
    return 1 if higher == (name != "--beta") else -1


def rate_reached(known: Evidence) -> float:
    """Return the learning rate; of a run that ended while it was still rising, the highest one that was reached."""
    rate, rates = known.setting("learning_rate"), known.values("learning_rate")
    return rates[-1] if rates and rates[0] < rates[-1] == max(rates) < rate else rate


def more_steps(known: Evidence) -> int:
    """Number of steps of a run that learns more."""
    steps = int(known.setting("num_steps"))
    return max(FEWEST_STEPS, LONGER * steps if steps < LONG_RUN else 2 * steps)


def pays_form(known: Evidence) -> bool:
    return bool(known.values("rewards/correctness/mean") or known.values("rewards/format/mean"))


def form_flags(known: Evidence) -> tuple[str, ...]:
    """Flags that show the model the form of an answer."""
    if not pays_form(known):
        return ("--reward_funcs correctness,format",)
    examples = len(worked_examples(known.answer_format))
    shown = (f"--few_shot {examples}",) if known.setting("few_shot") < examples else ()
    prefilled = () if known.setting("prefill") else ("--prefill true",)
    return (*shown, *prefilled) or ("--system_prompt FILE that shows the form",)


def spread_flags(known: Evidence) -> tuple[str, ...]:
    """Flags that make the rewards of a group differ."""
    if not pays_form(known) and known.kind != "none":
        return ("--reward_funcs correctness,format",)
    sampled = known.setting("answer_reward") == "sampled" and known.values("rewards/correctness/mean")
    sampled = sampled if known.kind == "labels" else []
    expected = ("--answer_reward expected",) if sampled and (known.late("well_formed") or 0) >= PAID else ()
    redraw = () if known.setting("dynamic_sampling") else ("--dynamic_sampling 2",)
    return (*expected, f"--num_generations {2 * known.setting('num_generations')}", *redraw)


def stronger(known: Evidence) -> tuple[str, ...]:
    """Flags that hold the policy nearer to the reference."""
    beta = known.setting("beta")
    return (f"--beta {2.5 * beta:g}",) if 0 < beta < STRONG_BETA else () if beta else ("--beta 0.04",)


def gentler(known: Evidence) -> tuple[str, ...]:
    """Flags that make the updates smaller."""
    once = ("--mu 1",) if known.setting("mu") > 1 else ()
    return (f"--learning_rate {known.setting('learning_rate') / 4:g}", *stronger(known), *once)


def usual_learning_rate(known: Evidence) -> float:
    """Return the learning rate that suits the run's model, adapter and optimizer."""
    preset, sgd = PRESETS.get(str(known.setting("model"))), known.summary.get("optimizer") == "SGD"
    return usual_rate(preset.recipe if preset else {}, lora=bool(known.setting("lora_r")), sgd=sgd)


def faster(known: Evidence) -> tuple[str, ...]:
    """Flags that let the policy move further: the model's usual learning rate, or more steps at it."""
    rate, usual = known.setting("learning_rate"), usual_learning_rate(known)
    steps = f"--num_steps {more_steps(known)}"
    if rate < usual:
        return (f"--learning_rate {usual:g}", steps)
    return (steps,) if rate_reached(known) < rate else (steps, f"--learning_rate {2 * rate:g}")
