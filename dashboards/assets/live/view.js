/* What this page looks at, kept in the URL: window, where it ends, filters. */
const listeners = new Set();
export const view = {};
const DEFAULTS = { window: 300, end: null, axis: "step", low: null, high: null, channel: null, runs: null, smooth: 0, band: "1", hide: null, group: null, reason: null };
const NUMBERS = ["window", "end", "low", "high", "smooth"];

export function read(page) {
  const query = new URLSearchParams(location.search);
  for (const name of Object.keys(view)) delete view[name];
  Object.assign(view, { page }, DEFAULTS);
  if (kept()) view.window = kept();
  for (const name of Object.keys(DEFAULTS)) {
    const given = query.get(name);
    if (given === null || given === "") continue;
    if (!NUMBERS.includes(name)) view[name] = given;
    else if (Number.isFinite(Number(given))) view[name] = Number(given);
  }
  view.window = Math.min(86400, Math.max(1, view.window));
  view.smooth = Math.min(99, Math.max(0, view.smooth));
  if (kept()) write();   // who is given this address has kept another, or none
}

const kept = () => Number(sessionStorage.getItem("window"));

/* Change it, write it to the URL, and tell whoever draws it. */
export function change(values) {
  Object.assign(view, values);
  if ("window" in values && view.end === null) sessionStorage.setItem("window", String(view.window));
  write();
  for (const listener of listeners) listener(values);
}

function write() {
  const query = new URLSearchParams();
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const told = String(view[name]) !== String(usual) || (name === "window" && kept());
    if (view[name] !== null && told) query.set(name, view[name]);
  }
  const text = query.toString();
  history.replaceState(history.state, "", location.pathname + (text ? "?" + text : ""));
}

/* Names in the address: with commas between them, as JSON where that could be read as something else. */
export function pack(names) {
  if (!names.length) return null;
  const text = names.join(",");
  return text === "all" || text.startsWith("[") || names.some((name) => name === "" || name.includes(",")) ? JSON.stringify(names) : text;
}

export function unpack(text) {
  if (!text) return [];
  try { return text.startsWith("[") ? JSON.parse(text).map(String) : text.split(","); } catch { return text.split(","); }
}

export const onChange = (listener) => listeners.add(listener);

/* What the server needs to know of it. */
export function asked() {
  const { page, window: span, end, axis, low, high, channel } = view;
  return { page, window: span, end, axis, low, high, channel };
}
