/* An event's data as something to read: names and values, tensors as pictures and statistics. */
import { element } from "./format.js";

export function tree(value) {
  if (value === null || typeof value !== "object") return element("span", { class: "leaf", text: JSON.stringify(value) });
  if (value.tensor) {
    const { tensor, picture, ...statistics } = value;
    return element("span", { class: "tensor" },
      picture ? element("img", { src: picture, alt: `picture of ${tensor}` }) : null,
      element("span", {}, element("b", { text: tensor }), element("span", { class: "soft", text: Object.entries(statistics).map(([name, number]) => ` ${name} ${number}`).join(" ·") })));
  }
  const list = element("dl", { class: "tree" });
  for (const [name, item] of Object.entries(value)) list.append(element("div", {}, element("dt", { text: name }), element("dd", {}, tree(item))));
  return list;
}
