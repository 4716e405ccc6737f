/** The voice of a speaker: a preset, one's own recording, or none. */

import { decodeRecording, encodeWav, SAMPLE_RATE } from "./wav.js";
import { MAX_SECONDS, Recorder } from "./recorder.js";
import { find, fromTemplate, setIcon, showError, tie } from "./dom.js";
import { SPEAKERS } from "./lines.js";

const PRESET = "preset:";
const OWN = "own";
const NONE = "none";
const WAV = "audio/wav";

export class VoicePanel extends EventTarget {
  /** @type {import("./api.js").Voice[]} */
  #voices = [];
  /** @type {Float32Array | null} */
  #samples = null;
  /** @type {Recorder | null} */
  #recorder = null;

  /**
   * @param {import("./api.js").Api} api
   * @param {number} speaker index of the speaker
   * @param {(choose?: string) => Promise<void>} refreshVoices asks the server for its voices, and
   *   gives them to all panels; this one chooses the named voice
   */
  constructor(api, speaker, refreshVoices) {
    super();
    this.api = api;
    this.speaker = speaker;
    this.refreshVoices = refreshVoices;
    const { element, parts } = fromTemplate("voice-template");
    this.parts = parts;
    const name = SPEAKERS[speaker];
    element.dataset.speaker = name;
    element.setAttribute("aria-label", `Voice of ${name}`);
    parts.badge.textContent = name;
    parts.title.textContent = `Speaker ${name}`;
    tie(parts["choice-label"], parts.choice);
    tie(parts["file-label"], parts.file);
    tie(parts["own-transcript-label"], parts["own-transcript"]);
    tie(parts["name-label"], parts.name);
    this.#listen();
    this.setVoices([]);
    find("#voices").append(element);
  }

  /**
   * Shows the available voices, and keeps the choice if possible.
   * @param {import("./api.js").Voice[]} voices
   * @param {string} [choose] name of the voice to choose
   */
  setVoices(voices, choose) {
    const isFirst = !this.#voices.length && this.parts.choice.value !== OWN;
    this.#voices = voices;
    const kept = this.parts.choice.value;
    const options = [
      ...voices.map(({ name }) => new Option(name, PRESET + name)),
      new Option("My own recording", OWN),
      new Option("No voice: the model’s choice", NONE),
    ];
    this.parts.choice.replaceChildren(...options);
    const preset = voices[this.speaker % voices.length];
    const values = [
      choose && PRESET + choose,
      !isFirst && kept,
      preset && PRESET + preset.name,
      NONE,
    ];
    this.parts.choice.value = values.find((value) => options.some((each) => each.value === value));
    this.#refresh();
  }

  /**
   * The source of the voice. Throws an `Error` if something is missing.
   * @returns {import("./reading.js").VoiceChoice}
   */
  get choice() {
    const preset = this.#preset;
    if (preset) return { kind: "preset", name: preset.name, speaker: preset.speaker };
    if (this.parts.choice.value === NONE) return { kind: "none" };
    return { kind: "own", ...this.#own() };
  }

  /** @param {string} message */
  showError(message) {
    showError(this.parts.error, message);
  }

  get #preset() {
    return this.#voices.find(({ name }) => this.parts.choice.value === PRESET + name);
  }

