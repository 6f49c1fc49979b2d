// Buttons that copy: what a button says for a moment tells whether it worked.

const MOMENT = 2000; // milliseconds

/** Copy a text, and say so in the button, which keeps its width, and to whoever listens. */
export async function copy(text, button, announce) {
  const done = await toClipboard(text);
  announce(done ? "Copied" : "The browser did not allow copying");
  const before = (button.dataset.words ??= button.textContent);
  button.textContent = done ? "Copied" : "Failed";
  clearTimeout(button.timer);
  button.timer = setTimeout(() => (button.textContent = before), MOMENT);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text); // there is none where the page came over plain HTTP from another machine
    return true;
  } catch {
    return toClipboardBySelecting(text);
  }
}

function toClipboardBySelecting(text) {
  const focused = document.activeElement;
  const field = document.createElement("textarea");
  field.className = "unseen";
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused?.focus({ preventScroll: true });
  return done;
}
