"use strict";
// Sorts the table, shows the numbers of a point or bar beside it, copies commands. Text from files goes only into textContent
// and attributes.
(() => {
  function make(parent, name, text = null) {
    const made = document.createElement(name);
    made.textContent = text;
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

  // Each point and bar is a link with a title of lines: the row's label, then "what: value". From the keyboard a chart is one
  // stop, and arrows go from point to point.
  document.querySelectorAll(".chart").forEach((figure) => {
    const points = [...figure.querySelectorAll(".point")].map((mark) => {
      const title = mark.querySelector("title"), lines = title.textContent.split("\n"), box = mark.getBoundingClientRect();
      title.remove();  // or the browser would show it too
      mark.setAttribute("aria-label", lines.join(", "));
      mark.setAttribute("tabindex", -1);
      return { mark, lines, x: box.left, y: box.top };
    });
    if (!points.length) return;
    if (figure.classList.contains("pareto")) points.sort((a, b) => a.x - b.x || a.y - b.y);
    points[0].mark.setAttribute("tabindex", 0);
    const tip = make(figure, "div");
    tip.className = "tip";
    tip.hidden = true;
    tip.setAttribute("aria-hidden", "true");
    let current = null;

    function show(point) {
      if (point === current) return;
      light(current, false);
      current = point;
      tip.hidden = point === null;
      if (point === null) return;
      light(point, true);
      tip.replaceChildren();
      make(tip, "strong", point.lines[0]);
      for (const said of point.lines.slice(1)) {
        const line = make(tip, "div"), at = said.lastIndexOf(": ");
        make(line, "span", said.slice(0, at));
        make(line, "span", said.slice(at + 2));
      }
      const frame = figure.getBoundingClientRect(), box = point.mark.getBoundingClientRect();
      const across = (box.left + box.right) / 2 - frame.left - tip.offsetWidth / 2;
      const above = box.top - frame.top - tip.offsetHeight - 8;
      tip.style.left = `${Math.max(0, Math.min(figure.clientWidth - tip.offsetWidth, across))}px`;
      tip.style.top = `${above >= -60 ? above : box.bottom - frame.top + 8}px`;
    }

    function light(point, on) {
      if (point === null) return;
      point.mark.classList.toggle("on", on);
      document.getElementById(`row-${point.mark.dataset.row}`).classList.toggle("lit", on);
    }

    points.forEach((point) => {
      const { mark } = point;
      mark.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") show(point); });
      mark.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(null); });
      mark.addEventListener("focus", () => show(point));
      mark.addEventListener("blur", () => show(null));
      mark.addEventListener("click", (event) => {
        if (event.pointerType !== "touch") return;  // a mouse and Enter go to the row, a finger has not seen the numbers yet
        event.preventDefault();
        show(point);
      });
    });
    figure.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") show(null);
      if (!step || current === null) return;
      event.preventDefault();
      const next = points[(points.indexOf(current) + step + points.length) % points.length];
      points.forEach(({ mark }) => mark.setAttribute("tabindex", mark === next.mark ? 0 : -1));
      next.mark.focus();
    });
  });

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
