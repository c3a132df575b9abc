"use strict";
// The page of attribute sliders. It says the messages of pipeline/app/messages.py over one WebSocket: a photo goes up once,
// and each move of a slider brings a picture back. A picture that is older than one already shown is dropped.

const byId = (id) => document.getElementById(id);
const [stage, after, before, divider] = ["stage", "after", "before", "divider"].map(byId);
const needFace = ["reset", "save", "paste", "copy", "live"].map(byId);
const LET_GO = 4000, FULL = 4001, REFUSED = 1008;

let socket = null, model = null, face = null, photo = null;
let controls = []; // one for each attribute: {attribute, read(), write(state)}
let start = [], settled = [], states = []; // where sliders stood at first, after the last change, and before each change
let asked = 0, shown = 0, first = 0; // numbers of moves: the last asked for, the last shown, the first of this face
let restore = null; // {state, chosen}: what to go back to when a lost connection is there again
let camera = null, frames = []; // the video of a camera that is live, and when its last frames were shown
let chosen = null, known = 0; // the model that was picked, if not the server's own; the size of the spool that is shown
let delay = 500, drawnNumber = Math.floor(Math.random() * 900000);

// --- the connection --------------------------------------------------------------------------------------------------

function connect() {
  if (window.LocalServer) { // of an exported page: ONNX Runtime answers here, and no photo leaves the machine
    socket = new LocalServer(({ data }) => (typeof data === "string" ? hear(JSON.parse(data)) : receive(data)));
    return;
  }
  const address = new URL("/socket", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  if (location.hash.length > 1) address.searchParams.set("token", decodeURIComponent(location.hash.slice(1)));
  address.hash = "";
  socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => (typeof event.data === "string" ? hear(JSON.parse(event.data)) : receive(event.data));
  socket.onclose = lost;
}

function lost(event) {
  const opened = model !== null;
  endLive();
  if (face) restore = { state: stateNow(), chosen: face.chosen };
  face = null;
  enable();
  if (event.code === LET_GO || event.code === FULL) return say(`The server closed the connection: ${event.reason}. Reload to go on.`, true);
  if (!opened && event.code !== 1006) return say("The server refused this page.", true);
  say(opened ? "The server is gone; trying again …" : "No answer, or this page may not connect (a token is missing?); trying again …", true);
  setTimeout(connect, delay);
  delay = Math.min(delay * 2, 8000);
}

function send(head, bytes) {
  if (socket.readyState !== WebSocket.OPEN) return;
  if (!bytes) return socket.send(JSON.stringify(head));
  const text = new TextEncoder().encode(JSON.stringify(head));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, text.length);
  socket.send(new Blob([length, text, bytes]));
}

function hear(message) {
  if (message.kind === "model") learn(message);
  else if (message.kind === "face") meet(message);
  else if (message.kind === "models") listModels(message);
  else if (message.kind === "training") showTraining(message);
  else if (message.kind === "error") refused(message.text);
}

