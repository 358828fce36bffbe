"use strict";
// Sorting: attentions move with their heads; what is not known goes last.
document.querySelectorAll("#attentions th button").forEach((button, column) => {
  button.addEventListener("click", () => {
    const heading = button.parentElement, table = heading.closest("table");
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const value = body => {
      const cell = body.rows[0].cells[column];
      if ("v" in cell.dataset) return Number(cell.dataset.v);
      return heading.dataset.kind === "number" ? null : cell.textContent;
    };
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      const less = typeof x === "number" ? x - y : x.localeCompare(y, "en", {numeric: true});
      return ascending ? less : -less;
    };
    [...table.tBodies].sort(order).forEach(body => table.append(body));
  });
});
// Menus: each shows one of the figures beside it; that of heads also gives the histogram its path.
const heads = JSON.parse(document.getElementById("heads").textContent);
document.querySelectorAll("select[data-shows]").forEach(menu => {
  const show = () => {
    const head = menu.dataset.shows === "curve" ? heads[menu.value] : null;
    const chosen = head ? String(head.curve) : menu.value;
    document.querySelectorAll(`[data-figure=${menu.dataset.shows}]`).forEach(figure => {
      figure.hidden = figure.dataset.value !== chosen;
      const histogram = figure.querySelector(".histogram");
      if (head && histogram && !figure.hidden) {
        histogram.setAttribute("d", head.path);
        figure.querySelector(".logits").textContent = `${head.label}: ${head.text}`;
      }
    });
  };
  menu.addEventListener("change", show);
  show();
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(folded => (folded.open = true)));
