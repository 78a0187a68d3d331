// OpenAI's client for Node.js. Reads requests from standard input, prints what their user saw.
const OpenAI = require("openai");
const { VERSION } = require("openai/version");

async function whole(client, ask) {
  const [choice] = (await client.chat.completions.create(ask)).choices;
  return { text: choice.message.content ?? "", finish: choice.finish_reason };
}

async function streamed(client, ask) {
  let text = "";
  let finish = null;
  for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
    for (const choice of chunk.choices) {
      text += choice.delta.content ?? "";
      finish = choice.finish_reason ?? finish;
    }
  }
  return { text, finish };
}

async function seen(way, client, ask) {
  try {
    return await way(client, ask);
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return { error: error.constructor.name, status: error.status, code: error.code, said: error.message };
  }
}

async function main() {
  const answers = [];
  for (const request of JSON.parse(require("node:fs").readFileSync(0, "utf8"))) {
    const client = new OpenAI({ baseURL: request.url + "/v1", apiKey: "not-needed" });
    const messages = [{ role: "user", content: request.text }];
    const ask = { model: request.model, messages, temperature: 0, max_tokens: 48 };
    answers.push([await seen(whole, client, ask), await seen(streamed, client, ask)]);
  }
  console.log(JSON.stringify({ version: VERSION, answers }));
}

main();