async function receive(data) {
  const length = new DataView(data).getUint32(0);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  const picture = new Blob([new Uint8Array(data, 4 + length)], { type: ["shown", "live"].includes(head.kind) ? "image/jpeg" : "image/png" });
  if (head.kind === "shown") return show(head.number, picture);
  if (head.kind === "live") return showFrame(picture);
  const address = URL.createObjectURL(picture);
  if (head.kind === "strip") return showStrip(head, address);
  const link = Object.assign(document.createElement("a"), { href: address, download: head.name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
  say(`Saved ${head.name}.`);
}

function say(text, bad = false) {
  byId("message").textContent = text;
  byId("message").classList.toggle("bad", bad);
}

// --- the model and its sliders -----------------------------------------------------------------------------------------

function learn(message) {
  delay = 500;
  if (chosen && message.model !== chosen) return pick(chosen); // a new connection begins with the server's own model
  if (!message.local && !byId("models").options.length) send({ kind: "models" });
  model = message;
  face = null;
  byId("about").textContent = `${message.model}: ${message.about}`;
  byId("licence").textContent = message.licence;
  document.querySelectorAll(".photos").forEach((part) => { part.hidden = !message.edits; });
  document.querySelectorAll(".served, #live, #paste, #drawn, .check").forEach((part) => { part.hidden ||= Boolean(message.local); });
  if (message.local) byId("place").textContent = "Your photo stays in this page; no server sees it.";
  byId("drawn").textContent = message.edits ? "Drawn face" : "New face";
  controls = message.attributes.map(control);
  byId("sliders").replaceChildren(...controls.map((one) => one.row));
  say("");
  enable();
  if (photo && (message.edits || photo.number !== undefined)) upload(photo);
  else restore = null;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function control(attribute, index) {
  const id = `slider-${index}`, several = attribute.kind === "k-way";
  const range = element("input", { type: "range", id, min: -2, max: 2, step: 0.05, value: 0, disabled: true });
  const value = element("output", { htmlFor: id });
  const steps = element("button", { type: "button", className: "steps", textContent: "steps", disabled: true });
  steps.setAttribute("aria-label", `Show steps of ${attribute.name}`);
  const marks = attribute.kind === "continuous" ? ["least", "most"] : ["absent", "present"];
  const track = element("div", { className: "track" }, range,
    ...marks.map((mark, i) => element("span", { className: ["absent", "present"][i], textContent: mark })));
  const line = element("div", { className: "line" });
  let choice = null;
  if (several) {
    choice = element("select", { disabled: true }, ...attribute.categories.map((name, i) => element("option", { value: i, textContent: name })));
    choice.setAttribute("aria-label", attribute.name);
    choice.addEventListener("change", () => { range.value = 1; moved(); commit(); });
    line.append(choice);
  }
  line.append(track);
  range.setAttribute("aria-label", several ? `Strength of ${attribute.name}` : attribute.name);
  const read = () => ({ category: choice ? Number(choice.value) : null, value: Number(range.value) });
  const label = () => {
    value.textContent = Number(range.value).toFixed(2);
    range.setAttribute("aria-valuetext", `${value.textContent}; -1 is ${marks[0]}, 1 is ${marks[1]}`);
  };
  const write = (state) => {
    if (choice) choice.value = state.category;
    range.value = state.value;
    label();
  };
  const name = () => (choice ? `${attribute.name}.${attribute.categories[Number(choice.value)]}` : attribute.name);
  range.addEventListener("input", moved);
  range.addEventListener("change", commit);
  steps.addEventListener("click", () => send({ kind: "strip", slider: name(), sliders: sliders() }));
  const row = element("fieldset", { className: "slider" }, element("span", { className: "name", textContent: attribute.name }), value, steps, line);
  return { attribute, row, read, write, name, label, enable: (on) => [range, steps, choice].forEach((part) => part && (part.disabled = !on)) };
}

const stateNow = () => controls.map((one) => one.read());

function commit() {
  states.push(settled);
  settled = stateNow();
  enable();
}

function enable() {
  needFace.forEach((button) => { button.disabled = !face; });
  controls.forEach((one) => one.enable(Boolean(face)));
  byId("undo").disabled = !face || !states.length;
}

function sliders() {
  const same = (a, b) => a.category === b.category && Math.abs(a.value - b.value) < 1e-9;
  const list = controls.map((one, i) => [one, one.read(), start[i]]).filter(([, now, was]) => !model.edits || !same(now, was));
  return Object.fromEntries(list.map(([one, now]) => [one.name(), now.value]));
}

const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

function moved() {
  if (!face) return;
  controls.forEach((one) => one.label());
  const now = sliders();
  asked += 1;
  after.dataset.asked = asked;
  send({ kind: "move", number: asked, sliders: now });
  const words = Object.entries(now).map(([name, value]) => quoted(`${name}=${value}`));
  const does = words.length ? `--set ${words.join(" ")}` : face.idle;
  byId("command").textContent = `${face.command} ${does} --out edited`;
}

function go(state) {
  controls.forEach((one, i) => one.write(state[i]));
  moved();
}

// --- photos ------------------------------------------------------------------------------------------------------------

function upload(file) {
  if (!model) return;
  endLive();
  if (file.number !== undefined) {
    send({ kind: "drawn", number: file.number });
  } else {
    if (file.size > model.upload_bytes) return say(`The photo has ${file.size.toLocaleString()} bytes; up to ${model.upload_bytes.toLocaleString()} can be taken.`, true);
    send({ kind: "photo", name: (file.name || "photo.png").slice(-200), align: byId("align").checked }, file);
  }
  if (file !== photo) restore = null;
  photo = file;
  say("Reading the photo …");
}

function meet(message) {
  if (restore && restore.chosen !== message.chosen && restore.chosen < message.faces.length) return send({ kind: "choose", face: restore.chosen });
  face = message;
  before.src = message.faces[message.chosen];
  delete stage.dataset.empty;
  start = model.attributes.map((attribute, i) => {
    const label = message.labels[i];
    return attribute.kind === "k-way" ? { category: label, value: 1 } : { category: null, value: 2 * label - 1 };
  });
  states = [];
  first = asked + 1;
  byId("strip").hidden = true;
  faces(message);
  const origins = Object.values(message.origins);
  const read = origins.includes("drawn") ? "The seed drew where the sliders start."
    : `The sliders start at what the photo shows, ${origins.includes("judge") ? "as the model's judge reads it" : "as the best reconstruction suggests"}.`;
  say([...message.notes, read].join(" "));
  enable();
  go(restore?.state ?? start);
  settled = stateNow();
  restore = null;
}

function faces(message) {
  byId("faces").hidden = message.faces.length < 2;
  byId("faces").replaceChildren(...message.faces.map((address, number) => {
    const button = element("button", { type: "button" }, element("img", { src: address, alt: `Face ${number + 1}` }));
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", number === message.chosen);
    button.addEventListener("click", () => send({ kind: "choose", face: number }));
    return button;
  }));
}

async function show(number, picture) {
  const bitmap = await createImageBitmap(picture);
  if (camera || number < first || number < shown) return bitmap.close();
  shown = number;
  paint(bitmap);
  after.dataset.shown = number;
}

function paint(bitmap) {
  if (after.width !== bitmap.width || after.height !== bitmap.height) Object.assign(after, { width: bitmap.width, height: bitmap.height });
  after.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
}

function showStrip({ slider, steps }, address) {
  const [image, caption, numbers] = ["img", "figcaption", ".numbers"].map((name) => byId("strip").querySelector(name));
  URL.revokeObjectURL(image.src);
  Object.assign(image, { src: address, alt: `${slider} from ${steps[0]} to ${steps.at(-1)}` });
  caption.textContent = slider;
  numbers.replaceChildren(...steps.map((step) => element("span", { textContent: step.toFixed(1) })));
  byId("strip").hidden = false;
}

function divide(share) {
  divider.value = share;
  stage.style.setProperty("--at", `${divider.value}%`);
}

// --- what people do ----------------------------------------------------------------------------------------------------

byId("file").addEventListener("change", (event) => { if (event.target.files[0]) upload(event.target.files[0]); event.target.value = ""; });
byId("drawn").addEventListener("click", () => upload({ number: (drawnNumber += 1) }));
byId("align").addEventListener("change", () => { if (photo && photo.number === undefined) upload(photo); });
byId("reset").addEventListener("click", () => { go(start); commit(); });
byId("undo").addEventListener("click", undo);
byId("save").addEventListener("click", () => send({ kind: "save", pasted: false, sliders: sliders() }));
byId("paste").addEventListener("click", () => send({ kind: "save", pasted: true, sliders: sliders() }));
byId("copy").addEventListener("click", copy);
divider.addEventListener("input", () => divide(divider.value));
stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); slide(event); });
stage.addEventListener("pointermove", (event) => { if (event.buttons) slide(event); });
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => { const file = event.clipboardData.files[0]; if (file) upload(file); });
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z") { event.preventDefault(); undo(); }
});

