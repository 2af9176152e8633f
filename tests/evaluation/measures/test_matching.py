"""What counts as the right answer, against tables written by hand and the definition of a longest common subsequence."""

from __future__ import annotations

import unicodedata
from decimal import Decimal
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.evaluation.measures.generated import without_reasoning
from surgery.evaluation.measures.matching import METRICS
from surgery.evaluation.measures.matching.numeric import final_number
from surgery.evaluation.measures.matching.rouge import rouge_l, words

# What comes with lm-evaluation-harness.
nltk = pytest.importorskip("nltk")
google = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
sacrebleu = pytest.importorskip("sacrebleu.tokenizers.tokenizer_zh")
squad = pytest.importorskip("lm_eval.tasks.tydiqa.utils")

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
    assert METRICS["numeric"].match(text, "#### 3") == 0.0


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
    assert METRICS["numeric"].match(generated, reference) == float(right)


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
    assert METRICS["exact"].match(generated, reference) == float(right)


WORDS = {
    "It's 3.5—über_ALLES!": ["it", "s", "3", "5", "über", "alles"],
    "naïve cafe\u0301": ["naïve", "café"],  # composed or not
    "我爱BERT模型。": ["我", "爱", "bert", "模", "型"],
    "東京へ行く": ["東", "京", "へ", "行", "く"],
    "ｶﾞｷﾞ": ["ガ", "ギ"],  # half as wide
    "น้ำ": ["น\u0e49\u0e4d", "า"],
    "हिन्दी भाषा": ["हिन्दी", "भाषा"],
    "한국어 단어": ["한국어", "단어"],
    "Привет, мир": ["привет", "мир"],
}


@pytest.mark.parametrize("text", WORDS)
def test_words_of_every_script(text: str) -> None:
    assert words(text) == [unicodedata.normalize("NFC", word) for word in WORDS[text]]


def test_chinese_is_cut_as_sacrebleu_cuts_it() -> None:
    text = "模型 会 忘记 它 以前 学过 的 东西 BERT 也 一样"
    assert words(text.replace(" ", "").replace("BERT", " BERT ")) == sacrebleu.TokenizerZh()(text).lower().split()


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_of_ascii_text_rouge_l_is_googles(generated: str, reference: str) -> None:
    assert rouge_l(generated, reference) == pytest.approx(google.score(reference, generated)["rougeL"].fmeasure)


PHRASES = st.lists(st.sampled_from(["the", "A", "duck", "Ducks,", "an-egg", "eggs!", "12", "theme", "\t"]), max_size=9)


@given(PHRASES, PHRASES)
def test_f1_and_em_are_squads(first: list[str], second: list[str]) -> None:
    generated, reference = " ".join(first), " ".join(second)
    same = squad.exact_match_score(generated, reference, "en")
    assert METRICS["em"].match(generated, reference) == same
    nothing = not any(squad.normalize_answer(text, "en") for text in (generated, reference))
    expected = 1 if nothing else squad.f1_score(generated, reference, "en")
    assert METRICS["f1"].match(generated, reference) == pytest.approx(expected)


@given(st.text("abc é", max_size=12), st.text("abc é", max_size=12))
def test_edit_similarity_is_one_less_the_share_of_characters_put_in_or_taken_out(first: str, second: str) -> None:
    moved = nltk.edit_distance(first, second, substitution_cost=2)
    expected = 1 - moved / (len(first) + len(second)) if first and second else 0.0
    assert METRICS["edit-similarity"].match(first, second) == pytest.approx(expected)


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
    assert without_reasoning(answer, ["blue", reference]) == said
