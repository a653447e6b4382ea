/* Charts: Plotly draws lines in ranges we choose; axes' texts, legends, the cursor and marks are ours.
   At most one redraw of a chart per animation frame, only of what is seen, and as many charts a frame as fit into it. */
import { byId, clock, element, put, short, stepTicks, style, timeTicks, valueTicks, whole, withUnit } from "./format.js";
import * as runs from "./runs.js";
import { dirty, facts, figures, measures, now, status, trim } from "./store.js";
import { change, pack, unpack, view } from "./view.js";

const BUDGET = 14;   // ms of drawing a frame; at least one chart is drawn
const MARGIN = { l: 62, r: 14, t: 10, b: 24 };
const PALE = 6;      // with more series than this, bands would hide each other
export const charts = new Map();
let specification = null, colours = [], scheduled = false, cursor = null, palette = null;
const seen = new Set();

const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    isIntersecting ? seen.add(target.dataset.figure) : seen.delete(target.dataset.figure);
  }
  schedule();
}, { rootMargin: "120px" });
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) redraw(target.closest("[data-figure]")?.dataset.figure);
});

export async function load() {
  specification = await (await fetch("/api/figures")).json();
  colours = specification.colours;
  return colours;
}

export function mount(root) {
  for (const node of root.querySelectorAll("[data-figure]")) {
    const name = node.dataset.figure;
    const chart = {
      name, node, ...specification.figures[name], plot: byId(`chart-${name}`), frame: node.querySelector(".frame"),
      empty: byId(`empty-${name}`), legend: byId(`legend-${name}`), order: [], hidden: hiddenOf(name), rows: new Map(), ready: false,
    };
    charts.set(name, chart);
    chart.marks = element("div", { class: "marks", ariaHidden: "true" });
    chart.line = element("div", { class: "cursor", hidden: true });
    chart.zone = element("div", { class: "zone", hidden: true });
    chart.frame.append(chart.marks, chart.zone, chart.line);
    listen(chart);
    watcher.observe(node);
    sizes.observe(chart.frame);
    for (const button of node.querySelectorAll("[data-export]")) {
      button.onclick = () => (button.dataset.export === "png" ? exportPng(chart) : exportCsv(chart));
    }
    dirty.add(name);
  }
  schedule();
}

export function unmount() {
  for (const chart of charts.values()) {
    watcher.unobserve(chart.node);
    sizes.unobserve(chart.frame);
    if (chart.ready) window.Plotly.purge(chart.plot);
  }
  charts.clear();
  seen.clear();
  dirty.clear();
  cursor = null;
}

export function redraw(name) {
  if (name) dirty.add(name);
  else for (const one of charts.keys()) dirty.add(one);
  schedule();
}

/* Time goes on in charts that have no news, and those that nobody sees forget what has left the window. */
export function moveOn() {
  if (view.end !== null) return;
  const end = latest();
  for (const chart of charts.values()) {
    if (!chart.run) trim(chart.name, end - view.window - 2);
    if (chart.drawn && kindOf(chart) === "time" && end - chart.drawn.to > 3) redraw(chart.name);
  }
}

export function themed() { palette = null; redraw(); }

export function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(frame);
}

function frame() {
  scheduled = false;
  if (!window.Plotly) return void setTimeout(schedule, 30);
  const began = performance.now();
  const closed = status.closed, bucket = latest();
  let drawn = 0;
  for (const name of [...dirty]) {
    if (!charts.has(name)) { dirty.delete(name); continue; }
    if (!seen.has(name)) { tellEmpty(charts.get(name)); continue; }
    if (drawn && performance.now() - began > BUDGET) { schedule(); break; }
    dirty.delete(name);
    draw(charts.get(name));
    drawn += 1;
  }
  if (drawn && closed) requestAnimationFrame(() => {
    const at = Date.now();
    measures.push({ closed: closed * 1000, drawn: at, cost: performance.now() - began, charts: drawn, bucket: Object.keys(figures).some((name) => !charts.get(name)?.run) ? bucket : null });
    if (measures.length > 20000) measures.splice(0, 10000);
  });
}

