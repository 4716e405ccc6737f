/** The settings of how speech is drawn. */

import { find, fromTemplate, showError, tie } from "./dom.js";

/**
 * A setting, with its name in the APIs.
 * @typedef {{name: string, label: string, hint: string, type: "range" | "text",
 *   min?: number, max?: number, step?: number, unit?: number}} Setting
 */

/** @type {Setting[]} */
const SETTINGS = [
  {
    name: "temperature",
    label: "Temperature",
    type: "range",
    min: 0,
    max: 2,
    step: 0.05,
    hint: "Higher values give more varied speech. 0 always takes the likeliest sound.",
  },
  {
    name: "top_k",
    label: "Top k",
    type: "range",
    min: 1,
    max: 500,
    step: 1,
    hint: "Number of likeliest sounds to choose from.",
  },
  {
    name: "top_p",
    label: "Top p",
    type: "range",
    min: 0.01,
    max: 1,
    step: 0.01,
    hint: "Only the likeliest sounds, up to this total probability. 1 is off.",
  },
  {
    name: "min_p",
    label: "Min p",
    type: "range",
    min: 0,
    max: 0.99,
    step: 0.01,
    hint: "Drops sounds less likely than this share of the likeliest. 0 is off.",
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    type: "range",
    min: 0.5,
    max: 3,
    step: 0.05,
    hint: "Avoids sounds that have been used. 1 is off.",
  },
  {
    name: "seed",
    label: "Seed",
    type: "text",
    hint: "The same seed gives the same speech. Empty: another seed each time.",
  },
  {
    name: "max_audio_length_ms",
    label: "Longest turn, in seconds",
    type: "text",
    unit: 1000,
    hint: "Longer speech is cut. Empty: the longest that the text can need.",
  },
  {
    name: "best_of",
    label: "Takes",
    type: "text",
    hint: "Of several takes the best is kept, if the server allows it. It then comes as a whole.",
  },
];

export class Settings {
  /** @type {Map<string, {setting: Setting, parts: Record<string, any>, isChanged: boolean}>} */
  #fields = new Map();

  constructor() {
    for (const setting of SETTINGS) {
      const { element, parts } = fromTemplate("setting-template");
      const field = { setting, parts, isChanged: false };
      this.#fields.set(setting.name, field);
      parts.label.textContent = setting.label;
      parts.hint.textContent = setting.hint;
      parts.hint.id = `hint-${setting.name}`;
      parts.input.setAttribute("aria-describedby", parts.hint.id);
      parts.input.id = setting.name;
      parts.input.type = setting.type;
      parts.output.hidden = setting.type === "text";
      if (setting.type === "text") {
        parts.input.inputMode = setting.unit ? "decimal" : "numeric";
        parts.input.autocomplete = "off";
      } else {
        const { min, max, step } = setting;
        Object.assign(parts.input, { min, max, step });
      }
      tie(parts.label, parts.input);
      parts.input.addEventListener("input", () => {
        field.isChanged = true;
        this.#refresh(setting.name);
      });
      find("#setting-fields").append(element);
      this.#refresh(setting.name);
    }
  }

  /**
   * Shows the server's defaults where nothing else was chosen.
   * @param {Record<string, number>} values
   */
  setDefaults(values) {
    for (const [name, field] of this.#fields) {
      if (field.isChanged || values[name] === undefined) continue;
      field.parts.input.value = values[name];
      this.#refresh(name);
    }
  }

  /**
   * The fields of a request: changed settings, and always a seed. A text that is not a number stays
   * as it is, and the server refuses it.
   * @returns {Record<string, unknown>}
   */
  get options() {
    /** @type {Record<string, unknown>} */
    const options = { seed: crypto.getRandomValues(new Uint32Array(1))[0] };
    for (const [name, { setting, parts, isChanged }] of this.#fields) {
      const written = parts.input.value.trim();
      if (!isChanged || !written) continue;
      const value = Number(written.replace(",", "."));
      options[name] = Number.isFinite(value) ? value * (setting.unit ?? 1) : written;
    }
    return options;
  }

  /** @param {number} seed */
  keepSeed(seed) {
    const field = this.#fields.get("seed");
    if (!field) return;
    field.parts.input.value = String(seed);
    field.isChanged = true;
    find("#settings").open = true;
    field.parts.input.focus();
  }

  /**
   * Shows an error of a setting; returns false if there is no such setting.
   * @param {string} message
   * @param {string | null} name
   */
  showError(message, name) {
    const field = this.#fields.get(name ?? "");
    if (!field) return false;
    find("#settings").open = true;
    showError(field.parts.error, message, field.parts.input);
    return true;
  }

  clearErrors() {
    for (const { parts } of this.#fields.values()) showError(parts.error, "", parts.input);
  }

  /** @param {string} name */
  #refresh(name) {
    const parts = this.#fields.get(name)?.parts;
    if (parts) parts.output.textContent = parts.input.value;
  }
}
