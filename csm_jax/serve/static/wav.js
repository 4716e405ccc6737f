/** Recordings: decoding what a browser can read, and 16-bit WAV files. */

export const SAMPLE_RATE = 24_000;
const HEADER_BYTES = 44;

/**
 * Samples of a recording in any format that the browser reads, mono at 24 kHz.
 * @param {Blob} recording
 * @returns {Promise<Float32Array>}
 */
export async function decodeRecording(recording) {
  // Decoding resamples to the rate of the context.
  const context = new OfflineAudioContext(1, 1, SAMPLE_RATE);
  const audio = await context.decodeAudioData(await recording.arrayBuffer());
  const mixed = new Float32Array(audio.length);
  for (let channel = 0; channel < audio.numberOfChannels; channel += 1) {
    const samples = audio.getChannelData(channel);
    for (let i = 0; i < mixed.length; i += 1) mixed[i] += samples[i] / audio.numberOfChannels;
  }
  return mixed;
}

/**
 * A WAV file: 16 bits, mono, 24 kHz.
 * @param {Float32Array} samples
 * @returns {ArrayBuffer}
 */
export function encodeWav(samples) {
  const numBytes = 2 * samples.length;
  const buffer = new ArrayBuffer(HEADER_BYTES + numBytes);
  const view = new DataView(buffer);
  const write = (/** @type {number} */ offset, /** @type {string} */ text) =>
    [...text].forEach((letter, i) => view.setUint8(offset + i, letter.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, HEADER_BYTES - 8 + numBytes, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, SAMPLE_RATE, true);
  view.setUint32(28, 2 * SAMPLE_RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, numBytes, true);
  samples.forEach((sample, i) => view.setInt16(HEADER_BYTES + 2 * i, toInt16(sample), true));
  return buffer;
}

/** @param {number} sample */
function toInt16(sample) {
  return Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
}

/** @param {Uint8Array} bytes */
export function toBase64(bytes) {
  const step = 0x8000;
  let text = "";
  for (let i = 0; i < bytes.length; i += step) {
    text += String.fromCharCode(...bytes.subarray(i, i + step));
  }
  return btoa(text);
}
