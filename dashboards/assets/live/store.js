/* What the charts hold: figure → series → {x, columns}; and the facts beside them. */
export const figures = {};
export const facts = {};
export const status = { live: false, heard: 0, offset: 0 };
export let dirty = new Set();
export const measures = [];   // of drawing, for benchmarks and the console: {closed, drawn} in ms

const decoder = new TextDecoder();

/* The server's time, in seconds, by a clock that nobody sets. */
const ticks = () => performance.now() / 1000;
export const now = () => (status.heard ? ticks() + status.offset : Date.now() / 1000);
window.pipelineNow = now;

export function take(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, size)));
  if (head.kind === "snapshot") {
    for (const name of Object.keys(figures)) delete figures[name];
    for (const name of Object.keys(facts)) delete facts[name];
  }
  let at = 4 + size;
  const touched = new Set();
  for (const [figure, name, first, width, rows, columns, whole] of head.series) {
    const values = [];
    for (let c = 0; c < columns; c += 1) {
      values.push(new Float64Array(buffer, at, rows));
      at += 8 * rows;
    }
    merge(figure, name, first, width, rows, values, whole);
    touched.add(figure);
  }
  Object.assign(facts, head.facts);
  Object.assign(status, {
    live: head.live, trouble: head.trouble, alerts: head.alerts, bad: head.bad, rate: head.rate, dead: head.dead,
    loaded: head.history, heard: performance.now(), offset: offset(head),
    closed: head.series.length ? head.now : status.closed,
  });
  for (const name of touched) dirty.add(name);
  return { snapshot: head.kind === "snapshot", page: head.page, facts: Object.keys(head.facts), touched, now: head.now };
}

/* Frames are late, never early; and a machine that slept has a clock that stood still. */
const offset = (head) => (head.kind === "snapshot" ? head.now - ticks() : Math.max(status.offset, head.now - ticks()));

function merge(figure, name, first, width, rows, values, whole) {
  const all = (figures[figure] ??= {});
  let x, columns;
  if (width > 0) {
    x = Array.from({ length: rows }, (_, i) => first + i * width);
    columns = values;
  } else {
    [x, ...columns] = values;
  }
  const held = whole ? undefined : all[name];
  if (!held) {
    all[name] = { x: Array.from(x), columns: columns.map((one) => Array.from(one)), width };
    return;
  }
  let keep = held.x.length;
  while (keep > 0 && held.x[keep - 1] >= x[0]) keep -= 1;
  held.x.length = keep;
  held.x.push(...x);
  held.columns.forEach((one, c) => { one.length = keep; one.push(...columns[c]); });
}

/* Forget what has left the window. */
export function trim(figure, from) {
  for (const [name, one] of Object.entries(figures[figure] || {})) {
    if (!one.width || !one.x.length || one.x[0] >= from) continue;
    let drop = 0;
    while (drop < one.x.length && one.x[drop] + one.width < from) drop += 1;
    if (drop === one.x.length) { delete figures[figure][name]; continue; }
    if (drop < 8) continue;   // a few at a time
    one.x.splice(0, drop);
    for (const column of one.columns) column.splice(0, drop);
  }
}

window.pipelineCharts = figures;
window.pipelineFacts = facts;
window.pipelineMeasures = measures;
