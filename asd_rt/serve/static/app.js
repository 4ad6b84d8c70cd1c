// The page: connection, controls and gauges. The player shows the frames.

import { Player } from "./player.js";

const PRESETS = [
  "a red three moving up and left", "a blue seven moving right", "a green zero moving down",
  "a pink five moving up", "a yellow eight moving down and right", "a white two moving left",
];
const BACKOFF_MS = [500, 1000, 2000, 4000, 8000];
const UNFIT = 1008, FULL = 1013, SILENT = 4408, TAKEN = 4409, FAILED = 4500; // asd_rt/serve/watch.py
const $ = (id) => document.getElementById(id);

const token = { value: sessionStorage.getItem("asd-rt-token") ?? "" };
if (location.hash.startsWith("#token=")) {
  keepToken(decodeURIComponent(location.hash.slice(7)));
  history.replaceState(null, "", location.pathname);
}

const live = {
  socket: null, wanted: false, started: false, paused: false, hidden: false, recording: 0, saving: false,
  recordedSince: 0, failures: 0, retry: 0, upload: null, session: null, clip: "", notice: "", prompt: "", sentAt: 0, awaited: 0, hello: null,
};

const player = new Player($("screen"), (header) => {
  send({ type: "ack", block: header.block });
  if (live.sentAt && header.prompt_id >= live.awaited) {
    gauge("latency", performance.now() - live.sentAt, "ms");
    live.sentAt = 0;
  }
  gauge("block", header.block_ms, "ms");
  gauge("steps", header.steps, "");
  $("block-now").classList.toggle("late", header.missed);
  if (!live.paused) setState("live", "Live");
});

// Connection.

