// The conversation's frame, which moves: whoever looks at its end goes on to do so.

import { byId } from "./dom.js";

const NEAR = 40; // pixels

export function showEnd() {
  byId("log").scrollTop = byId("log").scrollHeight;
}

/** Do what may change how much there is to see, or how much room it has. */
export function keepInView(act) {
  const log = byId("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
  act();
  if (follows) showEnd();
}
