import { byId, element, percent, seconds, short, style } from "../format.js";
import { facts, now } from "../store.js";

export function update(changed) {
  if (changed.includes("kernels")) kernels(facts.kernels);
  if (changed.includes("tiles")) tiles(facts.tiles);
  if (changed.includes("systolic")) systolic(facts.systolic);
}

export function themed() { if (facts.systolic) systolic(facts.systolic); }

function kernels(rows) {
  const box = byId("kernels");
  if (!rows.length) { box.replaceChildren(element("p", { class: "empty-line", text: "Publish jobs: python -m publishers.jobs" })); return; }
  const head = element("tr", {}, ...["kernel", "device", "last GFLOP/s", "best GFLOP/s", "of the peak"].map((text) => element("th", { scope: "col", text })));
  box.replaceChildren(element("table", { class: "plain" }, element("thead", {}, head), element("tbody", {}, ...rows.map((row) => element("tr", {},
    element("th", { scope: "row", text: row.kernel }), element("td", { text: row.device }),
    ...[row.last, row.best].map((value) => element("td", { text: value == null ? "–" : short(value) })),
    element("td", {}, row.share == null ? "–" : meter(row.share)))))));
}

function meter(share) {
  const bar = element("i");
  bar.style.width = `${Math.min(100, share * 100)}%`;
  return element("span", { class: "meter" }, element("span", { class: "bar" }, bar), percent(share));
}

function tiles(jobs) {
  const box = byId("tiles");
  if (!jobs.length) { box.replaceChildren(element("p", { class: "empty-line", text: "Share a product among the workers: pipeline matmul a.npy b.npy --blocks always" })); return; }
  box.replaceChildren(...jobs.map((job) => {
    const bar = element("i"), share = job.done / job.total, workers = Object.keys(job.workers).length;
    bar.style.width = `${100 * share}%`;
    return element("div", { class: "tile-job" },
      element("span", { class: "tabular", text: `${job.shape.join(" × ")}` }),
      element("span", { class: "bar", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": String(job.total), "aria-valuenow": String(job.done), ariaLabel: `Tiles of job ${job.job}` }, bar),
      element("span", { class: "soft tabular", text: `${job.done} of ${job.total} tiles · ${workers} ${workers === 1 ? "worker" : "workers"} · ${seconds(job.heard - job.started)}` }));
  }));
}

function systolic(one) {
  const box = byId("systolic");
  if (!one) { box.replaceChildren(element("p", { class: "empty-line", text: "Multiply on the simulated array: pipeline matmul a.npy b.npy --kernel systolic" })); return; }
  let canvas = box.querySelector("canvas");
  if (!canvas) {
    canvas = element("canvas", { role: "img" });
    box.replaceChildren(canvas, element("div", { class: "systolic-words" }, element("p", { class: "tabular" }), document.createElementNS("http://www.w3.org/2000/svg", "svg")));
  }
  const [rows, columns] = one.shown, bits = Uint8Array.from(atob(one.active), (c) => c.charCodeAt(0));
  const cell = Math.max(2, Math.min(18, Math.floor(340 / Math.max(rows, columns)))), gap = cell > 4 ? 1 : 0;
  const scale = window.devicePixelRatio || 1;
  canvas.width = columns * cell * scale; canvas.height = rows * cell * scale;
  canvas.style.width = `${columns * cell}px`; canvas.style.height = `${rows * cell}px`;
  const context = canvas.getContext("2d"), lit = style("--accent"), unlit = style("--grid");
  context.scale(scale, scale);
  let active = 0;
  for (let i = 0; i < rows * columns; i += 1) {
    const on = (bits[i >> 3] >> (7 - (i & 7))) & 1;
    active += on;
    context.fillStyle = on ? lit : unlit;
    context.fillRect((i % columns) * cell, Math.floor(i / columns) * cell, cell - gap, cell - gap);
  }
  const text = `cycle ${one.cycle + 1} of ${one.cycles} · ${percent(active / (rows * columns))} of ${one.size.join(" × ")} cells multiply`;
  canvas.setAttribute("aria-label", text);
  box.querySelector("p").textContent = text;
  curve(box.querySelector("svg"), one);
}

/* Which share of the cells was busy, over the cycles. */
function curve(svg, one) {
  const wide = 320, tall = 90;
  svg.setAttribute("viewBox", `0 0 ${wide} ${tall}`);
  svg.setAttribute("class", "curve");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "Share of busy cells over the cycles");
  const points = one.curve.map(([cycle, share]) => `${((cycle / Math.max(1, one.cycles - 1)) * wide).toFixed(1)},${(tall - 2 - share * (tall - 6)).toFixed(1)}`);
  let line = svg.querySelector("polyline");
  if (!line) line = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
  line.setAttribute("points", points.join(" "));
}
