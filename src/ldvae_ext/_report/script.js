"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// Sorting of the table of factors.
const table = document.getElementById("factors");
for (const button of table.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const column = [...head.parentElement.children].indexOf(head);
    const isNumber = head.classList.contains("number");
    const wasDescending = head.getAttribute("aria-sort") === "descending";
    const ascending = head.hasAttribute("aria-sort") ? wasDescending : !isNumber;
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const valueOf = (row) => {
      const cell = row.children[column];
      const value = cell.dataset.value ?? cell.textContent.trim();
      return isNumber ? Number(value) : value;
    };
    const compare = (a, b) => {
      const [x, y] = [valueOf(a), valueOf(b)];
      return isNumber ? x - y : x.localeCompare(y, undefined, { numeric: true });
    };
    const rows = [...table.tBodies[0].rows].sort(compare);
    if (!ascending) rows.reverse();
    table.tBodies[0].append(...rows);
  });
}

// Scatter plot.
const scatter = data.scatter;
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const xy = new Uint16Array(bytes(scatter.xy).buffer);
const columns = scatter.columns.map((column) => ({ ...column, codes: new Int8Array(bytes(column.codes).buffer) }));
const shades = scatter.factors.map(bytes);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6BB1", "#A6761D"];

function groupColor(column, i) {
  if (column.colors.length) return column.colors[i];
  if (column.groups.length <= OKABE_ITO.length) return OKABE_ITO[i];
  return `hsl(${Math.round((i * 137.5) % 360)} 60% ${i % 2 ? 42 : 58}%)`;
}

function diverging(t) {
  // Blue, through the colour of no change, to orange; t from 0 to 255.
  const middle = dark.matches ? [72, 79, 88] : [222, 226, 230];
  const end = t < 128 ? [0, 114, 178] : [213, 94, 0];
  const weight = Math.abs(t - 127.5) / 127.5;
  return `rgb(${end.map((value, i) => Math.round(middle[i] + weight * (value - middle[i]))).join(" ")})`;
}

const canvas = document.getElementById("scatter");
const choice = document.getElementById("color");

function draw() {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const size = scatter.n > 5000 ? 3 : scatter.n > 1000 ? 5 : 7;
  context.clearRect(0, 0, width, height);
  // Columns of obs are "groups-0", "groups-1", ..., factors "0", "1", ...
  const column = choice.value.startsWith("groups-") ? columns[Number(choice.value.slice(7))] : null;
  const shade = column ? null : shades[Number(choice.value)];
  const order = Array.from({ length: scatter.n }, (_, i) => i);
  // Cells at the ends of a factor lie on top.
  if (!column) order.sort((a, b) => Math.abs(shade[a] - 127.5) - Math.abs(shade[b] - 127.5));
  for (const i of order) {
    const code = column ? column.codes[i] : -1;
    context.fillStyle = !column ? diverging(shade[i]) : code < 0 ? "#888888" : groupColor(column, code);
    const x = 12 + (xy[2 * i] / 65535) * (width - 24);
    const y = 12 + (1 - xy[2 * i + 1] / 65535) * (height - 24);
    context.beginPath();
    context.arc(x, y, size, 0, 2 * Math.PI);
    context.fill();
  }
  key(column);
}

function key(column) {
  const place = document.getElementById("key");
  place.replaceChildren();
  if (column) {
    const list = document.createElement("ul");
    list.className = "legend";
    column.groups.forEach((name, i) => {
      const item = document.createElement("li");
      const mark = document.createElement("span");
      mark.style.background = groupColor(column, i);
      item.append(mark, name);
      list.append(item);
    });
    place.append(list);
    return;
  }
  const limit = scatter.limits[Number(choice.value)];
  const scale = document.createElement("div");
  scale.className = "scale";
  const stops = [0, 64, 127.5, 191, 255].map(diverging);
  scale.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const text = document.createElement("div");
  text.className = "soft";
  text.textContent = `${(-limit).toFixed(1)} to ${limit.toFixed(1)}`;
  place.append(scale, text);
}

choice.addEventListener("change", draw);
dark.addEventListener("change", draw);
draw();

// Genes of each factor in the chosen population.
const population = document.getElementById("population");

function fill() {
  const shown = (factor) => population.value || data.own[factor] || population.options[1].value;
  for (const place of document.querySelectorAll(".in-population")) {
    const factor = Number(place.dataset.factor);
    const genes = data.in_population[shown(factor)][factor];
    const largest = Math.max(...genes.map((gene) => Math.abs(gene[1])), 1e-12);
    place.replaceChildren();
    for (const [name, value] of genes) {
      const [label, track, bar, middle, number] = ["span", "span", "span", "span", "span"].map((tag) => document.createElement(tag));
      label.className = "label";
      label.textContent = name;
      track.className = "track";
      bar.className = value < 0 ? "bar down" : "bar";
      const half = (50 * Math.abs(value)) / largest;
      bar.style.left = `${value < 0 ? 50 - half : 50}%`;
      bar.style.width = `${half}%`;
      middle.className = "middle";
      middle.style.left = "50%";
      track.append(bar, middle);
      number.className = "value";
      number.textContent = (value < 0 ? "" : "+") + value.toPrecision(2);
      place.append(label, track, number);
    }
  }
  document.querySelectorAll(".of-population").forEach((place, factor) => {
    place.textContent = shown(factor);
  });
}

if (population) {
  population.addEventListener("change", fill);
  fill();
}

// Cards that are folded open for a link to them, and on paper.
const folded = [...document.querySelectorAll("details")];
for (const link of document.querySelectorAll('a[href^="#card-"]')) {
  link.addEventListener("click", () => {
    const part = document.querySelector(`${link.getAttribute("href")} > details`);
    if (part) part.open = true;
  });
}
let closed = [];
window.addEventListener("beforeprint", () => {
  closed = folded.filter((part) => !part.open);
  for (const part of closed) part.open = true;
});
window.addEventListener("afterprint", () => {
  for (const part of closed) part.open = false;
});
