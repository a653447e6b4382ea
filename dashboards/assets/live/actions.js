/* Acting: a question first, then one POST, then a word on what came of it. */
import { byId, element } from "./format.js";

/* Numbers of JavaScript are exact up to 2^53; beyond it the digits are kept as they came. */
function exact(key, value, { source } = {}) {
  return typeof value === "number" && /^-?\d+$/.test(source) && !Number.isSafeInteger(value) ? JSON.rawJSON(source) : value;
}

const read = async (answer) => { try { return JSON.parse(await answer.text(), exact); } catch { return {}; } };

export async function get(path) {
  const answer = await fetch(path);
  const body = await read(answer);
  if (!answer.ok) throw new Error(body.error || `${answer.status} ${answer.statusText}`);
  return body;
}

export async function post(path, body) {
  const answer = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  const found = await read(answer);
  if (!answer.ok) {
    const error = new Error(found.error || `${answer.status} ${answer.statusText}`);
    error.fields = found.fields || {};
    throw error;
  }
  return found;
}

/* Do it and say how it went; returns what came back, or null. */
export async function act(path, body, said) {
  try {
    const found = await post(path, body);
    toast(typeof said === "function" ? said(found) : said, "good");
    return found;
  } catch (error) {
    toast(error.message, "bad");
    return null;
  }
}

export function toast(text, kind = "") {
  const node = element("div", { class: `toast ${kind}`, text });
  byId("toasts").append(node);
  setTimeout(() => node.remove(), 7000);
}

/* A dialog with a form; resolves with its values, or null. `submit(values)` may act, and throw errors of fields. A field
   with `sets` gives others their values by its own. */
export function ask({ title, text, fields = [], yes = "OK", danger = false, submit }) {
  const dialog = byId("dialog");
  return new Promise((resolve) => {
    const problem = element("p", { class: "problem", role: "alert", hidden: true });
    const inputs = new Map();
    const rows = fields.map((field) => {
      const id = `field-${field.name.replace(/[^A-Za-z0-9]/g, "-")}`;
      const input = make(field, id);
      const wrong = element("span", { class: "wrong", id: `${id}-wrong` });
      input.setAttribute("aria-describedby", wrong.id);
      inputs.set(field.name, { field, input, wrong });
      return element("div", { class: "field" }, element("label", { for: id, text: field.label || field.name }), input,
        field.hint ? element("span", { class: "hint", text: field.hint }) : null, wrong);
    });
    const confirm = element("button", { class: `button ${danger ? "danger" : "primary"}`, type: "submit", text: yes });
    const form = element("form", { method: "dialog" },
      element("h2", { id: "dialog-title", text: title }), text ? element("p", { text }) : null, ...rows, problem,
      element("div", { class: "actions" }, element("button", { class: "button", type: "button", text: "Cancel", onclick: () => dialog.close() }), confirm));
    for (const { field, input } of inputs.values()) {
      if (field.sets) input.onchange = () => Object.entries(field.sets(input.value)).forEach(([name, value]) => { inputs.get(name).input.value = String(value ?? ""); });
    }
    dialog.setAttribute("aria-labelledby", "dialog-title");
    let result = null;
    form.onsubmit = async (event) => {
      event.preventDefault();
      problem.hidden = true;
      for (const { wrong } of inputs.values()) wrong.textContent = "";
      let values;
      try {
        values = Object.fromEntries([...inputs].map(([name, { field, input }]) => [name, valueOf(field, input)]));
      } catch (error) { problem.textContent = error.message; problem.hidden = false; return; }
      confirm.disabled = true;
      try {
        result = submit ? await submit(values) : values;
        dialog.close();
      } catch (error) {
        problem.textContent = error.message;
        problem.hidden = false;
        for (const [name, why] of Object.entries(error.fields || {})) {
          const one = inputs.get(name) || inputs.get(name.split(".")[0]);
          if (one) one.wrong.textContent = why;
        }
      } finally { confirm.disabled = false; }
    };
    dialog.onclose = () => { dialog.replaceChildren(); resolve(result); };
    dialog.replaceChildren(form);
    dialog.showModal();
  });
}

function make(field, id) {
  if (field.options) {
    const none = field.optional ? [element("option", { value: "", text: "–" })] : [];
    const select = element("select", { id }, ...none, ...field.options.map((one) => element("option", { value: String(one), text: String(one) })));
    if (field.value !== undefined) select.value = String(field.value);
    return select;
  }
  if (field.type === "boolean") return element("input", { id, type: "checkbox", checked: Boolean(field.value) });
  if (field.type === "json") return element("textarea", { id, rows: 4, spellcheck: false, value: field.value ?? "" });
  const number = field.type === "number" || field.type === "integer";
  return element("input", { id, type: number ? "number" : "text", step: field.type === "integer" ? "1" : "any", value: field.value ?? "", required: Boolean(field.required), autocomplete: "off" });
}

function valueOf(field, input) {
  if (field.type === "boolean") return input.checked;
  const text = input.value;
  if (field.options) return field.options[input.selectedIndex - (field.optional ? 1 : 0)];
  if (field.type === "integer" && /^-?\d+$/.test(text)) {
    const whole = JSON.parse(text.replace(/^(-?)0+(?=\d)/, "$1"), exact);
    if (typeof whole === "number" && !Number.isSafeInteger(whole)) throw new Error(`${field.label || field.name}: this browser would round so big a number`);
    return whole;
  }
  if (field.type === "number" || field.type === "integer") return text === "" ? null : Number(text);
  if (field.type === "json") {
    if (text.trim() === "") return undefined;
    try { return JSON.parse(text, exact); } catch (error) { throw new Error(`${field.label || field.name}: not JSON: ${error.message}`); }
  }
  return text === "" && !field.required ? undefined : text;
}

/* Fields of a form for an event of this JSON schema. What is optional begins empty, and is left out if it stays so. */
export function fieldsOf(schema) {
  const resolve = (one) => {
    if (one.$ref) return { ...resolve(schema.$defs?.[one.$ref.split("/").pop()] || {}), ...("default" in one && { default: one.default }) };
    const some = (one.anyOf || []).filter((other) => other.type !== "null");
    return some.length === 1 ? { ...resolve(some[0]), default: one.default } : one;
  };
  return Object.entries(schema.properties || {}).map(([name, given]) => {
    const one = resolve(given), required = (schema.required || []).includes(name), usual = one.default ?? null;
    const hint = [one.type === "array" || one.type === "object" ? "JSON" : one.type, required ? "needed" : usual === null ? "optional" : `optional, else ${JSON.stringify(usual)}`, one.minimum !== undefined ? `from ${one.minimum}` : "", one.maximum !== undefined ? `to ${one.maximum}` : ""].filter(Boolean).join(", ");
    const field = { name, label: name, required, optional: !required, hint };
    if (one.enum) return { ...field, options: one.enum };
    if (one.type === "boolean" && !required) return { ...field, options: [true, false] };
    return { ...field, type: ["string", "number", "integer", "boolean"].includes(one.type) ? one.type : "json" };
  });
}
