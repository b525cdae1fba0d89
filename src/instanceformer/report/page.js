"use strict";

const FRAMES_PER_SECOND = 8;
const OPACITY = 0.45;

const root = document.documentElement;
const find = (id) => document.getElementById(id);
const states = JSON.parse(find("states").textContent); // a digit of a row is an index
const films = [...document.querySelectorAll("script.film")];
const canvases = [...document.querySelectorAll("#screens canvas")];
const player = { film: null, images: [], frame: 0, timer: null };

// Theme: that of the system until the button is used.

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

find("theme").setAttribute("aria-pressed", String(isDark()));
find("theme").addEventListener("click", (event) => {
  root.dataset.theme = isDark() ? "light" : "dark";
  event.currentTarget.setAttribute("aria-pressed", String(isDark()));
});

// Masks: COCO's compressed run lengths, column by column, beginning with zeros.

function runLengths(text) {
  const lengths = [];
  for (let at = 0; at < text.length; ) {
    let value = 0;
    for (let shift = 0; ; shift += 5) {
      const bits = text.charCodeAt(at++) - 48;
      value |= (bits & 31) << shift;
      if (!(bits & 32)) {
        if (bits & 16) value |= -1 << (shift + 5); // negative
        break;
      }
    }
    lengths.push(lengths.length > 2 ? value + lengths[lengths.length - 2] : value);
  }
  return lengths;
}

function readMask(text, height, width) {
  const inside = new Uint8Array(height * width);
  let at = 0;
  let [area, top, sum, left, right] = [0, height, 0, width, 0];
  runLengths(text).forEach((length, index) => {
    if (index % 2) {
      inside.fill(1, at, at + length);
      area += length;
      left = Math.min(left, Math.floor(at / height));
      right = Math.floor((at + length - 1) / height) + 1;
      for (let i = at; i < at + length; i++) {
        top = Math.min(top, i % height);
        sum += Math.floor(i / height);
      }
    }
    at += length;
  });
  return { inside, area, top, left, right, center: area ? sum / area : 0 };
}

function maskPaths(mask, height, width, scale) {
  const fill = new Path2D();
  const outline = new Path2D();
  const has = (x, y) => x < 0 || y < 0 || x >= width || y >= height || mask.inside[x * height + y];
  const line = (x1, y1, x2, y2) => {
    outline.moveTo(x1 * scale, y1 * scale);
    outline.lineTo(x2 * scale, y2 * scale);
  };
  for (let x = mask.left; x < mask.right; x++) {
    for (let y = 0; y < height; y++) {
      if (!mask.inside[x * height + y]) continue;
      const start = y;
      while (y < height && mask.inside[x * height + y]) {
        if (!has(x - 1, y)) line(x, y, x, y + 1);
        if (!has(x + 1, y)) line(x + 1, y, x + 1, y + 1);
        y++;
      }
      if (!has(x, start - 1)) line(x, start, x + 1, start);
      if (!has(x, y)) line(x, y, x + 1, y);
      fill.rect(x * scale, start * scale, scale, (y - start) * scale);
    }
  }
  return { fill, outline };
}

// Drawing

function drawLabel(context, text, color, x, y, unit, taken) {
  context.font = `600 ${12 * unit}px system-ui, sans-serif`;
  const width = context.measureText(text).width + 8 * unit;
  const height = 17 * unit;
  const left = Math.max(0, Math.min(x - width / 2, context.canvas.width - width));
  let top = Math.max(0, y - height);
  const meets = (box) => left < box[0] + box[2] && box[0] < left + width && top < box[1] + height && box[1] < top + height;
  while (taken.some(meets) && top + 2 * height < context.canvas.height) top += height;
  taken.push([left, top, width]);
  context.fillStyle = color;
  context.fillRect(left, top, width, height);
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
  context.fillStyle = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "black" : "white";
  context.textBaseline = "middle";
  context.fillText(text, left + 4 * unit, top + height / 2 + unit / 2);
}

