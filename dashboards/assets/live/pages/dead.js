import { act, ask, get } from "../actions.js";
import { byId, element, put, whole } from "../format.js";
import { facts, status } from "../store.js";
import { fill, grid, listen } from "../tables.js";
import { tree } from "../payload.js";
import { change, view } from "../view.js";

const LIMIT = 500;
let letters = [], shown = {}, counts = {}, told = "", busy = false, again = false;   // shown: which letters these are, and how many

export function mount() {
  told = ""; letters = []; shown = {};
  listen("dead", {
    selectionChanged: chosen,
    rowClicked: (event) => showLetter(event.data),
    cellKeyDown: (event) => { if (event.event.key === "Enter") showLetter(event.data); },
  });
  const group = element("select", { id: "dead-group", "aria-label": "Group", onchange: () => choose({ group: group.value || null }) });
  const reason = element("input", { type: "search", placeholder: "part of the reason", "aria-label": "Part of the reason", value: view.reason, oninput: () => choose({ reason: reason.value || null }) });
  byId("dead-filters").replaceChildren(group, reason);
  byId("replay").onclick = () => settle("replay", false);
  byId("drop").onclick = () => settle("drop", false);
  byId("replay-all").onclick = () => settle("replay", true);
  byId("drop-all").onclick = () => settle("drop", true);
  load();
}

function choose(values) { change(values); load(); }

/* The ledger says when there are more, and what people do when there are fewer. */
export function update(changed) {
  if (!changed.includes("dead") && !changed.includes("markers")) return;
  const now = JSON.stringify([facts.dead, (facts.markers || []).findLast((mark) => mark.kind === "action")]);
  if (now !== told) { told = now; load(); }
}

/* One load at a time; what is asked for during one is loaded after it. */
async function load() {
  again = true;
  if (busy) return;
  busy = true;
  try {
    while (again) { again = false; await read(); }
  } finally { busy = false; }
}

async function read() {
  try {
    const all = await get("/api/dead");
    if (!byId("dead-channels")) return;   // the page was left
    counts = Object.fromEntries(Object.entries(all.channels).map(([name, one]) => [name, one.open]));
    const names = Object.keys(counts).filter((name) => counts[name] || name === view.channel);
    if (!names.includes(view.channel)) Object.assign(view, { channel: names.find((name) => counts[name]) || null, group: null });
    const wanted = which(view);
    chips(names);
    groups(Object.keys(all.channels[view.channel]?.groups || {}));
    const found = wanted.channel ? await get(`/api/dead?${new URLSearchParams({ ...wanted, limit: LIMIT })}`) : { letters: [], open: 0 };
    letters = found.letters;
    shown = { ...wanted, open: found.open };
    fill("dead", letters);
    chosen();
  } catch (error) {
    if (status.live) byId("dead-channels")?.replaceChildren(element("span", { class: "bad", text: error.message }));
  }
}

const which = ({ channel, group, reason }) => ({ channel, ...(group && { group }), ...(reason && { reason }) });

/* Made once, so that the one that has the focus keeps it. */
function chips(names) {
  const box = byId("dead-channels");
  if ([...box.children].map((one) => one.dataset.channel).join("\n") !== names.join("\n")) {
    box.replaceChildren(...names.map((name) => element("button", { class: "choice", "data-channel": name, onclick: () => choose({ channel: name, group: null }) })));
  }
  for (const one of box.children) {
    one.setAttribute("aria-pressed", String(one.dataset.channel === view.channel));
    put(one, `${one.dataset.channel} ${whole(counts[one.dataset.channel])}`);
  }
}

function groups(names) {
  const select = byId("dead-group"), all = ["", ...new Set([...names, ...(view.group ? [view.group] : [])].sort())];
  byId("dead-filters").hidden = !view.channel;
  if ([...select.options].map((one) => one.value).join("\n") !== all.join("\n")) {
    select.replaceChildren(...all.map((name) => element("option", { value: name, text: name || "all groups" })));
  }
  select.value = view.group || "";
}

const picked = () => grid("dead")?.getSelectedRows() || [];

function chosen() {
  const n = picked().length, all = shown.open || 0;
  const some = all > letters.length ? `the newest ${whole(letters.length)} of ${whole(all)}` : "";
  put(byId("chosen"), [some, n ? `${n} chosen` : ""].filter(Boolean).join(" · "));
  for (const id of ["replay", "drop"]) byId(id).disabled = !n;
  for (const id of ["replay-all", "drop-all"]) byId(id).disabled = !all;
}

async function settle(what, everything) {
  const { open, ...wanted } = shown, { channel, group, reason } = wanted, rows = picked(), n = everything ? open : rows.length;
  const text = what === "replay" ? "They go to their own group again, with their ids; each once." : "They are given up for good, and stay counted as dead.";
  const some = everything ? `${group ? ` in ${group}` : ""}${reason ? ` with “${reason}”` : ""}` : "";
  const sure = await ask({ title: `${what === "replay" ? "Replay" : "Drop"} ${n} dead ${n === 1 ? "letter" : "letters"} of ${channel}${some}?`, text, yes: what === "replay" ? "Replay" : "Drop", danger: what === "drop" });
  if (!sure) return;
  const body = !everything ? { channel, ids: rows.map((row) => row.id) } : group || reason ? wanted : { channel, all: true };
  await act(`/api/dead/${what}`, body, (done) => `${what === "replay" ? "replayed" : "dropped"} ${done.settled}${done.gone ? `, ${done.gone} were gone` : ""}`);
  grid("dead")?.deselectAll();
  byId("letter").replaceChildren("Choose a letter to see its traceback and payload");
  load();
}

function showLetter(letter) {
  byId("letter").replaceChildren(
    element("dl", { class: "facts" }, ...[["reason", letter.reason], ["channel", letter.channel], ["group", letter.group], ["event", letter.event_id], ["key", letter.key || "–"], ["attempts", String(letter.attempts)]]
      .map(([name, text]) => element("div", {}, element("dt", { text: name }), element("dd", { text })))),
    element("h3", { text: "Payload" }), ...(letter.events ? letter.events.map((one) => tree(one)) : [element("p", { class: "soft", text: "Nobody can read this frame" })]),
    ...(letter.traceback ? [element("h3", { text: "Traceback" }), element("pre", { class: "traceback", tabIndex: 0, text: letter.traceback })] : []));
}
