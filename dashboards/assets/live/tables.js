/* Tables of ag-grid, filled from the feed: rows have ids, so what did not change is not drawn again. */
const waiting = new Map();

export function grid(name) {
  try { return window.dash_ag_grid?.getApi(`grid-${name}`) || null; } catch { return null; }
}

/* Give a table its rows; one that is not made yet gets the newest as soon as it is. */
export function fill(name, rows) {
  const api = grid(name);
  if (api) { waiting.delete(name); api.setGridOption("rowData", rows); return; }
  if (!waiting.has(name)) setTimeout(() => retry(name), 60);
  waiting.set(name, rows);
}

function retry(name) {
  const rows = waiting.get(name);
  waiting.delete(name);
  if (rows && document.getElementById(`grid-${name}`)) fill(name, rows);
}

/* Call when the table is there. */
export function ready(name, use) {
  const api = grid(name);
  if (api) use(api);
  else if (document.getElementById(`grid-${name}`)) setTimeout(() => ready(name, use), 60);
}
