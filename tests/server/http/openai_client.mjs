// The official Node client against a server: `node openai_client.mjs URL KEY MODEL`, in a folder
// where `npm install openai` was run. Prints one JSON object of what it got.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.cwd()}/`);
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai")).href);
const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "w7 w8 w9" }];
const options = { model, max_tokens: 10, temperature: 0 };

const models = await client.models.list();
const whole = await client.chat.completions.create({ ...options, messages });
let streamed = "";
let finish = null;
for await (const chunk of await client.chat.completions.create({ ...options, messages, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
}
const completion = await client.completions.create({ ...options, prompt: "w7 w8 w9" });
let pieces = "";
for await (const piece of await client.completions.create({ ...options, prompt: "w7 w8 w9", stream: true })) {
  pieces += piece.choices[0]?.text ?? "";
}
const wrong = new OpenAI({ baseURL, apiKey: "not-a-key", maxRetries: 0 });
const refusal = await wrong.models.list().then(() => null, (error) => [error.status, error.code]);
const missing = await client.chat.completions
  .create({ ...options, messages, model: "of-no-such-name" })
  .then(() => null, (error) => error.status);

console.log(JSON.stringify({
  models: models.data.map((one) => one.id),
  chat: whole.choices[0].message.content,
  usage: whole.usage,
  streamed,
  finish,
  completion: completion.choices[0].text,
  pieces,
  refusal,
  missing,
}));
