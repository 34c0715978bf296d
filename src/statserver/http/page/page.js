"use strict";

// As many rows as a person reads; the server has the rest.
const MAX_ROWS = 100;
const MAX_SENDERS = 10;
const SECONDS = 600;
const SVG = "http://www.w3.org/2000/svg";
const LINES = [["flight", "in_flight"], ["stable", "stable"], ["panic", "panic"]];
// The columns, and what the server sorts by for them; by name only in one direction.
const COLUMNS = [
  ["Key", "name"], ["Source", null], ["Stable", "stable"], ["Panic", "panic"], ["In flight", "in_flight"],
  ["Requests/s", "requests_per_second"], ["Target", "target"], ["Load", "load"], ["Ready", "ready_pods"],
  ["Desired", "desired_pods"], ["Last report", "last_report_age"],
];
const MEANINGS = {
  Key: "namespace/name", Source: "who reports the key, and the share of the pods' requests that a gateway counts",
  Stable: "average over the stable window, all pods together", Panic: "average over the panic window, all pods together",
  "In flight": "requests in flight, by the last reports", "Requests/s": "average over the stable window",
  Target: "what each pod should have: the setting target times its utilization",
  Load: "the stable average as a share of what the ready pods should have",
  Ready: "pods that the decision took as ready", Desired: "pods that the key wants", "Last report": "time since anybody reported the key",
};

const at = (id) => document.getElementById(id);
// Not in the path: a browser takes a name like ".." for the folder above.
const path = (part, { namespace, name }, more = {}) => `/v1/key${part}?${new URLSearchParams({ namespace, name, ...more })}`;
const label = (key) => `${key.namespace}/${key.name}`;
// Names may have slashes, so that two keys can have the same label.
const fragment = (key) => `#${encodeURIComponent(key.namespace)}/${encodeURIComponent(key.name)}`;
const UNKNOWN = "–";
const rounded = (number) => number === null ? UNKNOWN : number.toLocaleString("en", { maximumFractionDigits: number < 100 ? 2 : 0 });
const percent = (share) => share === null ? UNKNOWN : `${rounded(Math.round(share * 100))} %`;
const counted = (number, what) => `${rounded(number)} ${what}${number === 1 ? "" : "s"}`;
const clock = (time) => new Date(time).toLocaleTimeString("en-GB");
// The metric is requests per second.
const isRps = (key) => key.settings.metric === "rps";
const unit = (metric) => metric === "rps" ? "requests/s" : "requests at once";
const averageOf = (key, window) => isRps(key) ? key[window].requests_per_second : key[window].concurrency;
const targetOf = ({ settings }) => settings.target * settings.target_utilization_percentage / 100;

