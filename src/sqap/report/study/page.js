"use strict";
// Sorts a table by the column whose heading is clicked: numbers from the largest down, names from A up, and the other way at a second click.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent.trim();
  headings.forEach((heading, i) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.some((row) => value(row, i) !== "" && !Number.isNaN(Number(value(row, i))));
      const down = heading.ariaSort === (numeric ? "descending" : "ascending") ? !numeric : numeric;
      const sign = down ? -1 : 1;
      const key = (row) => (numeric ? Number(value(row, i) || NaN) : value(row, i));
      const missing = (x) => Number.isNaN(x);
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (missing(x) || missing(y)) return missing(x) - missing(y);
        return sign * (numeric ? x - y : x.localeCompare(y));
      });
      for (const other of headings) other.ariaSort = "none";
      heading.ariaSort = down ? "descending" : "ascending";
      table.tBodies[0].append(...rows);
    });
  });
}
