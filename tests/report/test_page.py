"""The report of a run: what it says, what it leaves out, and that a browser reports no error."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from markupsafe import escape

from grpo_ds.errors import MAX_LINES, UsageError
from grpo_ds.report import answers, curves, environment, key_figures, memory_page, verdict, words
from grpo_ds.report.metric_names import reward_name
from grpo_ds.report.page import command_line, page, settings, write_page
from grpo_ds.report.run_files import LONGEST_TEXT, RunFiles, memory_by_phase, read_run
from grpo_ds.run_folder.files import REPORT_FILE
from tests.conftest import check_example
from tests.report import runs
from tests.report.browser import Browser, find_chromium

ROOT = Path(__file__).resolve().parents[2]
CSS = ROOT / "grpo_ds" / "report" / "page.css"
STEPS, ASKED = 60, 40
CHARTS = ["Reward", "Accuracy", "KL per token", "Completion length", "Entropy per token", "Shares per step"]
CHARTS += ["Gradient norm", "Seconds per step", "Memory over time: GPU memory, GiB", "Memory over time: RAM, GiB"]
PLAIN_TAGS = {
    "html", "head", "meta", "title", "link", "style", "body", "main", "header", "p", "h1", "h2", "h3", "h4", "dl", "dt",
    "dd", "div", "section", "figure", "figcaption", "ul", "li", "span", "bdi", "table", "thead", "tbody", "tr", "th",
    "td", "i", "b", "article", "details", "summary", "pre", "code", "footer", "strong", "abbr",
    "svg", "g", "path", "defs", "use", "text", "line", "rect", "clipPath",
}  # fmt: skip
HOSTILE = (
    "<script>window.ran=1</script></style><style>body{display:none}</style></title><img src=x onerror=window.ran=1>"
    ' "onload="window.ran=1" \'><svg onload=window.ran=1> {{7*7}} {% raw %} ]]> <!-- $x^ \\frac{ http://127.0.0.1/'
    f" \u202egnp.exe \x1b[31m \ud800 {'W' * 3000}"
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A complete run, which no test changes."""
    return runs.complete(tmp_path_factory.mktemp("runs") / "finished", steps=STEPS, asked=ASKED)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, for tests that change it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not find_chromium():
        pytest.skip("no Chromium found: apt install chromium")
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