/* -- one chart ------------------------------------------------------------------------------------------------- */

function colour(chart, name) {
  let at = chart.order.indexOf(name);
  if (at < 0) at = chart.order.push(name) - 1;
  return colours[at % colours.length];
}

function dash(chart, name) {
  if (chart.run) return name.endsWith(" bytes_raw") ? "dot" : "solid";
  const turn = Math.floor(chart.order.indexOf(name) / colours.length);
  return ["solid", "dash", "dot", "dashdot"][turn % 4];
}

function range(chart) {
  if (chart.run && view.axis === "step") {
    let low = Infinity, high = -Infinity;
    const set = runs.shown();
    for (const [name, one] of Object.entries(figures[chart.name] || {})) {
      if (!one.x.length || !runs.isShown(name, set)) continue;
      low = Math.min(low, one.x[0]); high = Math.max(high, one.x[one.x.length - 1]);
    }
    if (view.low !== null) low = view.low;
    if (view.high !== null) high = view.high;
    return low < high ? [low, high] : Number.isFinite(low) ? [low - 1, low + 1] : [0, 1];
  }
  const end = view.end ?? (latest() || now());
  return [end - view.window, end];
}

/* Where live charts end: the newest bucket that any of them has, so that all of them move together. */
function latest() {
  let found = 0;
  for (const [name, all] of Object.entries(figures)) {
    if (charts.get(name)?.run) continue;
    for (const one of Object.values(all)) if (one.x.length) found = Math.max(found, one.x[one.x.length - 1] + one.width);
  }
  const limit = now();
  return found && found > limit - 10 ? Math.min(found, limit + 5) : limit;
}

/* Charts hold so many series and no more. */
export function tellLeftOut() {
  for (const name of charts.keys()) {
    const count = facts.left_out[name];
    put(byId(`left-out-${name}`), count ? `without ${whole(count)} more, for which there is no room` : "");
  }
}

const visible = (chart, name) => (chart.run ? runs.isShown(name) : !chart.hidden.has(name));

function tellEmpty(chart) {
  chart.empty.hidden = Object.values(figures[chart.name] || {}).some((one) => one.x.length);
}

function draw(chart) {
  const began = performance.now();
  const [from, to] = range(chart);
  const all = figures[chart.name] || {};
  tellEmpty(chart);
  const names = Object.keys(all).sort().filter((name) => all[name].x.length);
  for (const name of names) colour(chart, name);
  const tint = chart.run ? runs.colourOf : (name) => colour(chart, name);
  const shownRuns = chart.run ? runs.shown() : null;
  const shown = names.filter((name) => (chart.run ? runs.isShown(name, shownRuns) : visible(chart, name)));
  const { traces, low, high } = chart.form === "line" ? lines(chart, all, shown, tint, from, to) : stacks(chart, all, shown, tint, from, to);
  palette ??= { soft: style("--soft"), edge: style("--edge"), grid: style("--grid"), panel: style("--panel") };
  const wide = chart.frame.clientWidth, tall = chart.frame.clientHeight;
  if (!wide) return;
  const some = Number.isFinite(low) && Number.isFinite(high);
  const y = valueTicks(some ? low : chart.log ? 0.001 : 0, some ? high : 1, chart.unit, chart);
  const x = chart.run && view.axis === "step" ? stepTicks(from, to, Math.max(2, wide / 90)) : timeTicks(from, to, Math.max(2, wide / 90));
  const layout = {
    width: wide, height: tall, margin: MARGIN, showlegend: false, hovermode: false, dragmode: false, autosize: false,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, -apple-system, 'Segoe UI', sans-serif", size: 11, color: palette.soft },
    xaxis: { visible: names.length > 0, type: "linear", range: [from, to], tickmode: "array", tickvals: x.values, ticktext: x.texts, showgrid: false, zeroline: false, showline: true, linecolor: palette.edge, ticks: "outside", ticklen: 4, tickcolor: palette.edge, fixedrange: true },
    yaxis: { visible: names.length > 0, type: chart.log ? "log" : "linear", range: y.range, tickmode: "array", tickvals: y.values, ticktext: some ? y.texts : y.texts.map(() => ""), gridcolor: palette.grid, zeroline: false, showline: false, fixedrange: true },
  };
  window.Plotly.react(chart.plot, traces, layout, { staticPlot: true, displayModeBar: false });
  chart.ready = true;
  chart.marks.hidden = names.length === 0;
  chart.drawn = { from, to, shown, wide, tall };
  drawMarks(chart);
  drawLegend(chart, all, names, tint);
  drawCursor(chart);
  describe(chart, all, shown);
  chart.cost = performance.now() - began;
}

