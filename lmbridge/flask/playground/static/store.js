// What outlives a reload of the page, for as long as its tab is open.

const PLACE = `lmbridge ${location.pathname}`;

export function load() {
  try {
    return JSON.parse(sessionStorage.getItem(PLACE)) ?? {};
  } catch {
    return {};
  }
}

/** Whether there was something to forget. */
export function forget() {
  try {
    const known = sessionStorage.getItem(PLACE) !== null;
    sessionStorage.removeItem(PLACE);
    return known;
  } catch {
    return false;
  }
}

export function save(state) {
  try {
    sessionStorage.setItem(PLACE, JSON.stringify(state));
  } catch {
    // no room or no leave: the conversation then lasts as long as the page
  }
}