function drawScreen(canvas, objects, name) {
  const { film, images, frame } = player;
  const scale = Math.max(1, Math.round(360 / film.height));
  const context = canvas.getContext("2d");
  if (canvas.width !== film.width * scale || canvas.height !== film.height * scale) {
    canvas.width = film.width * scale;
    canvas.height = film.height * scale;
  }
  context.drawImage(images[frame], 0, 0, canvas.width, canvas.height);
  const shown = objects.filter((each) => each.masks[frame] !== null);
  const masks = new Map(shown.map((each) => [each, readMask(each.masks[frame], film.height, film.width)]));
  shown.sort((a, b) => masks.get(b).area - masks.get(a).area);
  for (const each of shown) {
    const paths = maskPaths(masks.get(each), film.height, film.width, scale);
    context.fillStyle = context.strokeStyle = each.color;
    context.globalAlpha = OPACITY;
    context.fill(paths.fill);
    context.globalAlpha = 1;
    context.lineWidth = 2;
    context.stroke(paths.outline);
  }
  const unit = canvas.width / Math.max(1, canvas.clientWidth); // canvas pixels for a pixel of the page
  const taken = [];
  for (const each of shown) {
    const score = each.score === null || canvas.clientWidth < 320 ? "" : ` ${each.score.toFixed(2)}`;
    const mask = masks.get(each);
    const text = `#${each.number} ${each.name}${score}`;
    drawLabel(context, text, each.color, (mask.center + 0.5) * scale, mask.top * scale, unit, taken);
  }
  const list = shown.map((each) => `number ${each.number} ${each.name}`).join(", ") || "nothing";
  canvas.setAttribute("aria-label", `${name}, frame ${frame + 1} of ${film.frames.length}: ${list}`);
}

function draw() {
  const { film, frame } = player;
  drawScreen(canvases[0], film.instances, "Ground truth");
  film.panels.forEach((panel, index) => drawScreen(canvases[index + 1], panel.tracks, panel.run));
  find("slider").value = frame + 1;
  find("slider").setAttribute("aria-valuetext", `frame ${frame + 1} of ${film.frames.length}`);
  find("position").textContent = `frame ${frame + 1} of ${film.frames.length}`;
  for (const table of document.querySelectorAll(".timeline")) {
    table.querySelectorAll(".now").forEach((cell) => cell.classList.remove("now"));
    const cells = table.querySelectorAll(`[data-frame="${frame}"]`);
    cells.forEach((cell) => cell.classList.add("now"));
    if (cells.length) keepInView(table.parentElement, table, cells[0]);
  }
  root.dataset.frame = frame;
}

function keepInView(box, table, cell) {
  const names = table.querySelector("th").offsetWidth;
  if (cell.offsetLeft - names < box.scrollLeft) box.scrollLeft = cell.offsetLeft - names;
  const over = cell.offsetLeft + cell.offsetWidth - box.clientWidth;
  if (over > box.scrollLeft) box.scrollLeft = over;
}

// Playing

function jump(frame) {
  player.frame = Math.max(0, Math.min(player.film.frames.length - 1, frame));
  draw();
}

function play(on) {
  clearInterval(player.timer);
  player.timer = null;
  if (on) {
    if (player.frame === player.film.frames.length - 1) jump(0);
    player.timer = setInterval(() => {
      if (player.frame === player.film.frames.length - 1) play(false);
      else jump(player.frame + 1);
    }, 1000 / FRAMES_PER_SECOND);
  }
  find("play").textContent = on ? "Pause" : "Play";
  find("position").setAttribute("aria-live", on ? "off" : "polite");
}

const STEPS = {
  first: () => jump(0),
  back: () => jump(player.frame - 1),
  next: () => jump(player.frame + 1),
  last: () => jump(player.film.frames.length - 1),
};
const KEYS = { Home: "first", ArrowLeft: "back", ArrowRight: "next", End: "last" };

for (const button of document.querySelectorAll("[data-step]")) {
  button.addEventListener("click", () => {
    play(false);
    STEPS[button.dataset.step]();
  });
}
find("play").addEventListener("click", () => play(player.timer === null));
find("slider").addEventListener("input", (event) => {
  play(false);
  jump(Number(event.target.value) - 1);
});
find("player").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest(".timeline, input")) return;
  if (event.key === " " && !event.target.closest("button")) play(player.timer === null);
  else if (event.key in KEYS) {
    play(false);
    STEPS[KEYS[event.key]]();
  } else return;
  event.preventDefault();
});
addEventListener("resize", () => player.images.length && draw());

