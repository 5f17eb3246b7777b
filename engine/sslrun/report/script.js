"use strict";
// Two extras of a page that is complete without them: tables sort by a click, curves show their values under a pointer.

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const isUp = head.getAttribute("aria-sort") === "descending" ||
        (!head.hasAttribute("aria-sort") && head.dataset.first === "ascending");
      for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
      const key = row => row.cells[column].dataset.value ?? "";
      const rows = [...body.rows].sort((a, b) => {
        const [one, other] = [key(a), key(b)];
        if (one === "" || other === "") return (one === "") - (other === "");  // missing values stay last
        const order = isNaN(one) || isNaN(other) ? one.localeCompare(other) : one - other;
        return isUp ? order : -order;
      });
      body.append(...rows);
    });
  });
}

const numbers = text => text.split(" ").map(each => each === "" || each === "-" ? NaN : +each);
const shown = (value, unit) => `${value.toLocaleString("en-US", { maximumSignificantDigits: 4 })}${unit}`;
const clock = seconds => [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].reduce(([words, rest], [length, name]) => {
  const count = Math.floor(rest / length);
  return [count && words.length < 2 ? [...words, `${count} ${name}`] : words, rest - count * length];
}, [[], Math.round(seconds)])[0].join(" ") || "0 s";

for (const figure of document.querySelectorAll("figure[data-unit]")) {
  const label = figure.appendChild(document.createElement("div"));
  label.className = "readout";
  label.hidden = true;
  const series = [...figure.querySelectorAll("data")].map(each => ({
    name: each.dataset.name, color: each.dataset.color, y: numbers(each.dataset.y),
    epoch: numbers(each.dataset.epoch), step: numbers(each.dataset.step), wall: numbers(each.dataset.wall),
  }));
  const clear = () => {
    label.hidden = true;
    figure.querySelectorAll(".pointed").forEach(each => each.remove());
  };
  const point = event => {
    const svg = event.target.closest("svg[data-axis]");
    clear();
    if (!svg) return;
    const axis = svg.dataset.axis, [left, top, right, bottom] = numbers(svg.dataset.box);
    const [low, high] = numbers(svg.dataset.x), [least, most] = numbers(svg.dataset.y), box = svg.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = low + (across - left) / (right - left) * (high - low);
    const add = (name, attributes) => {
      const made = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
      for (const key in attributes) made.setAttribute(key, attributes[key]);
    };
    const lines = [];
    let guide = null;
    for (const line of series) {
      let best = -1;
      line[axis].forEach((x, place) => {
        if (!isNaN(x) && (best < 0 || Math.abs(x - wanted) < Math.abs(line[axis][best] - wanted))) best = place;
      });
      if (best < 0 || Math.abs(line[axis][best] - wanted) > (high - low) / 8) continue;
      const x = left + (line[axis][best] - low) / (high - low || 1) * (right - left);
      const y = bottom - (line.y[best] - least) / (most - least || 1) * (bottom - top);
      guide ??= x;
      add("circle", { class: `pointed line-${line.color}`, cx: x, cy: y, r: 3.5 });
      const at = [`epoch ${shown(line.epoch[best], "")}`, `step ${shown(line.step[best], "")}`];
      if (!isNaN(line.wall[best])) at.push(clock(line.wall[best]));
      lines.push([line.name, shown(line.y[best], figure.dataset.unit), at.join(" · ")]);
    }
    if (!lines.length) return;
    add("line", { class: "pointed guide", x1: guide, x2: guide, y1: top, y2: bottom });
    label.replaceChildren(...lines.map(([name, value, at]) => {
      const row = document.createElement("p");
      row.append(Object.assign(document.createElement("b"), { textContent: `${name} ${value}`.trim() }), ` at ${at}`);
      return row;
    }));
    label.hidden = false;
    label.style.insetInlineStart = across < svg.viewBox.baseVal.width / 2 ? "auto" : ".6rem";
    label.style.insetInlineEnd = across < svg.viewBox.baseVal.width / 2 ? ".6rem" : "auto";
  };
  figure.addEventListener("pointermove", point);
  figure.addEventListener("pointerdown", point);
  figure.addEventListener("pointerleave", clear);
}
