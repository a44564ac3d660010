// Sorts tables, filters by method and model, and draws the chart with values on hovering.
// Texts become text nodes, never markup; the page's policy allows this script alone.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b"];
  const points = JSON.parse(document.getElementById("points").textContent);
  const chart = document.getElementById("chart");
  const tip = document.getElementById("tip");
  const legend = document.getElementById("legend");
  const axis = document.getElementById("axis");
  const filters = ["method", "model"].map((key) => [key, document.getElementById(`of-${key}`)]);

  const number = (text) => {
    const found = text.replace(/[,\u2011]/g, (c) => (c === "," ? "" : "-")).match(/[+-]?\d+(\.\d+)?/);
    return found ? Number(found[0]) : NaN;
  };

  function sort(heading) {
    const table = heading.closest("table");
    const index = [...heading.parentNode.children].indexOf(heading);
    const falling = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const body = table.tBodies[0];
    const cell = (row) => row.cells[index].textContent.trim();
    const isText = heading.classList.contains("text");
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [cell(one), cell(other)];
      if (isText) return (falling ? -1 : 1) * a.localeCompare(b, "en", { numeric: true });
      const [x, y] = [number(a), number(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return (falling ? -1 : 1) * (x - y);
    });
    body.append(...rows);
  }

  for (const heading of document.querySelectorAll("table:not(.map) thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(heading));
    heading.append(button);
  }

  const isShown = (of) =>
    filters.every(([key, one]) => !one.value || one.value === of[key] || (of.dense && key === "method"));

  function filter() {
    for (const part of document.querySelectorAll("[data-model]")) {
      part.hidden = !isShown(part.dataset);
    }
    for (const table of document.querySelectorAll(".of-model")) {
      table.hidden = [...table.querySelectorAll("tbody tr")].every((row) => row.hidden);
    }
    draw();
  }

  const make = (name, attributes, text = "") => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  };

  function ticks(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high + step / 1e6; i += 1) found.push(i * step);
    return found;
  }

  const short = (value) => String(Number(value.toPrecision(4)));

  function show(of, mark) {
    tip.textContent = of.lines.join("\n");
    tip.hidden = false;
    const [frame, box] = [chart.getBoundingClientRect(), mark.getBoundingClientRect()];
    const left = box.left - frame.left + box.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(0, Math.min(left, frame.width - tip.offsetWidth))}px`;
    const above = box.top - frame.top - tip.offsetHeight - 6;
    tip.style.top = `${above < 0 ? box.bottom - frame.top + 6 : above}px`;
  }

  const labels = [...new Set(points.filter((of) => !of.dense).map((of) => of.label))];
  const colourOf = (of) => of.dense ? "currentColor" : COLOURS[labels.indexOf(of.label) % COLOURS.length];

  function explain(known) {
    const first = new Map(known.map((of) => [of.label, of]));
    legend.replaceChildren(
      ...[...first].map(([label, of]) => {
        const [item, swatch] = [document.createElement("li"), document.createElement("span")];
        swatch.style.background = colourOf(of);
        item.append(swatch, label);
        return item;
      }),
    );
  }

  function draw() {
    const [key, unit] = [axis.value, axis.selectedOptions[0].textContent];
    const known = points.filter((of) => of[key] > 0 && of.top1 !== null && isShown(of));
    chart.querySelector("svg")?.remove();
    tip.hidden = true;
    explain(known);
    const [width, height, left, bottom] = [chart.clientWidth, 320, 46, 44];
    const picture = make("svg", { width, height, role: "img", "aria-label": `top-1 by ${unit}` });
    chart.prepend(picture);
    if (!known.length) {
      picture.append(make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show"));
      return;
    }
    const [xs, spread] = [known.map((of) => of[key]), (of) => of.std ?? 0];
    const range = (low, high) => {
      const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
      return [low - room, high + room];
    };
    const [x0, x1] = range(Math.min(...xs), Math.max(...xs));
    const [y0, y1] = range(
      Math.min(...known.map((of) => of.top1 - spread(of))),
      Math.max(...known.map((of) => of.top1 + spread(of))),
    );
    const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - 12);
    const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - bottom - 10);
    for (const value of ticks(x0, x1, width / 110)) {
      picture.append(make("line", { class: "grid", x1: x(value), x2: x(value), y1: 10, y2: height - bottom }));
      picture.append(make("text", { x: x(value), y: height - bottom + 16, "text-anchor": "middle" }, short(value)));
    }
    for (const value of ticks(y0, y1, 6)) {
      picture.append(make("line", { class: "grid", x1: left, x2: width - 12, y1: y(value), y2: y(value) }));
      picture.append(make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    const title = `top-1 accuracy (%) by ${unit}`;
    picture.append(make("text", { x: width / 2, y: height - 8, "text-anchor": "middle" }, title));
    for (const of of known) {
      const colour = colourOf(of);
      const [px, py] = [x(of[key]), y(of.top1)];
      if (of.std) {
        const ends = { x1: px, x2: px, y1: y(of.top1 - of.std), y2: y(of.top1 + of.std) };
        picture.append(make("line", { ...ends, stroke: colour, "stroke-width": 1.5 }));
      }
      const mark = of.dense
        ? make("path", { d: `M${px} ${py - 7}L${px + 7} ${py}L${px} ${py + 7}L${px - 7} ${py}Z` })
        : make("circle", { cx: px, cy: py, r: 5.5 });
      mark.setAttribute("fill", colour);
      mark.setAttribute("tabindex", 0);
      mark.setAttribute("class", "point");
      mark.setAttribute("aria-label", of.lines.join(", "));
      for (const event of ["mouseenter", "focus", "click"]) mark.addEventListener(event, () => show(of, mark));
      for (const event of ["mouseleave", "blur"]) mark.addEventListener(event, () => (tip.hidden = true));
      picture.append(mark);
    }
  }

  for (const [, one] of filters) one.addEventListener("change", filter);
  axis.addEventListener("change", draw);
  addEventListener("resize", draw);
  document.getElementById("filters").hidden = false;
  draw();
})();
