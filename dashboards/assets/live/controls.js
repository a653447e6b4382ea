/* The window of time: choose it, hold it still, go back in it. */
import { byId, clock, element, put, seconds } from "./format.js";
import { now } from "./store.js";
import { change, onChange, view } from "./view.js";

const BACK = 6 * 3600;
let slider = null, label = null;

export function mount(root) {
  slider = null;
  const pause = byId("pause");
  if (!pause) return;
  for (const button of root.querySelectorAll("[data-window]")) {
    button.onclick = () => change({ window: Number(button.dataset.window) });
  }
  pause.onclick = () => change({ end: view.end === null ? Math.floor(now()) : null });
  slider = element("input", { type: "range", step: 1, ariaLabel: "End of the window" });
  label = element("output", { class: "tabular" });
  let waiting = 0;
  slider.oninput = () => {
    clearTimeout(waiting);
    const end = Number(slider.value);
    tell(end);
    waiting = setTimeout(() => change({ end }), 120);
  };
  byId("scrub").replaceChildren(slider, label);
  show();
}

function tell(end) {
  put(label, `${clock(end - view.window)} – ${clock(end)}`);
  slider.setAttribute("aria-valuetext", `until ${clock(end)}, ${seconds(Math.max(0, now() - end))} ago`);
}

function show() {
  if (!slider) return;
  const held = view.end !== null, pause = byId("pause");
  for (const button of document.querySelectorAll("[data-window]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.window) === view.window));
  }
  put(pause, held ? "Go live" : "Pause");
  pause.setAttribute("aria-pressed", String(held));
  pause.classList.toggle("primary", held);
  byId("scrub").hidden = !held;
  if (held) {
    slider.max = String(Math.floor(Math.max(now(), view.end)));   // moments, and not their distance from a now that goes on
    slider.min = String(Math.floor(Math.min(now() - BACK, view.end)));
    slider.value = String(view.end);
    tell(view.end);
  }
}

onChange(show);
