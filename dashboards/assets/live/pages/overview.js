import { byId, element, percent, put, short, whole } from "../format.js";
import { draw, reset } from "../flow.js";
import { facts } from "../store.js";

export function mount() { reset(); }

export function update(changed) {
  if (changed.includes("totals")) showTotals(facts.totals);
  if (changed.includes("alerts")) showAlerts(facts.alerts);
  if (changed.includes("flow")) draw(facts.flow);
}

function showTotals(t) {
  put(byId("tile-rate"), short(t.rate));
  put(byId("tile-published"), whole(t.published));
  put(byId("tile-waiting"), whole(t.waiting));
  put(byId("tile-dead"), whole(t.dead));
  byId("box-dead").classList.toggle("bad", t.dead > 0);
  put(byId("tile-retried"), whole(t.retried));
  put(byId("tile-ledger"), !t.groups ? "–" : t.off === 0 ? "balances" : `off by ${whole(t.off)}`);
  byId("box-ledger").classList.toggle("good", t.groups > 0 && t.off === 0);
  byId("box-ledger").classList.toggle("bad", t.off !== 0);
  put(byId("tile-accuracy"), t.accuracy == null ? "–" : percent(t.accuracy));
  put(byId("tile-workers"), String(t.workers));
}

function showAlerts(alerts) {
  const list = byId("alert-list");
  list.replaceChildren(...alerts.map((one) => element("a", { class: `alert ${one.level}`, href: one.link, text: one.text })));
}
