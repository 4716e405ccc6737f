/** The server's notices about speech, as text. */

/** @type {Record<string, string>} */
const WORDS = {
  cut: "cut at the longest length, which the settings can raise",
  nothing_said: "the model generated no speech; try another seed",
  context_dropped: "the context is too long: the oldest turns were dropped",
  no_transcript: "a recording has no transcript: the speech can be less clear",
  silent_context: "a recording of the context is silent; record it louder",
  resampled:
    "a part was generated again, because it repeated itself, fell silent or did not follow its text",
  continued: "the speech was about to end before its last word, and went on",
  ended: "the speech went on after its last word, and was ended there",
  guard_cut:
    "cut because it repeated itself, fell silent or did not end; " +
    "try another seed or a lower temperature",
};

/**
 * @param {string[]} kinds
 * @returns {string}
 */
export function noticeWords(kinds) {
  const text = kinds.map((kind) => WORDS[kind] ?? kind.replaceAll("_", " ")).join("; ");
  return text && `${text[0].toUpperCase()}${text.slice(1)}.`;
}
