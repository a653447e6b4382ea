/* Which runs are shown, and in which colours: the same in the table and in every chart. */
import { facts } from "./store.js";
import { change, pack, unpack, view } from "./view.js";

const NEWEST = 8;   // of more, unless they are chosen

const names = () => (facts.runs || []).map((run) => run.run);
const runOf = (series) => series.replace(/ bytes_raw$/, "");

export const isAll = () => view.runs === "all" || names().length <= NEWEST;

export function shown() {
  if (view.runs && view.runs !== "all") return new Set(unpack(view.runs));
  return new Set(view.runs === "all" ? names() : names().slice(-NEWEST));
}

export const isShown = (series, set = shown()) => set.has(runOf(series));

export function colourOf(series) {
  const colours = window.pipelineColours, at = names().indexOf(runOf(series));
  return colours[(at < 0 ? 0 : at) % colours.length];
}

/* One more or one less; alone: only this one, and again: as before. */
export function toggle(series, alone) {
  const run = runOf(series), chosen = shown();
  if (alone) {
    const only = chosen.size === 1 && chosen.has(run);
    change({ runs: only ? null : pack([run]) });
    return;
  }
  chosen.has(run) ? chosen.delete(run) : chosen.add(run);
  change({ runs: pack([...chosen]) });
}