/* A line does not bridge a time in which nothing was heard; points alone are dots. */
function lines(chart, all, shown, tint, from, to) {
  const traces = [], dots = { x: [], y: [], colours: [] };
  let low = Infinity, high = -Infinity;
  const bands = view.band !== "0" && shown.length <= PALE;
  for (const name of shown) {
    const one = all[name], gap = one.width ? Math.max(6, 2.5 * one.width) : Infinity, x = [], y = [], xs = one.x;
    const raw = one.columns[0], ys = chart.run && view.smooth > 0 ? smoothed(raw, view.smooth / 100) : raw;
    let before = null, run = 0;
    const lone = () => { if (run === 1) { dots.x.push(x[x.length - 1]); dots.y.push(y[y.length - 1]); dots.colours.push(tint(name)); } };
    for (let i = 0; i < xs.length; i += 1) {
      const at = one.width ? xs[i] + one.width / 2 : xs[i], value = ys[i];
      if (Number.isNaN(value) || (chart.log && !(value > 0))) continue;
      if (before !== null && at - before > gap) { lone(); x.push(at); y.push(null); run = 0; }
      x.push(at); y.push(value);
      run += 1; before = at;
      if (at >= from && at <= to) { if (value < low) low = value; if (value > high) high = value; }
    }
    lone();
    if (bands && one.columns.length === 3) {
      const band = bandOf(chart, one, tint(name), from, to);
      if (band) {
        traces.push(band.trace);
        low = Math.min(low, band.low); high = Math.max(high, band.high);
      }
    }
    traces.push({ type: "scatter", mode: "lines", name, x, y, line: { width: 1.7, color: tint(name), dash: dash(chart, name), simplify: true }, connectgaps: false, hoverinfo: "skip" });
  }
  if (dots.x.length) traces.push({ type: "scatter", mode: "markers", name: "", x: dots.x, y: dots.y, marker: { size: 6, color: dots.colours }, hoverinfo: "skip" });
  return { traces, low, high };
}

function bandOf(chart, one, tint, from, to) {
  const [, lows, highs] = one.columns, x = [], up = [], down = [];
  let low = Infinity, high = -Infinity, wide = false;
  for (let i = 0; i < one.x.length; i += 1) {
    const l = lows[i], h = highs[i];
    if (Number.isNaN(l) || (chart.log && !(l > 0))) continue;
    const at = one.width ? one.x[i] + one.width / 2 : one.x[i];
    x.push(at); up.push(h); down.push(l);
    if (h > l) wide = true;
    if (at >= from && at <= to) { low = Math.min(low, l); high = Math.max(high, h); }
  }
  if (!wide) return null;
  const trace = { type: "scatter", mode: "lines", name: "", x: x.concat(x.slice().reverse()), y: up.concat(down.reverse()), fill: "toself", fillcolor: tint + "2e", line: { width: 0 }, hoverinfo: "skip" };
  return { trace, low, high };
}

function smoothed(values, weight) {
  let mean = 0, norm = 0;
  return values.map((value) => {
    if (Number.isNaN(value)) return value;
    mean = mean * weight + value * (1 - weight);
    norm = norm * weight + (1 - weight);
    return mean / norm;
  });
}

