// The list, one incident, and its label. What comes from requests is only ever text: nothing here writes HTML.

import { chart } from "./chart.js";

const $ = (id) => document.getElementById(id);
const filters = $("filters");
let rows = [], selected = -1, after = null, open = null;

function make(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = String(text);
  if (className) made.className = className;
  return made;
}

function say(text) { $("status").textContent = text; }

async function ask(path, options) {
  const answer = await fetch(path, options);
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.error ? body.error.message : `the server answered ${answer.status}`);
  return body;
}

function number(value) { return value === null ? "" : Number(value).toPrecision(3); }
function when(text) { return new Date(text).toLocaleString(); }
function place(each) {
  if (each.phase === null) return "";
  return `${each.phase}, token ${each.position}, layer ${each.layer}${each.direction ? `, ${each.direction}` : ""}`;
}

function query() {
  const wanted = new URLSearchParams();
  for (const [name, value] of new FormData(filters)) if (value.trim()) wanted.set(name, value.trim());
  return wanted;
}

async function load(more) {
  const wanted = query();
  if (!more) history.replaceState(null, "", `${location.pathname}${wanted.size ? `?${wanted}` : ""}${location.hash}`);
  if (more && after) wanted.set("after", after);
  say("Loading");
  try {
    const page = await ask(`incidents?${wanted}`);
    rows = more ? [...rows, ...page.incidents] : page.incidents;
    after = page.after;
    draw();
    say(`${rows.length}${after ? " or more" : ""} incidents`);
  } catch (error) { say(error.message); }
}

function draw() {
  const body = $("rows");
  body.replaceChildren(...rows.map((each, index) => {
    const row = make("tr");
    row.tabIndex = 0;
    row.dataset.id = each.id;
    row.setAttribute("aria-selected", String(index === selected));
    row.append(make("td", when(each.at)), make("td", each.action, each.action), make("td", each.model), make("td", each.tenant ?? ""),
      make("td", place(each)), make("td", number(each.p_value)), make("td", each.label ?? "", each.label ?? ""));
    row.addEventListener("click", () => { selected = index; show(each.id); });
    return row;
  }));
  $("empty").hidden = rows.length > 0;
  $("more").hidden = after === null;
}

function select(index) {
  if (!rows.length) return;
  selected = Math.max(0, Math.min(rows.length - 1, index));
  draw();
  const row = $("rows").children[selected];
  row.focus();
  if (open) show(rows[selected].id);
}

async function show(id) {
  try { open = await ask(`incidents/${encodeURIComponent(id)}`); } catch (error) { say(error.message); return; }
  location.hash = id;
  fill();
}

function fact(name, value) {
  if (value === null || value === undefined || value === "") return [];
  return [make("dt", name), make("dd", value)];
}

function turns(each) {
  if (each.content === null) {
    const why = { off: "The policy keeps no text (content: off).", too_large: "The text was too large to be kept." };
    return [make("p", why[each.content_kind] ?? "No text is kept.", "dim")];
  }
  if (each.content_kind === "hash") return [make("p", `Keyed hash: ${each.content}`)];
  const asked = JSON.parse(each.content);
  const said = asked.messages ? asked.messages.map((one) => [one.role, one.content]) : [["prompt", asked.prompt]];
  return said.map(([role, content]) => {
    const turn = make("div", null, "turn");
    turn.append(make("b", role), make("pre", typeof content === "string" ? content : JSON.stringify(content, null, 1)));
    return turn;
  });
}

function fill() {
  const each = open;
  $("title").textContent = `${each.action}: ${each.reason || "not scored"}`;
  $("chart").replaceChildren(...each.sequences.map((sequence) => chart(sequence)));
  $("facts").replaceChildren(
    ...fact("Incident", each.id), ...fact("Time", when(each.at)), ...fact("Request", each.request_id),
    ...fact("Model", each.model), ...fact("Engine", each.engine), ...fact("Tenant", each.tenant), ...fact("Key", each.key),
    ...fact("Endpoint", `${each.endpoint}${each.stream ? ", streamed" : ""}`), ...fact("Policy", `${each.policy} (${each.mode})`),
    ...fact("Where", place(each)), ...fact("Detector", each.detector), ...fact("Score", number(each.score)),
    ...fact("Threshold", number(each.threshold)), ...fact("p-value", number(each.p_value)), ...fact("Bank", each.bank),
    ...fact("Calibration", each.calibration), ...fact("Sequences", each.sequences.length));
  $("content").replaceChildren(...turns(each));
  for (const button of document.querySelectorAll("[data-label]")) button.setAttribute("aria-pressed", String(button.dataset.label === each.label));
  $("history").replaceChildren(...(each.history || []).map((one) => make("li", `${one.label}, ${one.by}, ${when(one.at)}${one.note ? `: ${one.note}` : ""}`)));
  $("list").hidden = true;
  $("detail").hidden = false;
  $("detail").focus();
}

function back() {
  open = null;
  $("detail").hidden = true;
  $("list").hidden = false;
  history.replaceState(null, "", location.pathname + location.search);
  draw();
}

async function label(value) {
  const target = open ?? rows[selected];
  if (!target) return;
  const by = $("by").value.trim();
  if (!by) { say("Say who you are first."); if (open) $("by").focus(); else await show(target.id); return; }
  localStorage.setItem("reviewer", by);
  try {
    const said = { label: value, by, note: open ? $("note").value.trim() : "" };
    const changed = await ask(`incidents/${encodeURIComponent(target.id)}/label`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(said) });
    rows = rows.map((each) => (each.id === changed.id ? { ...each, label: changed.label } : each));
    $("note").value = "";
    say(`Labelled ${value}`);
    if (open) await show(changed.id); else draw();
  } catch (error) { say(error.message); }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && open) return back();
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === "j") select(selected + 1);
  else if (event.key === "k") select(selected - 1);
  else if (event.key === "Enter" && event.target.tagName === "TR") show(event.target.dataset.id);
  else if (event.key === "t") label("true");
  else if (event.key === "f") label("false");
  else if (event.key === "u") label("unsure");
});
filters.addEventListener("submit", (event) => { event.preventDefault(); selected = -1; load(false); });
filters.addEventListener("reset", () => setTimeout(() => { selected = -1; load(false); }));
$("more").addEventListener("click", () => load(true));
$("close").addEventListener("click", back);
for (const button of document.querySelectorAll("[data-label]")) button.addEventListener("click", () => label(button.dataset.label));
for (const [name, value] of new URLSearchParams(location.search)) if (filters.elements[name]) filters.elements[name].value = value;
$("by").value = localStorage.getItem("reviewer") ?? "";
load(false);
if (location.hash.length > 1) show(location.hash.slice(1));
