/** The field for an API key, where the server asks for one. */

import { ApiError } from "./api.js";
import { find, showError } from "./dom.js";

export class KeyPanel {
  /**
   * @param {import("./api.js").Api} api
   * @param {() => Promise<void>} onKey called with each new key; throws `ApiError` if it is wrong
   */
  constructor(api, onKey) {
    this.api = api;
    this.onKey = onKey;
    this.panel = find("#key-panel");
    this.input = find("#key");
    this.error = find(".error", this.panel);
    this.panel.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.#use(this.input.value.trim());
    });
    find("#key-button").addEventListener("click", () => this.#toggle());
    find("#key-forget").addEventListener("click", () => {
      this.api.key = "";
      location.reload();
    });
  }

  /** Asks for a key; says what is wrong with the one there is. */
  ask() {
    this.panel.hidden = false;
    find("#key-button").hidden = false;
    find("#key-forget").hidden = true;
    if (this.api.key) showError(this.error, "The server does not know this key.", this.input);
    // Wrong keys are limited, so this one must not be sent again automatically.
    this.api.key = "";
    this.input.focus();
  }

  /** To be called when the server has answered with the key there is, or without. */
  accept() {
    this.panel.hidden = true;
    showError(this.error, "", this.input);
    find("#key-button").hidden = find("#key-forget").hidden = !this.api.key;
  }

  /** @param {string} key */
  async #use(key) {
    if (!key) return;
    this.api.key = key;
    this.input.value = "";
    try {
      await this.onKey();
    } catch (error) {
      const message = /** @type {Error} */ (error).message;
      if (!(error instanceof ApiError && error.status === 401)) showError(this.error, message);
    }
  }

  #toggle() {
    this.panel.hidden = !this.panel.hidden;
    if (!this.panel.hidden) this.input.focus();
  }
}
