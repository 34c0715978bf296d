"use strict";

// As many rows as a person reads; the server has the rest.
const MAX_ROWS = 100;
const MAX_SENDERS = 10;
const SECONDS = 600;
const SVG = "http://www.w3.org/2000/svg";
const LINES = [["flight", "in_flight"], ["stable", "stable"], ["panic", "panic"]];

const at = (id) => document.getElementById(id);
// Not in the path: a browser takes a name like ".." for the folder above.
const path = (part, { namespace, name }, more = {}) => `/v1/key${part}?${new URLSearchParams({ namespace, name, ...more })}`;
const label = (key) => `${key.namespace}/${key.name}`;
// Names may have slashes, so that two keys can have the same label.
const fragment = (key) => `#${encodeURIComponent(key.namespace)}/${encodeURIComponent(key.name)}`;
const UNKNOWN = "–";
const rounded = (number) => number === null ? UNKNOWN : number.toLocaleString("en", { maximumFractionDigits: number < 100 ? 2 : 0 });

let chosen = null;
const rows = new Map();

async function get(url) {
  const answer = await fetch(url, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

function choose(key) {
  chosen = { namespace: key.namespace, name: key.name };
  location.replace(fragment(key));
  for (const [name, row] of rows) mark(row, name === fragment(key));
  chart().catch(() => {});
}

function mark(row, isChosen) {
  row.line.classList.toggle("chosen", isChosen);
  row.button.setAttribute("aria-pressed", isChosen);
}

// A row is made once, so that who is on it with the keyboard stays there.
function rowOf(key) {
  const line = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label(key);
  button.title = `namespace ${key.namespace}, name ${key.name}`;
  button.addEventListener("click", () => choose(key));
  const panics = document.createElement("span");
  panics.className = "panics";
  panics.textContent = "panic";
  head.append(button, panics);
  line.append(head);
  const cells = Array.from({ length: 6 }, () => line.appendChild(document.createElement("td")));
  return { line, button, panics, cells };
}

function fill(row, key) {
  const values = [
    key.stable.concurrency, key.panic.concurrency, key.in_flight,
    key.stable.requests_per_second, key.pods, key.desired_pods,
  ];
  values.forEach((value, i) => { row.cells[i].textContent = rounded(value); });
  row.panics.hidden = !key.panic_mode;
  row.line.classList.toggle("silent", key.stale);
  row.line.title = key.missing === null ? "" : key.missing;
}

function list(keys, found) {
  const shown = new Set(keys.map(fragment));
  for (const [name, row] of rows) {
    if (!shown.has(name)) { row.line.remove(); rows.delete(name); }
  }
  keys.forEach((key, place) => {
    const name = fragment(key);
    if (!rows.has(name)) rows.set(name, rowOf(key));
    const row = rows.get(name);
    fill(row, key);
    mark(row, chosen !== null && fragment(chosen) === name);
    if (at("keys").children[place] !== row.line) at("keys").insertBefore(row.line, at("keys").children[place] ?? null);
  });
  at("more").textContent = found > keys.length ? `and ${found - keys.length} more: use Find` : "";
}

function draw(points, between) {
  const svg = at("chart");
  const { width, height } = svg.getBoundingClientRect();
  const [left, right, top, bottom] = [44, width - 44, 12, height - 24];
  const axisMax = (values) => {
    const highest = Math.max(1, ...values);
    const step = 10 ** Math.floor(Math.log10(highest));
    return Math.ceil(highest / step) * step;
  };
  const load = axisMax(points.flatMap((p) => [p.stable, p.panic, p.in_flight]));
  const pods = axisMax(points.map((p) => p.desired_pods));
  const x = (i) => right - ((points.length - 1 - i) * between / SECONDS) * (right - left);
  const y = (value, of) => bottom - (value / of) * (bottom - top);
  const parts = [];
  const add = (name, attributes, text) => {
    const part = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
    if (text !== undefined) part.textContent = text;
    parts.push(part);
  };
  for (const share of [0, 0.5, 1]) {
    const height = y(share, 1);
    add("path", { class: "grid", d: `M${left} ${height}H${right}` });
    add("text", { x: left - 6, y: height + 4, "text-anchor": "end" }, rounded(load * share));
    add("text", { x: right + 6, y: height + 4 }, rounded(pods * share));
  }
  for (const minutes of [10, 5, 0]) {
    const place = right - (minutes * 60 / SECONDS) * (right - left);
    const anchor = minutes === 10 ? "start" : minutes === 0 ? "end" : "middle";
    add("text", { x: place, y: height - 7, "text-anchor": anchor }, minutes ? `${minutes} min ago` : "now");
  }
  for (const [style, field] of LINES) {
    add("path", { class: style, d: points.map((p, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(p[field], load).toFixed(1)}`).join("") });
  }
  const steps = points.map((p, i) => (i ? `H${x(i).toFixed(1)}V` : `M${x(i).toFixed(1)} `) + y(p.desired_pods, pods).toFixed(1));
  add("path", { class: "pods", d: steps.join("") });
  svg.replaceChildren(...parts);
}

async function chart() {
  if (chosen === null) return;
  const key = chosen;
  const [past, now, list] = await Promise.all([
    get(path("/history", key)), get(path("", key)), get(path("/senders", key, { limit: MAX_SENDERS })),
  ]);
  if (key !== chosen) return;
  at("chart-title").textContent = label(key);
  draw(past.points, past.seconds_between);
  senders(now, list);
}

const counted = (number, what) => `${rounded(number)} ${what}${number === 1 ? "" : "s"}`;

// Who reports the chosen key.
function senders(key, { senders, found }) {
  const share = key.proxied_share === null ? "" : `; ${rounded(key.proxied_share * 100)} % of the pods' requests are proxied`;
  at("reported-by").textContent = `reported by ${counted(key.pods, "pod")} and ${counted(key.gateways, "gateway")}${share}`;
  at("senders").replaceChildren(...senders.map((sender) => {
    const line = document.createElement("tr");
    line.classList.toggle("silent", !sender.live);
    const values = [
      sender.name, sender.role, rounded(sender.in_flight), rounded(sender.proxied_in_flight),
      rounded(sender.average_concurrency), `${rounded(sender.last_report_age_ms / 1000)} s ago`,
    ];
    for (const value of values) line.appendChild(document.createElement("td")).textContent = value;
    return line;
  }));
  at("more-senders").textContent = found > senders.length ? `and ${rounded(found - senders.length)} more` : "";
}

async function tick() {
  try {
    const search = encodeURIComponent(at("search").value.trim());
    const { keys, found } = await get(`/v1/keys?limit=${MAX_ROWS}&search=${search}`);
    if (chosen === null && keys.length) {
      choose(keys.find((key) => fragment(key) === location.hash) ?? keys[0]);
    }
    list(keys, found);
    await chart();
    at("state").textContent = `${found} ${found === 1 ? "key" : "keys"}, as of ${new Date().toLocaleTimeString("en-GB")}`;
    at("state").classList.remove("lost");
  } catch (error) {
    at("state").textContent = `cannot load from the stats server: ${error.message}`;
    at("state").classList.add("lost");
  }
  setTimeout(tick, 1000);
}

tick();
