"""The HTML page: what it says, read back from its HTML, and what its charts hold."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers import result_documents as samples

from surgery.comparison.charts import chosen, curve_charts, pareto_chart, series
from surgery.comparison.page import page
from surgery.comparison.plot import pareto, skills
from surgery.pictures import DARK, LIGHT, render


class Parsed(HTMLParser):
    """The elements of a page with the text right inside them, and the cells of its first table."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[list[tuple[dict[str, str | None], str]]] = []
        self._inside: list[str] = []
        self._tables = 0
        self.feed(content.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "line"):
            self._inside.append(tag)
        self._tables += tag == "table"
        if self._tables == 1 and tag == "tr":
            self.rows.append([])
        if self._tables == 1 and tag in ("td", "th"):
            self.rows[-1].append((dict(attrs), ""))
        if self._tables == 1 and tag == "small":
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        where = self._inside[-1] if self._inside else ""
        self.texts.append((where, data))
        if self._tables == 1 and "table" in self._inside and self.rows and self.rows[-1]:
            attributes, text = self.rows[-1][-1]
            self.rows[-1][-1] = (attributes, text + data)


def blocks(content: bytes) -> dict[str, str]:
    """The text of the style and the script."""
    text = content.decode()
    pattern = r"<style>(?P<style>.*?)</style>.*<script>(?P<script>.*?)</script>"
    found = re.search(pattern, text, re.DOTALL)
    assert found
    return found.groupdict()


SVG = "{http://www.w3.org/2000/svg}"


def drawings(content: bytes) -> list[str]:
    return re.findall(r"<svg.*?</svg>", content.decode(), re.DOTALL)


def titles(content: bytes) -> dict[str, str]:
    """What is said of each row beside its points and bars."""
    found = re.findall(r'href="(#row-\d+)"[^>]*><title>(.*?)</title>', content.decode(), re.DOTALL)
    assert len({row for row, _ in found}) == len(set(found)), "the same of each of its points"
    return {row: unescape(text) for row, text in found}


def test_every_point_and_bar_links_to_its_row_and_says_its_numbers_without_a_script() -> None:
    document = samples.sweep()
    content = page(document)
    pareto, curves, bars = drawings(content)
    rows = document["rows"]
    assert sorted(map(int, re.findall(r'href="#row-(\d+)"', pareto))) == list(range(len(rows)))
    assert Counter(re.findall(r'href="#row-(\d+)"', curves)) == {str(index): 2 for index in range(2, len(rows))}
    assert len(re.findall(r'href="#row-(\d+)"', bars)) == 20 * len(document["measures"])
    said = titles(content)
    for index, row in enumerate(rows):
        first, *lines = said[f"#row-{index}"].splitlines()
        assert first.removesuffix(" · Pareto-optimal") == row["label"]
        assert first.endswith("optimal") == row["pareto"]
        assert f"retention: {100 * row['retention']:.1f}%" in lines
        assert any(line.startswith(f"GSM8K: {100 * row['scores']['GSM8K']['value']:.1f}%") for line in lines)


def test_the_page_shows_what_the_plots_draw_in_its_own_colours() -> None:
    document = samples.comparison()
    content = page(document)
    names = {f"var(--{name})" for name in LIGHT}
    for text, figure in zip(drawings(content), (pareto(document, 9.0), skills(document, 20, 9.0)), strict=True):
        drawn = ElementTree.fromstring(render(figure, "svg"))
        expected = {" ".join(path.attrib.get("d", "").split()) for path in drawn.iter(f"{SVG}path")}
        shown = set(re.findall(r'<path [^>]*\bd="([^"]*)"', text))
        assert len(shown) > 20
        frames = {path for path in shown if path.count(" L ") == 4 and path.endswith("z")}  # unseen, around an axes
        assert shown - frames <= expected
        colours = set(re.findall(r' (?:fill|stroke)="([^"]*)"', text))
        assert colours - {"none"} <= names
    for name, colour in (*LIGHT.items(), *DARK.items()):
        assert f"--{name}: {colour};" in content.decode()


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", "").rstrip("%*")) / (100 if "%" in text else 1)


def test_the_table_holds_every_number_without_a_script() -> None:
    document = samples.comparison()
    head, *lines = Parsed(page(document)).rows
    names = [text.strip(" ↑↓\n") for _, text in head]
    assert names[:4] == ["Checkpoint", "GSM8K", "Retention", "WikiText-2"]
    assert len(lines) == 18
    for row, cells in zip(document["rows"], lines, strict=True):
        shown = {name: (attributes["data-value"], text) for name, (attributes, text) in zip(names, cells, strict=True)}
        assert shown["Checkpoint"][0] == row["label"]
        expected = {name: found["value"] for name, found in row["scores"].items()}
        expected |= {"Retention": row["retention"], "Forgetting": row["forgetting"], "General mean": row["average"]}
        expected |= {"Distance D": row["distance"], "Entries as in pre": row["effective_sparsity"]}
        for name, value in expected.items():
            held, text = shown[name]
            assert held is not None
            if value is None:
                assert (held, text.strip()) == ("", "–")
                continue
            assert float(held) == value
            first = re.match(r"−?[\d,.]+%?", text)
            assert first
            assert number(first.group()) == pytest.approx(value, abs=6e-4 if abs(value) < 10 else 6e-3)


