/** The server's OpenAPI document in a readable form, without scripts from elsewhere. */

import { Api, ApiError } from "./api.js";
import { find, fromTemplate, showError } from "./dom.js";

/** @typedef {Record<string, any>} Schema */
/** @typedef {{name: string, where: string, type: string, meaning: string}} Field */

/**
 * The schema of a reference.
 * @param {Schema} document
 * @param {Schema} [schema]
 * @returns {Schema}
 */
function resolve(document, schema = {}) {
  const name = schema.$ref?.split("/").pop();
  return name ? (document.components.schemas[name] ?? {}) : schema;
}

/**
 * @param {Schema} document
 * @param {Schema} schema
 * @returns {string}
 */
function typeName(document, schema) {
  if (schema.anyOf) {
    const kinds = schema.anyOf.filter((/** @type {Schema} */ each) => each.type !== "null");
    return kinds.map((/** @type {Schema} */ each) => typeName(document, each)).join(" or ");
  }
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.join(", ");
  if (schema.type === "array") return `list of ${typeName(document, schema.items ?? {})}`;
  return schema.format === "binary" ? "file or base64" : (schema.type ?? "any");
}

/**
 * @param {Schema} document
 * @param {Schema} operation
 * @returns {Field[]}
 */
function fieldsOf(document, operation) {
  const parameters = (operation.parameters ?? []).map((/** @type {Schema} */ each) => ({
    name: each.name + (each.required ? " *" : ""),
    where: each.in,
    type: typeName(document, each.schema ?? {}),
    meaning: each.description ?? "",
  }));
  const content = Object.values(operation.requestBody?.content ?? {})[0];
  const body = resolve(document, content?.schema);
  const properties = Object.entries(body.properties ?? {}).map(([name, schema]) => ({
    name: name + (body.required?.includes(name) ? " *" : ""),
    where: "body",
    type: typeName(document, schema),
    meaning: schema.description ?? "",
  }));
  return [...parameters, ...properties];
}

/**
 * @param {Schema} document
 * @param {string} path
 * @param {string} method
 * @param {Schema} operation
 */
function show(document, path, method, operation) {
  const { element, parts } = fromTemplate("operation-template");
  const fields = fieldsOf(document, operation);
  parts.method.textContent = method.toUpperCase();
  parts.path.textContent = path;
  parts.summary.textContent = operation.summary ?? "";
  parts.description.textContent = operation.description ?? "";
  parts.description.hidden = !operation.description;
  parts.fields.hidden = !fields.length;
  parts.fields.setAttribute("aria-label", `Fields of ${method.toUpperCase()} ${path}`);
  for (const field of fields) {
    const row = parts.rows.insertRow();
    for (const text of Object.values(field)) row.insertCell().textContent = text;
  }
  find("#operations").append(element);
}

try {
  const document = await new Api(new URL("..", window.document.baseURI)).openapi();
  find("#version").textContent = document.info.version;
  find("#description").textContent = document.info.description;
  for (const [path, operations] of Object.entries(document.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      show(document, path, method, operation);
    }
  }
} catch (error) {
  const needsKey = error instanceof ApiError && error.status === 401;
  const message = needsKey ? "Give your API key on the page first." : String(error);
  showError(find("#problem"), message);
}
