import { act, ask, fieldsOf, get, post, toast } from "../actions.js";
import { byId, clock, element, put, short } from "../format.js";
import { facts } from "../store.js";
import { fill, listen } from "../tables.js";
import { change, view } from "../view.js";
import { line, tree } from "../payload.js";

let shown = null, timer = 0;

export function mount() {
  shown = null;
  listen("channels", {
    rowClicked: (event) => choose(event.data.channel),
    cellKeyDown: (event) => { if (event.event.key === "Enter") choose(event.data.channel); },
  });
  byId("refresh").onclick = () => showEvents();
  byId("publish").onclick = publish;
  clearInterval(timer);
  timer = setInterval(() => { if (view.channel && view.end === null && !document.hidden) showEvents(true); }, 3000);
  detail();
}

export function unmount() { clearInterval(timer); }

export function update(changed) {
  if (changed.includes("channels")) {
    fill("channels", facts.channels);
    groups();
  }
  detail();
}

function choose(channel) {
  change({ channel });
  detail();
  byId("detail").scrollIntoView({ behavior: "smooth", block: "start" });
}

function detail() {
  const box = byId("detail");
  box.hidden = !view.channel;
  if (!view.channel || shown === view.channel) return;
  shown = view.channel;
  put(byId("channel-name"), view.channel);
  byId("events").replaceChildren(element("p", { class: "soft", text: "Reading …" }));
  groups();
  showEvents();
}

function groups() {
  const rows = (facts.channels || []).filter((row) => row.channel === view.channel);
  if (rows.length) put(byId("channel-kind"), rows[0].kind === "live" ? "live: who listens now hears it" : `durable, ${short(rows[0].retained)} frames kept`);
  const wanted = rows.filter((row) => row.group && row.kind === "durable");
  const key = [view.channel, ...wanted.map((row) => `${row.group}:${row.paused}`)].join();
  const box = byId("group-actions");
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  box.replaceChildren(...wanted.map((row) => element("button", {
    class: `button ${row.paused ? "primary" : ""}`, text: `${row.paused ? "Resume" : "Pause"} ${row.group}`,
    onclick: () => pause(row.channel, row.group, !row.paused),
  })));
}

async function pause(channel, group, stop) {
  if (stop && !(await ask({ title: `Pause ${group}?`, text: `Its workers finish what they hold and take nothing more from ${channel} until it is resumed.`, yes: "Pause" }))) return;
  await act(`/api/groups/${stop ? "pause" : "resume"}`, { channel, group }, `${group} is ${stop ? "paused" : "resumed"}`);
}

async function showEvents(quiet = false) {
  const channel = view.channel, box = byId("events");
  if (!channel || !box) return;
  try {
    const found = await get(`/api/channels/${encodeURIComponent(channel)}?count=20`);
    if (view.channel !== channel || !byId("events")) return;
    if (box.contains(document.activeElement)) return;   // somebody is reading
    const open = new Set([...box.querySelectorAll("details[open]")].map((one) => one.dataset.id));
    const rows = found.events.map((event) => {
      const row = element("details", { class: "event", "data-id": event.id, open: open.has(event.id) },
        element("summary", {}, element("span", { class: "tabular soft", text: clock(event.time) }), element("span", { class: "id", text: event.id }),
          event.key ? element("span", { class: "chip", text: event.key }) : null, element("code", { text: line(event.data) })), tree(event.data, true));
      return row;
    });
    box.replaceChildren(...(rows.length ? rows : [element("p", { class: "soft", text: found.durable ? `Nothing is kept here. Publish: pipeline publish ${channel} '{…}'` : "Nothing came while we listened; live channels keep nothing." })]));
  } catch (error) {
    if (!quiet) box.replaceChildren(element("p", { class: "bad", text: error.message }));
  }
}

async function publish() {
  const channel = view.channel;
  let found;
  try { found = await get(`/api/schemas?channel=${encodeURIComponent(channel)}`); } catch (error) { return toast(error.message, "bad"); }
  const raw = ["str", "bytes"].includes(found.type);
  const fields = raw ? [{ name: "text", label: "text", type: "string", required: true }] : fieldsOf(found.schema);
  await ask({
    title: `Publish a ${found.type} on ${channel}`, yes: "Publish", fields: [...fields, { name: "\u0000key", label: "key", hint: "optional: orders events" }],
    submit: async (values) => {
      const { "\u0000key": key, ...event } = values;
      for (const name of Object.keys(event)) if (event[name] === undefined || (event[name] === null && !fields.find((f) => f.name === name)?.required)) delete event[name];
      const done = await post("/api/events", { channel, event: raw ? event.text : event, ...(key ? { key } : {}) });
      toast(`published ${done.id}`, "good");
      setTimeout(() => showEvents(true), 300);
      return done;
    },
  });
}
