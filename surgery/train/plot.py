"""The picture of a continual training (`surgery train --plot`): the score of every task after every round, with OP and BWT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.pictures import HEAT, drawable
from surgery.train.report import said

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches: width and height of a cell, room to the left, right, above and below.
WIDE, TALL, LEFT, RIGHT, ABOVE, BELOW = 0.95, 0.5, 0.9, 0.5, 0.55, 0.75
# Characters of a task's name under its column.
LONGEST = 14
# Characters of what the scores are.
SAID = 90


def heat_map(document: dict[str, Any]) -> Figure:
    """Draw the scores, rounds × tasks, as colours, with OP and BWT (HFT A.2.2) beside them; the task of each round is framed.

    Args:
        document: the report of a training of several rounds.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    found = document["continual"]
    scores = np.array(found["scores"], dtype=np.float64)  # [rounds, tasks]
    count = len(scores)
    width, height = LEFT + WIDE * (count + 2) + RIGHT, ABOVE + TALL * count + BELOW
    figure = Figure((max(width, 5.2), height))
    width = figure.get_figwidth()
    axes = figure.add_axes((LEFT / width, BELOW / height, WIDE * (count + 2) / width, TALL * count / height))
    low, high = float(scores.min()), float(scores.max())
    colours = colormaps[HEAT]
    axes.imshow(scores, colours, vmin=low, vmax=high if high > low else low + 1, aspect="auto", interpolation="nearest")
    for (row, column), score in np.ndenumerate(scores):
        dark = score < (low + high) / 2
        axes.text(column, row, f"{score:.3f}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
    for row in range(count):
        axes.add_patch(Rectangle((row - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor="red", linewidth=1.5))
        axes.text(count, row, f"{found['op'][row]:.3f}", ha="center", va="center", fontsize=9)
        axes.text(count + 1, row, f"{found['bwt'][row]:+.3f}", ha="center", va="center", fontsize=9)
    names = [drawable(task["name"], LONGEST) for task in found["tasks"]]
    axes.set_xlim(-0.5, count + 1.5)
    axes.set_xticks(range(count + 2), [*names, "OP", "BWT"], fontsize=8)
    axes.set_yticks(range(count), [str(number) for number in range(1, count + 1)], fontsize=8)
    axes.set_ylabel("after round", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    optim = drawable(str(document["settings"]["optim"]))
    figure.suptitle(f"{drawable(document['output'])}, {optim}: score of each task", fontsize=9, x=0.02, ha="left")
    figure.text(0.02, 0.06, f"{drawable(said(found['tasks']), SAID)}. Framed: the task of the round.", fontsize=7)
    return figure
