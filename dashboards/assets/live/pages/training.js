import { ask, post, toast } from "../actions.js";
import { redraw } from "../charts.js";
import { bytes, byId, element, percent, put, seconds, short } from "../format.js";
import * as runs from "../runs.js";
import { facts, now } from "../store.js";
import { change, onChange, view } from "../view.js";

let rows = new Map(), known = "";

export function mount(root) {
  rows = new Map(); known = "";
  for (const button of root.querySelectorAll("[data-axis]")) button.onclick = () => change({ axis: button.dataset.axis, low: null, high: null });
  const smoothing = element("input", { type: "range", min: 0, max: 99, step: 1, value: String(view.smooth), id: "smoothing-by" });
  smoothing.oninput = () => { change({ smooth: Number(smoothing.value) }); redraw(); };
  byId("smoothing").replaceChildren(element("label", { for: "smoothing-by", text: "smoothing" }), smoothing);
  byId("all-runs").onclick = () => { change({ runs: view.runs === "all" ? null : "all" }); table(facts.runs || []); redraw(); };
  byId("band").onclick = () => { change({ band: view.band === "0" ? "1" : "0" }); redraw(); };
  byId("unzoom").onclick = () => change({ low: null, high: null });
  byId("start-run").onclick = start;
  show();
}

export function update(changed) {
  if (changed.includes("runs")) table(facts.runs);
}

function show() {
  if (view.page !== "training" || !byId("band")) return;
  for (const button of document.querySelectorAll("[data-axis]")) button.setAttribute("aria-pressed", String(button.dataset.axis === view.axis));
  byId("band").setAttribute("aria-pressed", String(view.band !== "0"));
  byId("all-runs").setAttribute("aria-pressed", String(view.runs === "all"));
  byId("unzoom").hidden = view.low === null && view.high === null;
}
onChange(show);

const COLUMNS = [
  ["step", (run) => short(run.step)], ["loss", (run) => number(run.loss)], ["accuracy", (run) => (run.accuracy == null ? "–" : percent(run.accuracy))],
  ["gradient norm", (run) => number(run.gradient_norm)], ["staleness", (run) => number(run.staleness)],
  ["round", (run) => (run.round_seconds == null ? "–" : seconds(run.round_seconds))], ["members", (run) => number(run.members)],
  ["sent a round", (run) => (run.bytes_sent == null ? "–" : bytes(run.bytes_sent))], ["saved", (run) => (run.bytes_saved == null ? "–" : bytes(run.bytes_saved))],
  ["compression", (run) => (run.ratio == null ? "–" : short(run.ratio) + " ×" + cost(run))],
  ["ran for", (run) => seconds(run.seconds)], ["state", (run) => (run.live ? "live" : `ended ${seconds(Math.max(0, now() - run.heard))} ago`)],
];
const cost = (run) => (run.encode_seconds == null ? "" : " in " + seconds(run.encode_seconds + (run.decode_seconds || 0)));
const number = (value) => (value == null ? "–" : short(value));

function table(all) {
  const newest = [...all].reverse(), box = byId("runs"), key = newest.map((run) => run.run).join("\n");
  if (!all.length) { box.replaceChildren(element("p", { class: "empty-line", text: "Start a run: python -m publishers.training" })); known = ""; return; }
  if (key !== known) {
    known = key; rows.clear();
    redraw();   // colours follow the order of runs
    const body = element("tbody");
    for (const run of newest) {
      const swatch = element("i", { class: "swatch" });
      const button = element("button", { class: "toggle", title: "Show or hide; with Shift: this one alone", onclick: (event) => { runs.toggle(run.run, event.shiftKey); table(facts.runs); redraw(); } }, swatch, run.run);
      const cells = COLUMNS.map(() => element("td"));
      const row = element("tr", {}, element("th", { scope: "row" }, button), ...cells);
      rows.set(run.run, { row, cells, swatch, button });
      body.append(row);
    }
    const head = element("tr", {}, element("th", { scope: "col", text: "run" }), ...COLUMNS.map(([text]) => element("th", { scope: "col", text })));
    box.replaceChildren(element("table", { class: "plain" }, element("thead", {}, head), body));
  }
  const set = runs.shown();
  newest.forEach((run) => {
    const { row, cells, swatch, button } = rows.get(run.run), on = set.has(run.run);
    swatch.style.background = runs.colourOf(run.run);
    button.setAttribute("aria-pressed", String(on));
    row.classList.toggle("off", !on);
    COLUMNS.forEach(([, text], i) => put(cells[i], text(run)));
    cells[cells.length - 1].className = run.live ? "good" : "soft";
  });
}

async function start() {
  const { modes, codecs } = byId("start-run").dataset;
  await ask({
    title: "Start a training run", yes: "Start",
    text: "A launcher takes it up: python -m publishers.training",
    fields: [
      { name: "run", label: "name", hint: "optional" }, { name: "mode", label: "mode", options: modes.split(" "), value: "sync" },
      { name: "compress", label: "compression", options: codecs.split(" "), value: "none", hint: "topk: of each hundred values one; powersgd: rank 2" },
      { name: "workers", label: "workers", type: "integer", value: 2 }, { name: "rounds", label: "rounds", type: "integer", value: 600 },
      { name: "learning_rate", label: "learning rate", type: "number", value: 0.006 }, { name: "batch", label: "batch", type: "integer", value: 64, hint: "samples a worker and round" },
      { name: "rate", label: "rounds a second at most", type: "number", value: 8, hint: "empty: as many as can be" },
    ],
    submit: async (values) => {
      const done = await post("/api/runs/start", Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)));
      toast(`run ${done.run} is asked for`, "good");
      return done;
    },
  });
}
