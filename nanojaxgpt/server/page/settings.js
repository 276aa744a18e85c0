/** What the user sets: how tokens are drawn, the theme. It is kept in the browser. */

import { PREFIX, store } from "./conversations.js";

const THEMES = ["", "light", "dark"]; // "" is the system's
const SLIDERS = [
  // name, label, lowest, highest, step, default, note
  ["temperature", "Temperature", 0, 2, 0.05, 0.8, "0 always takes the likeliest token"],
  ["top_p", "Top p", 0.01, 1, 0.01, 0.95, "Total of the likeliest tokens; 1 is off"],
  ["top_k", "Top k", 0, 200, 1, 0, "Number of the likeliest tokens; 0 is off"],
  ["min_p", "Min p", 0, 1, 0.01, 0, "Share of the likeliest token; 0 is off"],
  ["max_tokens", "Max tokens", 1, 2048, 1, 256, "The longest answer"],
];
const DEFAULTS = { ...Object.fromEntries(SLIDERS.map((s) => [s[0], s[5]])), seed: "", stops: "" };

export const settings = { ...DEFAULTS, theme: "", mode: "chat", tints: true, ...stored() };

function stored() {
  try {
    return JSON.parse(localStorage.getItem(`${PREFIX}settings`));
  } catch {
    return {};
  }
}

const find = (id) => document.getElementById(id);

/** Change some settings and keep them. @param {Partial<typeof settings>} changes */
export function change(changes) {
  Object.assign(settings, changes);
  store(`${PREFIX}settings`, settings);
  draw();
}

function draw() {
  for (const [name] of SLIDERS) {
    for (const input of document.getElementsByName(name)) input.value = settings[name];
  }
  find("seed").value = settings.seed;
  find("stops").value = settings.stops;
  document.documentElement.dataset.theme = settings.theme;
  find("theme").title = `Theme: ${settings.theme || "as the system"}`;
  find("theme").setAttribute("aria-label", find("theme").title);
}

function addSlider([name, label, min, max, step, , note]) {
  const field = find("slider").content.firstElementChild.cloneNode(true);
  const [number, range] = field.querySelectorAll("input");
  Object.assign(field.querySelector("label"), { textContent: label, htmlFor: `set-${name}` });
  number.id = `set-${name}`;
  range.setAttribute("aria-label", label);
  field.querySelector(".note").textContent = note;
  for (const input of [number, range]) {
    Object.assign(input, { name, min, max, step });
    input.addEventListener("change", () => {
      const value = input.value === "" ? settings[name] : Number(input.value);
      change({ [name]: Math.max(min, Math.min(max, value)) });
    });
  }
  range.addEventListener("input", () => { number.value = range.value; });
  find("sliders").append(field);
}

/** Show the settings, and take what is changed. */
export function showSettings() {
  const seed = find("seed"), stops = find("stops");
  SLIDERS.forEach(addSlider);
  seed.addEventListener("change", () => {
    const value = seed.value.trim();
    change({ seed: /^\d+$/.test(value) && Number(value) < 2 ** 31 ? value : "" });
  });
  stops.addEventListener("change", () => change({ stops: stops.value }));
  find("defaults").addEventListener("click", () => change(DEFAULTS));
  find("theme").addEventListener("click", () => {
    change({ theme: THEMES[(THEMES.indexOf(settings.theme) + 1) % THEMES.length] });
  });
  draw();
}
