"""Spelling: texts that Unicode calls equal are equal here, in linear time."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.task.spelling import label_key, nfc


@settings(deadline=None)  # the cores are shared
@given(st.text(st.characters() | st.sampled_from("\u0301\u0323\u0338\u0345\u1161"), max_size=31))
def test_the_composed_form_is_unicodes(text):
    assert nfc(text) == unicodedata.normalize("NFC", text)


def test_a_long_run_of_marks_stays_as_it_is_and_takes_linear_time():
    # Python's normalize takes two minutes for these 400,000 marks.
    marks = "\u0301\u0323" * 200_000
    assert nfc(f"cafe\u0301 x{marks} cafe\u0301") == f"caf\u00e9 x{marks} caf\u00e9"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("caf\u00e9", "cafe\u0301", True),
        ("CAFE\u0301", "caf\u00e9", True),
        ("\u212a", "k", True),  # the Kelvin sign is canonically a K
        ("\u03aa\u0301", "\u0390", True),  # folding decomposes the small letter, and only a part of the capital
        ("\u0391\u0345", "\u1fb3", True),
        ("\uac00", "\u1100\u1161", True),  # Hangul
        ("\uff59", "y", False),  # full-width: compatible, not equal
        ("caf\u00e9", "cafe", False),
    ],
)
def test_two_labels_are_one_whatever_case_and_form_they_have(one, other, same):
    assert (label_key(one) == label_key(other)) is same
