// What went wrong, where it went wrong: words for the visitor, and the server's own for whoever opens them.

import { element } from "./dom.js";

/** Show an error in this element; nothing where there is no message. */
export function explain(place, message, details = "") {
  const more = details && element("details", [element("summary", ["Details"]), element("p", [details])]);
  place.replaceChildren(...(message ? [element("p", [message], "said"), more] : []).filter(Boolean));
  place.hidden = !message;
}
