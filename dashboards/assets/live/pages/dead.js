import { act, ask, get } from "../actions.js";
import { byId, element, put, whole } from "../format.js";
import { facts, status } from "../store.js";
import { fill, grid, listen } from "../tables.js";
import { tree } from "../payload.js";
import { change, view } from "../view.js";

const LIMIT = 500;
let letters = [], shown = null, counts = {}, told = "", busy = false, again = false;   // shown: whose letters these are

export function mount() {
  told = ""; letters = []; shown = null;
  listen("dead", {
    selectionChanged: chosen,
    rowClicked: (event) => showLetter(event.data),
    cellKeyDown: (event) => { if (event.event.key === "Enter") showLetter(event.data); },
  });
  byId("replay").onclick = () => settle("replay", false);
  byId("drop").onclick = () => settle("drop", false);
  byId("replay-all").onclick = () => settle("replay", true);
  byId("drop-all").onclick = () => settle("drop", true);
  load();
}

/* The ledger says when there are more. */
export function update(changed) {
  const now = JSON.stringify(facts.dead || []);
  if (changed.includes("dead") && now !== told) { told = now; load(); }
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
    if (!view.channel || !names.includes(view.channel)) view.channel = names.find((name) => counts[name]) || null;
    const channel = view.channel;
    chips(names);
    letters = channel ? (await get(`/api/dead?channel=${encodeURIComponent(channel)}&limit=${LIMIT}`)).letters : [];
    shown = channel;
    fill("dead", letters);
    chosen();
  } catch (error) {
    if (status.live) byId("dead-channels")?.replaceChildren(element("span", { class: "bad", text: error.message }));
  }
}

function chips(names) {
  byId("dead-channels").replaceChildren(...names.map((name) => element("button", {
    class: "choice", "aria-pressed": String(name === view.channel), text: `${name} ${whole(counts[name])}`,
    onclick: () => { change({ channel: name }); load(); },
  })));
}

const picked = () => grid("dead")?.getSelectedRows() || [];

function chosen() {
  const n = picked().length, all = counts[shown] || 0;
  put(byId("chosen"), n ? `${n} chosen` : "");
  for (const id of ["replay", "drop"]) byId(id).disabled = !n;
  for (const id of ["replay-all", "drop-all"]) byId(id).disabled = !all;
}

async function settle(what, everything) {
  const channel = shown, rows = picked(), n = everything ? counts[channel] : rows.length;
  const text = what === "replay" ? "They go to their own group again, with their ids; each once." : "They are given up for good, and stay counted as dead.";
  const sure = await ask({ title: `${what === "replay" ? "Replay" : "Drop"} ${n} dead ${n === 1 ? "letter" : "letters"} of ${channel}?`, text, yes: what === "replay" ? "Replay" : "Drop", danger: what === "drop" });
  if (!sure) return;
  const body = everything ? { channel, all: true } : { channel, ids: rows.map((row) => row.id) };
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
