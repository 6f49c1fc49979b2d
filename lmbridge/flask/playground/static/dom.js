// Shorthands that the other files share.

export const byId = (id) => document.getElementById(id);

export const fromTemplate = (id) => byId(id).content.firstElementChild.cloneNode(true);

export const number = (value) =>
  value.toLocaleString("en", { maximumFractionDigits: value >= 100 ? 0 : value >= 10 ? 1 : 2 });

export const duration = (seconds) => (seconds < 1 ? `${number(Math.round(seconds * 1000))} ms` : `${number(seconds)} s`);