function connect() {
  clearInterval(live.retry);
  $("retry").hidden = true;
  setState("connecting", "Connecting");
  const near = live.session ?? live.upload; // of several servers, the one that has it
  const path = `/v1/live${near ? `?near=${encodeURIComponent(near)}` : ""}`;
  const url = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${path}`;
  const protocols = token.value ? ["asd-rt", `token.${token.value}`] : ["asd-rt"];
  const socket = new WebSocket(url, protocols);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => { live.opened = true; };
  socket.onmessage = ({ data }) => {
    if (socket !== live.socket) return;
    if (typeof data === "string") obey(JSON.parse(data));
    else player.push(data);
  };
  socket.onclose = (event) => { if (socket === live.socket) lost(event); };
  live.socket = socket;
  live.opened = live.started = live.accepted = false;
}

function send(message) {
  if (live.socket?.readyState !== WebSocket.OPEN) return false;
  live.socket.send(JSON.stringify(message));
  return true;
}

async function lost(event) {
  player.clear();
  live.started = false;
  enable();
  if (!live.opened && await isLocked()) {
    setState("locked", "Locked");
    $("token-form").hidden = false;
    $("token").focus();
    return;
  }
  if (event.code === SILENT && !live.wanted) return setState("ready", "Ready");
  if (event.code === UNFIT || event.code === TAKEN || event.code === FAILED) {
    live.wanted = false;
    forget();
    problem(event.reason);
    return setState("refused", "Stopped");
  }
  wait(event.code === FULL, event.reason);
}

/** The video cannot be gone on with, nor what was recorded of it. */
function forget() {
  live.session = null;
  const lost = live.recording || live.saving;
  live.saving = false;
  stopRecordingClock();
  enable();
  return lost ? " The recording is lost with it." : "";
}

/** Try again after a while that grows, and say so. */
function wait(full, reason) {
  const least = full ? 3 : 0;
  const step = Math.min(Math.max(live.failures, least), BACKOFF_MS.length - 1);
  live.failures += 1;
  const at = performance.now() + BACKOFF_MS[step] * (0.85 + 0.3 * Math.random());
  problem(reason);
  $("retry").hidden = false;
  const tick = () => {
    const left = at - performance.now();
    if (left <= 0) return connect();
    setState("waiting", `${full ? "Full" : "Connection lost"}; trying again in ${Math.ceil(left / 1000)} s`);
  };
  clearInterval(live.retry);
  live.retry = setInterval(tick, 200);
  tick();
}

async function isLocked() {
  try {
    return (await ask("/v1/videos/none")).status === 401;
  } catch {
    return false; // nobody there
  }
}

function ask(path, options = {}) {
  const headers = token.value ? { Authorization: `Bearer ${token.value}` } : {};
  return fetch(path, { ...options, headers });
}

function keepToken(value) {
  token.value = value;
  sessionStorage.setItem("asd-rt-token", value);
}

function obey(event) {
  if (event.type === "hello") {
    hello(event);
  } else if (event.type === "continued") {
    goesOn(event);
  } else if (event.type === "started" || event.type === "prompt") {
    live.accepted = true;
    live.session = event.session ?? live.session;
    hide();
    live.awaited = event.prompt_id;
    problem(live.notice);
    live.notice = "";
    mark(event.prompt);
  } else if (event.type === "recorded") {
    live.clip = event.id;
    download(event.id);
  } else if (event.type === "ended") {
    live.paused = true;
    enable();
    setState("paused", "Ended");
  } else if (event.type === "error") {
    live.sentAt = 0;
    if (event.code === "session") { // too late: a new video, in the same manner
      const lost = forget();
      start();
      live.notice = `The connection was lost for too long, so this is a new video.${lost}`;
      return;
    }
    if (event.code === "record") { live.saving = false; stopRecordingClock(); enable(); }
    if (event.code === "unsaved") { live.saving = false; startRecordingClock(); enable(); } // it is kept
    if (event.code === "upload") { live.upload = null; $("start").value = ""; }
    if (!live.accepted) { // the video has not begun
      live.wanted = live.started = false;
      setState("ready", "Ready");
      enable();
    }
    problem(event.message);
  }
}

function hello(event) {
  live.hello = event;
  live.failures = 0;
  $("engine").textContent = `${event.engine}, ${event.width}×${event.height}`;
  $("prompt").maxLength = event.prompt_chars;
  $("screen").classList.toggle("small", event.width < 200);
  if (!live.wanted) {
    $("screen").width = event.width;
    $("screen").height = event.height;
  }
  if (!pace.touched) { $("pace").value = event.fps; $("pace-out").textContent = `${event.fps} fps`; }
  document.documentElement.style.setProperty("--ratio", event.width / event.height);
  $("start-field").hidden = !event.starts_from_uploads;
  $("words").hidden = !event.words.length;
  $("words").querySelector("p").textContent = event.words.join(", ");
  if (!live.wanted) setState("ready", "Ready");
  else if (!live.session) start();
  else {
    live.started = true;
    send({ type: "continue", session: live.session });
  }
}

/** The video goes on where the connection was lost; what was changed since then is said now. */
function goesOn(event) {
  live.accepted = true;
  live.awaited = event.prompt_id;
  live.sentAt = 0;
  problem("");
  mark(event.prompt);
  send({ type: "set", steps: steps(), deadline_ms: deadline(), fps: Number($("pace").value) });
  send({ type: live.paused ? "pause" : "resume" }); // the last one may have been lost, or said to nobody
  if (event.prompt !== live.prompt) askForPrompt();
  const clip = event.recorded && event.recorded !== live.clip ? event.recorded : null;
  if (live.saving && clip) download(clip);
  // What was said as the connection broke may not have arrived.
  else if (live.saving && event.recording) send({ type: "save" });
  else if (live.recording && !event.recording && !clip) send({ type: "record" });
  if (live.paused) setState("paused", "Paused");
  enable();
  hide();
}

// What the watcher does.

function start() {
  live.prompt = $("prompt").value.trim();
  live.session = null;
  const message = {
    type: "start", prompt: live.prompt, steps: steps(), seed: seed(), fps: Number($("pace").value),
    deadline_ms: deadline(),
  };
  if (live.upload) message.upload = live.upload;
  live.sentAt = performance.now();
  live.awaited = 0;
  live.started = live.wanted = true;
  live.accepted = live.paused = false;
  send(message);
  enable();
}

function play() {
  problem("");
  live.wanted = true;
  if (live.socket?.readyState !== WebSocket.OPEN) {
    live.prompt = $("prompt").value.trim();
    if (live.socket?.readyState !== WebSocket.CONNECTING) connect();
    return; // hello starts it
  }
  if (!live.started) return start();
  live.prompt = $("prompt").value.trim();
  askForPrompt();
  if (live.paused) hold(false);
}

function askForPrompt() {
  live.sentAt = performance.now();
  live.awaited = Infinity; // until the server says which it is
  send({ type: "prompt", prompt: live.prompt });
}

function hold(paused) {
  if (!live.started) return;
  live.paused = paused;
  send({ type: paused ? "pause" : "resume" });
  if (paused) { player.clear(); setState("paused", "Paused"); }
  enable();
}

function restart() {
  if (!live.started) return;
  player.clear();
  live.paused = false;
  live.sentAt = performance.now();
  send({ type: "reset", seed: seed() });
  enable();
}

function record() {
  if (!live.started || live.saving) return;
  if (live.recording) {
    stopRecordingClock();
    live.saving = true;
    send({ type: "save" });
  } else {
    send({ type: "record" });
    live.recordedSince = performance.now();
    startRecordingClock();
  }
  enable();
}

function startRecordingClock() {
  const show = () => {
    const s = Math.floor((performance.now() - live.recordedSince) / 1000);
    $("recording").querySelector("span").textContent = `${Math.floor(s / 60)}:${String(s % 60).padStart(2, "0")}`;
  };
  show();
  clearInterval(live.recording);
  live.recording = setInterval(show, 250);
  $("recording").hidden = false;
}

function stopRecordingClock() {
  clearInterval(live.recording);
  live.recording = 0;
  $("recording").hidden = true;
}

async function download(id) {
  stopRecordingClock();
  live.saving = true;
  enable();
  try {
    const path = `/v1/videos/${encodeURIComponent(id)}`;
    let clip = { status: "encoding" };
    while (clip.status === "encoding") {
      await new Promise((done) => setTimeout(done, 100));
      clip = await (await ask(path)).json();
    }
    if (clip.status !== "done") throw new Error(clip.error?.message ?? clip.error ?? clip.status);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await (await ask(`${path}/content`)).blob());
    link.download = "asd-rt.mp4";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    problem(`The recording could not be saved (${error.message}).`);
  }
  live.saving = false;
  enable();
}

async function startFrom(file) {
  live.upload = null;
  if (file) {
    try {
      const most = live.hello?.upload_bytes ?? Infinity;
      if (file.size > most) throw new Error(`The file is larger than ${Math.round(most / 1e6)} MB.`);
      const answer = await ask("/v1/uploads", { method: "POST", body: file });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error.message);
      live.upload = found.id;
    } catch (error) {
      $("start").value = "";
      return problem(error.message);
    }
  }
  problem("");
  // A video is started once on a connection.
  const old = live.socket;
  live.wanted = true;
  forget();
  player.clear();
  connect();
  old?.close();
}

// Small things.

const steps = () => Number(document.querySelector("[name=steps]:checked").value);
const seed = () => Math.max(0, Math.floor(Number($("seed").value) || 0));
const deadline = () => (Number($("deadline").value) > 0 ? Number($("deadline").value) : null);
const problem = (text) => { $("problem").textContent = text ?? ""; };
const pace = { touched: false };

function setState(state, text) {
  const span = $("state").querySelector("span");
  document.body.dataset.state = state;
  if (span.textContent !== text) span.textContent = text;
  const veils = { paused: "Paused", waiting: "The picture goes on when the connection is back.",
    connecting: "", ready: "Describe something below and press Play.", refused: "Press Play to try again." };
  if (veils[state] !== undefined) $("veil").textContent = veils[state];
}

function enable() {
  for (const id of ["pause", "restart"]) $(id).disabled = !live.started;
  $("record").disabled = !live.started || live.saving;
  $("pause").textContent = live.paused ? "Resume" : "Pause";
  $("record").textContent = live.saving ? "Saving…" : live.recording ? "Stop and save" : "Record";
  $("record").setAttribute("aria-pressed", String(Boolean(live.recording)));
}

function gauge(name, value, unit) {
  const shown = unit && value < 100 ? value.toFixed(1) : Math.round(value);
  const target = $(`${name}-now`);
  target.innerHTML = "";
  target.append(String(shown));
  if (unit) {
    const small = document.createElement("small");
    small.textContent = ` ${unit}`;
    target.append(small);
  }
  $(`${name}-bar`).style.width = `${Math.min(100, (100 * value) / full(name))}%`;
}

/** What fills a gauge's bar. */
function full(name) {
  const pace = Number($("pace").value);
  const blockMs = (1000 * (live.hello?.block_frames ?? 1)) / pace;
  return { fps: pace, latency: 1000, block: deadline() ?? blockMs, steps: 4 }[name];
}

function mark(prompt) {
  for (const button of $("presets").children) button.setAttribute("aria-pressed", String(button.value === prompt));
}

for (const prompt of PRESETS) {
  const button = document.createElement("button");
  button.type = "button";
  button.value = prompt;
  button.textContent = prompt.replace(/^a /, "");
  button.onclick = () => { $("prompt").value = prompt; play(); };
  $("presets").append(button);
}
$("prompt-form").onsubmit = (event) => { event.preventDefault(); play(); };
$("token-form").onsubmit = (event) => {
  event.preventDefault();
  keepToken($("token").value.trim());
  $("token-form").hidden = true;
  connect();
};
$("retry").onclick = connect;
$("pause").onclick = () => hold(!live.paused);
$("restart").onclick = restart;
$("record").onclick = record;
$("steps").onchange = () => send({ type: "set", steps: steps() });
$("deadline").onchange = () => send({ type: "set", deadline_ms: deadline() });
$("seed").onchange = restart;
$("pace").oninput = () => {
  pace.touched = true;
  $("pace-out").textContent = `${$("pace").value} fps`;
};
$("pace").onchange = () => send({ type: "set", fps: Number($("pace").value) });
$("start").onchange = () => startFrom($("start").files[0]);

addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=radio]), button, summary");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = { "/": () => $("prompt").focus(), " ": () => hold(!live.paused), r: restart, s: record }[event.key.toLowerCase()];
  if (act) { event.preventDefault(); act(); }
  if ("1234".includes(event.key)) {
    document.querySelector(`[name=steps][value="${event.key}"]`).checked = true;
    send({ type: "set", steps: steps() });
  }
});
// A page that nobody sees shows no frames, so it asks for none.
function hide() {
  if (document.hidden && live.started && !live.paused) { live.hidden = true; hold(true); }
  else if (!document.hidden && live.hidden) {
    live.hidden = false;
    live.paused = false; // where nobody is connected it is said when somebody is
    hold(false);
  }
}
document.addEventListener("visibilitychange", hide);
addEventListener("online", () => { if (document.body.dataset.state === "waiting") connect(); });
setInterval(() => gauge("fps", live.paused ? 0 : player.fps, ""), 250);

connect();