def others(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["role"] == "other"]


def test_the_best_of_the_checkpoints_are_bold_and_pre_and_ft_never() -> None:
    document = samples.comparison()
    best = set()
    for name, choose in (("GSM8K", max), ("WikiText-2", min), ("BLiMP", max)):
        value = choose(row["scores"][name]["value"] for row in others(document))
        best |= {(row["label"], name) for row in others(document) if row["scores"][name]["value"] == value}
    marked = set()
    for line in re.findall(r"<tr class=\"[^\"]*\" id=\"row-.*?</tr>", page(document).decode()):
        (label,) = re.findall(r"data-value=\"([^\"]*)\"><span", line)
        cells = zip(("GSM8K", "Retention", "WikiText-2", "BLiMP"), re.findall(r"<td.*?</td>", line), strict=False)
        marked |= {(label, name) for name, cell in cells if "<b " in cell and name != "Retention"}
        assert ("Pareto</span>" in line) == next(row["pareto"] for row in document["rows"] if row["label"] == label)
        assert "<b " not in line or label not in ("pre", "ft")
    assert marked == best


@pytest.mark.parametrize(
    ("p", "mark"), [(0.0005, "***"), (0.001, "**"), (0.01, "*"), (0.0499, "*"), (0.05, ""), (None, "")]
)
def test_stars_say_how_sure_a_difference_is(p: float | None, mark: str) -> None:
    document = samples.comparison()
    for row in document["rows"]:
        for found in row["scores"].values():
            found["p"] = None
    document["rows"][2]["scores"]["GSM8K"]["p"] = p
    found = [text for where, text in Parsed(page(document)).texts if where == "sup"]
    assert "".join(found) == mark


def test_the_summary_names_the_pareto_optimal_rows() -> None:
    document = samples.comparison()
    text = page(document).decode()
    (summary,) = re.findall(r'<p class="summary">(.*?)</p>', text)
    optimal = [row["label"] for row in others(document) if row["pareto"]]
    assert re.findall(r"<strong>(.*?)</strong>", summary) == optimal
    assert summary.startswith(f"Of 16 checkpoints, {len(optimal)} are Pareto-optimal")
    assert "ft-hma-0.3-0.2-0.1 keeps the most, 101.2% at a forgetting of 0.063" in summary
    for row in document["rows"]:
        row["pareto"] = row["role"] == "pre"
    assert "none is Pareto-optimal" in page(document).decode()
    assert "Only pre and ft" in page(samples.document("compare", document["rows"][:2])).decode()


def test_nothing_is_asked_of_a_network_and_only_its_own_script_may_run() -> None:
    for content in (page(samples.comparison()), page(samples.hostile())):
        held, parsed = blocks(content), Parsed(content)
        policy = next(attributes["content"] for tag, attributes in parsed.found if attributes.get("http-equiv"))
        rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
        assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
        for kind in ("script", "style"):
            digest = base64.b64encode(hashlib.sha256(held[kind].encode()).digest()).decode()
            assert rules.pop(f"{kind}-src") == f"'sha256-{digest}'"
        assert not rules
        assert not {tag for tag, _ in parsed.found} & {
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "video",
        }
        names = {name for _, attributes in parsed.found for name in attributes}
        assert not {name for name in names if name.startswith("on") or name in ("src", "style")}
        ids = [attributes["id"] for _, attributes in parsed.found if "id" in attributes]
        assert len(ids) == len(set(ids))
        for _, attributes in parsed.found:
            for value in attributes.values():
                link = re.search(r"url\(#([^)]*)\)", value or "")
                assert link is None or link[1] in ids
            href = attributes.get("href")
            assert href is None or (href[0] == "#" and href[1:] in ids)
        assert "@import" not in held["style"]
        assert "url(" not in held["style"]
        assert not re.findall(r"\w+://\S*", held["script"] + held["style"])


def test_hostile_names_stay_text() -> None:
    document = samples.hostile()
    content = page(document)
    plain, parsed = Parsed(page(samples.sweep())), Parsed(content)
    assert {tag for tag, _ in parsed.found} == {tag for tag, _ in plain.found}
    assert sum(tag == "script" for tag, _ in parsed.found) == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", content.decode())
    shown = {line.removesuffix(" · Pareto-optimal") for text in titles(content).values() for line in text.splitlines()}
    assert samples.HOSTILE[0] + "0" in shown
    assert content.decode().count("window.hacked=1</script>") == 0
    assert samples.HOSTILE[5] in "".join(text for where, text in parsed.texts if where == "li")


