// Speech of a chat by the openai package, whole and streamed: node openai.js URL TEXT VOICE
import OpenAI from "openai";

const [url, text, voice] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const request = {
  model: "gpt-audio",
  modalities: ["text", "audio"],
  audio: { voice, format: "wav" },
  messages: [{ role: "user", content: text }],
  seed: 3,
};
const completion = await client.chat.completions.create(request);
const { audio } = completion.choices[0].message;
const stream = await client.chat.completions.create({
  ...request,
  audio: { voice, format: "pcm16" },
  stream: true,
});
let pcm = "";
for await (const chunk of stream) pcm += chunk.choices[0]?.delta?.audio?.data ?? "";
console.log(JSON.stringify({ audio, pcm }));
