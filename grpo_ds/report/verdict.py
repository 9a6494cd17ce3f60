"""The verdict on a run: did it learn, and if not, which known causes its own numbers show, and what to run next.

`judge` is a pure function of the evidence. The console's end, the report page and the model card show its result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grpo_ds.report.causes import CUT, SOLVED, Cause, causes, few_steps
from grpo_ds.report.evidence import AFTER, BEFORE, Evidence
from grpo_ds.report.key_figures import percent
from grpo_ds.report.lean import lean_of
from grpo_ds.report.metric_names import CLIPPED_RATIO, MEAN_LENGTH
from grpo_ds.report.remedies import more_steps
from grpo_ds.report.run_files import RunFiles, as_label, as_number, as_object
from grpo_ds.settings.saved_config import CONFIG_FILE
from grpo_ds.task.answers import AnswerKind
from grpo_ds.task.broken_rules import rules_line
from grpo_ds.task.grading import FEWEST_TO_COMPARE, small_sample
from grpo_ds.task.rewards import BARE_LABEL
from grpo_ds.task.sources import RECORDS
from grpo_ds.task.statistics import wilson_interval

SIGNIFICANT = 0.05
FORMED = 0.9  # share of well-formed answers: the form is known, and a tenth is left to odd questions
CHANCE_AUC = 0.5
FEW_WORDS = 10  # of reasoning; a sentence has more

TASK = "It learned the task: more answers are right than before, and more than the most common label alone would give."
RIGHT = "It learned the task: more answers are right than before."
PAID = "It learned what the rewards pay: held-out completions earn more than before."
PART = "It learned some of the task: the right answers have become more likely."
FORM = "It learned the form of an answer, but not the task."
FORM_ONLY = "It learned the form of an answer, but the right answers have become less likely."
WORSE = "It got worse."
EASY = "It answered nearly all held-out questions right before training, so there was little to learn."
NOTHING = "It learned nothing that these numbers can show."

# What a model of up to so many parameters can be expected to learn. From this project's own runs (docs/results.md) as
# far as they go; the last line is an expectation.
OUTLOOKS = (
    (300e6, "learns the form of an answer; on questions that need knowledge its answers stay near chance"),
    (1e9, "learns the form in a few steps; where knowledge is needed it begins near chance and takes 60 steps or more"),
    (2e9, "knows more than its answers show: expect training to remove its lean to one label and to raise accuracy"),
    (float("inf"), "knows enough to gain from training; how much has not been measured here"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict in plain English.

    headline: one of the sentences above, or how far the run is. aspects: form, accuracy, lean and reasoning.
    outlook: what such a model can be expected to learn; "" if its size is not known. changes: flags of a run that
    learns more.
    """

    headline: str
    aspects: tuple[str, ...]
    causes: tuple[Cause, ...] = ()
    note: str = ""  # said before them: that the steps are too few to judge by, or that no cause shows
    outlook: str = ""
    changes: tuple[str, ...] = ()

    def command(self, train: str, folder: str) -> str:
        """Command of a run that learns more. train: words that start one. folder: of this run, as typed in a shell."""
        return " ".join((train, "--config", f"{folder}/{CONFIG_FILE}", *self.changes)) if self.changes else ""

    def lines(self, train: str, folder: str) -> list[str]:
        """The verdict as the console prints it."""
        because = [self.note, "Why not more, by this run's own numbers:" if self.causes else ""]
        following = [f"A run that learns more: {self.command(train, folder)}"] if self.changes else []
        return [
            f"Verdict: {self.headline}",
            *(f"  {aspect}" for aspect in self.aspects),
            *filter(None, because),
            *(f"  - {cause}" for cause in self.causes),
            *filter(None, [self.outlook]),
            *following,
        ]


def of(run: RunFiles) -> Verdict:
    """Judge a run from its files."""
    return judge(Evidence.of(run))


