// Shows what /events says: one server-sent event an answer, after which the browser asks for the next.
"use strict";

const byId = (id) => document.getElementById(id);
const SILENT_MS = 12000; // without an event for as long, the server is gone
let source = null;
let last = 0;

function listen(seen) {
  if (source) source.close();
  const query = new URLSearchParams({ robot: byId("robot").value, seen });
  source = new EventSource(`events?${query}`);
  source.onmessage = (event) => {
    last = Date.now();
    const state = JSON.parse(event.data);
    show(state);
    source.close(); // the next one says what was seen
    setTimeout(() => listen(String(state.changes)), 200);
  };
}

function show(state) {
  byId("policy").textContent = `a ${state.family} policy`;
  status(state.not_ready ?? "ready", !state.not_ready);
  picture(state.shown);
  chart(state.latencies);
  numbers(state);
  rows("robots", state.robots.map((r) =>
    [r.name, r.peer, r.instruction, r.episode, r.steps, `${r.idle_s.toFixed(1)} s`]));
  rows("episodes", state.episodes.map((e) => [e.robot, e.episode, e.instruction, e.steps, e.seconds.toFixed(1)]));
  choices(state.robots.map((r) => r.name));
}

function status(text, good) {
  byId("status").textContent = text;
  byId("status").className = good ? "good" : "bad";
}

function picture(shown) {
  byId("image").hidden = !shown;
  byId("nothing").hidden = Boolean(shown);
  byId("kept").textContent = shown ? `${shown.name} keeps ${shown.kept} of ${shown.tokens} visual tokens` : "";
  byId("reasons").hidden = !shown || shown.kept === shown.tokens;
  if (shown) byId("image").src = shown.image;
}

function chart(latencies) {
  const highest = Math.max(...latencies.map((l) => l.total_ms), 1);
  byId("highest").textContent = latencies.length ? `highest bar: ${highest.toFixed(0)} ms` : "";
  const width = 600 / Math.max(latencies.length, 60);
  const bars = [];
  latencies.forEach((l, i) => {
    const total = 200 * l.total_ms / highest;
    const infer = Math.min(total, 200 * l.infer_ms / highest);
    bars.push(bar("queue", i * width, 200 - total, width, total - infer), bar("infer", i * width, 200 - infer, width, infer));
  });
  byId("chart").replaceChildren(...bars);
}

function bar(kind, x, y, width, height) {
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const place = { class: kind, x, y, width: width * 0.85, height };
  for (const [name, value] of Object.entries(place)) rect.setAttribute(name, value);
  return rect;
}

function numbers(state) {
  const totals = state.latencies.map((l) => l.total_ms).sort((a, b) => a - b);
  const at = (share) => totals.length ? `${totals[Math.min(totals.length - 1, Math.floor(share * totals.length))].toFixed(1)} ms` : "-";
  byId("p50").textContent = at(0.5);
  byId("p99").textContent = at(0.99);
  const batches = state.latencies.map((l) => l.batch);
  byId("batch").textContent = batches.length ? (batches.reduce((a, b) => a + b) / batches.length).toFixed(1) : "-";
  byId("waiting").textContent = `${state.waiting} of ${state.waiting_limit}`;
}

function rows(id, lines) {
  byId(id).replaceChildren(...lines.map((line) => {
    const row = document.createElement("tr");
    for (const text of line) row.insertCell().textContent = text;
    return row;
  }));
}

function choices(names) {
  const select = byId("robot");
  const there = [...select.options].map((option) => option.value).filter(Boolean);
  if (there.join() === names.join()) return;
  const chosen = names.includes(select.value) ? select.value : "";
  select.replaceChildren(new Option("the latest", ""), ...names.map((name) => new Option(name, name)));
  select.value = chosen;
}

byId("robot").addEventListener("change", () => listen(""));
setInterval(() => { if (Date.now() - last > SILENT_MS) status("no word from the server", false); }, 1000);
listen("");
