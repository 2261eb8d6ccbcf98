"use strict";
(async () => {
  const read = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // A click on a column's name sorts the table: numbers by value, others by text.
  const value = (cell) => {
    const text = cell.textContent.trim();
    const number = parseFloat(text.replaceAll(",", "").replace("\u2212", "-"));
    return Number.isNaN(number) ? text : number;
  };
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), body = head.closest("table").tBodies[0];
      const rising = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const column = head.cellIndex, sign = rising ? 1 : -1;
      const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      body.append(...[...body.rows].sort((a, b) => sign * order(value(a.cells[column]), value(b.cells[column]))));
    });
  }

  const packed = read("plotly"), data = read("figures");
  if (!packed || !data) return;
  const bytes = Uint8Array.from(atob(packed.textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  const figures = JSON.parse(data.textContent);

  const dressed = (figure, printing) => {
    const layout = structuredClone(figure.layout);
    const line = printing ? "#bbb" : colour("--line"), ink = printing ? "#000" : colour("--ink");
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: ink},
    });
    for (const [name, axis] of Object.entries(layout)) {
      if (/^[xy]axis/.test(name)) Object.assign(axis, {gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true});
    }
    return layout;
  };
  const draw = (printing = false) => Promise.all(Object.entries(figures).map(([id, figure]) =>
    Plotly.react(read(id), figure.data, dressed(figure, printing), {responsive: true, displaylogo: false, displayModeBar: false, staticPlot: false})));
  await draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    for (const id of Object.keys(figures)) read(id).style.width = "680px";
    draw(true);
    for (const id of Object.keys(figures)) Plotly.Plots.resize(read(id));
  });
  addEventListener("afterprint", () => { for (const id of Object.keys(figures)) read(id).style.width = ""; draw(); });
  document.documentElement.dataset.drawn = Object.keys(figures).length;
})();
