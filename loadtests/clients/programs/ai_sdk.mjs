// Vercel's AI SDK with its provider for servers like this one.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { BASE_URL, MODEL, PARAMETERS, run } from "./tries.mjs";

const provider = createOpenAICompatible({
  name: "millrace", baseURL: BASE_URL, includeUsage: true, supportsStructuredOutputs: true,
});
const model = provider(MODEL);
const prompt = "Tell me a story about a fox.";

await run({
  text: async () => (await generateText({ model, prompt, maxOutputTokens: 20 })).text,
  stream: async () => {
    const result = streamText({ model, prompt, maxOutputTokens: 20 });
    let text = "";
    for await (const part of result.textStream) text += part;
    return text && (await result.usage).outputTokens === 20;
  },
  object: async () => (await generateObject({ model, prompt, schema: jsonSchema(PARAMETERS) })).object.animal,
  tools: async () => {
    const look = tool({ description: "Look it up.", inputSchema: jsonSchema(PARAMETERS) });
    const result = await generateText({ model, prompt, tools: { look }, toolChoice: "required" });
    return result.toolCalls[0].input.animal;
  },
  completion: async () => {
    const model = provider.completionModel(MODEL);
    return (await generateText({ model, prompt: "Once upon", maxOutputTokens: 9 })).text;
  },
});