function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min`;
  return whole < 172800 ? `${Math.floor(whole / 3600)} h` : `${Math.floor(whole / 86400)} d`;
}
const age = (ms) => ms === null ? "never" : ms < 1000 ? "now" : `${duration(ms / 1000)} ago`;

let chosen = null;
let sort = "name";
// What was drawn last, for the values under the pointer.
let drawn = null;
let pointed = null;
let before = null;
const rows = new Map();

async function get(url) {
  const answer = await fetch(url, { cache: "no-store" });
  if (!answer.ok) {
    const error = new Error(`${answer.status} ${answer.statusText}`);
    error.status = answer.status;
    throw error;
  }
  return answer.json();
}

// The key of the address; null if it names none.
function linked() {
  const parts = location.hash.slice(1).split("/");
  try {
    const [namespace, name] = parts.map(decodeURIComponent);
    return parts.length === 2 && namespace !== "" && name !== "" ? { namespace, name } : null;
  } catch {
    return null;
  }
}

function choose(key) {
  chosen = { namespace: key.namespace, name: key.name };
  pointed = null;
  location.replace(fragment(key));
  for (const [name, row] of rows) mark(row, name === fragment(key));
  chart().catch(() => {});
}

function mark(row, isChosen) {
  row.line.classList.toggle("chosen", isChosen);
  row.button.setAttribute("aria-pressed", isChosen);
}

function head() {
  const line = document.createElement("tr");
  for (const [text, by] of COLUMNS) {
    const cell = line.appendChild(document.createElement("th"));
    cell.scope = "col";
    cell.title = MEANINGS[text];
    if (by === null) {
      cell.textContent = text;
      continue;
    }
    const button = cell.appendChild(document.createElement("button"));
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      sort = by === "name" ? by : sort === `-${by}` ? by : `-${by}`;
      sorted();
      tick();
    });
  }
  at("columns").replaceChildren(line);
  sorted();
}

function sorted() {
  [...at("columns").rows[0].cells].forEach((cell, i) => {
    const by = COLUMNS[i][1];
    const direction = by === null ? null : sort === by ? "ascending" : sort === `-${by}` ? "descending" : null;
    if (direction === null) cell.removeAttribute("aria-sort");
    else cell.setAttribute("aria-sort", direction);
  });
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
  const cells = Array.from({ length: COLUMNS.length - 1 }, () => line.appendChild(document.createElement("td")));
  return { line, button, panics, cells };
}

// Who reports a key.
function source(key) {
  const names = [];
  if (key.gateways > 0) names.push(counted(key.gateways, "gateway"));
  if (key.pods > 0) names.push(counted(key.pods, "sidecar"));
  const proxied = key.proxied_share === null || (key.gateways === 0 && key.proxied_share === 0) ? "" : `, ${percent(key.proxied_share)} proxied`;
  return names.length ? names.join(" + ") + proxied : "nobody";
}

// Of a key that nobody is heard of, what was measured last is not so any more.
const isSilent = (key) => key.stale || (key.last_report_age_ms !== null && key.pods + key.gateways === 0);

function fill(row, key) {
  const per = isRps(key) ? "/s" : "";
  const heard = (text) => key.stale ? UNKNOWN : text;
  const values = [
    source(key), heard(rounded(averageOf(key, "stable")) + per), heard(rounded(averageOf(key, "panic")) + per),
    heard(rounded(key.in_flight)), heard(rounded(key.stable.requests_per_second)),
    rounded(targetOf(key)) + per, heard(percent(key.load)), rounded(key.ready_pods), rounded(key.desired_pods),
    age(key.last_report_age_ms),
  ];
  values.forEach((value, i) => { row.cells[i].textContent = value; });
  row.panics.hidden = !key.panic_mode;
  row.line.classList.toggle("silent", isSilent(key));
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
    if (at("keys").children[place] !== row.line) {
      const hadFocus = row.line.contains(document.activeElement);
      at("keys").insertBefore(row.line, at("keys").children[place] ?? null);
      if (hadFocus) row.button.focus({ preventScroll: true });
    }
  });
  at("more").textContent = found > keys.length ? `and ${rounded(found - keys.length)} more: use Find`
    : found === 0 && (at("search").value !== "" || at("shown").value !== "") ? "no key is like that" : "";
}

function seconds(text) {
  const [, number, of] = /^([\d.]+)(ms|s|m)$/.exec(text) ?? [null, "0", "s"];
  return Number(number) * { ms: 0.001, s: 1, m: 60 }[of];
}

// What makes the decision another number than the averages alone want.
function reasons(key, needed) {
  const { settings } = key;
  const desired = key.desired_pods;
  const found = [];
  if (key.missing !== null) found.push(key.missing);
  if (key.panic_mode) found.push("panic mode: pods are only added until a stable window has passed without it");
  if (desired === null || desired === needed) return found;
  if (desired > needed) {
    if (settings.min_scale === desired) found.push(`min_scale is ${settings.min_scale}`);
    if (settings.activation_scale > 1 && settings.activation_scale === desired) found.push(`activation_scale is ${settings.activation_scale}`);
    if (seconds(settings.scale_down_delay) > 0) found.push(`scale_down_delay is ${settings.scale_down_delay}`);
    if (desired === Math.floor(Math.max(1, key.ready_pods) / settings.max_scale_down_rate)) found.push(`max_scale_down_rate is ${rounded(settings.max_scale_down_rate)}`);
  } else {
    if (settings.max_scale === desired) found.push(`max_scale is ${settings.max_scale}`);
    if (desired === Math.ceil(Math.max(1, key.ready_pods) * settings.max_scale_up_rate)) found.push(`max_scale_up_rate is ${rounded(settings.max_scale_up_rate)}`);
  }
  if (!found.length) found.push("the averages have changed since the decision, or it holds what there was; it is made every two seconds");
  return found;
}

function why(key) {
  const { settings } = key;
  const target = targetOf(key);
  const [stable, panic] = [averageOf(key, "stable"), averageOf(key, "panic")];
  const needs = (value) => Math.ceil(value / target);
  const stableSeconds = seconds(settings.stable_window);
  const panicSeconds = Math.max(1, Math.round(stableSeconds * settings.panic_window_percentage / 100));
  const quotient = (value) => `${rounded(value)} ÷ ${rounded(target)} = ${counted(needs(value), "pod")}`;
  const rows = [
    ["Metric", isRps(key) ? "requests per second" : "concurrency (requests at once)"],
    ["Target per pod", `${rounded(settings.target)} × ${rounded(settings.target_utilization_percentage)} % = ${rounded(target)} ${unit(settings.metric)}`],
    ["Stable", key.stale ? UNKNOWN : `${quotient(stable)}, over ${duration(stableSeconds)}`],
    ["Panic", key.stale ? UNKNOWN : `${quotient(panic)}, over ${duration(panicSeconds)}; panic mode from ${rounded(settings.panic_threshold_percentage)} % of the ready pods`],
    ["Ready pods", `${rounded(key.ready_pods)}${settings.ready_pods === null || settings.ready_pods === undefined ? "" : " (told by the setting)"}; load ${key.stale ? UNKNOWN : percent(key.load)} of their target`],
    ["Desired pods", [rounded(key.desired_pods), ...reasons(key, Math.max(needs(stable), key.panic_mode ? needs(panic) : 0))].join("; ")],
    ["Last report", age(key.last_report_age_ms)],
  ];
  at("why").replaceChildren(...rows.flatMap(([term, text]) => {
    const [name, value] = [document.createElement("dt"), document.createElement("dd")];
    [name.textContent, value.textContent] = [term, text];
    return [name, value];
  }));
  at("missing").hidden = key.missing === null;
  at("missing").textContent = key.missing === null ? "" : `Autoscalers are told nothing: ${key.missing}.`;
  at("chart").classList.toggle("silent", isSilent(key));
}

function draw(past, nowMs) {
  const svg = at("chart");
  const { width, height } = svg.getBoundingClientRect();
  const { metric, seconds_between: between } = past;
  const points = past.points.map((p) => ({ ...p, time: Date.parse(p.at), capacity: p.target * p.ready_pods }))
    .filter((p) => nowMs - p.time <= SECONDS * 1000);
  const [left, right, top, bottom] = [44, width - 44, 26, height - 24];
  const axisMax = (values) => {
    const highest = Math.max(1, ...values);
    const step = 10 ** Math.floor(Math.log10(highest));
    return Math.ceil(highest / step) * step;
  };
  // In flight is no rate.
  const lines = LINES.filter(([, field]) => metric !== "rps" || field !== "in_flight");
  document.querySelector("#legend .flight").hidden = metric === "rps";
  const measured = points.flatMap((p) => lines.map(([, field]) => p[field] ?? 0));
  // A target far above what is measured would press the lines to the ground.
  const highest = Math.max(1, ...measured);
  const load = axisMax([...measured, ...points.map((p) => p.capacity).filter((capacity) => capacity <= highest * 5)]);
  // The axis has a middle, and there is no half of a pod.
  const pods = Math.ceil(axisMax(points.flatMap((p) => [p.desired_pods, p.ready_pods])) / 2) * 2;
  const x = (time) => right - (nowMs - time) / (SECONDS * 1000) * (right - left);
  const y = (value, of) => bottom - (value / of) * (bottom - top);
  const parts = [];
  const add = (name, attributes, text) => {
    const part = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
    if (text !== undefined) part.textContent = text;
    parts.push(part);
  };
  add("text", { x: 6, y: 14, class: "unit" }, unit(metric));
  add("text", { x: width - 6, y: 14, "text-anchor": "end", class: "unit" }, "pods");
  for (const share of [0, 0.5, 1]) {
    const height = y(share, 1);
    add("path", { class: "grid", d: `M${left} ${height}H${right}` });
    add("text", { x: left - 6, y: height + 4, "text-anchor": "end" }, rounded(load * share));
    add("text", { x: right + 6, y: height + 4 }, rounded(pods * share));
  }
  for (const minutes of width < 500 ? [10, 5, 0] : [10, 8, 6, 4, 2, 0]) {
    const time = nowMs - minutes * 60000;
    const anchor = minutes === 10 ? "start" : minutes === 0 ? "end" : "middle";
    add("text", { x: x(time), y: height - 7, "text-anchor": anchor }, clock(time));
  }
  // A line ends where there is no value, or no point for long, and begins anew.
  const line = (style, value, of, isSteps) => {
    let last = null;
    const d = points.map((p) => {
      const number = value(p);
      if (number === null) { last = null; return ""; }
      const isNew = last === null || p.time - last > 3000 * between;
      last = p.time;
      const [px, py] = [x(p.time).toFixed(1), y(number, of).toFixed(1)];
      return isNew ? `M${px} ${py}h.1` : isSteps ? `H${px}V${py}` : `L${px} ${py}`;
    });
    add("path", { class: style, d: d.join("") });
  };
  line("target", (p) => p.capacity <= load ? p.capacity : null, load, true);
  for (const [style, field] of lines) line(style, (p) => p[field], load, false);
  line("ready", (p) => p.ready_pods, pods, true);
  line("pods", (p) => p.desired_pods, pods, true);
  add("path", { class: "pointer", d: "" });
  svg.replaceChildren(...parts);
  drawn = { points, metric, x, top, bottom, left, right, nowMs };
  values();
}

// Tells the values of the point that was pointed at.
function values() {
  if (drawn === null) return;
  const { points, metric, x, top, bottom } = drawn;
  const nearest = pointed === null ? null : points.reduce((best, p) => best === null || Math.abs(p.time - pointed) < Math.abs(best.time - pointed) ? p : best, null);
  const pointer = at("chart").querySelector(".pointer");
  if (nearest === null || pointer === null) {
    at("values").textContent = points.length ? "Point at the chart for single values." : "No decision in the last ten minutes, or too many keys have a history.";
    return;
  }
  pointer.setAttribute("d", `M${x(nearest.time).toFixed(1)} ${top}V${bottom}`);
  const averages = nearest.stable === null ? "nobody was heard"
    : `stable ${rounded(nearest.stable)}, panic ${rounded(nearest.panic)} ${unit(metric)}, ${rounded(nearest.in_flight)} in flight`;
  at("values").textContent = `${clock(nearest.time)}: ${averages}; target ${rounded(nearest.target)} per pod, ${rounded(nearest.capacity)} of all; ${rounded(nearest.ready_pods)} ready, ${rounded(nearest.desired_pods)} desired`;
}

function point(event) {
  if (drawn === null) return;
  const { left, right, nowMs } = drawn;
  const place = event.clientX - at("chart").getBoundingClientRect().left;
  pointed = nowMs - (right - place) / (right - left) * SECONDS * 1000;
  values();
}

function step(event) {
  const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") pointed = null;
  else if (direction === undefined || drawn === null || !drawn.points.length) return;
  else {
    const { points } = drawn;
    let place = pointed === null ? points.length : points.findIndex((p) => p.time >= pointed);
    if (place < 0) place = points.length - 1;
    pointed = points[Math.min(points.length - 1, Math.max(0, place + direction))].time;
  }
  event.preventDefault();
  values();
}

// What is shown of a key goes when another is chosen that is not there.
function absent(key) {
  at("absent").hidden = key === null;
  document.querySelector("section").hidden = key !== null;
  at("absent").textContent = key === null ? ""
    : `There is no key ${label(key)}: nobody has reported it since the server started, it was forgotten, or your token does not cover its namespace. It is shown as soon as it is reported.`;
}

async function chart() {
  if (chosen === null) return;
  const key = chosen;
  let answers;
  try {
    answers = await Promise.all([
      get(path("/history", key)), get(path("", key)), get(path("/senders", key, { limit: MAX_SENDERS })), get("/v1/server"),
    ]);
  } catch (error) {
    if (key === chosen && (error.status === 404 || error.status === 403 || error.status === 400)) absent(key);
    else throw error;
    return;
  }
  if (key !== chosen) return;
  absent(null);
  const [past, now, list, server] = answers;
  at("chart-title").textContent = label(key);
  why(now);
  draw(past, Date.parse(server.now));
  senders(now, list);
}

// Who reports the chosen key.
function senders(key, { senders, found }) {
  const share = key.proxied_share === null ? "" : `; ${rounded(key.proxied_share * 100)} % of the pods' requests are proxied`;
  at("reported-by").textContent = `reported by ${counted(key.pods, "pod")} and ${counted(key.gateways, "gateway")}${share}`;
  at("senders").replaceChildren(...senders.map((sender) => {
    const line = document.createElement("tr");
    line.classList.toggle("silent", !sender.live);
    line.title = sender.live ? "" : "silent: it does not count any more";
    const values = [
      sender.name, sender.role, rounded(sender.in_flight), rounded(sender.proxied_in_flight),
      rounded(sender.average_concurrency), age(sender.last_report_age_ms),
    ];
    for (const value of values) line.appendChild(document.createElement("td")).textContent = value;
    return line;
  }));
  at("more-senders").textContent = found > senders.length ? `and ${rounded(found - senders.length)} more` : "";
}