  #own() {
    const transcript = this.parts["own-transcript"].value.trim();
    if (!this.#samples) throw new Error("There is no recording yet: choose a file or record one.");
    if (!transcript) throw new Error("Write what is said in the recording.");
    return { samples: this.#samples, transcript };
  }

  #listen() {
    const { parts } = this;
    const on = (
      /** @type {string} */ part,
      /** @type {string} */ event,
      /** @type {() => any} */ act,
    ) => parts[part].addEventListener(event, () => this.#attempt(act));
    on("choice", "change", () => this.#refresh());
    on("listen", "click", () => this.#playPreset());
    on("delete", "click", () => this.#delete());
    on("file", "change", () => this.#takeFile());
    on("record", "click", () => this.#record());
    on("save", "click", () => this.#save());
  }

  /**
   * Runs an action, and shows its error.
   * @param {() => any} act
   */
  async #attempt(act) {
    this.showError("");
    this.parts.result.textContent = "";
    try {
      await act();
    } catch (error) {
      this.showError(/** @type {Error} */ (error).message);
      this.dispatchEvent(new CustomEvent("failed", { detail: error }));
    }
  }

  #refresh() {
    const { parts } = this;
    const preset = this.#preset;
    parts.own.hidden = parts.choice.value !== OWN;
    parts.listen.hidden = !preset;
    parts.delete.hidden = !preset?.deletable;
    parts["transcript-hint"].hidden = !preset;
    if (preset) parts["transcript-hint"].textContent = `“${preset.text}”`;
    parts.audio.hidden = parts.own.hidden || !this.#samples;
    parts.audio.pause();
  }

  async #playPreset() {
    const preset = this.#preset;
    if (!preset) return;
    this.#offer(await this.api.voiceRecording(preset.name));
    await this.parts.audio.play();
  }

  async #delete() {
    const preset = this.#preset;
    if (!preset || !confirm(`Delete the voice ${preset.name}?`)) return;
    await this.api.deleteVoice(preset.name);
    await this.refreshVoices();
    this.parts.result.textContent = `${preset.name} is deleted.`;
  }

  async #takeFile() {
    const [file] = this.parts.file.files;
    if (file) await this.#take(file);
  }

  /** @param {Blob} recording */
  async #take(recording) {
    try {
      this.#samples = await decodeRecording(recording);
    } catch {
      throw new Error("The browser cannot read this as a recording.");
    }
    this.#offer(new Blob([encodeWav(this.#samples)], { type: WAV }));
    this.parts.recorded.textContent = `${(this.#samples.length / SAMPLE_RATE).toFixed(1)} s`;
  }

  async #record() {
    if (this.#recorder) await this.#stopRecording();
    else await this.#startRecording();
  }

  async #startRecording() {
    this.#recorder = await Recorder.start();
    this.#showRecording(true);
    this.#follow(this.#recorder);
  }

  async #stopRecording() {
    const recorder = this.#recorder;
    if (!recorder) return;
    this.#recorder = null;
    this.#showRecording(false);
    await this.#take(await recorder.stop());
  }

  /** @param {boolean} isOn */
  #showRecording(isOn) {
    const { parts } = this;
    setIcon(parts.record, isOn ? "stop" : "microphone");
    parts["record-text"].textContent = isOn ? "Stop recording" : "Record";
    parts.record.classList.toggle("recording", isOn);
    parts.level.hidden = !isOn;
  }

  /**
   * Shows the level during a recording.
   * @param {Recorder} recorder
   */
  #follow(recorder) {
    if (this.#recorder !== recorder) return;
    this.parts.level.value = recorder.level;
    this.parts.recorded.textContent = `${recorder.seconds.toFixed(1)} s`;
    if (recorder.seconds >= MAX_SECONDS) this.#attempt(() => this.#stopRecording());
    else setTimeout(() => this.#follow(recorder), 50);
  }

  async #save() {
    const { samples, transcript } = this.#own();
    const name = this.parts.name.value.trim();
    if (!name) throw new Error("Give the voice a name to save it.");
    const recording = new Blob([encodeWav(samples)], { type: WAV });
    const voice = { name, speaker: this.speaker, text: transcript, recording };
    await this.api.addVoice(voice);
    await this.refreshVoices(name);
    this.parts.result.textContent = `${name} is saved.`;
  }

  /** @param {Blob} recording */
  #offer(recording) {
    const { audio } = this.parts;
    if (audio.src) URL.revokeObjectURL(audio.src);
    audio.src = URL.createObjectURL(recording);
    audio.setAttribute("aria-label", `Recording of speaker ${SPEAKERS[this.speaker]}`);
    audio.hidden = false;
  }
}
