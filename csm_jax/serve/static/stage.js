/** The part of the page that plays and shows speech. */

import { find, fromTemplate, save, setIcon, showError } from "./dom.js";
import { SPEAKERS } from "./lines.js";
import { noticeWords } from "./notices.js";
import { Player } from "./player.js";
import { Speech } from "./speech.js";
import { SAMPLE_RATE, encodeWav } from "./wav.js";
import { Waveform } from "./waveform.js";
import { LineText } from "./words.js";

/** @typedef {import("./reading.js").Turn} Turn */

export class Stage {
  #speech = new Speech();
  /** @type {Turn[]} */
  #turns = [];
  /** @type {Record<string, any>[]} */
  #lines = [];
  /** @type {Player | null} */
  #player = null;
  #isReading = false;
  #isDrawing = false;
  #startedAt = 0;
  #current = -1;
  #seed = 0;

  /**
   * @param {{onAgain: () => void, onKeepSeed: (seed: number) => void, onPlayer: () => void}} handlers
   */
  constructor({ onAgain, onKeepSeed, onPlayer }) {
    this.onPlayer = onPlayer;
    this.waveform = new Waveform(find("#wave"));
    this.position = find("#position");
    this.status = find("#status");
    this.problem = find("#speech-error");
    find("#again").addEventListener("click", onAgain);
    find("#keep-seed").addEventListener("click", () => onKeepSeed(this.#seed));
    find("#play").addEventListener("click", () => this.#toggle());
    find("#download").addEventListener("click", () => this.#download());
    this.position.addEventListener("input", () => {
      this.#player?.seek(Number(this.position.value) * SAMPLE_RATE);
      this.#draw();
    });
    for (const query of ["(prefers-color-scheme: dark)", "(prefers-contrast: more)"]) {
      matchMedia(query).addEventListener("change", () => this.#draw());
    }
    new ResizeObserver(() => this.#draw()).observe(this.waveform.canvas);
  }

  /** Whether speech is being played. */
  get isPlaying() {
    return this.#player?.state === "playing";
  }

  /** Pauses playback. */
  pause() {
    this.#player?.pause();
  }

  /**
   * Prepares for new speech. To be called when a button was pressed, because browsers allow sound
   * only then.
   * @param {Turn[]} turns
   * @param {number} seed
   */
  begin(turns, seed) {
    this.#player ??= this.#makePlayer();
    /** @type {AudioContext} */ (this.#player.context).resume();
    this.#speech = new Speech();
    this.#turns = turns;
    this.#seed = seed;
    this.#isReading = true;
    this.#startedAt = performance.now();
    this.#current = -1;
    this.#lines = turns.map((turn, i) => this.#makeLine(turn, i));
    find("#lines").replaceChildren(...this.#lines.map(({ element }) => element));
    find("#speech-empty").hidden = true;
    find("#speech-body").hidden = false;
    find("#result").hidden = this.problem.hidden = true;
    find("#other-formats").replaceChildren();
    showError(find("#download-error"), "");
    this.#player.load(this.#speech);
    this.#say("Waiting for the server…");
    this.#animate();
  }

  /** @param {import("./reading.js").ReadingEvent} event */
  take(event) {
    if (event.kind === "line") {
      this.#speech.startLine(event.index);
      this.#sayLine();
    } else if (event.kind === "samples") {
      if (!this.#speech.length) this.#tellFirstAudio();
      this.#speech.add(event.samples);
      this.#player?.update();
    } else if (event.kind === "words") {
      this.#lines[event.index].words.add(event.words);
    } else {
      this.#speech.endLine();
      const { notices, button } = this.#lines[event.index];
      notices.textContent = noticeWords(event.notices);
      notices.hidden = !event.notices.length;
      button.disabled = false;
    }
  }

  /** Ends the speech, all of which has arrived. */
  finish() {
    this.#end(`${this.#speech.seconds.toFixed(1)} s of speech`);
  }

  /** Ends the speech; what has arrived can be played again. */
  stop() {
    this.pause();
    this.#end("Stopped");
  }

  /**
   * Ends the speech. The samples that have arrived are kept, and played to their end.
   * @param {string} message what went wrong; "" if it is shown elsewhere
   */
  fail(message) {
    find("p", this.problem).textContent = message;
    this.problem.hidden = !message;
    this.#end(this.#speech.length ? "Interrupted" : "Not spoken");
  }

  /**
   * Offers the speech in other formats.
   * @param {HTMLElement[]} buttons
   */
  offer(buttons) {
    find("#other-formats").replaceChildren(...buttons);
  }

  /** @param {string} message */
  showDownloadError(message) {
    showError(find("#download-error"), message);
  }

  /** @param {string} text */
  #say(text) {
    this.status.textContent = text;
  }

  /** @param {string} summary */
  #end(summary) {
    this.#isReading = false;
    this.#speech.isComplete = true;
    this.#speech.endLine();
    this.#player?.update();
    for (const { index } of this.#speech.lines) this.#lines[index].button.disabled = false;
    find("#seconds").textContent = `${this.#speech.seconds.toFixed(2)} s`;
    find("#used-seed").textContent = String(this.#seed);
    find("#result").hidden = !this.#speech.length;
    this.#say(summary);
    this.#showPlayer();
    this.#draw();
  }

  #tellFirstAudio() {
    const seconds = (performance.now() - this.#startedAt) / 1000;
    find("#first-audio").textContent = `${seconds.toFixed(2)} s`;
  }

  #makePlayer() {
    const player = new Player(new AudioContext({ sampleRate: SAMPLE_RATE }));
    player.addEventListener("change", () => {
      this.#showPlayer();
      this.#draw();
      this.#animate();
      this.onPlayer();
    });
    return player;
  }

  /**
   * @param {Turn} turn
   * @param {number} index
   */
  #makeLine({ text, speaker }, index) {
    const { element, parts } = fromTemplate("line-template");
    element.dataset.speaker = parts.who.textContent = SPEAKERS[speaker];
    const words = new LineText(parts.text, text);
    parts.button.title = "Play from here";
    parts.button.disabled = true;
    parts.button.addEventListener("click", () => this.#playFrom(index));
    return { element, words, ...parts };
  }

  /** @param {number} index */
  #playFrom(index) {
    const line = this.#speech.lines.find((each) => each.index === index);
    if (!line) return;
    this.#player?.seek(line.start);
    this.#player?.play();
  }

  #toggle() {
    const state = this.#player?.state;
    if (state === "playing" || state === "buffering") this.#player?.pause();
    else this.#player?.play();
  }

  #showPlayer() {
    const state = this.#player?.state ?? "idle";
    const isOn = state === "playing" || state === "buffering";
    const button = find("#play");
    setIcon(button, isOn ? "pause" : "play");
    button.setAttribute("aria-label", isOn ? "Pause" : "Play");
    find("#speech").dataset.state = this.#isReading || state !== "buffering" ? state : "ended";
    const isWaiting = this.#isReading && state === "buffering";
    find("#speech").classList.toggle("buffering", isWaiting);
    if (isWaiting && this.#speech.length) this.#say("Buffering: the server is slower than speech…");
    else if (this.#isReading && state === "playing") this.#sayLine();
  }

  #sayLine() {
    const line = this.#speech.lines.at(-1);
    if (line) this.#say(`Line ${line.index + 1} of ${this.#turns.length}`);
  }

  /** Draws again and again while something moves. */
  #animate() {
    if (this.#isDrawing) return;
    this.#isDrawing = true;
    const step = () => {
      this.#draw();
      this.#isDrawing = this.#isReading || this.#player?.state === "playing";
      if (this.#isDrawing) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  #draw() {
    const speech = this.#speech;
    const position = this.#player?.position ?? 0;
    this.waveform.draw(speech, position, (sample) => this.#speakerAt(sample));
    this.position.max = (Waveform.span(speech) / SAMPLE_RATE).toFixed(2);
    this.position.value = String(position / SAMPLE_RATE);
    const text = `${clock(position)} of ${clock(speech.length)}`;
    if (this.position.getAttribute("aria-valuetext") !== text) {
      this.position.setAttribute("aria-valuetext", text);
      find("#time").textContent = clock(position);
      find("#duration").textContent = clock(speech.length);
    }
    this.#highlight(position);
  }

  /** @param {number} position */
  #highlight(position) {
    const state = this.#player?.state;
    const isOpen = state === "playing" || state === "paused";
    const line = isOpen ? this.#speech.lineAt(position) : undefined;
    const current = line?.index ?? -1;
    if (line) this.#lines[current].words.show((position - line.start) / SAMPLE_RATE);
    if (current === this.#current) return;
    this.#lines[this.#current]?.words.show(-1);
    this.#current = current;
    for (const [i, { element }] of this.#lines.entries()) {
      if (i === current) element.setAttribute("aria-current", "true");
      else element.removeAttribute("aria-current");
    }
  }

  /** @param {number} sample */
  #speakerAt(sample) {
    const line = this.#speech.lineAt(sample);
    return line ? this.#turns[line.index].speaker : 0;
  }

  #download() {
    const data = new Blob([encodeWav(this.#speech.slice())], { type: "audio/wav" });
    save(data, `speech-${this.#seed}.wav`);
  }
}

/** @param {number} samples */
function clock(samples) {
  const tenths = Math.floor((10 * samples) / SAMPLE_RATE);
  const seconds = String(Math.floor(tenths / 10) % 60).padStart(2, "0");
  return `${Math.floor(tenths / 600)}:${seconds}.${tenths % 10}`;
}