def judge(known: Evidence) -> Verdict:
    """Judge a run. Without answers after training only what is known so far is said."""
    if not known.grades(AFTER):
        return Verdict(_so_far(known), ())
    headline = _headline(known)
    fine = headline in (TASK, RIGHT, PAID, EASY)
    found = () if fine else causes(known)
    aspects = tuple(aspect(known) for aspect in ASPECTS[known.kind])
    note = "" if fine else _note(known, found)
    return Verdict(headline, aspects, found, note, _outlook(known), _changes(known, found))


def _headline(known: Evidence) -> str:
    if known.kind == "none":
        return {1: PAID, -1: WORSE}.get(_change(known, "reward"), NOTHING)
    task, form = _task(known), _shift(known, "well_formed")
    if task > 0 and known.kind != "labels":
        return RIGHT
    if task > 0 and _difference(known, "accuracy") > 0 and _above_majority(known):
        return TASK
    if task < 0 or form < 0:
        return FORM_ONLY if form > 0 else WORSE
    if as_number(known.outcome.get("p_right_change")) is not None and task > 0:
        return PART
    if form > 0:
        return FORM
    return EASY if (known.grade(BEFORE, "accuracy") or 0.0) >= SOLVED else NOTHING


def _task(known: Evidence) -> int:
    """1 if the answers became better by more than chance, -1 if worse, else 0.

    By the change of mean p(right), which a paired test sees first, if it was measured; else by McNemar's test.
    """
    accuracy = _difference(known, "accuracy")
    if as_number(known.outcome.get("p_right_change")) is None:
        p = as_number(known.outcome.get("mcnemar"))
        return 0 if p is None or p >= SIGNIFICANT or not accuracy else 1 if accuracy > 0 else -1
    return _change(known, "p_right")


def _change(known: Evidence, mean: str) -> int:
    """1 if a mean became larger by more than chance, by its paired test, -1 if smaller, else 0."""
    change, p = (as_number(known.outcome.get(f"{mean}_{figure}")) for figure in ("change", "p_value"))
    return 0 if p is None or p >= SIGNIFICANT or not change else 1 if change > 0 else -1


def _above_majority(known: Evidence) -> bool:
    interval, baseline = known.grades(AFTER)["accuracy_interval"], known.grade(AFTER, "majority_baseline")
    return interval[0] > (baseline or 0.0)


def _shift(known: Evidence, grade: str) -> int:
    """1 if a share rose beyond the 95 % interval of its value before, -1 if it fell below it, else 0."""
    before, after = known.grade(BEFORE, grade), known.grade(AFTER, grade)
    if before is None or after is None or not known.count:
        return 0
    low, high = wilson_interval(round(before * known.count), known.count)
    return 1 if after > high else -1 if after < low else 0


def _difference(known: Evidence, grade: str) -> float:
    return (known.grade(AFTER, grade) or 0.0) - (known.grade(BEFORE, grade) or 0.0)


# --- the aspects ----------------------------------------------------------------------------------------------


def _form(known: Evidence) -> str:
    after, shift = known.grade(AFTER, "well_formed") or 0.0, _shift(known, "well_formed")
    judged = {1: "it learned the form", -1: "it lost the form"}.get(shift, "it keeps to the form, as before")
    if not shift and after < FORMED:
        judged = "too small a change to tell from chance" if _difference(known, "well_formed") else "not learned"
    cut = known.late(CLIPPED_RATIO) or 0.0
    also = f"; {cut:.0%} of the last samples were cut" if cut >= CUT and after < FORMED else ""
    broken = rules_line(str(as_object(row.get(AFTER, {})).get("broken_rule", "")) for row in known.questions)
    also += f". Ill-formed: {broken}" if broken else ""
    return f"Form: {_moved(known, 'well-formed answers', 'well_formed')}: {judged}{also}."


