"""What counts as the right answer, against tables written by hand and the definition of a longest common subsequence."""

from __future__ import annotations

from decimal import Decimal
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.evaluation.measures.generated import without_reasoning
from surgery.evaluation.measures.matching import METRICS, final_number, rouge_l, words

NUMBERS = {
    "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer's market.\n#### 18": "18",
    "#### 1,450,000": "1450000",
    "#### -3": "-3",
    "It is #### $70.00 in all, of 90": "70",
    "####\n\nQuestion: 4": "4",
    "#### none, so 5": "5",
    "The answer is 72.": "72",
    "The answer is $1,234.50.": "1234.5",
    "= <<16-3-4=9>>": "9",
    "between 10-12": "12",
    "x = -7": "-7",
    "it fell to −4 degrees": "-4",
    "a loss of -$25": "-25",
    "a loss of $-25": "-25",
    "5% of them": "5",
    "1, 2, 3": "3",
    "1,2,3": "3",
    "12,3456": "3456",
    "half is .5": "0.5",
    "5.0": "5",
    "3/4": "4",
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_final_number_of_a_text(text: str) -> None:
    assert final_number(text) == Decimal(NUMBERS[text])


@pytest.mark.parametrize("text", ["", "no number", "####", "ten"])
def test_a_text_without_a_number_has_no_final_one(text: str) -> None:
    assert final_number(text) is None
    assert METRICS["numeric"](text, "#### 3") == 0.0


@pytest.mark.parametrize(
    ("generated", "reference", "right"),
    [
        ("so it is 18.0 dollars", "#### 18", True),
        ("so it is 1,000", "#### 1000", True),
        ("#### 18\n\nThen 5 more", "#### 18", True),
        ("18 and then 5", "#### 18", False),
        ("1.8", "#### 18", False),
        ("-18", "#### 18", False),
    ],
)
def test_numbers_are_compared_as_decimals(generated: str, reference: str, right: bool) -> None:
    assert METRICS["numeric"](generated, reference) == float(right)


@pytest.mark.parametrize(
    ("generated", "reference", "right"),
    [
        (" The  duck.\n", "the duck", True),
        ("STRASSE!", "Straße", True),
        ("the duck", "the ducks", False),
        ("the.duck", "theduck", False),
        ("", "duck", False),
    ],
)
def test_exact_overlooks_blanks_case_and_the_last_punctuation(generated: str, reference: str, right: bool) -> None:
    assert METRICS["exact"](generated, reference) == float(right)


def test_words_are_those_of_rouge_score() -> None:
    assert words("It's 3.5—über_ALLES!") == ["it", "s", "3", "5", "ber", "alles"]


def literal(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """The longest common subsequence, by its definition."""

    @cache
    def length(i: int, j: int) -> int:
        if not i or not j:
            return 0
        if first[i - 1] == second[j - 1]:
            return length(i - 1, j - 1) + 1
        return max(length(i - 1, j), length(i, j - 1))

    return length(len(first), len(second))


TEXTS = st.lists(st.sampled_from("abcd"), max_size=14)


@given(TEXTS, TEXTS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    common = literal(tuple(first), tuple(second))
    precision, recall = common / max(len(first), 1), common / max(len(second), 1)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_of_lins_own_example() -> None:
    # Lin 2004, §3.1: S1 "police killed the gunman", S2 "police kill the gunman", S3 "the gunman kill police"
    assert rouge_l("police kill the gunman", "police killed the gunman") == 0.75
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5


@pytest.mark.parametrize(
    ("answer", "reference", "said"),
    [
        ("<think>hm</think>\nred", "red", "red"),
        ("<think>a</think><think>b</think> red", "red", "red"),
        ("no tag\n</think>\nred", "red", "red"),  # the template opened it
        ("<thinking>hm</thinking>red", "red", "red"),
        ("<think>cut off", "red", ""),
        ("<think>hm</think>\nred", "<think>hm</think>\nred", "<think>hm</think>\nred"),
        ("red", "red", "red"),
    ],
)
def test_reasoning_is_taken_off_unless_the_reference_has_it(answer: str, reference: str, said: str) -> None:
    assert without_reasoning(answer, reference) == said
