import { ask, get, post, toast } from "../actions.js";
import { byId } from "../format.js";
import { facts } from "../store.js";
import { fill } from "../tables.js";

export function mount() { byId("set-rate").onclick = rate; }

export function update(changed) {
  if (changed.includes("workers")) fill("workers", facts.workers);
}

async function rate() {
  let publishers;
  try { publishers = await get("/api/publishers"); } catch (error) { return toast(error.message, "bad"); }
  const names = Object.keys(publishers);
  if (!names.length) return toast("No publisher's rate can be set. Start one: python -m publishers.data", "bad");
  const now = names.map((name) => `${name}: ${publishers[name].rate ?? "as fast as it goes"}`).join(", ");
  await ask({
    title: "Set a publisher's rate", yes: "Set", text: `Now: ${now}`,
    fields: [{ name: "publisher", label: "publisher", options: names, sets: (name) => ({ rate: publishers[name].rate }) },
      { name: "rate", label: "events a second and process", type: "number", value: publishers[names[0]].rate ?? "", hint: "0 holds it; empty: as fast as it goes" }],
    submit: async (values) => { const done = await post("/api/publishers/rate", values); toast(`${values.publisher}: ${values.rate ?? "as fast as it goes"}`, "good"); return done; },
  });
}
