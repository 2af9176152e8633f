"""The HTML page of a comparison or a sweep, and the charts that it shares with `surgery.plot_results`."""

from __future__ import annotations

from surgery.page.whole import page

__all__ = ["page"]
