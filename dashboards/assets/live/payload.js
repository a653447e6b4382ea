/* An event's data as something to read: names and values, tensors as pictures and statistics. */
import { element } from "./format.js";

const TENSOR = "\u0000tensor";   // in what the server has summarised; events cannot say so there

/* `summarised`: the data is what `browse.summary` made of an event, and not the event itself. */
export function tree(value, summarised = false) {
  if (value === null || typeof value !== "object" || JSON.isRawJSON?.(value)) return element("span", { class: "leaf", text: JSON.stringify(value) });
  if (summarised && value[TENSOR]) {
    const { [TENSOR]: tensor, picture, ...statistics } = value;
    return element("span", { class: "tensor" },
      picture ? element("img", { src: picture, alt: `picture of ${tensor}` }) : null,
      element("span", {}, element("b", { text: tensor }), element("span", { class: "soft", text: Object.entries(statistics).map(([name, number]) => ` ${name} ${number}`).join(" ·") })));
  }
  const list = element("dl", { class: "tree" });
  for (const [name, item] of Object.entries(value)) list.append(element("div", {}, element("dt", { text: name }), element("dd", {}, tree(item, summarised))));
  return list;
}

/* In one line, of what the server has summarised. */
export function line(data) {
  const text = JSON.stringify(data, (key, value) => (value && value[TENSOR] ? `<${value[TENSOR]}>` : value));
  return text.length > 140 ? text.slice(0, 139) + "…" : text;
}
