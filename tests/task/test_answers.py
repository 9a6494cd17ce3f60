"""The answer contract: what counts as an answer, and what earns nothing."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.task.answers import TAG_NAME, AnswerFormat
from grpo_ds.task.spelling import label_key

LABELS = ("yes", "no")
FORMAT = AnswerFormat(LABELS)
GOOD = "<reasoning>It fell.</reasoning><answer>yes</answer>"

ANSWERS = [
    (GOOD, "yes"),
    ("<reasoning>It fell.</reasoning><answer>no</answer>", "no"),
    (f"\n {GOOD} \n", "yes"),  # white space around the pairs is ignored
    ("<reasoning>\nIt\nfell.\n</reasoning>\n\n<answer>\nyes\n</answer>", "yes"),  # also between and inside them
    ("<reasoning>It fell.</reasoning><answer> Yes. </answer>", "yes"),  # case, space and one full stop are ignored
    ("<reasoning>It fell.</reasoning><answer>NO .</answer>", "no"),
    ("<reasoning>a < b > c </p></reasoning><answer>yes</answer>", "yes"),  # other angle brackets are text
]

NO_ANSWERS = [
    ("", "an empty completion"),
    ("The answer is yes", "outside the tags it is prose"),
    ("<answer>yes</answer>", "no reasoning"),
    ("<reasoning>It fell.</reasoning>", "no answer"),
    ("<reasoning>It fell.</reasoning>yes", "the answer is not in tags"),
    (f"{GOOD}<answer>no</answer>", "two answers are no answer"),
    (f"{GOOD}<answer>yes</answer>", "also if they agree"),
    (f"{GOOD}{GOOD}", "everything twice"),
    ("<reasoning>It <answer>yes</answer> fell.</reasoning>", "the answer is inside the reasoning"),
    ("<reasoning>It <answer>yes</answer></reasoning><answer>yes</answer>", "one inside, one after"),
    ("<reasoning>It fell.<answer>yes</answer>", "the reasoning never ends, so the answer is inside it"),
    ("<answer><reasoning>It fell.</reasoning>yes</answer>", "the reasoning is inside the answer"),
    ("<answer>yes</answer><reasoning>It fell.</reasoning>", "the answer comes before the reasoning"),
    ("<reasoning>a<reasoning>b</reasoning></reasoning><answer>yes</answer>", "nested reasoning"),
    ("<reasoning>a</reasoning><answer><answer>yes</answer></answer>", "nested answers"),
    ("</reasoning>It fell.<reasoning><answer>yes</answer>", "closed before it was opened"),
    ("It fell.</reasoning><answer>yes</answer>", "not opened: the caller did not put the prefilled tag back"),
    ("<reasoning>It fell.</reasoning><answer>yes", "cut off in the answer"),
    ("<reasoning>It fell.</reasoning>yes</answer>", "the answer was never opened"),
    ("<reasoning>a</reasoning><answer>yes</reasoning>", "closed by the wrong tag"),
    ("<reasoning></reasoning><answer>yes</answer>", "empty reasoning"),
    ("<reasoning> \n </reasoning><answer>yes</answer>", "blank reasoning"),
    ("<reasoning>...</reasoning><answer>yes</answer>", "dots are not reasoning"),
    ("<reasoning>\nYour reasons.</reasoning><answer>yes</answer>", "the prompt's placeholder is not reasoning"),
    ("<reasoning>a</reasoning><answer>yes or no</answer>", "the prompt's other placeholder is not an answer"),
    ("<reasoning>a</reasoning><answer></answer>", "empty answer"),
    ("<reasoning>a</reasoning><answer>.</answer>", "a full stop alone"),
    ("<reasoning>a</reasoning><answer>yes..</answer>", "one full stop is ignored, not two"),
    ("<reasoning>a</reasoning><answer>yes or no</answer>", "both labels"),
    ("<reasoning>a</reasoning><answer>maybe</answer>", "not one of the labels asked for"),
    ("<reasoning>a</reasoning><answer>yes, it fell</answer>", "more than the label"),
    (f"Sure! {GOOD}", "prose before"),
    ("<reasoning>a</reasoning>So:<answer>yes</answer>", "prose between"),
    (f"{GOOD} I hope this helps.", "prose after"),
    ("<REASONING>a</REASONING><ANSWER>yes</ANSWER>", "tags are lower-case"),
    ("< reasoning >a</ reasoning ><answer>yes</answer>", "tags have no spaces"),
    ("<reasoning>a<reasoning><answer>yes<answer>", "opened where it should close"),
    ("<reasoning>a <ANSWER>no</ANSWER></reasoning><answer>yes</answer>", "a look-alike is a second answer"),
    ('<reasoning>a <answer id="1"></reasoning><answer>yes</answer>', "also with an attribute"),
    ("<reasoning>a <|im_end|></reasoning><answer>yes</answer>", "another turn begins"),
    ("<reasoning>a</reasoning><answer>ye\u017f</answer>", "case folding alone would accept the long s"),
]

PAIRS = [
    (GOOD, True, True),
    ("<reasoning>a</reasoning>", True, False),
    ("<reasoning>a</reasoning><answer>yes", True, False),  # cut off: the complete pair still counts
    ("<reasoning>a</reasoning><answer>perhaps</answer>", True, False),  # no label, no answer
    ("<answer>no</answer>", False, True),
    ("<reasoning>...</reasoning><answer>no</answer>", False, True),
    (f"Sure! {GOOD} Bye.", True, True),  # the pairs are well-formed, the text is not: no answer
    ("<reasoning>a", False, False),
    ("<reasoning>a<answer>yes</answer></reasoning>", False, False),
    ("<reasoning>a<answer>yes</answer>", False, False),
    ("<answer>yes</answer><reasoning>a</reasoning>", False, False),  # out of order: neither
    (f"{GOOD}<answer>no</answer>", False, False),  # a second pair makes both worthless
    ("<reasoning>a</reasoning></answer>", False, False),  # a stray tag does so too
    ("</answer></reasoning><answer><reasoning>", False, False),  # all four tags, in the wrong order
]


@pytest.mark.parametrize(("completion", "answer"), ANSWERS)
def test_an_answer_by_the_contract_is_read(completion, answer):
    parsed = FORMAT.parse(completion)
    assert (parsed.answer, parsed.well_formed) == (answer, True)
    assert parsed.reasoning_tags and parsed.answer_tags


@pytest.mark.parametrize(("completion", "why"), NO_ANSWERS)
def test_a_completion_that_breaks_the_contract_has_no_answer(completion, why):
    parsed = FORMAT.parse(completion)
    assert (parsed.answer, parsed.well_formed) == (None, False), why


@pytest.mark.parametrize(("completion", "reasoning_tags", "answer_tags"), PAIRS)
def test_a_tag_pair_counts_only_in_its_place(completion, reasoning_tags, answer_tags):
    parsed = FORMAT.parse(completion)
    assert (parsed.reasoning_tags, parsed.answer_tags) == (reasoning_tags, answer_tags)


def test_maybe_is_an_answer_where_it_is_a_label():
    with_maybe = AnswerFormat((*LABELS, "maybe"))
    assert with_maybe.parse(with_maybe.write("a", "maybe")).answer == "maybe"


ACCENTED = AnswerFormat(("caf\u00e9", "e\u0301te\u0301", "no"))  # composed and decomposed


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("caf\u00e9", "caf\u00e9"),
        ("cafe\u0301", "caf\u00e9"),
        (" CAFE\u0301. ", "caf\u00e9"),
        ("\u00e9t\u00e9", "e\u0301te\u0301"),  # returned as the label is spelled
        ("\u00c9te\u0301", "e\u0301te\u0301"),
        ("cafe", None),  # another letter
        ("cafe\u0300", None),
        ("no\u0301", None),
        ("\u0338no", None),  # Unicode's "not greater than" ends no tag
    ],
)
def test_a_label_is_read_in_either_unicode_form(written, label):
    assert ACCENTED.parse(f"<reasoning>a</reasoning><answer>{written}</answer>").answer == label


OTHERS = AnswerFormat(("A", "B", "U.S.", "Straße"), reasoning_tag="think", answer_tag="final-answer")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>x</think><final-answer>A</final-answer>", "A"),
        ("<think>x</think><final-answer> b. </final-answer>", "B"),  # read in any case, returned as the label
        ("<think>x</think><final-answer>u.s.</final-answer>", "U.S."),  # a full stop may belong to the label
        ("<think>x</think><final-answer>STRASSE</final-answer>", "Straße"),
        ("<think>x</think><final-answer>C</final-answer>", None),
        ("<think>x</think><final-answer>A|B</final-answer>", None),
        ("<think>x</think><answer>A</answer>", None),  # tags of another format are text
        ("<think><reasoning>x</think><final-answer>A</final-answer>", "A"),  # also inside the reasoning
    ],
)
def test_a_format_reads_its_own_labels_and_tags(completion, answer):
    assert OTHERS.parse(completion).answer == answer


def test_a_format_reads_back_what_it_writes_and_knows_its_opening_and_stop_tags():
    assert [OTHERS.parse(OTHERS.write("x", label)).answer for label in OTHERS.labels] == list(OTHERS.labels)
    assert (OTHERS.opening, OTHERS.stop) == ("<think>", "</final-answer>")
    assert OTHERS.split(OTHERS.write("x", "A")) == ("x", "<final-answer>A</final-answer>")


@settings(deadline=None)  # the cores are shared
@given(st.text(st.characters(exclude_characters="<")), st.sampled_from(LABELS))
def test_a_written_answer_is_read_back(reasoning, answer):
    # Any text with a word and without our tags is reasoning.
    assert FORMAT.parse(FORMAT.write(f"word {reasoning}", answer)).answer == answer


TAG_SOUP = st.lists(
    st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "yes", " ", "because"]), max_size=12
).map("".join)


@settings(deadline=None)  # the cores are shared
@given(TAG_SOUP)
def test_a_soup_of_tags_is_an_answer_only_if_a_naive_reader_agrees(soup):
    parsed = FORMAT.parse(soup)
    assert parsed.well_formed == _naively_well_formed(soup)
    assert parsed.well_formed <= (parsed.reasoning_tags and parsed.answer_tags)


def _naively_well_formed(text):
    if [text.count(tag) for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>")] != [1, 1, 1, 1]:
        return False
    before, rest = text.split("<reasoning>")
    reasoning, _, rest = rest.partition("</reasoning>")
    between, _, rest = rest.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    words = any(word in reasoning for word in ("yes", "because"))
    return bool(closed and words) and answer.strip() == "yes" and not (before + between + after).strip()


ANY_TEXT = st.lists(
    st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<", "/", ">", "yes", "no", ".", " "])
    | st.text(st.characters(), max_size=5)  # also half surrogate pairs
).map("".join)


@settings(deadline=None)  # the cores are shared
@given(ANY_TEXT)
def test_any_text_is_read_and_an_answer_found_is_found_again(text):
    parsed = FORMAT.parse(text)
    assert parsed.answer in (None, *LABELS)
    if parsed.well_formed:
        assert FORMAT.parse(FORMAT.write(FORMAT.split(text)[0], parsed.answer)) == parsed


@settings(deadline=None, max_examples=20)  # the cores are shared
@given(ANY_TEXT.filter(bool))
def test_a_very_long_completion_is_read_too(text):
    # 400,000 characters: quadratic work would not end in time.
    long = text * (400_000 // len(text))
    assert FORMAT.parse(long).answer is None
    assert FORMAT.parse(FORMAT.write(f"word {long.replace('<', '')}", "no")).answer == "no"


FORMS = st.sampled_from(["NFC", "NFD"])


@settings(deadline=None)  # the cores are shared
@given(
    st.lists(
        st.sampled_from(
            [*ACCENTED.reasoning_pair, *ACCENTED.answer_pair, *ACCENTED.labels, "\u00e9", "\u0301", "\u0338"]
        )
        | st.text(max_size=3),
        max_size=9,
    ),
    FORMS,
    FORMS,
)
def test_a_completion_is_read_alike_in_either_unicode_form(parts, form, labels_form):
    text = "".join(parts)
    labels = tuple(unicodedata.normalize(labels_form, label) for label in ACCENTED.labels)
    other = AnswerFormat(labels)
    for completion in (text, f"<reasoning>{text}</reasoning><answer>{ACCENTED.labels[len(text) % 3]}</answer>"):
        found, again = ACCENTED.parse(completion), other.parse(unicodedata.normalize(form, completion))
        assert (found.reasoning_tags, found.answer_tags) == (again.reasoning_tags, again.answer_tags)
        assert found.answer == (again.answer and ACCENTED.labels[labels.index(again.answer)])


# A mark that turns the ">" before it into another sign would end no tag; such a label is refused.
LABEL = st.text(st.characters(exclude_characters="<\u0338"), min_size=1, max_size=8).map(str.strip)
SETS_OF_LABELS = st.lists(
    LABEL.filter(lambda label: label and not label.endswith(".")), min_size=2, max_size=5, unique_by=label_key
).map(tuple)
TAGS = st.lists(st.from_regex(TAG_NAME, fullmatch=True), min_size=2, max_size=2, unique=True)


@settings(deadline=None)  # the cores are shared
@given(SETS_OF_LABELS, TAGS, st.data())
def test_any_labels_are_read_back_in_any_tags(labels, tags, data):
    style = AnswerFormat(labels, *tags)
    label = data.draw(st.sampled_from(labels))
    written = data.draw(st.sampled_from(["{}", " {}\n", "{}.", "{} ."])).format(label)
    assert style.parse(style.write("word", written)).answer == label
    assert style.reads_back(label)


@pytest.mark.parametrize(
    ("labels", "lost"), [(("yes", "yes."), "yes."), (("a</answer>", "b"), "a</answer>"), (("\u0338a", "b"), "\u0338a")]
)
def test_a_label_that_would_not_be_read_back_is_detected(labels, lost):
    assert [label for label in labels if not AnswerFormat(labels).reads_back(label)] == [lost]


def test_reasoning_and_answer_are_split_for_display():
    assert FORMAT.split(GOOD) == ("It fell.", "<answer>yes</answer>")
    assert FORMAT.split("It fell") == ("It fell", "")
