/** Draws speech as bars, with the part that has been played and the speakers in their colors. */

import { PEAK_SAMPLES } from "./speech.js";
import { SAMPLE_RATE } from "./wav.js";

const BAR = 3;
const GAP = 2;
/** Seconds that the width stands for at least. */
const SHORTEST = 4;
/** Bars are as high as the square root of their peak, so that quiet speech is seen. */
const QUIETEST = 0.03;

export class Waveform {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.canvas = canvas;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  }

  /**
   * The samples that the width stands for.
   * @param {import("./speech.js").Speech} speech
   */
  static span(speech) {
    const least = speech.isComplete ? 1 : SHORTEST * SAMPLE_RATE;
    return Math.max(least, speech.length);
  }

  /**
   * @param {import("./speech.js").Speech} speech
   * @param {number} position the sample that is played
   * @param {(sample: number) => number} speakerAt index of the speaker at a sample
   */
  draw(speech, position, speakerAt) {
    const { width, height } = this.#fit();
    const style = getComputedStyle(this.canvas);
    const colors = ["--speaker-a", "--speaker-b"].map((name) => style.getPropertyValue(name));
    const span = Waveform.span(speech);
    this.context.clearRect(0, 0, width, height);
    for (let x = 0; x < width; x += BAR + GAP) {
      const start = (x / width) * span;
      if (start >= speech.length) break;
      const peak = this.#peak(speech, start, ((x + BAR + GAP) / width) * span);
      const bar = Math.max(BAR, Math.sqrt(Math.max(QUIETEST ** 2, peak)) * height * 0.96);
      this.context.globalAlpha = start < position ? 1 : 0.35;
      this.context.fillStyle = colors[speakerAt(start) % colors.length];
      this.context.beginPath();
      this.context.roundRect(x, (height - bar) / 2, BAR, bar, BAR / 2);
      this.context.fill();
    }
  }

  /**
   * The largest peak between two samples.
   * @param {import("./speech.js").Speech} speech
   * @param {number} start
   * @param {number} end
   */
  #peak(speech, start, end) {
    const from = Math.floor(start / PEAK_SAMPLES);
    const to = Math.max(from + 1, Math.floor(end / PEAK_SAMPLES));
    let peak = 0;
    for (let i = from; i < to && i < speech.peaks.length; i += 1)
      peak = Math.max(peak, speech.peaks[i]);
    return peak;
  }

  /** Gives the canvas a pixel for each of the screen's. */
  #fit() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const scale = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale))
      this.canvas.width = Math.round(width * scale);
    if (this.canvas.height !== Math.round(height * scale)) {
      this.canvas.height = Math.round(height * scale);
    }
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    return { width, height };
  }
}
