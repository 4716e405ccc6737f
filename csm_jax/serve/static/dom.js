/** Small helpers for the document. Data goes into it as text only. */

/**
 * The element of a selector.
 * @param {string} selector
 * @param {ParentNode} [root]
 * @returns {any}
 */
export function find(selector, root = document) {
  const found = root.querySelector(selector);
  if (!found) throw new Error(`the page has no ${selector}`);
  return found;
}

/**
 * A copy of a template, with its elements by their `data-part`.
 * @param {string} id
 * @returns {{element: HTMLElement, parts: Record<string, any>}}
 */
export function fromTemplate(id) {
  const element = find(`#${id}`).content.firstElementChild.cloneNode(true);
  /** @type {Record<string, any>} */
  const parts = {};
  for (const part of element.querySelectorAll("[data-part]")) parts[part.dataset.part] = part;
  return { element, parts };
}

/**
 * Shows an error beside its control, or hides it.
 * @param {HTMLElement} place
 * @param {string} message "" hides it
 * @param {HTMLElement} [control] the control whose value is wrong
 */
export function showError(place, message, control) {
  place.textContent = message;
  place.hidden = !message;
  if (!control) return;
  control.setAttribute("aria-invalid", String(Boolean(message)));
  place.id ||= nextId("error");
  if (message) control.setAttribute("aria-errormessage", place.id);
  else control.removeAttribute("aria-errormessage");
}

/**
 * Ties a label to its control.
 * @param {HTMLLabelElement} label
 * @param {HTMLElement} control
 */
export function tie(label, control) {
  control.id ||= nextId("control");
  label.htmlFor = control.id;
}

/**
 * Changes the icon of a button.
 * @param {HTMLElement} button
 * @param {string} name of a symbol in icons.svg
 */
export function setIcon(button, name) {
  find("use", button).setAttribute("href", `icons.svg#${name}`);
}

/**
 * A button.
 * @param {string} text
 * @param {() => void} onClick
 * @returns {HTMLButtonElement}
 */
export function makeButton(text, onClick) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", onClick);
  return button;
}

/**
 * Lets the browser save data as a file.
 * @param {Blob} data
 * @param {string} name
 */
export function save(data, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(data);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

let lastId = 0;

/** @param {string} prefix */
function nextId(prefix) {
  lastId += 1;
  return `${prefix}-${lastId}`;
}
