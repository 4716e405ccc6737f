/** A client of the server's HTTP APIs. */

/**
 * A voice as in /v1/audio/voices.
 * @typedef {{name: string, speaker: number, text: string, seconds: number, deletable: boolean}} Voice
 */

/** An error in the server's words. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status of HTTP; 0 if there was no response
   * @param {string | null} [param] the field that is wrong
   */
  constructor(message, status, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

const STORED_KEY = "csm-jax.key";
/** What the server selects of the subprotocols that are offered with a key. */
const PROTOCOL = "csm";

export class Api {
  /** @param {URL} base where the server's paths begin */
  constructor(base) {
    this.base = base;
  }

  /** The API key, kept until the tab is closed. */
  get key() {
    return sessionStorage.getItem(STORED_KEY) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(STORED_KEY, value);
    else sessionStorage.removeItem(STORED_KEY);
  }

  /**
   * The model: its id and its default sampling.
   * @returns {Promise<{id: string, sampling: Record<string, number>}>}
   */
  async model() {
    const response = await this.#request("v1/models");
    const [first] = (await response.json()).data;
    return { sampling: {}, ...first };
  }

  /**
   * The OpenAPI document.
   * @returns {Promise<Record<string, any>>}
   */
  async openapi() {
    return (await this.#request("openapi.json")).json();
  }

  /** @returns {Promise<Voice[]>} */
  async voices() {
    const response = await this.#request("v1/audio/voices");
    return (await response.json()).voices;
  }

  /**
   * The recording of a voice.
   * @param {string} name
   */
  async voiceRecording(name) {
    const response = await this.#request(`v1/audio/voices/${encodeURIComponent(name)}`);
    return response.blob();
  }

  /**
   * Saves a recording as a voice.
   * @param {{name: string, speaker: number, text: string, recording: Blob}} voice
   * @returns {Promise<Voice>}
   */
  async addVoice({ name, speaker, text, recording }) {
    const form = new FormData();
    form.set("name", name);
    form.set("speaker", String(speaker));
    form.set("text", text);
    form.set("audio", recording, "recording.wav");
    const response = await this.#request("v1/audio/voices", { method: "POST", body: form });
    return response.json();
  }

  /** @param {string} name */
  async deleteVoice(name) {
    await this.#request(`v1/audio/voices/${encodeURIComponent(name)}`, { method: "DELETE" });
  }

  /**
   * Speech as a file.
   * @param {Record<string, unknown>} fields those of /v1/audio/speech
   */
  async speech(fields) {
    const response = await this.#request("v1/audio/speech", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(fields),
    });
    return response.blob();
  }

  /** Opens the WebSocket of a conversation. A browser sends a key as a subprotocol only. */
  openSocket() {
    const url = new URL("v1/realtime", this.base);
    url.protocol = url.protocol.replace("http", "ws");
    const protocols = this.key ? [PROTOCOL, `csm-key.${base64url(this.key)}`] : [];
    const socket = new WebSocket(url, protocols);
    socket.binaryType = "arraybuffer";
    return socket;
  }

  /**
   * @param {string} path
   * @param {RequestInit} [options]
   */
  async #request(path, options = {}) {
    const headers = new Headers(options.headers);
    // A header consists of bytes, so a key that is not ASCII is sent as UTF-8.
    if (this.key) headers.set("Authorization", `Bearer ${asBytes(this.key)}`);
    let response;
    try {
      response = await fetch(new URL(path, this.base), { ...options, headers, cache: "no-store" });
    } catch {
      throw new ApiError("The server cannot be reached.", 0);
    }
    if (!response.ok) throw await readError(response);
    return response;
  }
}

/** @param {Response} response */
async function readError(response) {
  const fallback = `The server answered ${response.status}.`;
  try {
    const { error } = await response.json();
    return new ApiError(error.message || fallback, response.status, error.param);
  } catch {
    return new ApiError(fallback, response.status);
  }
}

/** @param {string} text */
function asBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

/** @param {string} text */
function base64url(text) {
  return btoa(asBytes(text)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
