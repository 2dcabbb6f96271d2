// The line charts: a card with the values of now as its legend, uPlot, and a table of the same.

import { clock, element } from "./format.js";

export const SPAN_SECONDS = 300;
const HEIGHT = 180;
const GAP_SECONDS = 8; // Between later samples nothing is known: a pause, or a sleeping computer.
const DASHES = [[], [6, 3], [2, 3]]; // Series differ by dash as well as by colour.

/** The samples of the last SPAN_SECONDS: one array of times, one for each series. */
class History {
  constructor(series) {
    this.columns = Array.from({ length: series + 1 }, () => []);
  }

  add(time, values) {
    const [times] = this.columns;
    const last = times.at(-1);
    if (last !== undefined && time - last > GAP_SECONDS) {
      this.#push(last + GAP_SECONDS / 2, values.map(() => null));
    }
    this.#push(time, values);
    while (times[0] < time - SPAN_SECONDS) this.columns.forEach((column) => column.shift());
  }

  #push(...row) {
    row.flat().forEach((value, index) => this.columns[index].push(value));
  }
}

export class Chart {
  /**
   * @param {HTMLElement} host receives the card.
   * @param {{id, title, note, series: string[], format, tick, least}} spec `note` stands beside
   *   the title, `format` writes a value and `tick` one of the axis, which reaches `least`.
   */
  constructor(host, spec) {
    this.spec = spec;
    this.history = new History(spec.series.length);
    this.card = this.#card();
    host.append(this.card);
    this.#draw();
    new ResizeObserver(() => this.plot.setSize(this.#size())).observe(this.box);
  }

  /** Add the values of one scrape; null leaves a gap. */
  add(time, values) {
    this.history.add(time, values);
    this.plot.setData(this.history.columns, false);
    this.plot.setScale("x", { min: time - SPAN_SECONDS, max: time });
    if (this.plot.cursor.idx == null) this.#legend(null);
    if (this.table.open) this.#rows();
  }

  /** Draw anew in the colours of the present colour scheme. */
  recolour() {
    this.plot.destroy();
    this.#draw();
  }

  #card() {
    const { id, title, note, series, format } = this.spec;
    this.values = series.map(() => element("span", { class: "value" }, format(null)));
    this.when = element("span", { class: "when muted" });
    const legend = element("ul", { class: "legend" });
    series.forEach((name, index) => {
      const swatch = element("span", { class: `line series-${index}`, "aria-hidden": "true" });
      legend.append(element("li", { "data-series": name }, swatch, `${name} `, this.values[index]));
    });
    this.box = element("div", { class: "plot", role: "img", "aria-label": `${title}, line chart` });
    this.body = element("tbody");
    const heads = ["Time", ...series].map((name) => element("th", { scope: "col" }, name));
    const caption = element("caption", {}, `${title}, ${note}`);
    const table = element(
      "table", {}, caption, element("thead", {}, element("tr", {}, ...heads)), this.body,
    );
    const label = `${title} as a table`;
    const scroll = element("div", { class: "scroll tall", role: "region", "aria-label": label,
      tabindex: "0" }, table);
    this.table = element("details", {}, element("summary", {}, label), scroll);
    this.table.addEventListener("toggle", () => this.#rows());
    return element(
      "section", { class: "card", id, "aria-labelledby": `${id}-title` },
      element("div", { class: "card-head" },
        element("h2", { id: `${id}-title` }, title),
        element("p", { class: "muted" }, note)),
      element("div", { class: "legend-row" }, legend, this.when),
      this.box,
      this.table,
    );
  }

  /** The values under the cursor, or of now. */
  #legend(index) {
    const [times, ...columns] = this.history.columns;
    const at = index ?? times.length - 1;
    this.when.textContent = index == null ? "" : `at ${clock(times[at])}`;
    columns.forEach((column, series) => {
      this.values[series].textContent = this.spec.format(column[at] ?? null);
    });
  }

  #rows() {
    const [times, ...columns] = this.history.columns;
    this.body.replaceChildren(
      ...times.map((time, index) =>
        element("tr", {}, element("th", { scope: "row" }, timeOfDay(time)),
          ...columns.map((column) => element("td", {}, this.spec.format(column[index])))),
      ).reverse(),
    );
  }

  #size() {
    return { width: Math.max(this.box.clientWidth, 120), height: HEIGHT };
  }

  #draw() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const axis = {
      stroke: colour("muted"),
      font: "12px system-ui, sans-serif",
      grid: { stroke: colour("rule"), width: 1 },
      ticks: { show: false },
    };
    const series = this.spec.series.map((label, index) => ({
      label,
      stroke: colour(`series-${index}`),
      width: 2,
      dash: DASHES[index].map((length) => length * devicePixelRatio),
      points: { show: true, size: 5, fill: colour(`series-${index}`), filter: lonely },
    }));
    const { least } = this.spec;
    this.plot = new uPlot({
      ...this.#size(),
      padding: [8, 18, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 } },
      scales: {
        x: { time: true },
        y: { range: (_, low, high) => [0, 1.1 * Math.max(high ?? 0, least)] },
      },
      axes: [
        {
          ...axis, size: 26, space: 70, incrs: [60, 120, 300],
          values: (_, times) => times.map((time) => clock(time).slice(0, 5)),
        },
        { ...axis, size: 56, space: 36, values: (_, values) => values.map(this.spec.tick) },
      ],
      series: [{}, ...series],
      hooks: {
        setCursor: [({ cursor }) => this.history.columns[0].length && this.#legend(cursor.idx)],
      },
    }, this.history.columns, this.box);
    const latest = this.history.columns[0].at(-1) ?? Date.now() / 1000;
    this.plot.setScale("x", { min: latest - SPAN_SECONDS, max: latest });
  }
}

function timeOfDay(time) {
  return element("time", { datetime: new Date(time * 1000).toISOString() }, clock(time));
}

/** Indices of values between two gaps, which no line would show. */
function lonely(plot, series, show) {
  const values = plot.data[series];
  const missing = (value) => value == null;
  return values
    .map((_, index) => index)
    .filter((i) => show && !missing(values[i]) && missing(values[i - 1]) && missing(values[i + 1]));
}
