/** Speaks a dialogue through a conversation with the server. */

import { ApiError } from "./api.js";
import { Conversation, asError } from "./conversation.js";
import { encodeWav, toBase64 } from "./wav.js";

/**
 * The source of a speaker's voice.
 * @typedef {{kind: "none"}
 *   | {kind: "preset", name: string, speaker: number}
 *   | {kind: "own", samples: Float32Array, transcript: string}} VoiceChoice
 *
 * @typedef {{text: string, speaker: number}} Turn speaker: index of A or B
 *
 * @typedef {{turns: Turn[], voices: VoiceChoice[], options: Record<string, unknown>}} Dialogue
 *
 * @typedef {{kind: "line", index: number}
 *   | {kind: "samples", samples: Float32Array}
 *   | {kind: "words", index: number, words: import("./words.js").SpokenWord[]}
 *   | {kind: "lineEnd", index: number, notices: string[]}} ReadingEvent
 */

/** Turns that wait at the server, so that it does not wait for the network between two. */
const AHEAD = 3;
const SEEDS = 2 ** 32;

/** An error, and what it is about. */
export class Problem extends Error {
  /**
   * @param {Error} cause
   * @param {{voice?: number, line?: number}} about the speaker's or the turn's index
   */
  constructor(cause, about) {
    super(cause.message, { cause });
    this.about = about;
  }
}

/**
 * The numbers of the speakers for the model. A preset keeps its own, which the model may have been
 * trained with; the other speaker gets another.
 * @param {VoiceChoice[]} voices
 * @param {boolean[]} speaks which of the speakers have a turn
 */
export function speakerNumbers(voices, speaks) {
  /** @type {number[]} */
  const numbers = [];
  const own = voices.map((voice, i) =>
    voice.kind === "preset" && speaks[i] ? voice.speaker : null,
  );
  for (const [i, number] of own.entries()) {
    if (number === null || numbers.includes(number)) continue;
    numbers[i] = number;
  }
  for (const i of voices.keys()) {
    const candidates = [i, ...Array(voices.length + 1).keys()];
    numbers[i] ??= candidates.find((each) => !numbers.includes(each)) ?? i;
  }
  return numbers;
}

/**
 * Speaks the turns of a dialogue one by one, each with the earlier ones as context.
 *
 * Every turn has a seed of its own: that of `options` and its index.
 *
 * @param {import("./api.js").Api} api
 * @param {Dialogue} dialogue
 * @param {AbortSignal} signal ends it
 * @returns {AsyncGenerator<ReadingEvent>}
 */
export async function* read(api, dialogue, signal) {
  const conversation = await Conversation.open(api, signal);
  try {
    await conversation.ask({ type: "session", words: true, ...dialogue.options });
    const speaks = dialogue.voices.map((_, i) => dialogue.turns.some((turn) => turn.speaker === i));
    const numbers = speakerNumbers(dialogue.voices, speaks);
    for (const [i, voice] of dialogue.voices.entries()) {
      if (voice.kind === "own" && speaks[i]) await addRecording(conversation, voice, i, numbers[i]);
    }
    yield* readTurns(conversation, dialogue, numbers);
  } finally {
    conversation.close();
  }
}

/**
 * Begins the conversation with a speaker's own recording.
 * @param {Conversation} conversation
 * @param {{samples: Float32Array, transcript: string}} voice
 * @param {number} index
 * @param {number} speaker
 */
async function addRecording(conversation, voice, index, speaker) {
  const audio = toBase64(new Uint8Array(encodeWav(voice.samples)));
  try {
    await conversation.ask({ type: "turn", speaker, text: voice.transcript, audio });
  } catch (error) {
    throw error instanceof ApiError ? new Problem(error, { voice: index }) : error;
  }
}

/**
 * @param {Conversation} conversation
 * @param {Dialogue} dialogue
 * @param {number[]} numbers
 * @returns {AsyncGenerator<ReadingEvent>}
 */
async function* readTurns(conversation, { turns, voices, options }, numbers) {
  let numSent = 0;
  let numDone = 0;
  while (numDone < turns.length) {
    for (; numSent < Math.min(numDone + AHEAD, turns.length); numSent += 1) {
      const { text, speaker } = turns[numSent];
      const voice = voices[speaker];
      conversation.send({
        type: "say",
        text,
        voice: voice.kind === "preset" ? voice.name : null,
        speaker: numbers[speaker],
        seed: (Number(options.seed) + numSent) % SEEDS,
      });
    }
    const message = await conversation.next();
    if (message instanceof Int16Array) {
      yield { kind: "samples", samples: Float32Array.from(message, (value) => value / 32768) };
    } else if (message.type === "started") {
      yield { kind: "line", index: message.id - 1 };
    } else if (message.type === "words") {
      yield { kind: "words", index: message.id - 1, words: message.words };
    } else if (message.type === "done") {
      numDone += 1;
      const kinds = message.notices ? message.notices.split(",") : [];
      // Nobody asked the page for words, which only some checkpoints have.
      const notices = kinds.filter((/** @type {string} */ kind) => kind !== "no_words");
      yield { kind: "lineEnd", index: message.id - 1, notices };
    } else if (message.type === "error") {
      const line = (message.id ?? numDone + 1) - 1;
      throw new Problem(asError(message), message.id ? { line } : {});
    }
  }
}
