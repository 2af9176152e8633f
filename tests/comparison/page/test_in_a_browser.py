"""The HTML page in a real browser, where one is installed: sorting, tooltips, phones, dark mode, hostile names."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
from helpers import chromium
from helpers import result_documents as samples

from surgery.comparison.page import page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    program = chromium.found()
    if program is None:
        pytest.skip("no Chromium is installed")
    with chromium.Chromium(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"compare": samples.comparison(), "sweep": samples.sweep(), "hostile": samples.hostile()}
    for name, document in made.items():
        (folder / f"{name}.html").write_bytes(page(document))
    return {name: folder / f"{name}.html" for name in made}


LABELS = "[...document.querySelectorAll('tbody')[0].rows].map((row) => row.cells[0].dataset.value)"


def column(browser: chromium.Chromium, name: str) -> str:
    """An expression for the head of a column."""
    return f"[...document.querySelectorAll('thead th')].find((head) => head.textContent.startsWith({json.dumps(name)}))"


def test_a_click_sorts_the_best_first_and_a_second_click_the_worst(
    browser: chromium.Chromium, pages: dict[str, Path]
) -> None:
    browser.open(pages["compare"])
    rows = samples.comparison()["rows"]
    assert browser.ask(LABELS) == [row["label"] for row in rows]
    head = column(browser, "WikiText-2")
    ranked = [row["label"] for row in sorted(rows, key=lambda row: row["scores"]["WikiText-2"]["value"])]
    for order, expected in (("ascending", ranked), ("descending", ranked[::-1])):
        browser.ask(f"{head}.querySelector('button').click()")
        assert browser.ask(f"{head}.getAttribute('aria-sort')") == order
        assert browser.ask(LABELS) == expected
    browser.ask(f"{column(browser, 'Retention')}.querySelector('button').focus()")
    browser.press("Enter")
    assert browser.ask(LABELS) == [row["label"] for row in sorted(rows, key=lambda row: -row["retention"])]
    assert browser.ask("document.querySelectorAll('[aria-sort=ascending], [aria-sort=descending]').length") == 1


def test_what_is_missing_is_sorted_last_both_ways(browser: chromium.Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["compare"])
    for _ in range(2):
        browser.ask(f"{column(browser, 'Distance')}.querySelector('button').click()")
        assert browser.ask(LABELS)[-1] == "pre"


def test_the_plot_puts_better_rows_up_and_to_the_right_and_names_do_not_overlap(
    browser: chromium.Chromium, pages: dict[str, Path]
) -> None:
    rows = samples.comparison()["rows"]
    for width in (1200, 360):
        browser.open(pages["compare"], width=width)
        place = "[+one.dataset.row, ...['x', 'y'].map((name) => +one.querySelector('use').getAttribute(name))]"
        drawn = browser.ask(f"[...document.querySelectorAll('.pareto .point')].map((one) => {place})")
        assert len(drawn) == len(rows)
        x = {row: at for row, at, _ in drawn}
        y = {row: at for row, _, at in drawn}
        for name, places in (("retention", x), ("forgetting", y)):
            values = [row[name] for row in rows]
            slope = (places[1] - places[0]) / (values[1] - values[0])
            assert slope > 0
            for index, value in enumerate(values):
                assert places[index] == pytest.approx(places[0] + slope * (value - values[0]), abs=0.01)
        names = json.dumps([row["label"] for row in rows])
        boxes = browser.ask(
            f"[...document.querySelectorAll('.pareto svg text')].filter((one) => {names}.includes(one.textContent))"
            ".map((one) => { const box = one.getBoundingClientRect();"
            "return [box.left, box.top + 2, box.right, box.bottom - 2]; })"
        )
        assert len(boxes) >= 16
        for number, one in enumerate(boxes):
            for other in boxes[:number]:
                assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


TIP = "document.querySelector('.tip:not([hidden])')?.innerText ?? ''"


def centre(browser: chromium.Chromium, row: int) -> tuple[float, float]:
    point = f"document.querySelector('.pareto .point[data-row=\"{row}\"]')"
    browser.ask(f"{point}.scrollIntoView({{block: 'center'}})")
    box = f"{point}.querySelector('use').getBoundingClientRect()"
    found = browser.ask(f"(({{left, right, top, bottom}}) => [(left + right) / 2, (top + bottom) / 2])({box})")
    return found[0], found[1]


def test_a_point_tells_its_numbers_to_mouse_keyboard_and_finger(
    browser: chromium.Chromium, pages: dict[str, Path]
) -> None:
    browser.open(pages["compare"])
    assert browser.ask(TIP) == ""
    x, y = centre(browser, 12)
    browser.move(x + 3, y + 3)
    shown = browser.ask(TIP)
    assert shown.startswith("ft-ties-0.8\n")
    assert "89.7%" in shown
    assert "0.033" in shown
    assert browser.ask("document.querySelector('tr.lit').id") == "row-12"
    browser.move(5, 5)
    assert browser.ask(TIP) == ""
    browser.ask("document.querySelector('.point[tabindex=\"0\"]').focus()")
    order = sorted(samples.comparison()["rows"], key=lambda row: row["retention"])
    assert browser.ask(TIP).startswith(order[0]["label"])
    browser.press("ArrowRight")
    assert browser.ask(TIP).startswith(order[1]["label"])
    browser.press("Escape")
    assert browser.ask(TIP) == ""
    browser.open(pages["compare"], width=360, height=740)
    browser.tap(*centre(browser, 12))
    browser.wait(f"({TIP}).startsWith('ft-ties-0.8')")
    box = browser.ask("(({left, right}) => [left, right])(document.querySelector('.tip').getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= 360


@pytest.mark.parametrize("name", ["compare", "sweep", "hostile"])
def test_no_complaint_no_request_and_no_scrolling_sideways(
    browser: chromium.Chromium, pages: dict[str, Path], name: str
) -> None:
    for width in (1200, 360):
        browser.open(pages[name], width=width, height=740)
        assert browser.ask("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        charts = browser.ask(
            "[...document.querySelectorAll('.chart')].map((one) => one.querySelectorAll('.point').length)"
        )
        assert charts == ([18, 72] if name == "compare" else [39, 74, 80])
        for chart in range(len(charts)):
            browser.ask(f"document.querySelectorAll('.chart')[{chart}].querySelector('.point[tabindex=\"0\"]').focus()")
            assert browser.ask(TIP)
        browser.ask("document.querySelectorAll('thead button').forEach((one) => one.click())")
        assert browser.ask("typeof window.hacked") == "undefined"
        assert browser.complaints == []
        assert browser.requests == [pages[name].as_uri()]


def test_the_policy_stops_a_script_that_got_in(browser: chromium.Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["compare"])
    browser.ask("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.hacked=1\">')")
    browser.ask(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked=1'}))"
    )
    browser.ask("new Promise((done) => setTimeout(done, 50))")
    assert browser.ask("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def test_dark_mode_has_a_dark_ground_and_bright_letters(browser: chromium.Chromium, pages: dict[str, Path]) -> None:
    def light(dark: bool) -> tuple[float, float]:
        browser.open(pages["compare"], dark=dark)
        style = "getComputedStyle(document.documentElement)"
        found = [
            browser.ask(f"{style}.{name}.match(/\\d+/g).slice(0, 3).map(Number)")
            for name in ("backgroundColor", "color")
        ]
        return fmean(found[0]) / 255, fmean(found[1]) / 255

    ground, letters = light(False)
    assert ground > 0.9 > 0.2 > letters
    ground, letters = light(True)
    assert ground < 0.1 < 0.8 < letters


def test_without_javascript_the_table_the_bars_and_the_commands_are_there(
    browser: chromium.Chromium, pages: dict[str, Path]
) -> None:
    browser.open(pages["compare"], script=False)
    try:
        assert len(browser.ask(LABELS)) == 18
        points = "[...document.querySelectorAll('.pareto .point')]"
        assert len(browser.ask(f"{points}.map((one) => one.querySelector('title').textContent)")) == 18
        bars = "[...document.querySelectorAll('.skills .point')].slice(0, 18)"
        widths = browser.ask(f"{bars}.map((one) => one.querySelector('path').getBoundingClientRect().width)")
        values = [row["scores"]["GSM8K"]["value"] for row in samples.comparison()["rows"]]
        for width, value in zip(widths, values, strict=True):
            assert width / widths[1] == pytest.approx(value / values[1], rel=0.01)
        browser.ask("document.querySelector('.pareto .point[data-row=\"12\"]').dispatchEvent(new MouseEvent('click'))")
        assert browser.ask("document.querySelector('tr:target').id") == "row-12"
        assert browser.ask("document.querySelectorAll('button.copy:not([hidden])').length") == 0
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)


def test_a_command_is_copied(browser: chromium.Chromium, pages: dict[str, Path]) -> None:
    browser.open(pages["compare"])
    browser("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.ask("document.querySelector('.copy').click()")
    browser.wait("document.querySelector('.copy').textContent === 'Copied'")
    copied = browser.ask("navigator.clipboard.readText()")
    assert copied == shlex.join(samples.comparison()["command"])
