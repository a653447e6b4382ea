import { act, ask, get, post, toast } from "../actions.js";
import { byId, element, percent, put, seconds, short } from "../format.js";
import { facts, figures, now } from "../store.js";
import { fill } from "../tables.js";
import { view } from "../view.js";

export function mount() {
  byId("load-model").onclick = load;
  byId("rollback").onclick = rollback;
}

export function update(changed) {
  if (changed.includes("models")) fill("models", facts.models);
  if (changed.includes("histogram")) histogram(facts.histogram);
  if (changed.includes("released")) reasons(facts.released);
  if (changed.includes("pictures")) pictures(facts.pictures);
  if (changed.includes("digits")) {
    put(byId("tile-digits"), facts.digits.accuracy == null ? "–" : percent(facts.digits.accuracy));
    put(byId("tile-weights"), facts.digits.version ? "v" + facts.digits.version : "–");
  }
  put(byId("tile-asked"), short(rate()));
}

/* Of the newest bucket that is over. */
function rate() {
  const until = view.end ?? now();
  let sum = 0;
  for (const { x, width, columns } of Object.values(figures.answers || {})) {
    if (x[x.length - 1] + width > until - width - 1) sum += columns[0][x.length - 1];
  }
  return sum;
}

/* Bars of a log histogram; quantiles from the same counts. */
function histogram(bins) {
  const box = byId("histogram"), all = bins.reduce((sum, [, n]) => sum + n, 0);
  const quantile = (share) => {
    let left = share * all;
    for (const [bound, n] of bins) { left -= n; if (left <= 0) return seconds(bound); }
    return "–";
  };
  put(byId("tile-p50"), all ? quantile(0.5) : "–");
  put(byId("tile-p99"), all ? quantile(0.99) : "–");
  if (!all) { box.replaceChildren(element("p", { class: "empty-line", text: "Ask a model: pipeline stress picture.jpg" })); return; }
  const most = Math.max(...bins.map(([, n]) => n));
  box.replaceChildren(element("div", { class: "bars", role: "img", ariaLabel: `${all} answers: median ${quantile(0.5)}, 99 % within ${quantile(0.99)}` },
    ...bins.map(([bound, n]) => {
      const bar = element("i", { title: `up to ${seconds(bound)}: ${n}` });
      bar.style.height = `${Math.max(n ? 2 : 0, (100 * n) / most)}%`;
      return bar;
    })),
    element("div", { class: "scale" }, element("span", { text: seconds(bins[0][0]) }), element("span", { text: seconds(bins[bins.length - 1][0]) })));
}

function reasons(released) {
  const byGroup = {};
  for (const [name, n] of Object.entries(released)) {
    const [group, reason] = name.split(": ");
    (byGroup[group] ??= []).push([reason, n]);
  }
  const box = byId("reasons");
  const groups = Object.entries(byGroup).filter(([, list]) => list.some(([, n]) => n));
  if (!groups.length) { box.replaceChildren(element("p", { class: "empty-line", text: "Start inference: pipeline serve subscribers.inference:app" })); return; }
  box.replaceChildren(...groups.map(([group, list]) => {
    const all = list.reduce((sum, [, n]) => sum + n, 0);
    const bar = element("div", { class: "share", role: "img", ariaLabel: list.map(([reason, n]) => `${reason} ${((100 * n) / all).toFixed(0)} %`).join(", ") },
      ...list.map(([reason, n]) => { const part = element("i", { class: `reason-${reason}` }); part.style.width = `${(100 * n) / all}%`; return part; }));
    const words = list.map(([reason, n]) => `${reason} ${((100 * n) / all).toFixed(0)} %`).join(" · ");
    return element("div", { class: "reason" }, element("b", { title: group, text: group }), bar, element("span", { class: "soft", text: `${words} of ${short(all)}` }));
  }));
}

function pictures(list) {
  const box = byId("pictures");
  if (!list.length) { box.replaceChildren(element("p", { class: "empty-line", text: "Ask a model: pipeline stress picture.jpg" })); return; }
  box.replaceChildren(...list.map((one) => element("figure", { title: one.model },
    element("img", { src: one.picture, alt: one.scores[0][0], width: 64, height: 64 }),
    element("figcaption", {}, ...one.scores.map(([label, p], i) => element(i ? "span" : "b", { text: `${label.split(",")[0]} ${(100 * p).toFixed(0)} %` }))))));
}

async function choices() {
  try { return await get("/api/models"); } catch (error) { toast(error.message, "bad"); return null; }
}

async function load() {
  const models = await choices();
  if (!models) return;
  const names = Object.keys(models);
  if (!names.length) return toast("No model is served. Start: pipeline serve subscribers.serving:app", "bad");
  const next = (name) => ({ version: (models[name].version || 0) + 1, source: models[name].source || "" }), first = next(names[0]);
  await ask({
    title: "Load a version", yes: "Load", text: "Every worker loads it beside the old one and swaps between two batches; one that does not load is refused.",
    fields: [{ name: "model", label: "model", options: names, sets: next }, { name: "version", label: "version", type: "integer", value: first.version, required: true },
      { name: "source", label: "source", value: first.source, hint: "a specification in PIPELINE_MODELS_DIR, or a built-in model" }],
    submit: async (values) => { const done = await post("/api/models/load", { ...values, source: values.source || "" }); toast(`${values.model} v${values.version} is asked for`, "good"); return done; },
  });
}

async function rollback() {
  const models = await choices();
  if (!models) return;
  const names = Object.keys(models).filter((name) => models[name].previous);
  if (!names.length) return toast("There is nothing to roll back to", "bad");
  const values = await ask({ title: "Roll back", yes: "Roll back", danger: true, fields: [{ name: "model", label: "model", options: names, hint: names.map((name) => `${name} → v${models[name].previous.version}`).join(", ") }] });
  if (values) await act("/api/models/rollback", values, (done) => `${values.model} goes back to v${done.version}`);
}
