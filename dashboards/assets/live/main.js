/* The pages' moving part. Dash renders a page once; this finds it, follows the feed, and draws. */
import * as charts from "./charts.js";
import * as controls from "./controls.js";
import { byId, clock, put, short } from "./format.js";
import * as channels from "./pages/channels.js";
import * as dead from "./pages/dead.js";
import * as matmul from "./pages/matmul.js";
import * as overview from "./pages/overview.js";
import * as serving from "./pages/serving.js";
import * as training from "./pages/training.js";
import * as workers from "./pages/workers.js";
import { ask, connect } from "./socket.js";
import { facts, now, status } from "./store.js";
import * as tables from "./tables.js";
import * as views from "./view.js";

const PAGES = { overview, channels, training, serving, matmul, workers, dead };
const TITLES = { overview: "Overview", channels: "Channels", training: "Training", serving: "Serving", matmul: "Matmul", workers: "Workers", dead: "Dead letters" };
const SILENCE = 4000;   // ms without a frame after which the dashboard itself counts as gone
let root = null, page = null;

function look() {
  const found = byId("page");
  if (found === root) return;
  if (page) { charts.unmount(); tables.forget(); page.unmount?.(); byId("dialog")?.close(); }   // it asks about a page that was left
  root = found;
  page = null;
  if (!root) return;
  views.read(root.dataset.page);
  page = PAGES[root.dataset.page];
  for (const name of Object.keys(facts)) delete facts[name];
  controls.mount(root);
  charts.mount(root);
  page.mount?.(root);
  ask();
}

function onFrame(frame) {
  if (frame && page && frame.page === root?.dataset.page) {
    page.update?.(frame.facts);
    if (frame.facts.includes("left_out")) charts.tellLeftOut();
    if (frame.snapshot) charts.redraw();
    else if (frame.facts.includes("markers")) charts.redraw();
    else if (frame.touched.size) charts.schedule();
  }
  tell();
}

/* The state of things: pill, banner, title, icon. */
let shown = "";
function tell() {
  const quiet = performance.now() - status.heard > SILENCE;
  const live = status.live && !quiet, held = views.view.end !== null && views.view.end !== undefined;
  const state = !status.heard && !status.lost ? "connecting" : live ? (held ? "paused" : "live") : "stale";
  const trouble = status.lost || (quiet ? "The dashboard does not answer."
    : `No news from Redis: ${status.trouble || "it does not answer"}. Start it (pipeline server); this page goes on by itself.`);
  const level = state === "stale" ? "bad" : status.bad ? "bad" : status.alerts ? "warn" : "good";
  const rate = short(status.rate || 0), title = TITLES[root?.dataset.page] || "Pipeline";
  const text = `${state === "stale" ? "⚠ " : status.bad ? `(${status.bad}) ` : ""}${title} · ${state === "stale" ? "no news" : rate + " events/s"}`;
  if (document.title !== text) document.title = text;
  const key = [state, level, trouble, status.alerts].join();
  if (key === shown) return;
  shown = key;
  const pill = byId("state"), banner = byId("banner"), alerts = byId("alerts");
  if (!pill) { shown = ""; return; }
  put(pill, state);
  pill.className = `pill ${state}`;
  banner.hidden = state !== "stale";
  put(banner, state === "stale" ? trouble : "");
  alerts.hidden = !status.alerts;
  alerts.className = `pill alerts ${status.bad ? "bad" : "warn"}`;
  put(alerts, `${status.alerts} ${status.alerts === 1 ? "alert" : "alerts"}`);
  const colour = { good: "%233fb68b", warn: "%23f2a541", bad: "%23e4637a" }[level];
  byId("favicon").href = `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'><rect x='1' y='1' width='14' height='14' rx='4' fill='${colour}'/><path d='M4 9.5 6.5 6l3 4L12 5.5' fill='none' stroke='white' stroke-width='1.6' stroke-linecap='round' stroke-linejoin='round'/></svg>`;
}

function follow() {
  new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
  new MutationObserver(() => { charts.themed(); page?.themed?.(); })
    .observe(document.documentElement, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });
  setInterval(tables.tend, 150);
  setInterval(() => { tell(); charts.moveOn(); put(byId("clock"), status.heard ? clock(now()) : ""); }, 500);
  views.onChange(() => { shown = ""; tell(); });
  look();
}

charts.load().then((colours) => {
  window.pipelineColours = colours;
  connect(onFrame);
  follow();
});