def _accuracy(known: Evidence) -> str:
    grades = known.grades(AFTER)
    low, high = grades["accuracy_interval"]
    baseline, count, test = known.grade(AFTER, "majority_baseline"), known.count, ""
    if (p := as_number(known.outcome.get("mcnemar"))) is not None and _difference(known, "accuracy"):
        test = f"; McNemar {_p_value(p)}: the change {'is more than' if p < SIGNIFICANT else 'could be'} chance"
    compared = ""
    if baseline is not None:
        position = "above" if low > baseline else "below" if high < baseline else "not clearly different from"
        compared = f", {position} the {percent(baseline)} of always giving the most common label"
    return (
        f"Accuracy: {_moved(known, 'right answers', 'accuracy')} of {count} held-out questions (95% interval "
        f"{percent(low)} to {percent(high)}{test}){compared}. "
        f"{_p_right(known)}{small_sample(count, (low, high))}".rstrip()
    )


def _reward(known: Evidence) -> str:
    before, after = known.grade(BEFORE, "mean_reward"), known.grade(AFTER, "mean_reward")
    if before is None or after is None:
        return "Reward: of the held-out questions it is not known."
    p, test = as_number(known.outcome.get("reward_p_value")), ""
    if p is not None and before != after:
        test = f" (paired test {_p_value(p)}: the change {'is more than' if p < SIGNIFICANT else 'could be'} chance)"
    moved = "stayed at" if before == after else f"{'rose' if after > before else 'fell'} from {before:.3f} to"
    names = ", ".join(f"{as_label(name)} {value:.3f}" for name, value in known.by_label(AFTER, "mean_rewards").items())
    return f"Reward: its mean over {known.count} held-out questions {moved} {after:.3f}{test}; now {names}."


def _length(known: Evidence) -> str:
    first, last = known.early(MEAN_LENGTH), known.late(MEAN_LENGTH)
    if first is None or last is None:
        return "Length: not known."
    cut = f", {known.late(CLIPPED_RATIO) or 0.0:.0%} of the last cut at the limit"
    return f"Length: {first:.0f} tokens per sample at first, {last:.0f} at the end{cut}."


def _p_right(known: Evidence) -> str:
    """Mean p(right), which says more than right or wrong does; "" if it was not measured."""
    before, after = known.grade(BEFORE, "mean_p_right"), known.grade(AFTER, "mean_p_right")
    if before is None or after is None:
        return ""
    p = as_number(known.outcome.get("p_right_p_value"))
    return f"Mean p(right): {before:.3f}, then {after:.3f}{'' if p is None else f' (paired test {_p_value(p)})'}. "


def _lean(known: Evidence) -> str:
    answers = known.by_label(AFTER, "predicted")
    if not sum(answers.values()):
        return "Lean: not known, as no answer was well-formed."
    shares = ", ".join(f"{as_label(label)} {count:.0f}" for label, count in answers.items())
    if lean := lean_of(known, AFTER):
        collapsed = known.grades(AFTER).get("collapsed") is True
        most = "Nearly all answers are one class; then accuracy says little, see macro-F1. " if collapsed else ""
        was = ", as before" if (before := lean_of(known, BEFORE)) and before.label == lean.label else ""
        return f"Lean: {most}To “{lean.label}”{was}: {lean} (answers given: {shares}).{_behind_the_lean(known)}"
    return f"Lean: none beyond chance; answers given: {shares}."


def _behind_the_lean(known: Evidence) -> str:
    """Say what the probabilities tell apart all the same; "" if that could be chance."""
    area, interval = known.grade(AFTER, "auc"), known.grades(AFTER).get("auc_interval")
    if area is None or not interval or interval[0] <= CHANCE_AUC:
        return ""
    return (
        f" It hides what the model knows: its probabilities tell two questions of different classes apart in "
        f"{area:.0%} of all pairs (AUC; a coin toss has 50%)."
    )


def _reasoning(known: Evidence) -> str:
    gain, said = known.grade(AFTER, "reasoning_gain"), known.reasoning_words(AFTER)
    helps = "whether it helps was not measured"
    if gain is not None:
        helps = f"it changes p(right) by {gain:+.3f} on average"
    if said is None:
        lengths = known.early(MEAN_LENGTH), known.late(MEAN_LENGTH)
        tokens = (
            "" if None in lengths else f" ({lengths[0]:.0f} tokens per sample at first, {lengths[1]:.0f} at the end)"
        )
        return f"Reasoning: no well-formed answer has any{tokens}."
    before = known.reasoning_words(BEFORE)
    was = "" if before is None else f", {before:.0f} before"
    shrank = before is not None and said < FEW_WORDS <= before
    why = f"; it shrank{_pay_for_reasoning(known)}" if shrank else ""
    return f"Reasoning: {said:.0f} word{'' if said == 1 else 's'} per answer{was}{why}; {helps}."


