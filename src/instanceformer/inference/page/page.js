// Asks for the newest frame as soon as the one before is displayed, and sends what the controls change.

const $ = (id) => document.getElementById(id);
const sliders = ["birth", "show", "patience"].map($);
let changed = 0; // the first version that has all changes made here
let waiting = null; // rules to send
let sending = false;

async function post(path, content = {}) {
  const answer = await fetch(path, { method: "POST", body: JSON.stringify(content) });
  if (!answer.ok) throw new Error(await answer.text());
  changed = (await answer.json()).version;
}

async function sendRules() {
  waiting = Object.fromEntries(sliders.map((slider) => [slider.id, Number(slider.value)]));
  if (sending) return;
  sending = true;
  try {
    while (waiting) {
      const rules = waiting;
      waiting = null;
      await post("rules", rules);
    }
  } finally {
    sending = false;
  }
}

function writeValues() {
  for (const { id, value } of sliders) {
    document.querySelector(`output[for=${id}]`).value = id === "patience" ? value : Number(value).toFixed(2);
  }
}

function displayRules(rules) {
  const [birth, show, patience] = sliders;
  patience.max = Math.max(patience.max, rules.patience);
  [birth.value, show.value, patience.value] = [rules.birth, rules.show, rules.patience];
  writeValues();
}

function row({ id, name, score, color }) {
  const line = document.createElement("tr");
  const cells = [`#${id}`, name, score.toFixed(2)].map((text) => {
    const cell = document.createElement("td");
    cell.textContent = text;
    return cell;
  });
  const patch = document.createElement("span");
  patch.className = "color";
  patch.style.background = color;
  cells[0].prepend(patch);
  line.append(...cells);
  return line;
}

function displayStatus(text, usable) {
  if ($("status").textContent !== text) $("status").textContent = text; // read aloud only when it changes
  for (const control of [...sliders, $("pause"), $("reset")]) control.disabled = !usable;
}

async function display(state) {
  if (!sending && state.version >= changed) displayRules(state.rules);
  $("pause").textContent = state.paused ? "Resume" : "Pause";
  const begun = state.image !== undefined;
  displayStatus(state.ended ? "ended" : state.paused ? "paused" : begun ? "running" : "waiting for the first frame", !state.ended);
  if (!begun) return;
  const picture = $("picture");
  picture.src = state.image;
  picture.alt = `Frame ${state.count} with the masks of ${state.instances.length} instances`;
  picture.hidden = false;
  $("rate").textContent = `frame ${state.count}` + (state.paused || state.ended ? "" : `, ${state.rate.toFixed(1)} per second`);
  $("instances").replaceChildren(...state.instances.map(row));
  $("count").textContent = state.instances.length;
  $("hidden").textContent = state.hidden.length ? `Hidden: ${state.hidden.map((id) => `#${id}`).join(", ")}` : "";
  await picture.decode();
}

async function becomeVisible() {
  while (document.hidden) {
    await new Promise((resume) => document.addEventListener("visibilitychange", resume, { once: true }));
  }
}

async function watch() {
  let version = 0;
  for (;;) {
    await becomeVisible();
    try {
      const answer = await fetch(`next?after=${version}`);
      if (!answer.ok) throw new Error(await answer.text());
      const state = await answer.json();
      version = state.version;
      await display(state);
      if (state.ended) return;
    } catch {
      displayStatus("not connected: ended, or out of reach", false);
      [version, changed] = [0, 0]; // of another run, when it answers again
      await new Promise((resume) => setTimeout(resume, 1000));
    }
  }
}

for (const slider of sliders) {
  slider.addEventListener("input", () => {
    const [birth, show] = sliders;
    if (Number(show.value) > Number(birth.value)) (slider === show ? birth : show).value = slider.value;
    writeValues();
    sendRules();
  });
}
$("pause").addEventListener("click", () => post($("pause").textContent === "Pause" ? "pause" : "resume"));
$("reset").addEventListener("click", () => post("reset"));
watch();