/* Counts on top of each other, as steps; nothing is sent of a time in which nothing was counted. */
function stacks(chart, all, shown, tint, from, to) {
  const traces = [], sums = new Map();
  let high = 0;
  const width = Math.max(...shown.map((name) => all[name].width), 0);
  for (const name of shown) for (const x of all[name].x) if (!sums.has(x)) sums.set(x, 0);
  const grid = [...sums.keys()].sort((a, b) => a - b);
  shown.forEach((name, at) => {
    const one = all[name], values = new Map(one.x.map((x, i) => [x, one.columns[0][i]])), x = [], y = [];
    let before = Infinity;
    for (const t of grid) {
      if (t > before) { x.push(before, t); y.push(0, 0); }
      before = t + width;
      const sum = sums.get(t) + (values.get(t) || 0);
      sums.set(t, sum);
      x.push(t, t + width); y.push(sum, sum);
      if (t + width >= from && t <= to && sum > high) high = sum;
    }
    traces.push({ type: "scatter", mode: "lines", name, x, y, fill: at ? "tonexty" : "tozeroy", fillcolor: tint(name) + "b0", line: { width: 1, color: tint(name) }, hoverinfo: "skip" });
  });
  return { traces, low: 0, high: high || 1 };
}

/* -- marks: what happened, on all time charts ------------------------------------------------------------------- */

function drawMarks(chart) {
  const wanted = [];
  if (!(chart.run && view.axis === "step")) {
    const { from, to, wide } = chart.drawn, across = (wide - MARGIN.l - MARGIN.r) / (to - from);
    for (const mark of facts.markers || []) {
      if (mark.time >= from && mark.time <= to) wanted.push([MARGIN.l + (mark.time - from) * across, mark]);
    }
  }
  while (chart.marks.childElementCount > wanted.length) chart.marks.lastChild.remove();
  wanted.forEach(([left, mark], i) => {
    const node = chart.marks.children[i] || chart.marks.appendChild(element("i"));
    node.className = `mark mark-${mark.kind}`;
    node.style.transform = `translateX(${left.toFixed(1)}px)`;
  });
}

/* -- legends ----------------------------------------------------------------------------------------------------- */

function drawLegend(chart, all, names, tint) {
  if (chart.run && !runs.isAll()) names = names.filter((name) => visible(chart, name));
  if (names.join("\n") !== chart.known) {
    chart.known = names.join("\n");
    chart.rows.clear();
    const head = element("tr", {}, element("th", { scope: "col", text: "series" }), ...["last", "min", "max"].map((text) => element("th", { scope: "col", text })));
    const body = element("tbody");
    for (const name of names) {
      const swatch = element("i", { class: "swatch" }), button = element("button", { class: "toggle", title: "Show or hide; with Shift: this one alone", onclick: (event) => toggle(chart, name, event) }, swatch, name);
      const cells = ["last", "min", "max"].map(() => element("td"));
      const row = element("tr", {}, element("th", { scope: "row" }, button), ...cells);
      chart.rows.set(name, { row, button, swatch, cells });
      body.append(row);
    }
    chart.legend.replaceChildren(...(names.length ? [element("table", {}, element("thead", {}, head), body)] : []));
    names.length > 4 ? chart.legend.setAttribute("tabindex", "0") : chart.legend.removeAttribute("tabindex");
    chart.legend.setAttribute("role", "region");
    chart.legend.setAttribute("aria-label", `Legend of ${chart.title}`);
  }
  for (const [name, parts] of chart.rows) {
    const on = visible(chart, name);
    parts.button.setAttribute("aria-pressed", String(on));
    parts.swatch.style.background = tint(name);
    parts.row.classList.toggle("off", !on);
  }
  fillLegend(chart, all);
}

