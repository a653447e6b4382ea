/* Numbers with units; ticks of axes. */
const shows = window.pipelineShows;
export const { count, seconds, bytes, short, whole, percent } = shows;

/* A value as a chart of that unit shows it. */
export function withUnit(value, unit) {
  if (value == null || Number.isNaN(value)) return "–";
  if (unit === "s") return seconds(value);
  if (unit === "B") return bytes(value);
  return unit.startsWith("%") ? short(value) + " %" : short(value);
}

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value == null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node[name] = value;
    else if (name.startsWith("aria-") || name.startsWith("data-") || name === "for" || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

export const byId = (id) => document.getElementById(id);
export const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const two = (n) => String(n).padStart(2, "0");

export function clock(t, withSeconds = true) {
  const at = new Date(t * 1000);
  return `${two(at.getHours())}:${two(at.getMinutes())}` + (withSeconds ? `:${two(at.getSeconds())}` : "");
}

/* Put text into an element only when it has changed: an unchanged page costs no layout. */
export function put(node, text) {
  if (node && node.textContent !== text) node.textContent = text;
}

const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800];

export function timeTicks(from, to, most) {
  const step = STEPS.find((s) => (to - from) / s <= most) || 21600;
  const shift = new Date(from * 1000).getTimezoneOffset() * 60;
  const values = [], texts = [];
  for (let t = Math.ceil((from - shift) / step) * step + shift; t <= to; t += step) {
    values.push(t);
    texts.push(clock(t, step < 60));
  }
  return { values, texts };
}

export function stepTicks(from, to, most) {
  const raw = Math.max(1, (to - from) / most), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw) || 10 * power;
  const values = [];
  for (let v = Math.ceil(from / step) * step; v <= to; v += step) values.push(v);
  return { values, texts: values.map((v) => short(v)) };
}

/* The range of a y axis and where its lines are. */
export function valueTicks(low, high, unit, { log, zero, top }) {
  if (log) {
    let from = Math.floor(Math.log10(low) + 1e-9), to = Math.ceil(Math.log10(high) - 1e-9);
    if (to <= from) to = from + 1;
    const every = Math.max(1, Math.ceil((to - from) / 4)), values = [];
    for (let power = from; power <= to; power += every) values.push(10 ** power);
    if (to - from === 1) values.splice(1, 0, 2 * 10 ** from, 5 * 10 ** from);
    return { range: [from - 0.02, to + 0.02], values, texts: values.map((v) => withUnit(v, unit)) };
  }
  if (zero) low = Math.min(0, low);
  if (top != null) high = Math.max(top, high);
  if (high - low < 1e-12) { const pad = Math.abs(high) * 0.1 || 1; high += pad; if (!zero) low -= pad; }
  const base = unit === "B" ? 1000 : 10;
  const raw = (high - low) / 4, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, base].map((f) => f * power).find((s) => s >= raw) || 10 * power;
  const from = Math.floor(low / step + 1e-9) * step, to = Math.ceil(high / step - 1e-9) * step, values = [];
  for (let v = from; v <= to + step / 2; v += step) values.push(Number(v.toPrecision(12)));
  return { range: [from, to + (to - from) * 0.02], values, texts: values.map((v) => withUnit(v, unit)) };
}
