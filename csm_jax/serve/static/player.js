/** Plays speech while it comes, without gaps, on the clock of Web Audio. */

import { SAMPLE_RATE } from "./wav.js";

/** Seconds from a call until the first sample is played, so that it is not late already. */
const LEAD = 0.02;
/** Seconds that must be there after playback ran dry; doubled each time up to the last. */
const FIRST_RESERVE = 0.25;
const LAST_RESERVE = 2;

/** @typedef {"idle" | "playing" | "paused" | "buffering" | "ended"} PlayerState */

export class Player extends EventTarget {
  /** @type {PlayerState} */
  state = "idle";
  /** @type {import("./speech.js").Speech | null} */
  #speech = null;
  /** @type {Set<AudioBufferSourceNode>} */
  #sources = new Set();
  /** The sample that is played at `#since` of the clock, in samples. */
  #from = 0;
  #since = 0;
  /** Samples before this are with the browser. */
  #scheduled = 0;
  #reserve = 0;

  /** @param {BaseAudioContext & {outputLatency?: number}} context whose sample rate is the speech's */
  constructor(context) {
    super();
    this.context = context;
  }

  /**
   * Takes new speech, whose first samples are played when they arrive.
   * @param {import("./speech.js").Speech} speech
   */
  load(speech) {
    this.#silence();
    this.#speech = speech;
    this.#reserve = 0;
    this.#from = this.#scheduled = 0;
    this.#enter("buffering");
  }

  /** The sample that is played now. */
  get position() {
    if (this.state !== "playing") return this.#from;
    const elapsed = this.#now() - this.#since - (this.context.outputLatency ?? 0) * SAMPLE_RATE;
    return Math.min(this.#scheduled, Math.max(this.#from, Math.floor(this.#from + elapsed)));
  }

  /** Goes on from where it stands, or from the beginning after the end. */
  play() {
    if (!this.#speech || this.state === "playing" || this.state === "buffering") return;
    this.#goOn(this.state === "ended" ? 0 : this.#from);
  }

  pause() {
    if (this.state !== "playing" && this.state !== "buffering") return;
    const position = this.position;
    this.#silence();
    this.#from = position;
    this.#enter("paused");
  }

  /**
   * Moves to a sample, and plays or waits there as before.
   * @param {number} sample
   */
  seek(sample) {
    if (!this.#speech) return;
    const target = Math.max(0, Math.min(Math.round(sample), this.#speech.length));
    const plays = this.state === "playing" || this.state === "buffering";
    this.#silence();
    this.#from = target;
    if (plays) this.#goOn(target);
    else this.#enter("paused");
  }

  /** To be called when samples have come, or when all have. */
  update() {
    if (this.state === "playing") this.#schedule();
    else if (this.state === "buffering") this.#goOn(this.#from);
  }

  /** @param {number} sample */
  #goOn(sample) {
    const speech = this.#speech;
    if (!speech) return;
    this.#from = this.#scheduled = sample;
    const waiting = speech.length - sample;
    if (speech.isComplete && !waiting) return this.#enter("ended");
    if (!waiting || (!speech.isComplete && waiting < this.#reserve * SAMPLE_RATE)) {
      return this.#enter("buffering");
    }
    this.#enter("playing");
    this.#schedule();
  }

  /** Hands all samples that are there to the browser. */
  #schedule() {
    const speech = this.#speech;
    if (!speech || speech.length === this.#scheduled) return;
    const now = this.#now();
    // Nothing was played before, so nothing can be late, even if this runs slowly.
    if (this.#scheduled === this.#from) this.#since = now + Math.round(LEAD * SAMPLE_RATE);
    const start = this.#since + this.#scheduled - this.#from;
    if (start < now) return this.#runDry();
    const samples = speech.slice(this.#scheduled);
    const buffer = this.context.createBuffer(1, samples.length, SAMPLE_RATE);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    source.addEventListener("ended", () => this.#finish(source));
    this.#sources.add(source);
    source.start(start / SAMPLE_RATE);
    this.#scheduled = speech.length;
  }

  /** @param {AudioBufferSourceNode} source */
  #finish(source) {
    if (!this.#sources.delete(source) || this.#sources.size || this.state !== "playing") return;
    this.#runDry();
  }

  /** Handles the end of all scheduled samples. */
  #runDry() {
    this.#silence();
    if (!this.#speech?.isComplete) {
      this.#reserve = Math.min(LAST_RESERVE, 2 * this.#reserve || FIRST_RESERVE);
    }
    this.#goOn(this.#scheduled);
  }

  #silence() {
    for (const source of this.#sources) source.stop();
    this.#sources.clear();
  }

  /** The clock, in samples. */
  #now() {
    return Math.round(this.context.currentTime * SAMPLE_RATE);
  }

  /** @param {PlayerState} state */
  #enter(state) {
    if (state === this.state) return;
    this.state = state;
    this.dispatchEvent(new Event("change"));
  }
}