function fillLegend(chart, all) {
  for (const [name, { cells }] of chart.rows) {
    const one = all[name];
    if (!one) continue;
    const values = one.columns[0], { from, to } = chart.drawn;
    let low = Infinity, high = -Infinity, last = NaN, at = NaN;
    for (let i = 0; i < values.length; i += 1) {
      const value = values[i], x = one.x[i];
      if (Number.isNaN(value) || x < from - one.width || x > to) continue;
      low = Math.min(low, one.columns.length === 3 ? one.columns[1][i] : value);
      high = Math.max(high, one.columns.length === 3 ? one.columns[2][i] : value);
      last = value;
      if (cursor !== null && x <= cursor) at = value;
    }
    put(cells[0], withUnit(cursor === null ? last : at, chart.unit));
    put(cells[1], Number.isFinite(low) ? withUnit(low, chart.unit) : "–");
    put(cells[2], Number.isFinite(high) ? withUnit(high, chart.unit) : "–");
  }
}

function toggle(chart, name, event) {
  const names = [...chart.rows.keys()];
  if (chart.run) {
    runs.toggle(name, event.shiftKey);
    redraw();
    return;
  }
  if (event.shiftKey) names.forEach((other) => (other === name ? chart.hidden.delete(other) : chart.hidden.add(other)));
  else chart.hidden.has(name) ? chart.hidden.delete(name) : chart.hidden.add(name);
  if (names.every((one) => chart.hidden.has(one))) chart.hidden.clear();
  change({ hide: pack([...charts.values()].flatMap((one) => [...one.hidden].map((series) => `${one.name}:${series}`))) });
  redraw(chart.name);
}

/* As the URL says. */
function hiddenOf(figure) {
  const own = unpack(view.hide).filter((one) => one.startsWith(`${figure}:`));
  return new Set(own.map((one) => one.slice(figure.length + 1)));
}

/* -- the cursor: the same moment in all charts, by mouse or by arrow keys; dragging chooses a range -------------- */

function listen(chart) {
  const frame = chart.frame;
  let start = null;
  const at = (event) => {
    const box = frame.getBoundingClientRect(), { from, to, wide } = chart.drawn || {};
    if (from === undefined) return null;
    const share = (event.clientX - box.left - MARGIN.l) / (wide - MARGIN.l - MARGIN.r);
    return from + Math.min(1, Math.max(0, share)) * (to - from);
  };
  frame.addEventListener("pointermove", (event) => {
    const x = at(event);
    if (x === null) return;
    setCursor(x, chart);
    if (start !== null) showZone(chart, start, x);
  });
  frame.addEventListener("pointerleave", () => { if (start === null) setCursor(null); });
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.pointerType === "touch") return;
    start = at(event);
    frame.setPointerCapture(event.pointerId);
  });
  frame.addEventListener("pointerup", (event) => {
    const end = at(event), begun = start;
    start = null;
    for (const one of charts.values()) one.zone.hidden = true;
    if (begun !== null && end !== null) zoom(chart, Math.min(begun, end), Math.max(begun, end));
  });
  frame.addEventListener("dblclick", () => change({ end: null, low: null, high: null, window: Number(sessionStorage.getItem("window")) || 300 }));
  frame.addEventListener("keydown", (event) => {
    const { from, to } = chart.drawn || {};
    if (from === undefined) return;
    const step = (to - from) / 60, move = { ArrowLeft: -step, ArrowRight: step }[event.key];
    if (move) { setCursor(Math.min(to, Math.max(from, (cursor ?? to) + move)), chart); event.preventDefault(); }
    else if (event.key === "Escape") setCursor(null);
  });
  frame.addEventListener("blur", () => setCursor(null));
}

const kindOf = (chart) => (chart.run && view.axis === "step" ? "step" : "time");

/* The part that was dragged over is asked of the server again, in finer buckets. */
function zoom(chart, low, high) {
  const { from, to } = chart.drawn;
  if ((high - low) / (to - from) < 0.02) return;
  if (kindOf(chart) === "step") change({ low: Math.floor(low), high: Math.ceil(high) });
  else change({ end: high, window: Math.max(5, high - low) });
}

function showZone(chart, one, two) {
  for (const other of charts.values()) {
    if (!other.drawn || kindOf(other) !== kindOf(chart)) continue;
    const { from, to, wide } = other.drawn, across = (wide - MARGIN.l - MARGIN.r) / (to - from);
    other.zone.hidden = false;
    other.zone.style.left = `${MARGIN.l + (Math.min(one, two) - from) * across}px`;
    other.zone.style.width = `${Math.abs(two - one) * across}px`;
  }
}

