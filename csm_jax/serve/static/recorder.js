/** Records the microphone. */

/** Seconds after which a recording ends by itself: what the server reads of one. */
export const MAX_SECONDS = 60;

export class Recorder {
  /** @type {Blob[]} */
  #pieces = [];

  /**
   * @param {MediaStream} stream
   * @param {AudioContext} context
   */
  constructor(stream, context) {
    this.stream = stream;
    this.context = context;
    this.analyser = context.createAnalyser();
    this.analyser.fftSize = 2048;
    context.createMediaStreamSource(stream).connect(this.analyser);
    this.recorder = new MediaRecorder(stream);
    this.recorder.addEventListener("dataavailable", ({ data }) => this.#pieces.push(data));
    this.started = performance.now();
    this.recorder.start();
  }

  /** Asks for the microphone and starts. Throws an `Error` that says what is wrong. */
  static async start() {
    if (!navigator.mediaDevices) {
      throw new Error("A browser records only on pages that come over https or from localhost.");
    }
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
      return new Recorder(stream, new AudioContext());
    } catch (error) {
      const isRefused = error instanceof DOMException && error.name === "NotAllowedError";
      throw new Error(
        isRefused
          ? "The browser does not let this page use the microphone."
          : "No microphone can be used.",
      );
    }
  }

  get seconds() {
    return (performance.now() - this.started) / 1000;
  }

  /** The highest level of the last moment, 0 to 1. */
  get level() {
    const samples = new Float32Array(this.analyser.fftSize);
    this.analyser.getFloatTimeDomainData(samples);
    return samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
  }

  /**
   * Ends the recording, and returns it.
   * @returns {Promise<Blob>}
   */
  async stop() {
    if (this.recorder.state !== "inactive") {
      await new Promise((resolve) => {
        this.recorder.addEventListener("stop", resolve, { once: true });
        this.recorder.stop();
      });
    }
    for (const track of this.stream.getTracks()) track.stop();
    await this.context.close();
    return new Blob(this.#pieces, { type: this.recorder.mimeType });
  }
}
