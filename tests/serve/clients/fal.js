// fal.subscribe with logs and updates of the queue: node fal.js URL KEY SCENE
import { fal } from "@fal-ai/client";

const [url, key, scene] = process.argv.slice(2);
fal.config({
  credentials: key,
  requestMiddleware: async (request) => ({
    ...request,
    url: request.url
      .replace("https://queue.fal.run", `${url}/queue`)
      .replace("https://fal.run", url),
  }),
});
const updates = [];
const logs = [];
const result = await fal.subscribe("fal-ai/csm-1b", {
  input: { scene: JSON.parse(scene), seed: 3 },
  logs: true,
  pollInterval: 50,
  onQueueUpdate: (update) => {
    updates.push(update.status);
    if (update.logs) logs.push(...update.logs.map((log) => log.message));
  },
});
console.log(JSON.stringify({ updates, logs, ...result }));