let cursorKind = "time", moving = false;
function setCursor(x, chart) {
  cursor = x;
  if (chart) cursorKind = kindOf(chart);
  if (moving) return;
  moving = true;
  requestAnimationFrame(() => {
    moving = false;
    for (const one of charts.values()) {
      if (!one.drawn || !seen.has(one.name)) continue;
      drawCursor(one);
      fillLegend(one, figures[one.name] || {});
    }
  });
}

function drawCursor(chart) {
  const { from, to, wide } = chart.drawn;
  chart.line.hidden = cursor === null || kindOf(chart) !== cursorKind || cursor < from || cursor > to;
  if (chart.line.hidden) return;
  const left = MARGIN.l + ((cursor - from) * (wide - MARGIN.l - MARGIN.r)) / (to - from);
  chart.line.style.transform = `translateX(${left.toFixed(1)}px)`;
  const near = cursorKind === "time" && (facts.markers || []).find((mark) => Math.abs(mark.time - cursor) * (wide - MARGIN.l - MARGIN.r) / (to - from) < 5);
  chart.line.dataset.at = (cursorKind === "time" ? clock(cursor) : "step " + short(Math.round(cursor))) + (near ? " · " + near.text : "");
  chart.line.classList.toggle("flip", left > wide * 0.6);
}

/* For who does not see it. */
function describe(chart, all, shown) {
  const last = shown.slice(0, 6).map((name) => {
    const values = all[name].columns[0];
    return `${name} ${withUnit(values[values.length - 1], chart.unit)}`;
  });
  const text = shown.length ? `${chart.title}: ${shown.length} series; ${last.join(", ")}` : `${chart.title}: ${chart.empty.textContent}`;
  if (!chart.told || performance.now() - chart.told > 5000) {
    chart.told = performance.now();
    chart.frame.setAttribute("aria-label", text);
  }
}

/* -- taking it along --------------------------------------------------------------------------------------------- */

const file = (chart, ending) => `${chart.name}-${new Date().toISOString().slice(0, 19).replace(/[:T]/g, "")}.${ending}`;

function save(name, href) {
  const link = element("a", { href, download: name });
  link.click();
}

async function exportPng(chart) {
  draw(chart);   // it may not have been seen for a while
  const { wide, tall, shown } = chart.drawn, longest = Math.max(1, ...shown.map((name) => name.length));
  const rows = Math.ceil(shown.length / Math.max(1, Math.floor(wide / (50 + 7 * longest)))), below = 10 + 19 * rows, height = tall + 24 + below;   // as wide as Plotly makes its columns
  const data = chart.plot.data.map((trace) => ({ ...trace, showlegend: Boolean(trace.name) }));
  const layout = { ...chart.plot.layout, paper_bgcolor: palette.panel, title: { text: chart.title, x: 0.02, font: { size: 13 } }, margin: { ...MARGIN, t: 34, b: MARGIN.b + below }, height, showlegend: true, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", font: { color: palette.soft } } };
  const href = await window.Plotly.toImage({ data, layout }, { format: "png", width: wide, height, scale: 2 });
  save(file(chart, "png"), href);
}

function exportCsv(chart) {
  const rows = [[view.axis === "step" && chart.run ? "step" : "time", "series", "value", "min", "max"]];
  for (const [name, one] of Object.entries(figures[chart.name] || {})) {
    one.x.forEach((x, i) => {
      const at = chart.run && view.axis === "step" ? x : new Date(x * 1000).toISOString();
      rows.push([at, `"${name.replaceAll('"', '""')}"`, ...one.columns.map((column) => column[i])]);
    });
  }
  const href = URL.createObjectURL(new Blob([rows.map((row) => row.join(",")).join("\n") + "\n"], { type: "text/csv" }));
  save(file(chart, "csv"), href);
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

window.pipelineCosts = () => [...charts.values()].map((one) => [one.name, Math.round(one.cost || 0)]);
