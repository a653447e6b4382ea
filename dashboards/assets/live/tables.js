/* Tables of ag-grid, filled from the feed: rows have ids, so what did not change is not drawn again. */
const newest = new Map(), listeners = new Map(), tended = new Map();

export function grid(name) {
  try { return window.dash_ag_grid?.getApi(`grid-${name}`) || null; } catch { return null; }
}

/* Give a table its rows; one that is not made yet gets them when it is. */
export function fill(name, rows) {
  newest.set(name, rows);
  grid(name)?.setGridOption("rowData", rows);
}

/* Call these when that happens in the table. */
export function listen(name, events) {
  listeners.set(name, events);
  tend();
}

/* A table that is being made forgets what it was given, rows and listeners: it gets them again. Called often. */
export function tend() {
  for (const [name, events] of listeners) {
    const api = grid(name);
    if (!api || tended.get(name) === api) continue;
    tended.set(name, api);
    for (const [event, call] of Object.entries(events)) api.addEventListener(event, call);
  }
  for (const [name, rows] of newest) {
    const api = grid(name);
    if (api && (rows.length ? api.getDisplayedRowCount() === 0 : !api.getGridOption("rowData"))) api.setGridOption("rowData", rows);
  }
}

export function forget() {
  for (const held of [newest, listeners, tended]) held.clear();
}
