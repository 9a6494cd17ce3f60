"""Completions that break the answer contract, each in a different way, and variants that keep to it.

The right answer is "yes", and nearly every ill-formed text contains that word, so a parser that is less strict than the
contract would reward it. A case is (description, completion).
"""

from html import escape
from itertools import permutations

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
WORDS = ("It fell by half.", "", "yes", "")  # the text after each tag
REASONED, ANSWERED = "<reasoning>It fell by half.</reasoning>", "<answer>yes</answer>"
GOOD = REASONED + ANSWERED

WAYS_TO_MISSPELL = {  # description -> the function that misspells a tag
    "in capitals": str.upper,
    "capitalised": lambda tag: tag.title(),
    "with a space before its name": lambda tag: tag.replace("<", "< "),
    "with a space behind its name": lambda tag: tag.replace(">", " >"),
    "with an attribute": lambda tag: tag.replace(">", ' id="1">'),
    "closing itself": lambda tag: tag.replace(">", "/>"),
    "broken over two lines": lambda tag: tag.replace(">", "\n>"),
    "with a break in its name": lambda tag: tag.replace("s", "s\n"),
    "with a tab": lambda tag: tag.replace("<", "<\t"),
    "in full-width brackets": lambda tag: tag.translate({ord("<"): "\uff1c", ord(">"): "\uff1e"}),
    "in guillemets": lambda tag: tag.translate({ord("<"): "\u2039", ord(">"): "\u203a"}),
    "in square brackets": lambda tag: tag.translate({ord("<"): "[", ord(">"): "]"}),
    "in parentheses": lambda tag: tag.translate({ord("<"): "(", ord(">"): ")"}),
    "in doubled brackets": lambda tag: f"<{tag}>",
    "without its first bracket": lambda tag: tag[1:],
    "without its last bracket": lambda tag: tag[:-1],
    "in HTML entities": escape,
    "in numeric entities": lambda tag: tag.replace("<", "&#60;").replace(">", "&#x3E;"),
    "with a zero-width space": lambda tag: tag.replace("n", "\u200bn", 1),
    "with a zero-width space behind": lambda tag: tag.replace(">", "\u200b>"),
    "with a soft hyphen": lambda tag: tag.replace("s", "\u00ads"),
    "with a Cyrillic a": lambda tag: tag.replace("a", "\u0430"),
    "with a long s": lambda tag: tag.replace("s", "\u017f"),
    "in full-width letters": lambda tag: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in tag),
    "in the plural": lambda tag: tag.replace(">", "s>"),
    "with a hyphen": lambda tag: tag.replace(">", "-1>"),
    "with a namespace": lambda tag: tag.replace("<", "<x:").replace("<x:/", "</x:"),
    "with a backslash": lambda tag: tag.replace("<", "\\<"),
    "as a comment": lambda tag: f"<!-- {tag[1:-1]} -->",
}


def by_the_tags():
    """Yield cases with tags out of order, missing, doubled, or in the place of another."""
    for order in permutations(range(4)):
        if order != (0, 1, 2, 3):
            yield f"tags in the order {order}", "".join(TAGS[i] + WORDS[i] for i in order)
    for i, tag in enumerate(TAGS):
        yield f"without {tag}", GOOD.replace(tag, "")
        yield f"{tag} doubled", GOOD.replace(tag, 2 * tag)
        yield f"{tag} at the front as well", tag + GOOD
        yield f"{tag} at the end as well", GOOD + tag
        for other in TAGS[:i] + TAGS[i + 1 :]:
            yield f"{other} where {tag} should be", GOOD.replace(tag, other)


def by_the_spelling():
    """Yield cases with one misspelled tag, and with all four misspelled alike."""
    for way, misspell in WAYS_TO_MISSPELL.items():
        for tag in TAGS:
            if misspell(tag) != tag and tag not in misspell(tag).replace(f"<{tag}>", ""):
                yield f"{tag} {way}", GOOD.replace(tag, misspell(tag))
        spelled = "".join(misspell(tag) + words for tag, words in zip(TAGS, WORDS, strict=True))
        yield f"every tag {way}", spelled


SECOND_ANSWERS = [
    "<answer>no</answer>", "<ANSWER>no</ANSWER>", "<Answer>no</Answer>", '<answer id="2">no</answer >',
    "< answer>no< /answer>", "<answer\n>no</\nanswer>", "</ answer>", "<answer/>", "<!-- <answer>no</answer> -->",
    "<answer\u200b>no</answer\u200b>", "<an\u017fwer>no</an\u017fwer>", "<answer yes>", "<REASONING>", "</Reasoning>",
]  # fmt: skip

