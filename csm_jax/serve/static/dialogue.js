/** The editor of a dialogue: a list of turns, or their text. */

import { find, fromTemplate, showError } from "./dom.js";
import { SPEAKERS, formatLines, otherSpeaker, parseLines } from "./lines.js";

/**
 * A turn of the list.
 * @typedef {{speaker: number, element: HTMLElement, parts: Record<string, any>}} Row
 */

export class DialogueEditor {
  /** @type {Row[]} */
  #rows = [];

  /** @param {import("./lines.js").Turn[]} turns what is there at first */
  constructor(turns) {
    this.list = find("#turns");
    this.text = find("#text");
    this.error = find("#dialogue-error");
    find("#add-turn").addEventListener("click", () => this.#insert(this.#rows.length));
    find("#as-turns").addEventListener("click", () => this.#show("turns"));
    find("#as-text").addEventListener("click", () => this.#show("text"));
    this.#fill(turns);
  }

  /** The turns that say something. */
  get turns() {
    if (this.#isText) return parseLines(this.text.value);
    return this.#filledRows.map(({ speaker, parts }) => ({
      speaker,
      text: parts.text.value.trim(),
    }));
  }

  /**
   * Shows an error of a turn, or of the dialogue.
   * @param {string} message
   * @param {number} [index] of the turn in `turns`
   */
  showError(message, index) {
    const row = index === undefined || this.#isText ? undefined : this.#filledRows[index];
    if (row) showError(row.parts.error, message, row.parts.text);
    else showError(this.error, message, this.#isText ? this.text : undefined);
  }

  clearErrors() {
    showError(this.error, "", this.text);
    for (const { parts } of this.#rows) showError(parts.error, "", parts.text);
  }

  get #isText() {
    return !find("#text-field").hidden;
  }

  get #filledRows() {
    return this.#rows.filter(({ parts }) => parts.text.value.trim());
  }

  /** @param {"turns" | "text"} form */
  #show(form) {
    if (this.#isText === (form === "text")) return;
    const turns = this.turns;
    this.clearErrors();
    if (form === "text") this.text.value = formatLines(turns);
    else this.#fill(turns);
    find("#text-field").hidden = form !== "text";
    this.list.hidden = find("#turns-foot").hidden = form === "text";
    find("#as-turns").setAttribute("aria-pressed", String(form === "turns"));
    find("#as-text").setAttribute("aria-pressed", String(form === "text"));
  }

  /** @param {import("./lines.js").Turn[]} turns */
  #fill(turns) {
    const filled = turns.length ? turns : [{ speaker: 0, text: "" }];
    this.#rows = filled.map((turn) => this.#makeRow(turn));
    this.#refresh();
  }

  /**
   * @param {import("./lines.js").Turn} turn
   * @returns {Row}
   */
  #makeRow({ speaker, text }) {
    const { element, parts } = fromTemplate("turn-template");
    const row = { speaker, element, parts };
    parts.text.value = text;
    parts.who.addEventListener("click", () => {
      row.speaker = otherSpeaker(row.speaker);
      this.#refresh();
    });
    parts.up.addEventListener("click", () => this.#move(row, -1, parts.up));
    parts.down.addEventListener("click", () => this.#move(row, 1, parts.down));
    parts.remove.addEventListener("click", () => this.#remove(row));
    parts.text.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      this.#typed(row, event);
    });
    parts.text.addEventListener("paste", (/** @type {ClipboardEvent} */ event) => {
      this.#pasted(row, event);
    });
    return row;
  }

  /**
   * @param {Row} row
   * @param {KeyboardEvent} event
   */
  #typed(row, event) {
    const move = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const isPlain = !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.isComposing;
    if (move && event.altKey) this.#move(row, move, row.parts.text);
    else if (event.key === "Enter" && isPlain) this.#insert(this.#rows.indexOf(row) + 1);
    else return;
    event.preventDefault();
  }

  /**
   * Parses a pasted dialogue into turns.
   * @param {Row} row
   * @param {ClipboardEvent} event
   */
  #pasted(row, event) {
    const turns = parseLines(event.clipboardData?.getData("text/plain") ?? "");
    if (turns.length < 2) return;
    event.preventDefault();
    const index = this.#rows.indexOf(row);
    const isEmpty = !row.parts.text.value.trim();
    const pasted = turns.map((turn) => this.#makeRow(turn));
    this.#rows.splice(isEmpty ? index : index + 1, isEmpty ? 1 : 0, ...pasted);
    this.#refresh();
    pasted.at(-1)?.parts.text.focus();
  }

  /** @param {number} index */
  #insert(index) {
    const before = this.#rows[index - 1];
    const row = this.#makeRow({ speaker: before ? otherSpeaker(before.speaker) : 0, text: "" });
    this.#rows.splice(index, 0, row);
    this.#refresh();
    row.parts.text.focus();
  }

  /**
   * @param {Row} row
   * @param {number} by
   * @param {HTMLElement} focused what keeps the focus
   */
  #move(row, by, focused) {
    const from = this.#rows.indexOf(row);
    const to = from + by;
    if (to < 0 || to >= this.#rows.length) return;
    this.#rows.splice(from, 1);
    this.#rows.splice(to, 0, row);
    this.#refresh();
    focused.focus();
  }

  /** @param {Row} row */
  #remove(row) {
    const index = this.#rows.indexOf(row);
    this.#rows.splice(index, 1);
    if (this.#rows.length) this.#refresh();
    else this.#fill([]);
    const next = this.#rows[Math.min(index, this.#rows.length - 1)];
    next.parts.text.focus();
  }

  #refresh() {
    this.list.replaceChildren(...this.#rows.map(({ element }) => element));
    for (const [i, { speaker, element, parts }] of this.#rows.entries()) {
      const name = SPEAKERS[speaker];
      const other = SPEAKERS[otherSpeaker(speaker)];
      element.dataset.speaker = name;
      parts.who.textContent = name;
      parts.who.title = `Speaker ${name}; change to ${other}`;
      parts.who.setAttribute(
        "aria-label",
        `${name}, the speaker of turn ${i + 1}; change to ${other}`,
      );
      parts.text.setAttribute("aria-label", `Turn ${i + 1}, speaker ${name}`);
      parts.text.placeholder = `What ${name} says`;
      for (const part of ["up", "down", "remove"]) {
        const label = { up: "Move up", down: "Move down", remove: "Remove" }[part];
        parts[part].setAttribute("aria-label", `${label} turn ${i + 1}`);
        parts[part].title = label;
      }
      // Not `disabled`, which would remove the focus while a turn is moved by keyboard.
      parts.up.setAttribute("aria-disabled", String(i === 0));
      parts.down.setAttribute("aria-disabled", String(i === this.#rows.length - 1));
    }
  }
}
