/** The speech that has arrived so far. */

import { SAMPLE_RATE } from "./wav.js";

/** Samples that share a bar of the waveform: 10 ms. */
export const PEAK_SAMPLES = 240;

/**
 * A line of the speech, in samples; `end` is null while it is being generated.
 * @typedef {{index: number, start: number, end: number | null}} SpokenLine
 */

export class Speech {
  #samples = new Float32Array(SAMPLE_RATE * 8);
  #length = 0;
  /** @type {number[]} */
  peaks = [];
  /** @type {SpokenLine[]} */
  lines = [];
  isComplete = false;

  get length() {
    return this.#length;
  }

  get seconds() {
    return this.#length / SAMPLE_RATE;
  }

  /** @param {Float32Array} samples */
  add(samples) {
    const length = this.#length + samples.length;
    if (length > this.#samples.length) {
      const larger = new Float32Array(Math.max(length, 2 * this.#samples.length));
      larger.set(this.#samples.subarray(0, this.#length));
      this.#samples = larger;
    }
    this.#samples.set(samples, this.#length);
    for (let i = 0; i < samples.length; i += 1) {
      const bar = Math.floor((this.#length + i) / PEAK_SAMPLES);
      this.peaks[bar] = Math.max(this.peaks[bar] ?? 0, Math.abs(samples[i]));
    }
    this.#length = length;
  }

  /** @param {number} index */
  startLine(index) {
    this.lines.push({ index, start: this.#length, end: null });
  }

  endLine() {
    const line = this.lines.at(-1);
    if (line) line.end = this.#length;
  }

  /**
   * A part of the samples, not copied.
   * @param {number} [from]
   * @param {number} [to]
   */
  slice(from = 0, to = this.#length) {
    return this.#samples.subarray(from, Math.min(to, this.#length));
  }

  /**
   * The line at a sample.
   * @param {number} sample
   * @returns {SpokenLine | undefined}
   */
  lineAt(sample) {
    return this.lines.findLast((line) => line.start <= sample);
  }
}
