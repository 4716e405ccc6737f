/** Speech of one turn in formats that the server writes. */

import { makeButton, save } from "./dom.js";

/** Formats of /v1/audio/speech, and what their files are called. */
const FORMATS = { mp3: "mp3", flac: "flac", opus: "ogg" };

/**
 * Buttons that let the server speak a turn again, with the same seed, as a file. None for more
 * than one turn, or a recording of one's own, which /v1/audio/speech does not take.
 * @param {import("./api.js").Api} api
 * @param {string} model
 * @param {import("./reading.js").Dialogue} dialogue
 * @param {(message: string) => void} showError
 * @returns {HTMLButtonElement[]}
 */
export function formatButtons(api, model, { turns, voices, options }, showError) {
  if (turns.length !== 1) return [];
  const [{ text, speaker }] = turns;
  const voice = voices[speaker];
  if (voice.kind === "own") return [];
  const name = voice.kind === "preset" ? voice.name : String(speaker);
  const fields = { model, input: text, voice: name, ...options };
  return Object.entries(FORMATS).map(([format, suffix]) => {
    const button = makeButton(format.toUpperCase(), async () => {
      button.disabled = true;
      showError("");
      try {
        const data = await api.speech({ ...fields, response_format: format });
        save(data, `speech-${options.seed}.${suffix}`);
      } catch (error) {
        showError(/** @type {Error} */ (error).message);
      }
      button.disabled = false;
    });
    return button;
  });
}
