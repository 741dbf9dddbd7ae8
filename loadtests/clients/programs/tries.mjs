// What the programs in JavaScript share: one line for each thing that was tried.

export const { BASE_URL, MODEL } = process.env;
export const ASK = [{ role: "user", content: "Tell me a story about a fox." }];
export const PARAMETERS = {
  type: "object",
  properties: { animal: { enum: ["fox", "hen", "owl"] }, count: { enum: [1, 2, 3] } },
  required: ["animal", "count"],
  additionalProperties: false,
};

// Each by its name; a false result or an exception is a failure.
export async function run(tries) {
  for (const [what, attempt] of Object.entries(tries)) {
    let how = "ok";
    try {
      const result = await attempt();
      if (result !== undefined && !result) how = `got ${result}`;
    } catch (error) {
      how = `${error.name}: ${error.message}`.replace(/\s+/g, " ").replaceAll("|", "/").slice(0, 240);
    }
    if (how !== "ok") process.exitCode = 1;
    console.log(`${what}: ${how}`);
  }
}
