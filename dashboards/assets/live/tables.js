/* Tables of ag-grid, filled from the feed: rows have ids, so what did not change is not drawn again. */
const newest = new Map();

export function grid(name) {
  try { return window.dash_ag_grid?.getApi(`grid-${name}`) || null; } catch { return null; }
}

/* Give a table its rows; one that is not made yet gets them when it is. */
export function fill(name, rows) {
  newest.set(name, rows);
  grid(name)?.setGridOption("rowData", rows);
}

/* A table that is being made drops what it is given: it gets it again. Called twice a second. */
export function refill() {
  for (const [name, rows] of newest) {
    const api = grid(name);
    if (api && rows.length && api.getDisplayedRowCount() === 0) api.setGridOption("rowData", rows);
  }
}

export function forget() { newest.clear(); }

/* Call when the table is there. */
export function ready(name, use) {
  const api = grid(name);
  if (api) use(api);
  else if (document.getElementById(`grid-${name}`)) setTimeout(() => ready(name, use), 60);
}
