"""The HTML page of a comparison or a sweep, and the charts that it shares with `surgery.comparison.plot`."""

from __future__ import annotations

from surgery.comparison.page.whole import page

__all__ = ["page"]
