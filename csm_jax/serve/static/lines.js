/** A dialogue as text: a turn on each line, "A: ..." or "B: ...". */

/** @typedef {import("./reading.js").Turn} Turn */

export const SPEAKERS = ["A", "B"];
const LINE = /^\s*(?:([AB])\s*:)?\s*(.*)$/is;

/** @param {number} speaker */
export function otherSpeaker(speaker) {
  return (speaker + 1) % SPEAKERS.length;
}

/**
 * The turns of a text. A line without a name is the other speaker's turn; one that says nothing is
 * none.
 * @param {string} text
 * @returns {Turn[]}
 */
export function parseLines(text) {
  /** @type {Turn[]} */
  const turns = [];
  for (const line of text.split(/\r\n|\r|\n/)) {
    const [, name, rest] = /** @type {RegExpExecArray} */ (LINE.exec(line));
    if (!rest.trim()) continue;
    const last = turns.at(-1);
    const other = last ? otherSpeaker(last.speaker) : 0;
    const speaker = name ? SPEAKERS.indexOf(name.toUpperCase()) : other;
    turns.push({ text: rest.trim(), speaker });
  }
  return turns;
}

/**
 * The text that `parseLines` reads as these turns.
 * @param {Turn[]} turns
 */
export function formatLines(turns) {
  const lines = turns.map(({ text, speaker }) => `${SPEAKERS[speaker]}: ${oneLine(text)}`);
  return lines.join("\n");
}

/** @param {string} text */
function oneLine(text) {
  return text.replaceAll(/\s*[\r\n]+\s*/g, " ").trim();
}