// How the server is: what grows and should not is marked.
function health(server) {
  const now = Date.parse(server.now);
  const items = [];
  if (server.draining) items.push(["draining", true, "the server shuts down"]);
  const grown = (field) => before === null ? 0 : server[field] - before.server[field];
  const elapsed = before === null ? 0 : (now - before.now) / 1000;
  if (elapsed > 0) items.push([`${rounded(grown("reports_accepted") / elapsed)} reports/s`, false, `${rounded(server.reports_accepted)} reports since the start`]);
  if (server.streams > 0) items.push([counted(server.streams, "stream"), false, "open websockets of the stat stream"]);
  for (const [field, text, title] of [
    ["reports_failed", "reports failed", "reports that were not recorded, or not as a whole, since the start"],
    ["refused", "refused", "connections, requests and keys that exceeded a limit, since the start"],
    ["unauthorized", "unauthorized", "requests without a token that allows them, since the start"],
  ]) {
    items.push([`${rounded(server[field])} ${text}`, grown(field) > 0, title]);
  }
  if (server.forward_connected !== null) {
    items.push([server.forward_connected ? "forwarding" : "autoscaler not connected", !server.forward_connected, "--forward"]);
  }
  if (server.started !== null) items.push([`up ${duration(Math.max(0, now - Date.parse(server.started)) / 1000)}`, false, `started ${new Date(server.started).toLocaleString("en-GB")}`]);
  items.push([`version ${server.version}`, false, server.revision === null ? "" : `revision ${server.revision}`]);
  at("health").replaceChildren(...items.map(([text, isBad, title]) => {
    const item = document.createElement("li");
    item.textContent = text;
    item.title = title;
    item.classList.toggle("bad", isBad);
    return item;
  }));
  // Over some seconds, so that the rate is steady.
  if (before === null || elapsed >= 10) before = { now, server };
}