def test_a_command_can_be_pasted_into_a_shell() -> None:
    document = samples.comparison()
    document["command"] = ["surgery", "compare", "--task", "a <b> & 'c'.jsonl\nd"]
    found = [text for where, text in Parsed(page(document)).texts if where == "code"]
    assert found[0] == "surgery compare --task 'a <b> & '\"'\"'c'\"'\"'.jsonl\nd'"
    assert len(found) == 1 + len(others(document))


def test_what_is_not_finite_is_left_out_and_said() -> None:
    document = samples.sweep()
    broken = document["rows"][5]
    for key in ("downstream", "retention", "average", "forgetting", "retention_low", "forgetting_high", "distance"):
        broken[key] = None if key != "average" else math.nan
    broken["scores"]["GSM8K"] = {"value": math.inf, "low": None, "high": None, "p": math.nan}
    content = page(document)
    for text in (*titles(content).values(), *drawings(content)):
        assert not re.search(r"\b(nan|inf|Infinity|None|NaN)\b", text)
    assert content.decode().count(f"for want of finite numbers: {broken['label']}.") == 2
    for text in drawings(content)[:2]:
        assert '"row-4"' not in text
        assert 'href="#row-4"' in text
        assert 'href="#row-5"' not in text
    cells = Parsed(content).rows[6]
    assert [text for _, text in cells].count("–") >= 4


def test_a_comparison_without_general_measures_or_other_rows_has_a_page() -> None:
    document = samples.document("compare", samples.comparison()["rows"][:2])
    document["measures"] = samples.MEASURES[:1]
    for row in document["rows"]:
        row["scores"] = {"GSM8K": row["scores"]["GSM8K"]}
        row.update(average=None, forgetting=None, forgetting_low=None, forgetting_high=None)
    head, *lines = Parsed(page(document)).rows
    assert [text.strip(" ↑↓\n") for _, text in head] == [
        "Checkpoint",
        "GSM8K",
        "Retention",
        "Distance D",
        "Entries as in pre",
    ]
    assert len(lines) == 2


def test_rows_of_a_method_are_a_series_and_joined_only_along_one_number() -> None:
    document = samples.sweep()
    groups = {group.name: group for group in series(document)}
    assert list(groups) == ["fapm", "magnitude", "hma", "half-reset"]
    assert groups["fapm"].at == sorted(
        row["parameters"]["sparsity"] for row in document["rows"] if row["method"] == "fapm"
    )
    assert [group.joined for group in groups.values()] == [True, True, False, False]
    for row in document["rows"]:
        if row["method"] == "magnitude" and row["parameters"]["sparsity"] < 0.7:
            row["parameters"]["scope"] = "linear"
    names = [group.name for group in series(document)]
    assert "magnitude (scope linear)" in names
    assert "magnitude" in names


def test_the_front_joins_the_pareto_optimal_rows_from_left_to_right() -> None:
    for document in (samples.comparison(), samples.sweep()):
        chart = pareto_chart(document)
        expected = sorted([row["retention"], row["forgetting"]] for row in document["rows"] if row["pareto"])
        assert chart["front"] == expected
        assert [y for _, y in expected] == sorted(y for _, y in expected)


def test_curves_go_through_the_means_of_equal_settings() -> None:
    document = samples.sweep()
    sparsity, ratio, mean_ratio = curve_charts(document)
    rows = {row["label"]: row for row in document["rows"]}
    downstream, general = sparsity
    assert [chart["x"]["label"] for chart in (downstream, ratio[0], mean_ratio[0])] == [
        *("sparsity", "ratio (share of matrices reset)", "mean ratio (weight of pre)")
    ]
    line = next(line for line in downstream["lines"] if line["series"] == 0)["points"]
    for x, y, low, high in line:
        row = rows[f"fapm-{x}"]
        assert y == row["scores"]["GSM8K"]["value"]
        assert (low, high) == pytest.approx((row["retention_low"] * 0.076, row["retention_high"] * 0.076))
    for x, y, low, high in general["lines"][1]["points"]:
        row = rows[f"magnitude-{x}"]
        assert (y, low, high) == pytest.approx(
            (row["average"], 0.9 - row["forgetting_high"], 0.9 - row["forgetting_low"])
        )
    (seeds,) = ratio[1]["lines"]
    assert [point[0] for point in seeds["points"]] == [0.3, 0.5, 0.7]
    assert seeds["points"][1][1] == pytest.approx(fmean(rows[f"half-reset-0.5-s{seed}"]["average"] for seed in (0, 1)))
    assert len(ratio[1]["points"]) == 6
    assert [(level["name"], level["y"]) for level in general["levels"]] == [("pre", 0.9), ("ft", pytest.approx(0.779))]
    assert curve_charts(samples.comparison()) == []


@pytest.mark.parametrize("most", [2, 3, 8, 20, 100])
def test_few_rows_stand_for_many(most: int) -> None:
    document = samples.sweep()
    found = chosen(document, most)
    assert len(found) == min(most, len(document["rows"]))
    assert found == sorted(set(found))
    assert found[:2] == [0, 1]
    if most == 8:
        assert all(document["rows"][index]["pareto"] for index in found[2:])
