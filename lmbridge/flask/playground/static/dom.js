// Shorthands that the other files share.

export const byId = (id) => document.getElementById(id);

export const fromTemplate = (id) => byId(id).content.firstElementChild.cloneNode(true);

export function element(tag, children = [], className = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Figures of a bounded length, which have their place whatever they say.

export const number = (value) =>
  value.toLocaleString("en", {
    maximumFractionDigits: value >= 100 ? 0 : value >= 10 ? 1 : 2,
    notation: value >= 9999.5 ? "compact" : "standard",
  });

export function duration(seconds) {
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 999.5) return `${number(seconds)} s`;
  return seconds < 36_000 ? `${Math.round(seconds / 60)} min` : `${number(Math.round(seconds / 3600))} h`;
}
