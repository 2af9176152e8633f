"""The HTML page of a comparison or a sweep."""

from __future__ import annotations

from surgery.comparison.page.whole import page

__all__ = ["page"]