let timer = null;
let ticks = 0;

async function tick() {
  clearTimeout(timer);
  ticks += 1;
  const mine = ticks;
  try {
    const query = new URLSearchParams({ limit: MAX_ROWS, search: at("search").value.trim(), sort });
    if (at("shown").value !== "") query.set("state", at("shown").value);
    const [{ keys, found }, server] = await Promise.all([get(`/v1/keys?${query}`), get("/v1/server")]);
    // The reader asked for something else meanwhile.
    if (mine !== ticks) return;
    if (chosen === null) {
      const key = linked() ?? keys[0];
      if (key !== undefined) choose(key);
    }
    list(keys, found);
    health(server);
    await chart();
    at("state").textContent = `${found} ${found === 1 ? "key" : "keys"}, as of ${clock(server.now)}`;
    at("state").classList.remove("lost");
  } catch (error) {
    at("state").textContent = `cannot load from the stats server: ${error.message}`;
    at("state").classList.add("lost");
  }
  if (mine === ticks) timer = setTimeout(tick, 1000);
}

at("search").addEventListener("input", () => tick());
at("shown").addEventListener("change", () => tick());
at("filter").addEventListener("submit", (event) => event.preventDefault());
at("chart").addEventListener("pointermove", point);
at("chart").addEventListener("pointerdown", point);
at("chart").addEventListener("pointerleave", () => { pointed = null; values(); });
at("chart").addEventListener("keydown", step);
addEventListener("hashchange", () => {
  const key = linked();
  if (key !== null && (chosen === null || fragment(key) !== fragment(chosen))) choose(key);
});
head();
tick();
