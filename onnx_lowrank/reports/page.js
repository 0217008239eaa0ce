"use strict";
// Sorts, searches and filters the table of layers.  Without scripts every row is there, in the
// order of the graph.

const FEW = 100; // rows that are shown at first

for (const box of document.querySelectorAll("[data-table]")) {
  const find = (selector) => box.querySelector(selector);
  const body = find("tbody");
  const rows = [...body.rows];
  const heads = [...find("thead").rows[0].cells];
  // Names and scopes, and what became of a layer.
  const texts = rows.map((row) => `${row.cells[0].textContent} ${
    row.cells[row.cells.length - 1].textContent}`.toLowerCase());
  const place = new Map(rows.map((row, index) => [row, index]));
  let order = { column: null, falling: false };
  let all = false;

  const value = (row) => {
    const held = row.cells[order.column].dataset.value;
    const number = held === undefined || held.trim() === "" ? NaN : Number(held);
    return { held, number };
  };

  // Rows without a value come last, whichever way the others go.
  const compare = (one, other) => {
    const a = value(one), b = value(other);
    if ((a.held === undefined) !== (b.held === undefined)) return a.held === undefined ? 1 : -1;
    let found = 0;
    if (a.held !== undefined) {
      const numbers = !Number.isNaN(a.number) && !Number.isNaN(b.number);
      found = numbers ? a.number - b.number
        : a.held.localeCompare(b.held, "en", { numeric: true });
    }
    return (order.falling ? -found : found) || place.get(one) - place.get(other);
  };

  const show = () => {
    const words = find(".search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = find(".filter").value;
    const sorted = order.column === null ? rows : [...rows].sort(compare);
    let matched = 0, shown = 0;
    for (const row of sorted) {
      const fits = (kind === "all" || row.dataset.status === kind)
        && words.every((word) => texts[place.get(row)].includes(word));
      matched += fits;
      row.hidden = !fits || (!all && matched > FEW);
      shown += !row.hidden;
    }
    body.append(...sorted);
    find(".shown").value = matched === rows.length && shown === matched
      ? "" : `${shown} of ${matched} shown${matched === rows.length ? "" : `, ${rows.length} in all`}`;
    find(".more").hidden = shown === matched;
    find(".more").textContent = `Show all ${matched}`;
    heads.forEach((head, index) => {
      if (index !== order.column) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", order.falling ? "descending" : "ascending");
    });
    find(".order").value = order.column === null ? "" : String(order.column);
  };

  // A number falls first, a name rises first; a third click gives the graph's order back.
  const sort = (column) => {
    const falls = heads[column].classList.contains("number");
    if (order.column !== column) order = { column, falling: falls };
    else if (order.falling === falls) order = { column, falling: !falls };
    else order = { column: null, falling: false };
    show();
  };

  heads.forEach((head, index) => {
    head.querySelector("button")?.addEventListener("click", () => sort(index));
  });
  find(".search").addEventListener("input", show);
  find(".filter").addEventListener("change", show);
  find(".order").addEventListener("change", (event) => {
    order = { column: null, falling: false };
    if (event.target.value === "") show();
    else sort(Number(event.target.value));
  });
  find(".more").addEventListener("click", () => { all = true; show(); });
  show();
}
