"""edit-similarity: 2 c / (m + n), where c counts the characters in common, in order, of texts of m and n characters.

That is 1 − d / (m + n), where d is the least number of characters that are put in or taken out to make one text of the other: the
`fuzz.ratio` by which CodeXGLUE and TRACE score Py150, before it is rounded to a whole percent. 0 where nothing was generated.
"""

from __future__ import annotations

from surgery.evaluation.measures.matching.common import similarity
from surgery.evaluation.measures.matching.metric import Metric

EDIT_SIMILARITY = Metric("edit-similarity", similarity, bool, "text")
