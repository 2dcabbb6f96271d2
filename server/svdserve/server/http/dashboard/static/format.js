// Numbers with their units, and the one helper that makes elements.

export const NONE = "–";

/** Three significant digits are what a reader takes in; whole numbers keep all of theirs. */
function digits(value) {
  if (value >= 100) return Math.round(value).toLocaleString("en");
  return value.toFixed(value >= 10 ? 1 : 2);
}

export const count = (value) => (value === null ? NONE : Math.round(value).toLocaleString("en"));
export const rate = (value) => (value === null ? NONE : value === 0 ? "0" : digits(value));
export const percent = (ratio) => (ratio === null ? NONE : `${(ratio * 100).toFixed(1)} %`);
export const error = (value) => (value === null ? NONE : value.toFixed(4));

export const ratio = (value) => String(Number(value.toFixed(3)));

export function seconds(value) {
  if (value === null) return NONE;
  return value < 1 ? `${digits(value * 1000)} ms` : `${digits(value)} s`;
}

/** The same for an axis, whose ticks are round numbers. */
export function secondsTick(value) {
  if (value === 0) return "0";
  const milliseconds = Number((value * 1000).toPrecision(3));
  return milliseconds < 1000 ? `${milliseconds} ms` : `${milliseconds / 1000} s`;
}

export function bytes(value) {
  if (value === null) return NONE;
  if (value === 0) return "0";
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20]]) {
    if (value >= size * 0.97) return `${digits(value / size)} ${unit}`; // No "1,023 MiB".
  }
  return `${digits(value / 1024)} KiB`;
}

/** Time of day of a Unix time in seconds: 14:03:05. */
export function clock(time) {
  return new Date(time * 1000).toLocaleTimeString("en-GB");
}

/** <tag attributes>children</tag>; texts are escaped by the browser. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
