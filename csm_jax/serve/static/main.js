/** The page: a client of the server's APIs like any other. */

import { Api, ApiError } from "./api.js";
import { DialogueEditor } from "./dialogue.js";
import { find, showError } from "./dom.js";
import { formatButtons } from "./formats.js";
import { KeyPanel } from "./key-panel.js";
import { SPEAKERS, parseLines } from "./lines.js";
import { Problem, read } from "./reading.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { VoicePanel } from "./voice-panel.js";

const EXAMPLE = "A: one two three\nB: four five six\nA: seven eight nine";

class Page {
  /** @type {AbortController | null} */
  #running = null;
  #model = "";

  constructor() {
    // The page is one directory below the root of the server, which may have a prefix.
    this.api = new Api(new URL("..", document.baseURI));
    this.dialogue = new DialogueEditor(parseLines(EXAMPLE));
    this.settings = new Settings();
    this.panels = SPEAKERS.map((_, speaker) => this.#makePanel(speaker));
    this.stage = new Stage({
      onAgain: () => this.speak(),
      onKeepSeed: (seed) => this.settings.keepSeed(seed),
      onPlayer: () => this.#showRunning(),
    });
    this.keyPanel = new KeyPanel(this.api, () => this.connect());
    find("#speak").addEventListener("click", () => this.speak());
    find("#stop").addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => this.#pressed(event));
    // Another client may have added a voice.
    window.addEventListener("focus", () => this.#refreshVoices().catch(() => {}));
  }

  /** Asks the server for its model and its voices. Throws `ApiError`. */
  async connect() {
    try {
      const { id, sampling } = await this.api.model();
      this.#model = id;
      find("#model").textContent = id;
      this.settings.setDefaults(sampling);
      await this.#refreshVoices();
      this.keyPanel.accept();
      showError(find("#problem"), "");
    } catch (error) {
      this.#showProblem(/** @type {Error} */ (error));
      throw error;
    }
  }

  /** Speaks the dialogue, until its end or until it is stopped. */
  async speak() {
    if (this.#running) return;
    const dialogue = this.#collect();
    if (!dialogue) return;
    const running = (this.#running = new AbortController());
    this.#showRunning();
    this.stage.begin(dialogue.turns, Number(dialogue.options.seed) || 0);
    try {
      for await (const event of read(this.api, dialogue, running.signal)) this.stage.take(event);
      this.stage.finish();
      this.stage.offer(this.#formatButtons(dialogue));
    } catch (error) {
      if (running.signal.aborted) this.stage.stop();
      else this.#fail(/** @type {Error} */ (error), dialogue);
    } finally {
      this.#running = null;
      this.#showRunning();
    }
  }

  /** Stops playback, and ends the server's work. */
  stop() {
    if (this.#running) this.#running.abort();
    else this.stage.pause();
  }

  /** @param {number} speaker */
  #makePanel(speaker) {
    const panel = new VoicePanel(this.api, speaker, (name) => this.#refreshVoices(panel, name));
    panel.addEventListener("failed", (event) => {
      const error = /** @type {CustomEvent} */ (event).detail;
      if (error instanceof ApiError && error.status === 401) this.keyPanel.ask();
    });
    return panel;
  }

  /**
   * @param {VoicePanel} [chooser] the panel that chooses a voice
   * @param {string} [name] of that voice
   */
  async #refreshVoices(chooser, name) {
    const voices = await this.api.voices();
    for (const panel of this.panels) panel.setVoices(voices, panel === chooser ? name : undefined);
  }

  /**
   * The dialogue to speak; undefined if something is missing, which is then shown.
   * @returns {import("./reading.js").Dialogue | undefined}
   */
  #collect() {
    this.dialogue.clearErrors();
    this.settings.clearErrors();
    const { turns } = this.dialogue;
    if (!turns.length) this.dialogue.showError("There is nothing to say yet: write a turn.");
    let isWhole = turns.length > 0;
    /** @type {import("./reading.js").VoiceChoice[]} */
    const voices = this.panels.map((panel, i) => {
      panel.showError("");
      if (!turns.some(({ speaker }) => speaker === i)) return { kind: "none" };
      try {
        return panel.choice;
      } catch (error) {
        panel.showError(/** @type {Error} */ (error).message);
        isWhole = false;
        return { kind: "none" };
      }
    });
    return isWhole ? { turns, voices, options: this.settings.options } : undefined;
  }

  /** @param {import("./reading.js").Dialogue} dialogue */
  #formatButtons(dialogue) {
    return formatButtons(this.api, this.#model, dialogue, (message) =>
      this.stage.showDownloadError(message),
    );
  }

  /**
   * Shows an error, beside its control if that is on the page.
   * @param {Error} error
   * @param {import("./reading.js").Dialogue} dialogue
   */
  #fail(error, dialogue) {
    const isShown = this.#showInPlace(error);
    const line = error instanceof Problem ? error.about.line : undefined;
    const where = line === undefined ? "" : ` (line ${line + 1} of ${dialogue.turns.length})`;
    this.stage.fail(isShown && !where ? "" : `${error.message}${where}`);
  }

  /**
   * Shows an error beside its control; returns whether there is one.
   * @param {Error} error
   * @returns {boolean}
   */
  #showInPlace(error) {
    const { voice, line } = error instanceof Problem ? error.about : {};
    const cause = error instanceof Problem ? /** @type {Error} */ (error.cause) : error;
    const status = cause instanceof ApiError ? cause.status : 0;
    const param = cause instanceof ApiError ? cause.param : null;
    if (status === 401) this.keyPanel.ask();
    else if (voice !== undefined) this.panels[voice].showError(error.message);
    else if (!this.settings.showError(error.message, param)) {
      if (line === undefined) return false;
      this.dialogue.showError(error.message, line);
    }
    return true;
  }

  /** @param {Error} error */
  #showProblem(error) {
    if (error instanceof ApiError && error.status === 401) this.keyPanel.ask();
    else showError(find("#problem"), error.message);
  }

  #showRunning() {
    find("#speak").disabled = this.#running !== null;
    find("#stop").disabled = this.#running === null && !this.stage.isPlaying;
  }

  /** @param {KeyboardEvent} event */
  #pressed(event) {
    if (event.key === "Escape") this.stop();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.speak();
    else return;
    event.preventDefault();
  }
}

const page = new Page();
page.connect().catch(() => {});
