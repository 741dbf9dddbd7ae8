// Renders /openapi.json. Text only ever goes in as text, so nothing in the document can become markup.
const make = (tag, text, parent) => {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  parent.append(node);
  return node;
};

const typeOf = (schema) =>
  schema.anyOf ? schema.anyOf.map(typeOf).join(" | ")
  : schema.type === "array" ? `[${typeOf(schema.items)}]`
  : schema.type ?? "any";

const row = (table, name, about) => {
  const line = make("tr", "", table);
  make("code", name, make("td", "", line));
  make("td", about, line);
  return line;
};

const show = (method, path, route, parent) => {
  make("h2", `${method.toUpperCase()} ${path}`, parent);
  make("p", route.summary, parent);
  if (route.parameters) {
    const table = make("table", "", parent);
    for (const given of route.parameters) {
      row(table, `${given.name}: ${typeOf(given.schema)}, ${given.in}`, given.description ?? "");
    }
  }
  const body = route.requestBody?.content["application/json"].schema;
  if (body) {
    const table = make("table", "", parent);
    for (const [name, field] of Object.entries(body.properties)) {
      const fallback = field.default == null ? "" : ` = ${JSON.stringify(field.default)}`;
      row(table, `${name}: ${typeOf(field)}${fallback}`, field.description);
    }
  }
  const answers = make("table", "", parent);
  for (const [status, answer] of Object.entries(route.responses)) {
    const headers = Object.entries(answer.headers ?? {}).map(([name, header]) => ` ${name}: ${header.description}.`);
    const line = row(answers, status, answer.description + (headers.length ? "." : "") + headers.join(""));
    for (const [code] of answer.description.matchAll(/[a-z_]+(?=: )/g)) make("a", "", line).id = code;
  }
};

const key = sessionStorage.getItem("millrace.key"); // as the chat page keeps it
const answer = await fetch("/openapi.json", { headers: key ? { authorization: `Bearer ${key}` } : {} });
const routes = document.getElementById("routes");
if (answer.status === 401) make("p", "This server asks for a key: give it to the chat page in this tab, then come back.", routes);
const api = answer.ok ? await answer.json() : { paths: {} };
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, route] of Object.entries(methods)) show(method, path, route, routes);
}
if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();

const example = document.querySelector("#try");
example.textContent = example.textContent.replace("http://localhost:8000", location.origin);
