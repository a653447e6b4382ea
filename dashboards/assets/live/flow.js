/* The diagram of what flows where, as SVG: nodes are links, lines carry their rates and the groups that read. */
import { byId, short, whole } from "./format.js";

const NS = "http://www.w3.org/2000/svg";
const WIDE = 154, TALL = 40, GAP_X = 96, GAP_Y = 14;
let shape = "", parts = null;

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

const keyOf = (edge) => `${edge.from}>${edge.to}>${edge.group}`;
const cut = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

export function reset() { shape = ""; parts = null; }

export function draw(flow) {
  const root = byId("flow");
  if (!root) return;
  byId("flow-empty").hidden = flow.nodes.length > 0;
  const key = flow.nodes.map((n) => `${n.id}@${n.column},${n.row}`).join() + "|" + flow.edges.map(keyOf).join();
  if (key !== shape) build(root, flow, key);
  for (const node of flow.nodes) fill(parts.nodes.get(node.id), node);
  for (const edge of flow.edges) {
    const { path, label } = parts.edges.get(keyOf(edge));
    path.setAttribute("class", edge.rate > 0 ? "edge busy" : "edge");
    path.style.strokeWidth = String(1.2 + Math.min(3.5, Math.log10(1 + edge.rate)));
    path.style.animationDuration = `${Math.max(0.35, 2 - Math.log10(1 + edge.rate) * 0.45).toFixed(2)}s`;
    const text = [cut(edge.group, 12), edge.rate > 0 ? short(edge.rate) : ""].join(" ").trim();
    if (label.textContent !== text) label.textContent = text;
  }
}

function build(root, flow, key) {
  shape = key;
  parts = { nodes: new Map(), edges: new Map() };
  const columns = Math.max(...flow.nodes.map((n) => n.column), 0) + 1;
  const heights = Array(columns).fill(0);
  for (const node of flow.nodes) heights[node.column] = Math.max(heights[node.column], node.row + 1);
  const most = Math.max(...heights, 1);
  const width = columns * WIDE + (columns - 1) * GAP_X + 4, height = most * (TALL + GAP_Y) + 2;
  const place = (node) => ({
    x: 2 + node.column * (WIDE + GAP_X),
    y: (height - heights[node.column] * (TALL + GAP_Y)) / 2 + GAP_Y / 2 + node.row * (TALL + GAP_Y),
  });
  const at = new Map(flow.nodes.map((node) => [node.id, place(node)]));
  const edges = make("g"), nodes = make("g"), labels = make("g");
  const sides = sidesOf(flow.edges, at);
  for (const edge of flow.edges) {
    const a = at.get(edge.from), b = at.get(edge.to);
    if (!a || !b) continue;
    const off = offset(edge, sides.get(sideOf(edge)));
    const path = make("path", { class: "edge", d: edge.group ? curve(a, b, off, 0) : curve(a, b, 0, off), fill: "none" });
    const label = make("text", { class: edge.group && b.x > a.x ? "edge-rate reads" : "edge-rate", ...point(edge, a, b, off) });
    parts.edges.set(keyOf(edge), { path, label });
    edges.append(path);
    labels.append(label);
  }
  for (const node of flow.nodes) {
    const { x, y } = at.get(node.id);
    const href = node.kind === "channel" ? `/channels?channel=${encodeURIComponent(node.label)}` : "/workers";
    const name = make("text", { class: "node-name", x: x + 12, y: y + 17 }), about = make("text", { class: "node-about", x: x + 12, y: y + 31 });
    const box = make("rect", { x, y, width: WIDE, height: TALL, rx: node.kind === "app" ? 20 : 8 });
    const link = make("a", { href, class: `node ${node.kind}` }, box, name, about);
    parts.nodes.set(node.id, { link, name, about });
    nodes.append(link);
  }
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height }, edges, labels, nodes);
  root.replaceChildren(svg);
}

/* Lines are named beside their channel, where those of one side lie above each other. */
const sideOf = (edge) => (edge.group ? `${edge.from}>` : `>${edge.to}`);

function sidesOf(edges, at) {
  const sides = new Map(), height = (edge) => at.get(edge.group ? edge.to : edge.from)?.y;
  for (const edge of edges) sides.set(sideOf(edge), [...(sides.get(sideOf(edge)) || []), edge]);
  for (const side of sides.values()) side.sort((one, other) => height(one) - height(other));
  return sides;
}

function offset(edge, side) {
  return (side.indexOf(edge) - (side.length - 1) / 2) * Math.min(12, (TALL - 8) / Math.max(1, side.length - 1));
}

/* Forward lines bow from side to side; those that lead back go around below. */
function curve(a, b, from, to) {
  const y1 = a.y + TALL / 2 + from, y2 = b.y + TALL / 2 + to;
  if (b.x > a.x) {
    const x1 = a.x + WIDE, x2 = b.x, bend = Math.max(36, (x2 - x1) / 2);
    return `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`;
  }
  const low = Math.max(a.y, b.y) + TALL + 10;
  return `M${a.x + WIDE / 2},${a.y + TALL} C${a.x + WIDE / 2},${low + 14} ${b.x + WIDE / 2},${low + 14} ${b.x + WIDE / 2},${b.y + TALL}`;
}

function point(edge, a, b, off) {
  if (b.x <= a.x) return { x: (a.x + b.x + WIDE) / 2, y: Math.max(a.y, b.y) + TALL + 18 };
  return edge.group ? { x: a.x + WIDE + 8, y: a.y + TALL / 2 - 4 + off } : { x: b.x - 8, y: b.y + TALL / 2 - 4 + off };
}

function fill(part, node) {
  if (!part) return;
  const name = cut(node.label, 20);
  const text = node.kind === "channel"
    ? `${short(node.rate)}/s · ${node.durable ? short(node.waiting) + " waiting" : "live"}${node.dead ? ` · ${short(node.dead)} dead` : ""}`
    : `${node.workers} ${node.workers === 1 ? "process" : "processes"}${node.live ? "" : ", silent"}`;
  if (part.name.textContent !== name) part.name.textContent = name;
  if (part.about.textContent !== text) {
    part.about.textContent = text;
    part.link.setAttribute("aria-label", `${node.kind} ${node.label}: ${text}${node.kind === "channel" ? `, ${whole(node.count)} published` : ""}`);
  }
  part.link.classList.toggle("bad", node.kind === "channel" ? node.dead > 0 : !node.live);
  part.link.classList.toggle("waits", node.kind === "channel" && node.durable && node.groups > 0 && node.waiting > 1000);
}
