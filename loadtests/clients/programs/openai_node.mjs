// OpenAI's client for JavaScript.

import OpenAI from "openai";
import { ASK, BASE_URL, MODEL, PARAMETERS, run } from "./tries.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: "none" });
const tool = { type: "function", function: { name: "look", description: "Look it up.", parameters: PARAMETERS } };

await run({
  chat: async () => {
    const answer = await client.chat.completions.create({ model: MODEL, messages: ASK, max_tokens: 20 });
    return answer.choices[0].message.content && answer.usage.completion_tokens === 20;
  },
  stream: async () => {
    const stream_options = { include_usage: true };
    const stream = await client.chat.completions.create({
      model: MODEL, messages: ASK, max_tokens: 20, stream: true, stream_options,
    });
    let text = "", usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    return text && usage.completion_tokens === 20;
  },
  "stream helper": async () => {
    const runner = client.chat.completions.stream({ model: MODEL, messages: ASK, max_tokens: 20 });
    return (await runner.finalChatCompletion()).choices[0].finish_reason === "length";
  },
  completions: async () => {
    const answer = await client.completions.create({ model: MODEL, prompt: "Once", max_tokens: 5 });
    return answer.choices[0].text;
  },
  tools: async () => {
    const answer = await client.chat.completions.create({
      model: MODEL, messages: ASK, tools: [tool], tool_choice: { type: "function", function: { name: "look" } },
    });
    return JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments).animal;
  },
  structured: async () => {
    const response_format = { type: "json_schema", json_schema: { name: "seen", schema: PARAMETERS } };
    const answer = await client.chat.completions.parse({ model: MODEL, messages: ASK, response_format });
    return JSON.parse(answer.choices[0].message.content).count >= 1;
  },
  responses: async () => {
    const answer = await client.responses.create({ model: MODEL, input: "Tell me.", max_output_tokens: 20 });
    const stream = await client.responses.create({ model: MODEL, input: "Tell me.", max_output_tokens: 9, stream: true });
    const kinds = [];
    for await (const event of stream) kinds.push(event.type);
    return answer.output_text && kinds[0] === "response.created";
  },
  models: async () => (await client.models.list()).data[0].id === MODEL,
  errors: async () => {
    try {
      await client.chat.completions.create({ model: MODEL, messages: ASK, temperature: 9 });
    } catch (error) {
      return error.status === 400 && error.param === "temperature";
    }
    return false;
  },
});