function slide(event) {
  const box = stage.getBoundingClientRect();
  if (face) divide(Math.round((100 * (event.clientX - box.left)) / box.width));
}

function undo() {
  if (!face || !states.length) return;
  settled = states.pop();
  go(settled);
  enable();
}

async function copy() {
  const text = byId("command").textContent;
  try {
    await navigator.clipboard.writeText(text);
    say("Copied. In the command, name the photo where it lies.");
  } catch {
    getSelection().selectAllChildren(byId("command"));
    say("The browser does not let this page copy; the command is marked: press Ctrl+C.");
  }
}

// --- other models, and runs that train ---------------------------------------------------------------------------------------

function pick(address) {
  chosen = address;
  send({ kind: "pick", address });
  say(`Opening ${address} …`);
}

function refused(text) {
  say(text, true);
  if (chosen && model && model.model !== chosen) byId("models").value = chosen = model.model;
}

function listModels({ groups, runs }) {
  const names = { now: "of this page", registry: "registered", runs: "runs and their checkpoints" };
  const group = ([name, addresses]) => element("optgroup", { label: names[name] }, ...addresses.map((value) => element("option", { value, textContent: value })));
  byId("models").replaceChildren(...Object.entries(groups).filter(([, addresses]) => addresses.length).map(group));
  byId("models").value = chosen ?? groups.now[0];
  byId("run").replaceChildren(...runs.map(({ name, report }) => {
    const option = element("option", { value: name, textContent: name });
    option.dataset.report = report ? "yes" : "";
    return option;
  }));
  byId("watch").disabled = !runs.length;
}

