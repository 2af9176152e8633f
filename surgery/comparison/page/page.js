"use strict";
// Sorts the table, draws the charts from the JSON block, shows a tooltip, copies commands. Text from files goes only into
// textContent and attributes.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NAMESPACE = "http://www.w3.org/2000/svg";
  const TOP = 14, BOTTOM = 46, RIGHT = 14, LEVELS = 30, NEAR = 30, CROWD = 20, NARROW = 560;
  const SHAPES = [
    "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z", "M-4.5-4.5H4.5V4.5H-4.5Z", "M0-5.6L5.4 4.2H-5.4Z", "M0-6L6 0L0 6L-6 0Z", "M0 5.6L5.4-4.2H-5.4Z",
  ];

  function make(parent, name, attributes = {}, text = null) {
    const made = document.createElementNS(parent.namespaceURI === NAMESPACE || name === "svg" ? NAMESPACE : parent.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }

  // ── The table ──────────────────────────────────────────────────────────────────────────────────────────────────────

  const body = document.querySelector("tbody");
  const heads = [...document.querySelectorAll("thead th[aria-sort]")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const { better } = head.dataset;
    const first = better === "high" || better === "" ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((one) => one.setAttribute("aria-sort", one === head ? order : "none"));
    const sign = order === "ascending" ? 1 : -1;
    const keyed = [...body.rows].map((row) => [row.cells[column].dataset.value, row]);
    keyed.sort(([a], [b]) => {
      if (better === "name") return sign * a.localeCompare(b, "en", { numeric: true });
      if (a === "" || b === "") return (a === "") - (b === "");  // what is missing stays last
      return sign * (a - b);
    });
    body.append(...keyed.map(([, row]) => row));
  }));

  // ── The charts ─────────────────────────────────────────────────────────────────────────────────────────────────────

  function colour(series, role) { return series === null ? role : `s${series % 6}`; }

  function shape(series) { return SHAPES[series === null ? 0 : series % SHAPES.length]; }

  function ticks(low, high, most) {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((times) => times * power).find((size) => size >= rough * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
    return { step, found };
  }

  function scale(values, axis, from, to, most) {
    let low = Math.min(...values), high = Math.max(...values);
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    [low, high] = [low - room, high + room];
    const at = (value) => from + (value - low) / (high - low) * (to - from);
    const { step, found } = ticks(low, high, most);
    const shown = axis.percent ? step * 100 : step;
    const decimals = Math.min(8, Math.max(0, Math.ceil(-Math.log10(shown) - 1e-9 + (/^2\.5/.test(shown.toExponential()) ? 1 : 0))));
    const word = (value) => ((axis.percent ? value * 100 : value).toFixed(decimals).replace(/^-(?=0(\.0*)?$)/, "").replace("-", "−")
      + (axis.percent ? "%" : ""));
    return { at, ticks: found.map((value) => [at(value), word(value)]) };
  }

  const ruler = document.createElement("canvas").getContext("2d");

  function width(text) {
    ruler.font = `600 12px ${getComputedStyle(document.body).fontFamily}`;
    return ruler.measureText(text).width;
  }

  function short(text, most) { return text.length > most ? `${text.slice(0, most - 1)}…` : text; }

  // A label goes where it covers no point and no other label, further away with a line to its point, or nowhere.
  function placeLabels(layer, points, area) {
    const taken = points.map(({ px, py }) => [px - 7, py - 7, px + 7, py + 7]);
    const crowded = points.length > CROWD;
    const order = points.filter(({ rank }) => !crowded || rank > 0).sort((a, b) => b.rank - a.rank);
    const rings = area[2] < NARROW ? [9, 16] : crowded ? [9, 20, 32] : [9, 20, 34, 50, 68];
    const placed = new Set();
    for (const point of order) {
      const text = short(point.label, 28), wide = width(text), tall = 14;
      const spot = spots(point, wide, tall, rings).find(([x, y]) => x >= area[0] && y >= area[1] && x + wide <= area[2] && y + tall <= area[3]
        && !taken.some(([a, b, c, d]) => x < c && x + wide > a && y < d && y + tall > b));
      if (!spot) continue;
      const [x, y, far] = spot;
      taken.push([x - 2, y, x + wide + 2, y + tall]);
      placed.add(point.row);
      if (far) {
        const nearest = Math.max(x, Math.min(point.px, x + wide));
        make(layer, "line", { class: "leader", x1: point.px, y1: point.py, x2: nearest, y2: y + (point.py > y ? tall : 0) });
      }
      const kind = point.role === "other" ? (point.pareto ? "pareto" : "other") : point.role;
      make(layer, "text", { class: `label ${kind}`, x, y: y + 11, "aria-hidden": "true" }, text);
    }
    return placed;
  }

  function spots({ px, py }, wide, tall, rings) {
    const found = [];
    for (const away of rings) {
      const slant = away * 0.75;
      found.push([px + away, py - tall / 2], [px - away - wide, py - tall / 2], [px - wide / 2, py - away - tall], [px - wide / 2, py + away]);
      found.push([px + slant, py - slant - tall], [px - slant - wide, py - slant - tall], [px + slant, py + slant], [px - slant - wide, py + slant]);
    }
    return found.map(([x, y], at) => [x, y, at >= 8]);
  }

  function draw(chart, figure) {
    const drawing = figure.querySelector(".drawing"), wide = drawing.clientWidth;
    const pareto = chart.name === "pareto";
    const tall = Math.round(Math.max(pareto ? 340 : 260, Math.min(pareto ? 560 : 320, wide * 0.62)));
    drawing.replaceChildren();
    figure.querySelector(".legend")?.remove();
    const points = chart.points.map((point) => ({ ...point }));
    const lineValues = chart.lines.flatMap((line) => line.points);
    const known = (values) => values.filter((value) => value !== null);
    const xs = known([...points.flatMap(({ x }) => x), ...lineValues.map(([x]) => x)]);
    const ys = known([...points.flatMap(({ y }) => y), ...lineValues.flatMap(([, ...rest]) => rest), ...chart.levels.map(({ y }) => y)]);
    if (!xs.length || !ys.length) {
      make(drawing, "p", { class: "hint" }, "No row has finite numbers for this picture.");
      return;
    }
    const rough = scale(ys, chart.y, 0, 1, tall / 60);
    const left = Math.ceil(28 + Math.max(...rough.ticks.map(([, word]) => width(word))));
    const [bottom, right] = [tall - BOTTOM, wide - (chart.levels.length ? LEVELS : RIGHT)];
    const x = scale(xs, chart.x, left, right, wide / 75);
    const y = scale(ys, chart.y, chart.y.flip ? TOP : bottom, chart.y.flip ? bottom : TOP, tall / 60);
    const svg = make(drawing, "svg", { viewBox: `0 0 ${wide} ${tall}`, height: tall, role: "group",
      "aria-label": `${chart.title}: ${chart.y.label} against ${chart.x.label}` });

    for (const [at, word] of x.ticks) {
      make(svg, "line", { class: "grid", x1: at, x2: at, y1: TOP, y2: bottom });
      make(svg, "text", { x: at, y: bottom + 18, "text-anchor": "middle" }, word);
    }
    for (const [at, word] of y.ticks) {
      make(svg, "line", { class: "grid", x1: left, x2: right, y1: at, y2: at });
      make(svg, "text", { x: left - 8, y: at + 4, "text-anchor": "end" }, word);
    }
    make(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
    make(svg, "text", { x: (left + right) / 2, y: tall - 6, "text-anchor": "middle" }, chart.x.label + (pareto ? " →" : ""));
    make(svg, "text", { transform: `translate(12 ${(TOP + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" },
      chart.y.label + (pareto ? " →" : ""));

    for (const { name, y: value } of chart.levels) {
      const at = y.at(value), crowded = chart.levels.find((other) => other.name !== name && Math.abs(y.at(other.y) - at) < 14);
      make(svg, "line", { class: "level", x1: left, x2: right, y1: at, y2: at });
      make(svg, "text", { class: `label ${name}`, x: right + 5, y: at + 4 + (crowded ? (crowded.y > value ? 7 : -7) : 0) }, name);
    }
    if (chart.front.length > 1) {
      const steps = chart.front.map(([a, b], i) => (i ? `V${y.at(b)}H${x.at(a)}` : `M${x.at(a)} ${y.at(b)}`));
      make(svg, "path", { class: "front", d: steps.join("") });
    }
    for (const { series, points: joined } of chart.lines) {
      const path = (side) => joined.map((point) => `${x.at(point[0])} ${y.at(point[side])}`);
      if (joined.every(([, , low, high]) => low !== null && high !== null)) {
        make(svg, "path", { class: `band ${colour(series)}`, d: `M${path(2).join("L")}L${path(3).reverse().join("L")}Z` });
      }
      make(svg, "path", { class: `line ${colour(series)}`, d: `M${path(1).join("L")}` });
    }
    const banded = new Set(chart.lines.filter((line) => line.points.every(([, , low]) => low !== null)).map((line) => line.series));
    const whiskers = make(svg, "g"), labels = make(svg, "g"), marks = make(svg, "g");
    for (const point of [...points].sort((a, b) => (a.role !== "other") - (b.role !== "other"))) {
      [point.px, point.py] = [x.at(point.x[0]), y.at(point.y[0])];
      const kind = colour(point.series, point.role);
      if (!banded.has(point.series)) {
        const lines = [];
        if (known(point.x).length === 3) lines.push(`M${x.at(point.x[1])} ${point.py}H${x.at(point.x[2])}`);
        if (known(point.y).length === 3) lines.push(`M${point.px} ${y.at(point.y[1])}V${y.at(point.y[2])}`);
        if (lines.length) make(whiskers, "path", { class: `whiskers ${kind}`, d: lines.join("") });
      }
      point.mark = make(marks, "g", { class: "point", tabindex: -1, role: "img", "data-row": point.row,
        transform: `translate(${point.px} ${point.py})`,
        "aria-label": `${point.label}: ${point.tip.map(([name, value]) => `${name} ${value}`).join(", ")}` });
      make(point.mark, "circle", { class: "ring", r: 10 });
      make(point.mark, "path", { class: `mark ${kind}${point.pareto ? " pareto" : ""}`, d: shape(point.series) });
    }
    const named = pareto ? placeLabels(labels, points, [left, 0, right, bottom]) : new Set();
    drawLegend(figure, chart, points, named);
    react(svg, drawing, points);
    if (chart.missing.length) make(drawing, "p", { class: "hint" }, `Not drawn, for want of finite numbers: ${chart.missing.join(", ")}.`);
  }

  // The series of several points, and those whose name found no room.
  function drawLegend(figure, chart, points, named) {
    const shown = data.series.map((series, index) => ({ ...series, index })).filter(({ index, rows }) => {
      const mine = points.filter((point) => point.series === index);
      return mine.length > 0 && (rows.length > 1 || !named.has(mine[0].row));
    });
    if (!shown.length) return;
    const list = make(figure, "ul", { class: "legend" });
    for (const { name, index } of shown) {
      const item = make(list, "li");
      const svg = make(item, "svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" });
      make(svg, "path", { class: `mark ${colour(index)}`, d: shape(index) });
      make(item, "span", {}, name);
    }
  }

  function react(svg, drawing, points) {
    const tip = make(drawing, "div", { class: "tip", hidden: "", "aria-hidden": "true" });
    const order = [...points].sort((a, b) => a.px - b.px || a.py - b.py);
    let current = null;
    if (order.length) order[0].mark.setAttribute("tabindex", 0);

    function show(point) {
      if (point === current) return;
      light(current, false);
      current = point;
      tip.hidden = point === null;
      if (point === null) return;
      light(point, true);
      tip.replaceChildren();
      make(tip, "strong", {}, point.label + (point.pareto ? " · Pareto-optimal" : ""));
      for (const [name, value] of point.tip) {
        const line = make(tip, "div");
        make(line, "span", {}, name);
        make(line, "span", {}, value);
      }
      const room = drawing.clientWidth - tip.offsetWidth;
      const above = point.py - tip.offsetHeight - 16;
      tip.style.left = `${Math.max(0, Math.min(room, point.px - tip.offsetWidth / 2))}px`;
      tip.style.top = `${above >= -60 ? above : point.py + 16}px`;
    }

    function light(point, on) {
      if (point === null) return;
      point.mark.classList.toggle("on", on);
      body.querySelector(`tr[data-row="${point.row}"]`)?.classList.toggle("lit", on);
    }

    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const [px, py] = [event.clientX - box.left, event.clientY - box.top];
      let [best, least] = [null, NEAR];
      for (const point of points) {
        const away = Math.hypot(point.px - px, point.py - py);
        if (away < least) [best, least] = [point, away];
      }
      return best;
    }

    svg.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") show(nearest(event)); });
    svg.addEventListener("click", (event) => show(nearest(event)));
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(null); });
    svg.addEventListener("focusin", (event) => show(points.find(({ mark }) => mark.contains(event.target)) ?? null));
    svg.addEventListener("focusout", () => show(null));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (event.key === "Escape") show(null);
      if (!step || current === null) return;
      event.preventDefault();
      const next = order[(order.indexOf(current) + step + order.length) % order.length];
      order.forEach(({ mark }) => mark.setAttribute("tabindex", mark === next.mark ? 0 : -1));
      next.mark.focus();
    });
  }

  const charts = new Map(data.charts.map((chart) => [chart.name, chart]));
  const watch = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.drawnAt === target.clientWidth) continue;
      target.drawnAt = target.clientWidth;
      draw(charts.get(target.dataset.chart), target);
    }
  });
  document.querySelectorAll(".chart").forEach((figure) => watch.observe(figure));

  // ── The commands ───────────────────────────────────────────────────────────────────────────────────────────────────

  document.querySelectorAll(".copy").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  });
})();
