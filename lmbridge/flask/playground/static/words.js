// What the page says when the server refuses or fails: what happened, and what a visitor can do.
//
// Rule: the server speaks to a programmer. Its own words are kept for whoever asks for details; those about the settings
// that were typed here are for the visitor already.

const SETTINGS = { temperature: "Temperature", top_p: "Top p", max_tokens: "Max tokens", seed: "Seed" };
const AGAIN = "If it happens again, tell whoever runs this server.";

const BY_CODE = {
  context_length_exceeded: "This is more text than the model can read at once. Shorten it, or start a new conversation.",
  unsupported_parameter: "This model does not support one of the settings. Clear the settings, then try again.",
  unsupported_task: "This model does not support this task. Choose another model.",
  model_not_found: "The server no longer has this model. Reload the page, then choose another one.",
  queue_full: "The server is busy. Try again in a moment.",
  deadline_exceeded: "The answer took longer than the server allows. Try again, or set a lower Max tokens.",
  engine_unavailable: `The model is not available at the moment. Try again in a minute. ${AGAIN}`,
  shutting_down: "The server is shutting down. Try again in a minute.",
  aborted: "The server ended this answer early. Try again.",
};

const BY_STATUS = {
  401: "The server requires a valid API key. Enter it below.",
  403: "The server does not allow this.",
  404: "The server does not offer this. Reload the page.",
  413: "This is more text than the server accepts. Shorten it, or start a new conversation.",
  429: BY_CODE.queue_full,
  503: BY_CODE.engine_unavailable,
  504: BY_CODE.deadline_exceeded,
};

/** For an error in the API's form and its status: {message, details}; details are "" where there is no more to say. */
export function wordsFor({ message = "", code, param }, status) {
  if (code === "unsupported_parameter" && SETTINGS[param]) {
    return { message: `This model does not support “${SETTINGS[param]}”. Clear that field, then try again.`, details: message };
  }
  const known = BY_CODE[code] ?? BY_STATUS[status];
  if (known) return { message: known, details: message };
  if (message && status >= 400 && status < 500) return { message, details: "" };
  return { message: `The model failed to answer. Try again. ${AGAIN}`, details: message };
}
