"use strict";
(() => {
  const table = document.getElementById("models");
  const body = table.tBodies[0];
  const rows = [...body.rows];

  // Sorting: numbers by data-value with empty cells last in both directions, text by locale.
  const headings = [...table.tHead.rows[0].cells];
  const sortBy = (heading) => {
    const index = headings.indexOf(heading);
    const numeric = heading.querySelector("button").dataset.kind === "number";
    const down = heading.getAttribute("aria-sort") === (numeric ? "none" : "ascending") ||
      (numeric && heading.getAttribute("aria-sort") === "ascending");
    headings.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
    table.dataset.sorted = "";
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => numeric ? row.cells[index].dataset.value : row.cells[index].textContent.trim();
    const sorted = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
      return down ? -order : order;
    });
    body.append(...sorted);
  };
  headings.forEach((heading) => {
    const button = heading.querySelector("button");
    if (button) button.addEventListener("click", () => sortBy(heading));
  });

  // Filtering, of the table and of everything that shows its entries.
  const form = document.getElementById("filters");
  const find = document.getElementById("find");
  const shows = [...document.querySelectorAll("[data-ids]")].filter((element) => !element.parentElement.closest("details[data-ids]"));
  const filter = () => {
    const wanted = [...form.querySelectorAll("select")].filter((select) => select.selectedIndex > 0);
    const text = find.value.trim().toLowerCase();
    const ids = new Set();
    rows.forEach((row) => {
      const visible = wanted.every((select) => row.dataset[select.dataset.column] === select.value) &&
        row.textContent.toLowerCase().includes(text);
      row.hidden = !visible;
      if (visible) ids.add(row.querySelector("input").value);
    });
    shows.forEach((element) => element.toggleAttribute("hidden", !element.dataset.ids.split(" ").some((id) => ids.has(id))));
    document.querySelectorAll(".plots section").forEach((section) => { section.hidden = !section.querySelector("[data-ids]:not([hidden])"); });
    document.getElementById("count").textContent = `${ids.size} of ${rows.length} models`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => {
    headings.forEach((heading) => heading.hasAttribute("aria-sort") && heading.setAttribute("aria-sort", "none"));
    delete table.dataset.sorted;
    body.append(...rows);
    setTimeout(filter);
  });
  form.addEventListener("submit", (event) => event.preventDefault());

  // Paired comparison of the two models chosen last: exact McNemar test, Agresti-Min interval.
  const pairs = JSON.parse(document.getElementById("pairs").textContent);
  const output = document.getElementById("comparison");
  let chosen = [];
  const mcnemar = (b, c) => {
    const n = b + c;
    let term = -n * Math.LN2, tail = 0;
    for (let k = 0; k <= Math.min(b, c); k += 1) {
      tail += Math.exp(term);
      term += Math.log((n - k) / (k + 1));
    }
    return Math.min(1, 2 * tail);
  };
  const compare = ([first, second]) => {
    const [a, b] = [pairs[first.value], pairs[second.value]];
    const names = [first, second].map((box) => box.closest("tr").querySelector("th a").textContent);
    if (!a || !b || a.points !== b.points) {
      return `${names[0]} and ${names[1]} were not evaluated on the same points under the same threat, so they cannot be compared point by point.`;
    }
    let onlyA = 0, onlyB = 0;
    for (let i = 0; i < a.robust.length; i += 1) {
      onlyA += a.robust[i] > b.robust[i];
      onlyB += b.robust[i] > a.robust[i];
    }
    const n = a.robust.length, total = n + 2, z = 1.959963984540054;
    const centre = (onlyA - onlyB) / total;
    const half = z * Math.sqrt(Math.max(0, (onlyA + onlyB + 1) / total - centre * centre) / total);
    const points = (x) => (100 * Math.max(-1, Math.min(1, x))).toFixed(1);
    return `${names[0]} minus ${names[1]}: ${points((onlyA - onlyB) / n)} points of robust accuracy ` +
      `(95 % interval ${points(centre - half)} to ${points(centre + half)}), exact McNemar p = ${mcnemar(onlyA, onlyB).toPrecision(2)}; ` +
      `${onlyA} points are right only under the first, ${onlyB} only under the second, of ${n}.`;
  };
  body.addEventListener("change", (event) => {
    chosen = chosen.filter((box) => box.checked && box !== event.target);
    if (event.target.checked) chosen.push(event.target);
    while (chosen.length > 2) chosen.shift().checked = false;
    const name = (box) => box.closest("tr").querySelector("th a").textContent;
    output.textContent = chosen.length === 2 ? compare(chosen) : chosen.map((box) => `${name(box)}: tick a second model to compare.`).join("");
  });

  // A link to an entry opens it.
  const open = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") { target.hidden = false; target.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", open);
  open();

  // Theme: the system's unless chosen; remembered where the browser allows it.
  const button = document.getElementById("theme");
  const dark = () => document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const show = () => { button.textContent = dark() ? "Light colours" : "Dark colours"; };
  const remembered = (value) => {
    try { return value ? localStorage.setItem("theme", value) : localStorage.getItem("theme"); } catch { return null; }
  };
  if (["dark", "light"].includes(remembered())) document.documentElement.dataset.theme = remembered();
  button.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; remembered(document.documentElement.dataset.theme); show(); });
  button.hidden = false;
  show();
})();