function watch() {
  const run = byId("run").value;
  if (byId("training").hidden || !run) return;
  send({ kind: "watch", run, size: known });
  const token = location.hash.length > 1 ? `?token=${encodeURIComponent(decodeURIComponent(location.hash.slice(1)))}` : "";
  byId("report").href = `/report/${encodeURIComponent(run)}${token}`;
  byId("report").hidden = !byId("run").selectedOptions[0].dataset.report;
}

function showTraining({ run, size, curves, picture, caption }) {
  if (run !== byId("run").value || !curves) return;
  known = size;
  byId("curves").replaceChildren(...Object.entries(curves).map(([name, points]) => curve(name, points)));
  const last = Math.max(...Object.values(curves).map((points) => points.at(-1)[0]));
  byId("state").textContent = `${last.toLocaleString()} images seen`;
  byId("grid").hidden = !picture;
  if (!picture) return;
  byId("grid").querySelector("img").src = picture;
  byId("grid").querySelector("figcaption").textContent = caption;
}

function curve(name, points) {
  const [xs, ys] = [0, 1].map((i) => points.map((point) => point[i]));
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 50");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${name}: from ${ys[0]} to ${ys.at(-1)}, between ${low} and ${high}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const place = ([x, y]) => `${(100 * (x - left)) / (right - left || 1)},${high > low ? 47 - (44 * (y - low)) / (high - low) : 25}`;
  line.setAttribute("points", points.map(place).join(" "));
  svg.append(line);
  const number = element("output", { textContent: ys.at(-1).toPrecision(4), title: `lowest ${low.toPrecision(4)}, highest ${high.toPrecision(4)}` });
  return element("figure", {}, element("figcaption", {}, element("span", { textContent: name }), number), svg);
}

byId("models").addEventListener("change", () => {
  restore = null; // where sliders of one model stand says nothing to another
  pick(byId("models").value);
});
byId("watch").addEventListener("click", () => {
  byId("training").hidden = !byId("training").hidden;
  byId("watch").setAttribute("aria-expanded", !byId("training").hidden);
  send({ kind: "models" }); // a run may have begun meanwhile
  watch();
});
byId("run").addEventListener("change", () => { known = 0; byId("curves").replaceChildren(); byId("grid").hidden = true; watch(); });
setInterval(watch, 2000);

// --- the camera --------------------------------------------------------------------------------------------------------

byId("camera").addEventListener("click", async () => {
  const video = byId("shot").querySelector("video");
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
  } catch (error) {
    return say(`There is no camera for this page: ${error.message}`, true);
  }
  byId("shot").showModal();
  await video.play();
});
byId("take").addEventListener("click", () => {
  const video = byId("shot").querySelector("video");
  const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => upload(new File([blob], "camera.png", { type: "image/png" })), "image/png");
  byId("shot").close();
});
byId("cancel").addEventListener("click", () => byId("shot").close());
byId("shot").addEventListener("close", () => {
  const video = byId("shot").querySelector("video");
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
});

// --- the camera, live: one frame is under way at a time, so that frames are dropped and none lags ---------------------------

byId("live").addEventListener("click", async () => {
  if (camera) return endLive();
  const video = document.createElement("video");
  Object.assign(video, { muted: true, playsInline: true });
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user", width: 320, height: 240 } });
  } catch (error) {
    return say(`There is no camera for this page: ${error.message}`, true);
  }
  await video.play();
  [camera, frames] = [video, []];
  stage.classList.add("live");
  byId("live").setAttribute("aria-pressed", "true");
  sendFrame();
});

function sendFrame() {
  const frame = element("canvas", { width: camera.videoWidth, height: camera.videoHeight });
  frame.getContext("2d").drawImage(camera, 0, 0);
  const every = Object.fromEntries(controls.map((one) => [one.name(), one.read().value]));
  frame.toBlob((blob) => { if (camera) send({ kind: "live", sliders: every }, blob); }, "image/jpeg", 0.9);
}

async function showFrame(picture) {
  const bitmap = await createImageBitmap(picture), now = performance.now();
  if (!camera) return bitmap.close();
  paint(bitmap);
  frames = [...frames.filter((at) => now - at < 2000), now];
  say(`Live: ${(frames.length / 2).toFixed(0)} frames a second.`);
  sendFrame();
}

function endLive() {
  camera?.srcObject.getTracks().forEach((track) => track.stop());
  camera = null;
  stage.classList.remove("live");
  byId("live").setAttribute("aria-pressed", "false");
  if (face) moved();
}

connect();
