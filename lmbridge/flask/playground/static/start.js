// The empty start: what the model knows, as far as that is told, and prompts to begin with.

import { byId, element } from "./dom.js";

const BUNDLED = {
  title: "Ask the demo model",
  about:
    "It comes with lmbridge and is tiny. It knows capitals, sums of two numbers up to 99, colours, opposites " +
    "and stories about animals. To anything else it says that it does not know.",
  prompts: ["What is the capital of Japan?", "What is 37 + 48?", "Tell me a story about a fox."],
};
const OTHER = {
  title: "Ask the model something",
  about: "Type a message, or start with one of these.",
  prompts: [
    "Explain in three sentences how a rainbow forms.",
    "Compare trains and planes in a small table.",
    "Write a Python function that reverses a string.",
  ],
};

/** Show the start for a model; `onPick` gets the prompt that is clicked. */
export function showStart(bundled, onPick) {
  const { title, about, prompts } = bundled ? BUNDLED : OTHER;
  byId("start").replaceChildren(
    element("h2", [title]),
    element("p", [about]),
    element("ul", prompts.map((prompt) => element("li", [promptButton(prompt, onPick)]))),
  );
}

function promptButton(prompt, onPick) {
  const button = element("button", [prompt], "prompt");
  button.type = "button";
  button.addEventListener("click", () => onPick(prompt));
  return button;
}
