/** A conversation over the server's WebSocket, message by message. */

import { ApiError } from "./api.js";

/** Milliseconds until a server that does not answer counts as gone. */
const OPEN_MS = 20_000;

/** The connection ended before the conversation did. */
export class ConnectionLost extends Error {}

/**
 * A message of the server: 16-bit samples, or an object with a type.
 * @typedef {Int16Array | {type: string, [field: string]: any}} Message
 */

export class Conversation {
  /** @type {Message[]} */
  #received = [];
  /** @type {Error | null} */
  #ended = null;
  #wake = () => {};

  /**
   * @param {WebSocket} socket one that is open
   * @param {AbortSignal} signal ends waiting for messages
   */
  constructor(socket, signal) {
    this.socket = socket;
    this.signal = signal;
    signal.addEventListener("abort", () => this.#wake());
    socket.addEventListener("message", ({ data }) => {
      this.#received.push(typeof data === "string" ? JSON.parse(data) : new Int16Array(data));
      this.#wake();
    });
    socket.addEventListener("close", ({ reason }) => {
      const why = reason ? `: ${reason}` : ".";
      this.#ended = new ConnectionLost(`The connection to the server was lost${why}`);
      this.#wake();
    });
  }

  /**
   * Connects. Throws `ApiError` or `ConnectionLost`.
   * @param {import("./api.js").Api} api
   * @param {AbortSignal} signal
   */
  static async open(api, signal) {
    const socket = api.openSocket();
    if (await isOpened(socket, signal)) return new Conversation(socket, signal);
    signal.throwIfAborted();
    // A browser does not tell why a WebSocket was refused, but HTTP does: no key, too many requests.
    await api.model();
    throw new ConnectionLost("The server accepted no connection for speech. Try again.");
  }

  /** @param {{type: string, [field: string]: any}} message */
  send(message) {
    this.socket.send(JSON.stringify(message));
  }

  /**
   * Sends a message, and returns the response. Throws `ApiError` if that is an error.
   * @param {{type: string, [field: string]: any}} message
   */
  async ask(message) {
    this.send(message);
    const response = await this.next();
    if (!(response instanceof Int16Array) && response.type === "error") throw asError(response);
    return response;
  }

  /**
   * The next message. Throws `ConnectionLost`.
   * @returns {Promise<Message>}
   */
  async next() {
    for (;;) {
      this.signal.throwIfAborted();
      const message = this.#received.shift();
      if (message) return message;
      if (this.#ended) throw this.#ended;
      await new Promise((resolve) => (this.#wake = () => resolve(undefined)));
    }
  }

  /** Ends what is being spoken, and the connection. */
  close() {
    if (this.socket.readyState === WebSocket.OPEN) this.send({ type: "cancel" });
    this.socket.close();
  }
}

/**
 * The error in a message.
 * @param {{[field: string]: any}} message
 */
export function asError(message) {
  // In a message "session.seed" is the seed.
  const param = message.param?.split(".").pop() ?? null;
  return new ApiError(message.message, 400, param);
}

/**
 * Waits until a WebSocket is open; false if it is refused or aborted.
 * @param {WebSocket} socket
 * @param {AbortSignal} signal
 * @returns {Promise<boolean>}
 */
function isOpened(socket, signal) {
  return new Promise((resolve) => {
    const giveUp = () => socket.close();
    const timer = setTimeout(giveUp, OPEN_MS);
    const settle = (/** @type {boolean} */ isOpen) => {
      clearTimeout(timer);
      signal.removeEventListener("abort", giveUp);
      resolve(isOpen);
    };
    signal.addEventListener("abort", giveUp);
    socket.addEventListener("open", () => settle(true));
    socket.addEventListener("close", () => settle(false));
  });
}