def change(file, **values):
    """Replace some values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def launch(*words):
    line = [sys.executable, ROOT / "launch" / "report.py", *map(str, words)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


def titles(run):
    return [chart.title for chart in [*curves.curves(run), *memory_page.timeline_charts(run)]]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_all_of_it_in_the_window_and_asks_for_nothing_else(browser, finished, tmp_path, width, dark):
    seen = browser.see(write_page(finished, tmp_path / "page.html"), width=width, dark=dark)
    shown = seen.measures
    assert seen.complaints == [] and seen.requests == [(tmp_path / "page.html").as_uri()]
    assert shown["wide"] == width and shown["overflow"] == 0 and shown["beyond"] == []
    assert [label.partition(".")[0] for label in shown["charts"]] == CHARTS
    assert shown["chartFont"] >= 10  # pixels: legible
    for title in ("Held-out questions", "Completions during training", "Settings and machine", "Versions"):
        assert title in shown["text"]


def test_light_and_dark_differ_in_page_text_and_lines(browser, finished, tmp_path):
    file = write_page(finished, tmp_path / "page.html")
    light, dark = (browser.see(file, dark=dark).measures for dark in (False, True))
    assert all(light[part] != dark[part] for part in ("background", "colour", "line"))


def test_a_page_can_be_read_aloud(browser, finished, tmp_path):
    shown = browser.see(write_page(finished, tmp_path / "page.html")).measures
    levels = shown["headings"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(deeper <= level + 1 for level, deeper in pairwise(levels))
    assert len(set(shown["ids"])) == len(shown["ids"])  # those that matplotlib gives its clip paths too
    assert all(re.search(r"\d", label) for label in shown["charts"])  # each says its values
    assert '<html lang="en">' in (tmp_path / "page.html").read_text()


def hostile_run(folder):
    """Write a run in which every text from data, models, people or other programs is an attack."""
    runs.complete(folder, steps=3, asked=6)
    held = json.loads((folder / "held_out.json").read_text())
    for row in held["questions"]:
        row |= {"question": HOSTILE, "label": HOSTILE}
        row["after"] |= {"text": HOSTILE, "answer": HOSTILE, "rewards": {HOSTILE: 1.0}}
    for grades in (held["before"], held["after"]):
        grades |= {"recall": {HOSTILE: 0.5}, "predicted": {HOSTILE: 6}, "collapsed": True}
    (folder / "held_out.json").write_text(json.dumps(held))
    for name in ("metrics.jsonl", "completions.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        texts = {"question": HOSTILE, "completion": HOSTILE} if name.startswith("c") else {}
        more = {f"rewards/{HOSTILE}": 0.5, f"rewards/{HOSTILE}/mean": 0.5, f"seconds/{HOSTILE}": 1.0}
        (folder / name).write_text("".join(json.dumps(row | more | texts) + "\n" for row in rows))
    memory = json.loads((folder / "memory.json").read_text())
    memory["measured"][0]["phase"] = memory["spans"][0]["phase"] = HOSTILE
    (folder / "memory.json").write_text(json.dumps(memory))
    change(folder / "environment.json", cpu=HOSTILE, gpus=[HOSTILE], versions={HOSTILE: HOSTILE}, command=[HOSTILE])
    change(folder / "run_status.json", state="failed", message=HOSTILE, resume=HOSTILE, max_steps=HOSTILE)
    (folder / "grpo_config.yaml").write_text(json.dumps({"model": HOSTILE, HOSTILE[:200]: HOSTILE}))


def test_texts_of_others_stay_texts(browser, tmp_path):
    folder = tmp_path / "<img src=x onerror=window.ran=1>{{7*7}}"
    hostile_run(folder)
    seen = browser.see(write_page(folder, tmp_path / "page.html"), width=360)
    shown, source = seen.measures, (tmp_path / "page.html").read_text()
    assert seen.complaints == [] and len(seen.requests) == 1 and shown["ran"] is None
    assert shown["title"] == f"Run report: {folder.name}" and folder.name in shown["text"]
    assert set(shown["tags"]) <= PLAIN_TAGS and shown["handlers"] == [] and shown["links"] == ["data:,"]
    assert "left out" not in shown["text"].lower()  # nothing was lost either
    assert shown["overflow"] == 0 and shown["beyond"] == []
    assert "<script>window.ran=1</script>" in shown["text"] and "{{7*7}}" in shown["text"]
    assert source.count("<style>") == 1 and not set("\u202e\x1b") & set(source) and r"\x1b[31m" in shown["text"]
    assert all(re.fullmatch(r"[\d.%e\u2212\u00d7]*", words) for words in shown["chartTexts"])  # axes have numbers alone


def test_a_page_is_made_without_torch(finished, tmp_path):
    script = (
        "import sys; from grpo_ds.commands.report import main; main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'datasets') if name in sys.modules])"
    )
    words = [sys.executable, "-c", script, finished, "--output", tmp_path / "page.html"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    assert said == f"Report: {tmp_path / 'page.html'}\n[]\n"


def test_the_script_writes_into_the_folder(run):
    result = launch(run)
    assert (result.returncode, result.stdout) == (0, f"Report: {run / REPORT_FILE}\n")
    assert (run / REPORT_FILE).read_text() == page(read_run(run))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{empty}"], ["empty", "metrics.jsonl", "--output_dir"]),
        (["{empty}/nowhere"], ["nowhere"]),
        ([], ["DIR", "launch/report.py outputs/RUN"]),
        (["{run}", "--outptu", "x.html"], ["--outptu"]),
        (["{run}", "--output", "{run}/metrics.jsonl"], ["metrics.jsonl", ".html"]),
        (["{run}", "--output", "{empty}/no/where.html"], ["where.html", "No such file"]),
    ],
)
def test_what_cannot_be_reported_is_said_in_a_few_lines(run, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    before = (run / "metrics.jsonl").read_bytes()
    result = launch(*(word.format(empty=tmp_path / "empty", run=run) for word in words))
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) <= MAX_LINES
    assert all(word in result.stderr for word in said) and "Traceback" not in result.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_goes_on_says_where_it_stands(tmp_path):
    runs.logged(tmp_path, 5)
    runs.answered(tmp_path, 10, over=False)
    runs.RunStatus(tmp_path, max_steps=100).write("training", step=5)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 6, "rew')  # as it is being written
    run = read_run(tmp_path)
    shown = page(run)
    assert "This run has not ended: it was training at step 5 of 100" in shown and "do not exist yet" in shown
    assert len(run.steps) == 5 and "left out" not in shown and ">after<" not in shown
    assert "0 gained" not in shown


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_run_that_was_cut_short_says_how_to_resume_it(run, state):
    change(run / "run_status.json", state=state, exit_code=5, message="Out of memory.\nMore", resume="python again.py")
    shown = page(read_run(run))
    sentence = f"{state.capitalize()} at step 60 of 60 with exit code 5: Out of memory. Resume with: python again.py"
    assert sentence in shown


@pytest.mark.parametrize("steps", [0, 1, 2, 21, 400])
def test_any_number_of_steps_makes_a_page(tmp_path, steps):
    runs.logged(tmp_path, steps)
    (tmp_path / "metrics.jsonl").touch()
    shown = page(read_run(tmp_path))
    assert ("Seconds per step" in shown) == (steps > 0)
    assert "No held-out answers were compared." in shown


def test_a_long_run_makes_a_page_that_opens_as_fast(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, **runs.metrics(step, 9000)}) + "\n" for step in range(1, 9001))
    )
    assert len(page(read_run(tmp_path))) < 2_000_000


def test_without_a_reference_there_is_no_kl(tmp_path):
    runs.logged(tmp_path, 3, kl=0.0)
    assert "KL per token" not in titles(read_run(tmp_path))


def test_steps_without_a_finite_number_are_gaps_and_counted(tmp_path):
    runs.logged(tmp_path, 30)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "reward": None, "kl": None}) + "\n" for step in (31, 32))
        file.write('{"step": 33, "reward": 1e999, "kl": 1e308}\n')
    charts = {chart.title: chart for chart in curves.curves(read_run(tmp_path))}
    assert "3 steps without a finite number left out" in charts["Reward"].caption
    assert "2 steps without a finite number left out" in charts["KL per token"].caption


def test_a_run_evaluated_and_nothing_else_has_its_accuracy(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "eval/accuracy": 0.5}\n{"step": 40, "eval/accuracy": 0.75}\n')
    (chart,) = curves.curves(read_run(tmp_path))
    assert chart.label.startswith("Accuracy. held-out questions, greedy 50% → 75%.")


NOT_WHAT_THEY_SHOULD_BE = ["", "[1, 2]", '{"a": ' * 5000, "\udcff\x00"]
OF_THE_WRONG_SHAPE = {
    "held_out.json": ['{"before": 3}', '{"before": {}, "after": {"count": "x"}}', '{"questions": [{"question": 1}]}'],
    "memory.json": ['{"planned": 1}', '{"measured": [{"phase": "load"}], "planned": {"load": 3}}'],
    "environment.json": ['{"versions": []}', '{"command": 3}', '{"commands": 3}', '{"gpus": [1]}'],
    "run_status.json": [],
    "grpo_config.yaml": [],
    "summary.json": [],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, wrong in OF_THE_WRONG_SHAPE.items() for content in [*NOT_WHAT_THEY_SHOULD_BE, *wrong]],
)
def test_a_damaged_file_is_left_out_and_named(run, name, content):
    (run / name).write_bytes(content.encode(errors="surrogateescape"))
    read = read_run(run)
    shown = page(read)
    assert read.damaged == [name] and f"Damaged, so left out: {name}." in shown
    assert "Reward" in shown  # and the rest is there


def test_damaged_lines_of_metrics_are_counted(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3:5] = ['{"step": 4, "rew', '["no", "step"]']
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "Damaged, so left out: metrics.jsonl (2 of its lines)." in page(read_run(run))


def test_a_fifo_in_place_of_a_file_is_not_waited_for(run):
    (run / "memory.json").unlink()
    os.mkfifo(run / "memory.json")
    assert not read_run(run).memory


def grades(accuracy, interval, **more):
    return dict(
        count=100, accuracy=accuracy, accuracy_interval=interval, macro_f1=0.5, recall={"yes": 1.0, "no": 0.0},
        well_formed=0.9, majority_baseline=0.62, predicted={"yes": 60, "no": 30}, collapsed=False,
    ) | more  # fmt: skip


@pytest.mark.parametrize(
    ("after", "p", "words"),
    [
        (
            grades(0.8, (0.71, 0.87)),
            0.00004,
            ["rose from 50.0% to 80.0%", "p < 0.001: the change is more than chance", "above the 62"],
        ),
        (grades(0.6, (0.50, 0.69)), 0.12, ["rose", "p = 0.120: the change could be chance", "not clearly different"]),
        (
            grades(0.3, (0.22, 0.40)),
            0.01,
            ["fell from 50.0% to 30.0%", "p = 0.010: the change is more than", "below the 62.0%"],
        ),
        # The interval ends under it; where nothing has changed, no change could be chance.
        (grades(0.5, (0.40, 0.60)), 1.0, ["stayed at 50.0%", "interval 40.0% to 60.0%), below the 62.0%"]),
    ],
)
def test_the_verdict_says_direction_chance_and_baseline(after, p, words):
    run = RunFiles("r", held_out={"before": grades(0.5, (0.4, 0.6)), "after": after, "mcnemar": p})
    said = "\n".join(verdict.of(run).aspects)
    assert all(word in said for word in words) and "well-formed answers stayed at 90.0%" in said


@pytest.mark.parametrize(("count", "warned"), [(19, True), (20, False)])
def test_the_verdict_on_few_questions_says_what_its_interval_is_worth(count, warned):
    both = grades(0.5, (0.3, 0.7), count=count)
    run = RunFiles("r", held_out={"before": both, "after": both, "mcnemar": 1.0})
    assert ("An evaluation of 19 questions says little: its 95 % interval, 30% to 70%" in page(run)) is warned


def test_answers_of_one_class_are_warned_of():
    after = grades(0.62, (0.52, 0.71), predicted={"yes": 99, "no": 1}, collapsed=True)
    run = RunFiles("r", held_out={"before": grades(0.5, (0.4, 0.6)), "after": after, "mcnemar": 0.1})
    assert "Nearly all answers are one class" in page(run) and "To “yes”: 99% of the answers" in page(run)
    run.held_out["after"]["collapsed"] = False
    assert "one class" not in page(run)


def test_the_page_of_few_steps_says_so_before_the_causes():
    both, steps = (
        grades(0.5, (0.4, 0.6)),
        [{"step": step, "entropy": 0.001, "weights_moved": 0.01} for step in (1, 2, 3)],
    )
    made = page(RunFiles("r", steps=steps, held_out={"before": both, "after": both}))
    assert made.index("Too few steps to judge by (3)") < made.index("Why not more") < made.index("The entropy is gone")


def test_gained_and_lost_are_both_shown_and_the_rest_is_counted():
    def row(i, before, after):
        sides = {"before": {"text": f"t{i}", "answer": before}, "after": {"text": f"t{i}", "answer": after}}
        return {"id": str(i), "question": f"q{i}", "label": "yes", **sides}

    rows = [row(i, "no", "yes") for i in range(50)] + [row(50, "yes", None)] + [row(i, "yes", "yes") for i in (51, 52)]
    found = answers.pairs(RunFiles("r", held_out={"questions": rows}))
    assert (found.count, found.gained, found.lost, len(found.shown)) == (53, 50, 1, answers.MOST_PAIRS)
    assert [pair.change for pair in found.shown[:11]] == ["gained"] * 10 + ["lost"]
    assert found.shown[10].after.verdict == "wrong: no answer in the required form"


def test_the_first_screen_names_model_and_data(finished, tmp_path):
    about = key_figures.about(read_run(finished))
    assert about == [("Model", "smollm2-135m"), ("Data", "40 held out")]
    config = {"model": "/models/mine", "data": "/data/quiz.json", "lora_r": 16}
    run = RunFiles("r", config=config, summary={"questions": {"train": 128, "held_out": 32}})
    assert key_figures.about(run) == [
        ("Model", "mine, a LoRA adapter of rank 16"), ("Data", "quiz.json: 128 to train on, 32 held out"),
    ]  # fmt: skip
    assert page(run).index("quiz.json: 128") < page(run).index('class="verdict"')


def test_held_out_questions_carry_their_context_folded_and_what_broke_the_form(finished):
    made = page(read_run(finished))
    folded = re.findall(r'<details class="context"><summary>Context</summary>.*?In trial \d+ both', made)
    assert len(folded) == answers.MOST_PAIRS
    assert "wrong: no answer in the required form (no tags)" in made


def test_a_completion_that_was_cut_is_marked():
    row = {"question": "q", "label": "yes", "completion": "<reasoning>It", "reward": 0.0}
    cut = {**row, "broken_rule": "cut at --max_completion_length"}
    made = page(RunFiles("r", steps=[{"step": 1, "reward": 0.0}], completions={1: [row, cut]}))
    assert made.count('<span class="wrong">✗ <bdi>cut at --max_completion_length</bdi></span>') == 1


def test_ill_formed_answers_are_counted_by_the_rule_that_they_break(finished):
    run = read_run(finished)
    for row in run.held_out["questions"]:
        row["after"] |= {"answer": None, "broken_rule": "empty reasoning"}
    run.held_out["after"]["well_formed"] = 0.0
    assert "Ill-formed: 40 x empty reasoning." in verdict.of(run).aspects[0]


def test_words_of_the_trade_are_explained_where_they_stand(finished):
    made = page(read_run(finished))
    for word, line in words.WORDS.items():
        if word not in ("AUC", "p(right)"):  # not measured here
            assert f'<abbr title="{escape(line)}">{word}</abbr>' in made, word
    assert words.explained("KL <b> KL") == f'<abbr title="{words.WORDS["KL"]}">KL</abbr> &lt;b&gt; KL'
    assert words.explained("KLM, no nats") == f'KLM, no <abbr title="{words.WORDS["nats"]}">nats</abbr>'


def test_the_sentences_on_the_pairs_stand_apart(finished):
    assert "unchanged, of 40. 30 are shown, changed ones first; the other 10 are in held_out.json." in page(
        read_run(finished)
    )


def test_long_texts_end_with_how_much_is_missing(run):
    held = json.loads((run / "held_out.json").read_text())
    held["questions"][0]["after"]["text"] = "x" * (LONGEST_TEXT + 17)
    (run / "held_out.json").write_text(json.dumps(held))
    assert f"{'x' * 50} … (17 more characters)" in page(read_run(run))


def test_completions_are_those_of_the_first_the_middle_and_the_last_step(finished):
    read = read_run(finished)
    assert list(read.completions) == [1, 31, 60] and [len(rows) for rows in read.completions.values()] == [8, 8, 8]
    assert [(s.count, len(s.shown)) for s in answers.sampled_steps(read)] == [(8, 4)] * 3


def test_settings_that_differ_come_with_their_default(finished):
    found = {setting.name: (setting.value, setting.default) for setting in settings(read_run(finished))}
    assert found["learning_rate"] == ("2e-05", "1e-06") and found["beta"] == ("0.04", None)


def test_the_command_is_what_was_typed():
    words = ["deepspeed", "launch/train.py", "--data", "my file.json"]
    typed = command_line(RunFiles("r", environment={"command": words}))
    assert typed == "deepspeed launch/train.py \\\n  --data 'my file.json'"
    assert shlex.split(typed.replace("\\\n", "")) == words


@pytest.mark.parametrize(
    "before", [None, "{", '{"commands": 3}', '{"command": ["began"]}', '{"commands": [["began"]]}']
)
def test_a_resumed_run_keeps_the_command_that_began_it(tmp_path, monkeypatch, before):
    if before:
        (tmp_path / "environment.json").write_text(before)
    monkeypatch.setattr(environment, "restart_words", lambda: ["train"])
    for flags in (["--resume_from_checkpoint", "a run"],) * 2:
        monkeypatch.setattr(environment, "flag_words", lambda flags=flags: flags)
        environment.write_environment(tmp_path, ranks=1)
    (tmp_path / "run_status.json").write_text('{"status": "finished"}')
    began = "began\n" if before and "began" in before else ""
    assert command_line(read_run(tmp_path)) == f"{began}train \\\n  --resume_from_checkpoint 'a run'"


def test_a_run_that_goes_on_shows_its_last_evaluation():
    evaluations = [{"step": step, "eval/accuracy": share} for step, share in ((20, 0.55), (40, 0.65))]
    run = RunFiles("r", held_out={"before": grades(0.5, (0.4, 0.6))}, evaluations=evaluations)
    found = {tile.name: (tile.value, tile.beside) for tile in key_figures.tiles(run)}
    assert found["Accuracy"] == ("65.0%", "after step 40; before: 50.0%")
    assert found["Macro-F1"] == ("0.500", "before training")


def test_a_line_is_the_mean_of_its_neighbours_and_says_so():
    values = [(1, 1.0), (2, 2.0), (3, 6.0), (4, float("nan"))]
    line = curves.smoothed(values, 3)
    assert line == [(1, 1.5), (2, 3.0), (3, 4.0), (4, 6.0)]  # (1+2)/2, (1+2+6)/3, (2+6)/2, 6/1
    assert curves.window(20) == 1 and curves.window(21) == 5 and curves.window(120) == 13
    assert curves.window(10**6) == curves.LONGEST_MEAN
    steps = [{"step": i, "accuracy": 0.5} for i in range(1, 1001)]
    caption = curves.accuracy_curve(RunFiles("r", steps=steps)).caption
    assert caption == "Line: mean of 51 steps, fewer at the ends; dots: means of 7 steps."
    assert len(curves.thinned([(row["step"], 0.5) for row in steps])) <= curves.MOST_DOTS


def test_a_phase_that_outgrew_its_plan_says_by_how_much():
    gib = 2**30
    uses = [
        {"phase": "update", "ram_peak": 5 * gib, "gpu_peak": 0},
        {"phase": "floor", "ram_peak": gib, "gpu_peak": 0},
    ]
    planned = {"update": {"gpu": {}, "ram": {"weights": 3 * gib, "process": gib}}}
    found = memory_page.phase_bars(RunFiles("r", memory={"measured": uses, "planned": planned}))
    update, floor = found["RAM"]
    assert list(found) == ["RAM"] and (update.plan_error, floor.plan_error) == ("+20%", "")  # (5 - 4) / 5
    assert (update.percent(update.measured), floor.percent(floor.measured)) == ("100.0", "20.0")


OLD_KEYS = {"ram": "host", "ram_peak": "host_peak", "ram_end": "host_end"}
OLD_METRICS = {
    "rewards/correctness/mean": "rewards/correctness",
    "rewards/format/mean": "rewards/format",
    "completions/mean_length": "completion_length",
    "clip_ratio/region_mean": "clip_fraction",
}


def in_an_older_version(run):
    """Rewrite metrics.jsonl and memory.json with the names of an older version."""
    memory = (run / "memory.json").read_text()
    for new, old in OLD_KEYS.items():
        memory = memory.replace(f'"{new}":', f'"{old}":')
    (run / "memory.json").write_text(memory)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in [name for name in row if name.endswith("/std") or name in ("num_tokens", "epoch", "step_time")]:
            del row[name]
        if "reward" in row:
            row |= {old: row.pop(new) for new, old in OLD_METRICS.items()}
            row["ended"] = 1 - row.pop("completions/clipped_ratio")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_of_an_older_version_has_the_same_report(finished, run):
    in_an_older_version(run)
    assert '"host_peak"' in (run / "memory.json").read_text() and '"ended"' in (run / "metrics.jsonl").read_text()
    old, new = read_run(run), read_run(finished)
    assert old.memory == new.memory and memory_by_phase(run) == memory_by_phase(finished)
    assert [chart.label for chart in curves.curves(old)] == [chart.label for chart in curves.curves(new)]
    assert key_figures.tiles(old) == key_figures.tiles(new) and old.damaged == []


def test_a_text_where_an_older_version_had_a_number_is_a_damaged_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ended": "no"}\n{"step": 2, "ended": 0.25}\n')
    run = read_run(tmp_path)
    assert run.steps == [{"step": 2, "completions/clipped_ratio": 0.75}]
    assert run.damaged == ["metrics.jsonl (1 of its lines)"]


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("rewards/format/mean", "format"),
        ("rewards/a/b/mean", "a/b"),  # no function has such a name, but a file may
        ("rewards/format/std", None),
        ("rewards/format", None),  # a row of completions.jsonl
        ("eval/accuracy", None),
    ],
)
def test_a_reward_is_found_by_its_mean(metric, name):
    assert reward_name(metric) == name


def test_the_example_of_a_data_class_is_right():
    check_example(RunFiles)


def luminance(colour):
    """Relative luminance of an sRGB colour, as defined by WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_lines_stand_out_and_texts_can_be_read(theme):
    blocks = re.findall(r":root \{(.*?)\}", CSS.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[theme]))

    def contrast(name, ground):
        low, high = sorted(luminance(colours[part]) for part in (name, ground))
        return (high + 0.05) / (low + 0.05)

    lines = [name for name in colours if name.startswith("series-")]
    assert len(lines) == 6 and all(contrast(name, "card") >= 3 for name in lines)
    texts = ("text", "muted", "right", "wrong", "accent")
    assert all(contrast(name, ground) >= 4.5 for name in texts for ground in ("card", "page"))
    assert contrast("text", "warn") >= 4.5


def test_a_report_that_cannot_be_written_does_not_fail_the_run(finished, capsys, monkeypatch):
    from grpo_ds.report.console import Console
    from grpo_ds.training.reports import Reports

    reports = Reports.__new__(Reports)
    reports.writes, reports.folder, reports.console = True, finished / "gone", Console()
    reports.page()
    assert "Warning: no report was written" in capsys.readouterr().out


def test_no_run_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="not a run's folder"):
        read_run(tmp_path)
