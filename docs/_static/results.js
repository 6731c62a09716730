/* The results browser: filters that depend on each other, sorting, fifty rows at a time, the view in the address, CSV. */
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const root = document.querySelector(".results");
  if (!root) return;
  const { columns, numbers, choices, at_once: atOnce, links, rows } = JSON.parse(root.querySelector(".results-data").textContent);
  const place = Object.fromEntries(columns.map((column, i) => [column, i]));
  const text = new Map(rows.map((row) => [row, row.slice(0, -1).join(" ").toLowerCase()]));
  const form = root.querySelector("form");
  const body = root.querySelector("tbody");
  const heads = Array.from(root.querySelectorAll("th"));
  const selects = Object.fromEntries(choices.map((column) => [column, form.elements[column]]));
  const state = { sort: "", falling: false, page: 0, shown: rows };

  const chosen = (column) => selects[column].dataset.wanted ?? "";

  function fits(row, but) {
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    return (
      words.every((word) => text.get(row).includes(word)) &&
      (!form.elements.published.checked || row[place.published] !== "–") &&
      choices.every((column) => column === but || !chosen(column) || row[place[column]] === chosen(column))
    );
  }

  /* a list offers what the other filters leave */
  function offer(column) {
    const left = new Set(rows.filter((row) => fits(row, column)).map((row) => row[place[column]]));
    if (chosen(column)) left.add(chosen(column));
    const values = Array.from(left).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const options = [new Option("all", ""), ...values.map((value) => new Option(value, value))];
    selects[column].replaceChildren(...options);
    selects[column].value = chosen(column);
  }

  const key = (row) => {
    const cell = row[place[state.sort]];
    return numbers.includes(state.sort) ? cell.replaceAll(",", "").replace("−", "-").replace("–", "") : cell;
  };

  function sorted(found) {
    if (!state.sort) return found;
    const compare = numbers.includes(state.sort)
      ? (a, b) => Number(a) - Number(b)
      : (a, b) => a.localeCompare(b, "en", { numeric: true });
    return found.toSorted((a, b) => {
      if ((key(a) === "") !== (key(b) === "")) return key(a) === "" ? 1 : -1; // what is not there comes last
      return (state.falling ? -1 : 1) * compare(key(a), key(b));
    });
  }

  function draw() {
    const from = state.page * atOnce;
    body.replaceChildren(
      ...state.shown.slice(from, from + atOnce).map((row) => {
        const tr = document.createElement("tr");
        columns.forEach((column, i) => {
          const td = tr.insertCell();
          if (column === "table") {
            const link = document.createElement("a");
            link.href = links[row.at(-1)];
            link.textContent = row[i];
            td.append(link);
          } else td.textContent = row[i];
          if (numbers.includes(column)) td.className = "number";
        });
        return tr;
      }),
    );
    const all = rows.length.toLocaleString("en");
    const n = state.shown.length;
    root.querySelector(".results-count").textContent = n === rows.length ? `${all} rows` : `${n.toLocaleString("en")} of ${all} rows`;
    root.querySelector(".results-pages span").textContent = n ? `${from + 1} to ${Math.min(from + atOnce, n)} of ${n.toLocaleString("en")}` : "no rows";
    root.querySelector(".results-before").disabled = state.page === 0;
    root.querySelector(".results-after").disabled = from + atOnce >= n;
    heads.forEach((head, i) => {
      if (columns[i] === state.sort) head.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }

  function remember() {
    const view = new URLSearchParams();
    for (const column of choices) if (chosen(column)) view.set(column, chosen(column));
    if (form.elements.words.value) view.set("words", form.elements.words.value);
    if (form.elements.published.checked) view.set("published", "1");
    if (state.sort) view.set("sort", (state.falling ? "-" : "") + state.sort);
    if (state.page) view.set("page", state.page + 1);
    history.replaceState(null, "", view.size ? `?${view}` : location.pathname);
  }

  function update(page = 0) {
    choices.forEach(offer);
    state.shown = sorted(rows.filter((row) => fits(row)));
    state.page = Math.max(0, Math.min(page, Math.ceil(state.shown.length / atOnce) - 1));
    draw();
    remember();
  }

  function restore() {
    const view = new URLSearchParams(location.search); // results.html?words=AALP&preset=cpu
    form.elements.words.value = view.get("words") ?? "";
    form.elements.published.checked = view.get("published") === "1";
    for (const column of choices) selects[column].dataset.wanted = view.get(column) ?? "";
    const sort = view.get("sort") ?? "";
    state.falling = sort.startsWith("-");
    state.sort = columns.includes(sort.replace(/^-/, "")) ? sort.replace(/^-/, "") : "";
    update((Number.parseInt(view.get("page"), 10) || 1) - 1);
  }

  function download() {
    // a cell that begins like a formula must stay text in a spreadsheet
    const safe = (cell) => `"${(/^[=+@\t]/.test(cell) ? `'${cell}` : cell).replaceAll('"', '""')}"`;
    const lines = [columns, ...state.shown.map((row) => row.slice(0, -1))].map((row) => row.map(safe).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
    link.download = "afgstudy-results.csv";
    link.click();
    root.dataset.csv = lines.length - 1;
  }

  form.elements.words.addEventListener("input", () => update());
  form.elements.published.addEventListener("change", () => update());
  choices.forEach((column) =>
    selects[column].addEventListener("change", () => {
      selects[column].dataset.wanted = selects[column].value;
      update();
    }),
  );
  form.addEventListener("submit", (event) => event.preventDefault());
  heads.forEach((head, i) =>
    head.querySelector("button").addEventListener("click", () => {
      state.falling = state.sort === columns[i] && !state.falling;
      state.sort = columns[i];
      update();
    }),
  );
  root.querySelector(".results-before").addEventListener("click", () => update(state.page - 1));
  root.querySelector(".results-after").addEventListener("click", () => update(state.page + 1));
  root.querySelector(".results-csv").addEventListener("click", download);
  restore();
});
