// The table of compressed groups: rank, parameters kept, error; sorted by any column.

import { count, element, error, percent } from "./format.js";

/** What is dense has full rank. */
const rankOf = (row) => row.rank ?? row.full_rank;

// On a phone `wide` columns, `more` and `bar` are left out. A column is sorted by its `key`.
const COLUMNS = [
  {
    name: "Layer",
    key: (row) => row.layer ?? -1,
    text: (row) => (row.layer === null ? "" : String(row.layer)),
    number: true,
  },
  {
    name: "Module",
    key: (row) => row.index,
    text: (row) => row.name,
  },
  {
    name: "Layout",
    key: (row) => row.layout,
    text: (row) => row.layout + (row.dtype === "int8" ? ", int8" : ""),
    wide: true,
  },
  {
    name: "Rank",
    key: rankOf,
    text: (row) => count(rankOf(row)),
    more: (row) => ` of ${count(row.full_rank)}`,
    number: true,
  },
  {
    name: "Parameters",
    key: (row) => row.parameters,
    text: (row) => count(row.parameters),
    number: true,
    wide: true,
  },
  {
    name: "Kept",
    key: (row) => row.kept,
    text: (row) => percent(row.kept),
    number: true,
    bar: (row) => row.kept,
  },
  {
    name: "Error",
    key: (row) => row.error ?? -1,
    text: (row) => error(row.error),
    number: true,
    bar: (row, most) => row.error && row.error / most,
  },
];

/** Fill the table from the answer of /svdserve/groups; null where there is none. */
export function showGroups(groups) {
  const modules = groups?.modules ?? [];
  const factored = modules.filter((row) => row.rank !== null);
  const summary = document.getElementById("groups-summary");
  const table = document.getElementById("groups");
  table.parentElement.hidden = modules.length === 0;
  document.getElementById("groups-note").hidden = modules.length === 0;
  if (modules.length === 0) {
    summary.textContent = groups ? "The model is dense: nothing is factored." : "Not known.";
    return;
  }
  const kept = total(modules, "parameters") / total(modules, "dense_parameters");
  summary.textContent =
    `${factored.length} of ${modules.length} factored, ${percent(kept)} of their parameters kept`;
  const rows = modules.map(describe);
  const most = Math.max(...rows.map((row) => row.error ?? 0)) || 1;
  fill(table, rows, most, 0, false);
}

const total = (modules, field) => modules.reduce((sum, row) => sum + row[field], 0);

/** "model.layers.3.mlp.down_proj" is layer 3, mlp.down_proj. */
function describe(row, index) {
  const match = /\.(\d+)\.(.+)$/.exec(row.module);
  return {
    ...row,
    index,
    layer: match ? Number(match[1]) : null,
    name: match ? match[2] : row.module,
    kept: row.parameters / row.dense_parameters,
  };
}

function fill(table, rows, most, chosen, descending) {
  const { key } = COLUMNS[chosen];
  const compare = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a.index - b.index);
  const sorted = rows.toSorted((a, b) => (descending ? compare(b, a) : compare(a, b)));
  const heads = COLUMNS.map((column, index) => {
    const button = element("button", { type: "button" }, column.name);
    button.addEventListener("click", () => {
      fill(table, rows, most, index, index === chosen && !descending);
      table.tHead.rows[0].cells[index].firstChild.focus();
    });
    const head = element("th", { scope: "col", class: classes(column) }, button);
    if (index === chosen) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    return head;
  });
  table.tHead.rows[0].replaceChildren(...heads);
  table.tBodies[0].replaceChildren(...sorted.map((row) => element("tr", {}, ...cells(row, most))));
}

function cells(row, most) {
  return COLUMNS.map((column, index) => {
    const head = index === 1;
    const cell = element(head ? "th" : "td", { class: classes(column) }, column.text(row));
    if (head) cell.setAttribute("scope", "row");
    if (column.more) cell.append(element("span", { class: "wide" }, column.more(row)));
    const share = column.bar?.(row, most) ?? null;
    if (share !== null) {
      const mark = element("span", { class: "mark", "aria-hidden": "true" }, element("span"));
      mark.firstChild.style.width = `${100 * share}%`;
      cell.append(mark);
    }
    return cell;
  });
}

const classes = (column) => `${column.number ? "number" : ""} ${column.wide ? "wide" : ""}`.trim();