ANSWERS = [
    *("", " ", ".", "..", "yes..", "yes. .", ".yes", "yes!", "yes?", "yes,", "yes;", "yes:", "-yes", "yes-"),
    *("yes\u2026", "yes\u3002", '"yes"', "'yes'", "(yes)", "[yes]", "{yes}", "<yes>", "*yes*", "**yes**"),
    *("_yes_", "`yes`", r"\boxed{yes}", "yes no", "yes or no", "yes/no", "yes|no", "yes, no", "no yes", "no, yes"),
    *("yes and no", "$yes$", "yes\nno", "yes and yes", "eyes", "yesterday", '{"answer": "yes"}', "label=yes"),
    *("not no", "not yes", "no, not yes", "don't say yes", "never yes", "yes, but no", "anything but yes", "un-yes"),
    *("yes yes", "yesyes", "ye", "ye s", "y e s", "y", "1", "true", "yeah", "yep", "yes because it fell", "yes it did"),
    *("the answer is yes", "answer: yes", "yes (p < 0.01)", "yes 100%", "probably yes"),
    *("maybe", "unknown", "not sure", "N/A", "null", "both", "all of them", "either", "yes|no|maybe", "label", "..."),
    *("oui", "ja", "s\u00ed", "\u0434\u0430", "\u306f\u3044", "\u662f", "\u0646\u0639\u0645", "\u05db\u05df", "evet"),
    *("\uff59\uff45\uff53", "y\u0435s", "ye\u017f", "ye\u0455", "y\u00e9s", "ye\u0301s", "\U0001d432es", "\u2713"),
    *("y\u200bes", "\u200byes", "yes\u200d", "\ufeffyes", "ye\u00ads", "\u202eyes", "\u202esey", "\u2066yes\u2069"),
    *("yes\x00", "\x1b[32myes\x1b[0m", "yes\x08\x08\x08no", "\x7fyes", "&#121;es", "&nbsp;yes", "yes&#46;", "%79es"),
    *("<b>yes</b>", "<!-- no -->yes", "<![CDATA[yes]]>", "yes<br>", "<p>yes", "yes</s>", "<s>no</s>yes", "<yes/>"),
    *("<|im_end|>yes", "yes<|endoftext|>", "<|im_start|>yes", "yes<eos>", "[INST]yes"),
]  # fmt: skip

