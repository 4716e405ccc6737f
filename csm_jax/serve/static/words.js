/** The text of a line, whose words light up while they are spoken. */

/**
 * A word as the server sends it, with seconds of its line.
 * @typedef {{text: string, start: number, end: number, confidence: number}} SpokenWord
 */

const NOW = "now";

export class LineText {
  /** @type {{start: number, element: HTMLElement}[]} */
  #words = [];
  /** @type {HTMLElement | null} */
  #now = null;
  /** The text behind the last word. */
  #rest;
  /** The characters that are not white space, their places, and how many of them are in words. */
  #letters;
  /** @type {number[]} */
  #places;
  #numFound = 0;

  /**
   * @param {HTMLElement} element shows the text
   * @param {string} text
   */
  constructor(element, text) {
    this.text = text;
    this.#letters = withoutSpaces(text);
    this.#places = [...text.matchAll(/\S/g)].map(({ index }) => index);
    this.#rest = document.createTextNode(text);
    element.replaceChildren(this.#rest);
  }

  /**
   * Adds words, in their order. One that is not in the text, which the server may have spoken in
   * other words, is left out.
   * @param {SpokenWord[]} words
   */
  add(words) {
    for (const { text, start, confidence } of words) {
      const place = this.#find(text);
      if (!place || !confidence) continue;
      const offset = place.first - (this.text.length - this.#rest.length);
      const node = this.#rest.splitText(offset);
      this.#rest = node.splitText(place.last - place.first);
      const element = document.createElement("span");
      element.className = "word";
      node.replaceWith(element);
      element.append(node);
      this.#words.push({ start, element });
    }
  }

  /**
   * Lights up the word that is spoken.
   * @param {number} seconds of the line; before it, no word is
   */
  show(seconds) {
    const now = this.#words.findLast(({ start }) => start <= seconds)?.element ?? null;
    if (now === this.#now) return;
    this.#now?.classList.remove(NOW);
    now?.classList.add(NOW);
    this.#now = now;
  }

  /**
   * The place of the next word in the text. White space is not compared.
   * @param {string} word
   */
  #find(word) {
    const letters = withoutSpaces(word);
    const found = this.#letters.indexOf(letters, this.#numFound);
    if (!letters || found < 0) return null;
    this.#numFound = found + letters.length;
    return { first: this.#places[found], last: this.#places[this.#numFound - 1] + 1 };
  }
}

/** @param {string} text */
function withoutSpaces(text) {
  return text.replaceAll(/\s/g, "");
}
