// The speech call of the AI SDK: node ai_sdk.js URL TEXT VOICE
import { createOpenAI } from "@ai-sdk/openai";
import * as ai from "ai";

const [url, text, voice] = process.argv.slice(2);
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const generateSpeech = ai.generateSpeech ?? ai.experimental_generateSpeech;
const model = openai.speech("csm-1b");
const { audio, warnings } = await generateSpeech({ model, text, voice, outputFormat: "wav" });
console.log(JSON.stringify({ audio: audio.base64, mediaType: audio.mediaType, warnings }));