// Timelines and mistakes

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function timeline(film, panel) {
  const head = element("tr", {}, element("th", { scope: "col" }, "Frame"));
  for (let t = 0; t < film.frames.length; t++) {
    head.append(element("th", { scope: "col", "data-head": t }, t === 0 || (t + 1) % 5 === 0 ? String(t + 1) : ""));
  }
  const body = element("tbody");
  for (const [number, digits] of panel.rows) {
    const instance = film.instances[number - 1];
    const swatch = element("span", { class: "swatch", style: `background: ${instance.color}` });
    const row = element("tr", {}, element("th", { scope: "row" }, swatch, `#${number} ${instance.name}`));
    [...digits].forEach((digit, t) => {
      const state = states[digit];
      const text = `#${number} ${instance.name}, frame ${t + 1}: ${state.replace("_", " ")}`;
      const letter = state === "hidden" ? "–" : state[0].toUpperCase();
      row.append(
        element("td", { class: state, tabindex: -1, "data-frame": t, "aria-label": text, title: text }, letter),
      );
    });
    body.append(row);
  }
  const table = element("table", { class: "timeline", role: "grid", "aria-label": `Timeline of ${panel.run}` });
  table.append(element("thead", {}, head), body);
  const first = body.querySelector("td");
  if (first) first.tabIndex = 0; // one stop for the Tab key; arrows move inside
  table.addEventListener("click", (event) => goTo(event.target.closest("td")));
  table.addEventListener("keydown", moveInTimeline);
  return element("div", { class: "scroll" }, table);
}

function goTo(cell) {
  if (!cell) return;
  play(false);
  cell.closest("table").querySelector('td[tabindex="0"]').tabIndex = -1;
  cell.tabIndex = 0;
  cell.focus({ preventScroll: true });
  jump(Number(cell.dataset.frame));
}

function moveInTimeline(event) {
  const cell = event.target.closest("td");
  if (!cell) return;
  const column = [...cell.parentElement.cells].indexOf(cell);
  const rows = [...cell.closest("tbody").rows];
  const at = rows.indexOf(cell.parentElement);
  const target = {
    ArrowLeft: () => rows[at].cells[Math.max(1, column - 1)],
    ArrowRight: () => rows[at].cells[column + 1],
    ArrowUp: () => rows[at - 1]?.cells[column],
    ArrowDown: () => rows[at + 1]?.cells[column],
    Home: () => rows[at].cells[1],
    End: () => rows[at].cells[rows[at].cells.length - 1],
  }[event.key];
  if (event.key === "Enter" || event.key === " ") goTo(cell);
  else if (target) {
    const next = target();
    if (next) {
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  } else return;
  event.preventDefault();
}

function mistakes(panel) {
  const list = element("ul", { class: "mistakes" });
  for (const each of panel.mistakes) {
    const button = element("button", { type: "button", "data-first": each.first }, each.text);
    button.addEventListener("click", () => {
      play(false);
      jump(each.first);
      find("screens").scrollIntoView({ block: "nearest" });
    });
    list.append(element("li", {}, button));
  }
  return panel.mistakes.length ? list : element("p", {}, "No instance was captured or lost.");
}

// Choosing a video

async function choose(index) {
  play(false);
  const film = JSON.parse(films[index].textContent);
  const images = film.frames.map((source) => Object.assign(new Image(), { src: source }));
  await images[0].decode();
  Object.assign(player, { film, images, frame: 0 });
  for (const button of document.querySelectorAll("[data-video]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.video) === index));
  }
  find("film-title").textContent = film.name;
  find("slider").max = film.frames.length;
  find("timelines").replaceChildren(
    ...film.panels.flatMap((panel) => [
      element("h4", {}, film.panels.length > 1 ? `Timeline, ${panel.run}` : "Timeline"),
      timeline(film, panel),
      element("h4", {}, film.panels.length > 1 ? `Captured and lost, ${panel.run}` : "Captured and lost"),
      mistakes(panel),
    ]),
  );
  jump(0);
  performance.mark("first frame");
  root.dataset.video = index;
  await Promise.all(images.map((image) => image.decode()));
}

for (const button of document.querySelectorAll("[data-video]")) {
  button.addEventListener("click", () => choose(Number(button.dataset.video)));
}
if (films.length) choose(0);
