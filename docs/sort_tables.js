// Sorts the rows of a table by the column whose head is clicked: numbers by value, the rest by the alphabet.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".md-typeset table")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      let sign = 1;
      head.style.cursor = "pointer";
      head.addEventListener("click", () => {
        const key = (row) => row.cells[column].textContent.trim();
        const compare = (one, other) => parseFloat(one) - parseFloat(other) || one.localeCompare(other);
        body.append(...[...body.rows].sort((one, other) => sign * compare(key(one), key(other))));
        sign = -sign;
      });
    });
  }
});
