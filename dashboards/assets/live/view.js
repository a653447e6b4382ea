/* What this page looks at, kept in the URL: window, where it ends, filters. */
const listeners = new Set();
export const view = {};
const DEFAULTS = { window: 300, end: null, axis: "step", low: null, high: null, channel: null, runs: null, smooth: 0, band: "1", hide: null, group: null, reason: null };
const NUMBERS = ["window", "end", "low", "high", "smooth"];

export function read(page) {
  const query = new URLSearchParams(location.search);
  for (const name of Object.keys(view)) delete view[name];
  Object.assign(view, { page }, DEFAULTS);
  const kept = Number(sessionStorage.getItem("window"));
  if (kept) view.window = kept;
  for (const name of Object.keys(DEFAULTS)) {
    const given = query.get(name);
    if (given === null || given === "") continue;
    if (!NUMBERS.includes(name)) view[name] = given;
    else if (Number.isFinite(Number(given))) view[name] = Number(given);
  }
  view.window = Math.min(86400, Math.max(1, view.window));
}

/* Change it, write it to the URL, and tell whoever draws it. */
export function change(values) {
  Object.assign(view, values);
  if ("window" in values && view.end === null) sessionStorage.setItem("window", String(view.window));
  const query = new URLSearchParams();
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    if (view[name] !== null && String(view[name]) !== String(usual)) query.set(name, view[name]);
  }
  const text = query.toString();
  history.replaceState(history.state, "", location.pathname + (text ? "?" + text : ""));
  for (const listener of listeners) listener(values);
}

export const onChange = (listener) => listeners.add(listener);

/* What the server needs to know of it. */
export function asked() {
  const { page, window: span, end, axis, low, high, channel } = view;
  return { page, window: span, end, axis, low, high, channel };
}
