"""How well a generated answer matches a reference, from 0 to 1: one file a way to compare them.

    exact             the texts are the same but for blanks, case and punctuation at the end
    numeric           their final numbers are the same, as GSM8K is scored
    rouge-l           the words in common, in order
    f1, em            SQuAD's: the words in common, in any order; the same words
    edit-similarity   the characters in common, in order

Where several answers are right, the best match counts.
"""

from __future__ import annotations

from surgery.evaluation.measures.matching import edit, exact, numeric, rouge, squad
from surgery.evaluation.measures.matching.metric import Metric

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (exact.EXACT, numeric.NUMERIC, rouge.ROUGE_L, squad.F1, squad.EM, edit.EDIT_SIMILARITY)
}
