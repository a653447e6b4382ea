/* One WebSocket: it says what it looks at, and gets a snapshot, then deltas. It comes back by itself. */
import { status, take } from "./store.js";
import { asked, onChange } from "./view.js";

let socket = null, onFrame = () => {}, wait = 250, pending = false;
const GONE = "The dashboard's own process is gone. Start it (python -m dashboards); this page goes on by itself.";
const LOST = {
  1003: (reason) => `The dashboard refuses what this page asks for: ${reason}`,
  1008: () => "The token is wrong or missing. Open /?token=… once; this page goes on by itself.",
};
const LOCAL = ["runs", "smooth", "band", "hide", "group", "reason"];

export function connect(listener) {
  onFrame = listener;
  open();
  onChange((values) => { if (Object.keys(values).some((name) => !LOCAL.includes(name))) ask(); });
}

/* Ask for what the view says now; several changes at once ask once. */
export function ask() {
  if (pending) return;
  pending = true;
  queueMicrotask(() => {
    pending = false;
    if (socket?.readyState === WebSocket.OPEN && asked().page) socket.send(JSON.stringify(asked()));
  });
}

function open() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/feed`);
  socket.binaryType = "arraybuffer";
  socket.onopen = ask;
  socket.onmessage = (message) => { wait = 250; status.lost = null; onFrame(take(message.data)); };
  socket.onclose = (event) => {
    status.live = false;
    status.lost = LOST[event.code]?.(event.reason) || GONE;
    onFrame(null);
    setTimeout(open, wait);
    wait = Math.min(5000, wait * 2);
  };
}
