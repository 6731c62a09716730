/* The results browser: filter by words and by column, sort by a click on a column's name. */
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const root = document.querySelector(".results");
  if (!root) return;
  const body = root.querySelector("tbody");
  const rows = Array.from(body.rows);
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const words = root.querySelector("input[name=words]");
  const choices = Array.from(root.querySelectorAll("select"));
  const count = root.querySelector(".results-count");
  const address = new URLSearchParams(location.search); // results.html?words=AALP&preset=cpu
  words.value = address.get("words") ?? words.value;
  for (const c of choices) c.value = address.get(c.name) ?? c.value;

  function filter() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits =
        wanted.every((word) => text.get(row).includes(word)) &&
        choices.every((c) => !c.value || row.cells[c.dataset.column].textContent === c.value);
      row.hidden = !fits;
      shown += fits;
    }
    const all = rows.length.toLocaleString("en");
    count.textContent = shown === rows.length ? `${all} rows` : `${shown.toLocaleString("en")} of ${all} rows`;
  }

  function sort(head, column) {
    const falling = head.getAttribute("aria-sort") === "ascending";
    root.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.key;
    const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
    const compare = numeric ? (a, b) => Number(a) - Number(b) : (a, b) => a.localeCompare(b, "en", { numeric: true });
    rows.sort((a, b) => {
      if ((key(a) === "") !== (key(b) === "")) return key(a) === "" ? 1 : -1; // what is not there comes last
      return (falling ? -1 : 1) * compare(key(a), key(b));
    });
    body.append(...rows);
  }

  words.addEventListener("input", filter);
  choices.forEach((choice) => choice.addEventListener("change", filter));
  root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  root.querySelectorAll("th").forEach((th, column) => th.querySelector("button").addEventListener("click", () => sort(th, column)));
  filter(); // a browser may have kept what was typed before
});