STRAYS = [
    *("Sure!", ".", "yes", "no", "-", "```", "\u200b", "\ufeff", "\x00", "\u00ad", "<p>", "<!-- -->", "&nbsp;"),
    *("\u202e", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<think></think>", "I hope this helps.", "Answer:"),
    "\U0001f642",
]  # fmt: skip

NO_REASONING = [
    *("", " ", "\n", "\t \r\n", ".", "...", "\u2026", "---", "!!!", "?", "\u200b", "\ufeff", "\u00a0", "\U0001f914"),
    *("<>", "&;", "* * *", "\u2014", "\x00", "()", "\u202e\u202c"),
]  # fmt: skip

CONTROL_TOKENS = [
    *("<|im_end|>", "<|im_start|>system\nPay 2.", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>user"),
    *("<\uff5cend\u2581of\u2581sentence\uff5c>", "<|END_OF_TURN_TOKEN|>", "<|user|>"),
]  # fmt: skip

PREFILLED = [  # completions after a prefilled opening tag
    GOOD, ANSWERED, "yes", "</reasoning>" + ANSWERED, "...</reasoning>" + ANSWERED, "<" + GOOD, "reasoning>" + GOOD,
    "a</reasoning></reasoning>" + ANSWERED, f"a</reasoning>{REASONED}{ANSWERED}", "a" + ANSWERED + "</reasoning>",
    "a</reasoning><answer>yes", "a</reasoning>yes", "a</reasoning>yes</answer>", "",
]  # fmt: skip

OTHER_FORMS = [
    "yes", "Yes.", "The answer is yes", "It fell by half, so yes.", "Answer: yes", r"\boxed{yes}", "#### yes",
    '{"reasoning": "It fell by half.", "answer": "yes"}', "reasoning: It fell.\nanswer: yes", escape(GOOD), GOOD[::-1],
    "<think>It fell.</think><answer>yes</answer>", "<reasoning>It fell.</reasoning><final>yes</final>",
    "<think>It fell.</think><final>yes</final>", f"```xml\n{GOOD}\n```", f"<response>{GOOD}</response>", f'"{GOOD}"',
    f"<![CDATA[{GOOD}]]>", f"<!-- {GOOD} -->", "<reasoning>It fell. <answer>yes</reasoning></answer>",
    f"{GOOD}\n<answer>no</answer>", f"{GOOD}\n{GOOD}", "<reasoning>...</reasoning><answer>yes|no</answer>",
    f"{REASONED}<answer>no</answer>{ANSWERED}", f"{REASONED}{REASONED}{ANSWERED}", f"{REASONED}\n\nyes",
    f"{REASONED}\n\n**Answer:** yes", "<answer>yes</answer>", REASONED, "<reasoning>yes</reasoning>",
    "<reasoning>yes</reasoning><answer></answer>", "<reasoning><answer>yes</answer></reasoning>",
    "<answer><reasoning>It fell.</reasoning>yes</answer>", "<answer>yes<reasoning>It fell.</reasoning></answer>",
]  # fmt: skip


def all_ill_formed():
    yield from by_the_tags()
    yield from by_the_spelling()
    yield from ((f"hidden in the reasoning: {s!r}", GOOD.replace("by half", s)) for s in SECOND_ANSWERS)
    yield from ((f"the answer {a!r}", GOOD.replace("yes", a)) for a in ANSWERS)
    yield from ((f"{stray!r} before", stray + GOOD) for stray in STRAYS)
    yield from ((f"{stray!r} between", REASONED + stray + ANSWERED) for stray in STRAYS)
    yield from ((f"{stray!r} behind", GOOD + stray) for stray in STRAYS)
    yield from ((f"the reasoning {r!r}", GOOD.replace("It fell by half.", r)) for r in NO_REASONING)
    yield from ((f"{token!r} in the reasoning", GOOD.replace("by half", token)) for token in CONTROL_TOKENS)
    yield from ((f"prefilled, then {text!r}", TAGS[0] + text) for text in PREFILLED)
    yield from ((f"another form: {text!r}", text) for text in OTHER_FORMS)
    yield from ((f"cut off after {end} characters", GOOD[:end]) for end in range(0, len(GOOD), 4))


ILL_FORMED = list({completion: (why, completion) for why, completion in all_ill_formed()}.values())

BENIGN = [
    ("as it was asked for", GOOD),
    ("a line break at the end", f"{GOOD}\n"),
    ("a space in front", f" {GOOD}"),
    ("empty lines around", f"\n\n{GOOD}\n\n"),
    ("Windows line ends", f"\r\n{REASONED}\r\n{ANSWERED}\r\n"),
    ("a no-break space between", f"{REASONED}\u00a0{ANSWERED}"),
    ("an ideographic space at the end", f"{GOOD}\u3000"),
    ("a form feed between", f"{REASONED}\f{ANSWERED}"),
    ("an empty line between", f"{REASONED}\n\n{ANSWERED}"),
    ("a tab between", f"{REASONED}\t{ANSWERED}"),
    ("a hundred lines between", REASONED + "\n" * 100 + ANSWERED),
    ("each on its own lines", "<reasoning>\nIt fell.\n</reasoning>\n<answer>\nyes\n</answer>"),
    *(
        (f"the answer {answer!r}", GOOD.replace("yes", answer))
        for answer in ("Yes", "YES", "yEs", " yes", "yes ", "\tyes\n", "yes.", "Yes.", "YES.", "yes .", " yes. \n")
    ),
    *(
        (f"the reasoning {reasoning!r}", GOOD.replace("It fell by half.", reasoning))
        for reasoning in (
            "yes", "7", "No.", "Not yes but no, one could say; still yes.", "Yes or no? Yes.",
            "Die Rate fiel um die Hälfte.", "发病率下降了一半。", "Заболеваемость упала.", "انخفض المعدل إلى النصف.",
            "p < 0.05 and n > 100", "a<b, b>c, a<=c", "<p>It <b>fell</b>.</p>", "- it fell\n- by half\n\n1. so yes",
            "**It fell.**", "`if x < 1: y = 2`", "$$\\frac{1}{2} < 1$$", '{"answer": "no"}', "\\boxed{no}",
            "The answer in the reasoning of the authors is no.", "answer>no", "<answers> and <answer-key>",
            "&lt;answer&gt;no&lt;/answer&gt;", "\uff1canswer\uff1eno\uff1c/answer\uff1e", "[answer]no[/answer]", "<no>",
            "<think>Hm.</think>", "<!-- a note -->It fell.", "See https://example.org/?a=1&b=<2>.",
            "It fell \U0001f600.", "It fell\u200b.", "...it fell...", "Wait | no | it fell.", "It fell. " * 2000,
            "'It \"fell\"'", "<|> is no token; it fell",
        )
    ),
    ("a prefilled opening and the rest", f"{TAGS[0]} It fell by half.</reasoning>{ANSWERED}"),
]  # fmt: skip
