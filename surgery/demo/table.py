"""The demo's table: one row a model, as in Table 1 of the FAPM paper."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from surgery.display import new_table


@dataclass(frozen=True)
class Row:
    """The measurements of one model.

    label: the row's name. folder: the checkpoint, relative to the demo's folder. skills: accuracy of each general
    skill, from 0 to 1. general: their mean. downstream: accuracy of the new skill. distance: from pre-trained,
    mean over tensors of ‖θ − θ0‖ / ‖θ0‖.
    """

    label: str
    folder: str
    skills: dict[str, float]
    downstream: float
    distance: float

    @property
    def general(self) -> float:
        return sum(self.skills.values()) / len(self.skills)


def results_table(sections: Sequence[Sequence[Row]], new_skill: str) -> Table:
    """Return the rows as a table of at most 80 columns, with a rule between sections.

    All rows must have the same skills.
    """
    table = new_table("model", *sections[0][0].skills, "AVG.", new_skill.upper(), "D")
    for rows in sections:
        for row in rows:
            shares = (*row.skills.values(), row.general, row.downstream, row.distance)
            table.add_row(row.label, *(f"{share:.3f}" for share in shares))
        table.add_section()
    return table