ASPECTS: Mapping[AnswerKind, tuple[Callable[[Evidence], str], ...]] = {
    "labels": (_form, _accuracy, _lean, _reasoning),
    "number": (_form, _accuracy, _reasoning),
    "text": (_form, _accuracy, _reasoning),
    "none": (_reward, _length),
}


def _pay_for_reasoning(known: Evidence) -> str:
    functions = str(known.setting("reward_funcs"))
    if (
        known.kind != "labels" or BARE_LABEL in functions or known.config.get("reward_weights")
    ):  # a weight would be missing
        return ""
    return f", as no reward pays for it: --reward_funcs {functions},{BARE_LABEL}"


# --- what comes next -----------------------------------------------------------------------------------------------


def _outlook(known: Evidence) -> str:
    if known.kind != "labels" or not (size := known.parameters):  # other answers have not been measured here
        return ""
    expected = next(text for most, text in OUTLOOKS if size <= most)
    shown = f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.0f}M" if size >= 1e6 else f"{size:,}"
    larger = "; a larger model learns more, with a card: docs/recipes.md" if size < 1e9 else ""
    return f"What to expect: a model of {shown} parameters {expected}{larger} (docs/results.md has real runs)."


def _changes(known: Evidence, found: tuple[Cause, ...]) -> tuple[str, ...]:
    """The best flag of each cause, more steps, enough questions; a flag that needs a user's file is left to the user.

    Empty for records that a script passed, which no command can name.
    """
    if known.config.get("data") == RECORDS:
        return ()
    flags = [cause.flags[0] for cause in found if cause.flags and len(cause.flags[0].split()) == 2]
    by_name = {flag.split()[0]: flag for flag in (f"--num_steps {more_steps(known)}", *reversed(flags))}
    if (limit := as_number(known.config.get("eval_limit"))) and limit < FEWEST_TO_COMPARE:
        by_name.setdefault("--eval_limit", f"--eval_limit {FEWEST_TO_COMPARE}")
    return tuple(by_name.values())


def _so_far(known: Evidence) -> str:
    """Sum up a run without answers after training."""
    first, last = known.early("reward"), known.late("reward")
    reward = ""
    if first is not None:
        reward = f" The mean reward was {first:.2f} in the first quarter of the steps and {last:.2f} in the last."
    if not known.grades(BEFORE):
        return f"No held-out answers were compared.{reward}"
    accuracy, baseline = known.grade(BEFORE, "accuracy"), known.grade(BEFORE, "majority_baseline")
    if accuracy is None:
        earned = known.grade(BEFORE, "mean_reward") or 0.0
        found = f"the mean reward of {known.count} held-out questions was {earned:.3f}"
    else:
        found = f"{percent(accuracy)} of {known.count} held-out questions were answered right"
    if baseline is not None:
        found += f" (majority baseline (always the most common label): {percent(baseline)})"
    return f"Before training, {found}; the answers after training do not exist yet.{reward}"


def _note(known: Evidence, found: tuple[Cause, ...]) -> str:
    steps = len(known.steps)
    if few_steps(known):
        return (
            f"Too few steps to judge by ({steps}): a small model takes 15 to 40 to learn the form of an answer, and "
            "more to learn a task."
        )
    none = f"No known cause shows in the numbers of these {steps} steps; most often there are too few of them."
    return "" if found else none


def _p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _moved(known: Evidence, what: str, grade: str) -> str:
    before, after = known.grade(BEFORE, grade) or 0.0, known.grade(AFTER, grade) or 0.0
    if before == after:
        return f"{what} stayed at {percent(after)}"
    return f"{what} {'rose' if after > before else 'fell'} from {percent(before)} to {percent(after)}"
