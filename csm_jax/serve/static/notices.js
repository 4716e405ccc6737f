/** What the server notices of speech, in words. */

/** @type {Record<string, string>} */
const WORDS = {
  cut: "cut at the longest length; allow more in the settings",
  nothing_said: "the model said nothing; try another seed",
  context_dropped: "the oldest turns did not fit, and were not heard for it",
  resampled: "a part was drawn again, because it went astray",
  guard_cut: "cut where it went astray; try another seed or a lower temperature",
};

/**
 * @param {string[]} kinds
 * @returns {string}
 */
export function noticeWords(kinds) {
  const text = kinds.map((kind) => WORDS[kind] ?? kind.replaceAll("_", " ")).join("; ");
  return text && `${text[0].toUpperCase()}${text.slice(1)}.`;
}
