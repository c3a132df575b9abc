"use strict";
// The page of a study: one picture after another, two questions for each. It learns nothing else of a picture.

const byId = (id) => document.getElementById(id);
const address = new URL("/socket", location.href);
address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
if (location.hash.length > 1) address.searchParams.set("token", decodeURIComponent(location.hash.slice(1)));
address.hash = "";
const socket = new WebSocket(address);
socket.binaryType = "arraybuffer";

const say = (text) => { byId("message").textContent = text; };
const send = (message) => socket.send(JSON.stringify(message));

socket.onopen = () => send({ kind: "next" });
socket.onclose = () => { byId("answers").hidden = true; say("The connection is closed; what you answered is kept. Reload to go on."); };
socket.onmessage = ({ data }) => {
  if (typeof data !== "string") return show(data);
  const message = JSON.parse(data);
  if (message.kind === "error") say(message.text);
  if (message.kind !== "done") return;
  byId("answers").hidden = byId("picture").hidden = true;
  byId("left").textContent = "";
  say("That was the last picture. Thank you!");
};

function show(data) {
  const length = new DataView(data).getUint32(0);
  const { attribute, values, left } = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  URL.revokeObjectURL(byId("picture").src);
  byId("picture").src = URL.createObjectURL(new Blob([new Uint8Array(data, 4 + length)], { type: "image/png" }));
  byId("answers").reset();
  byId("values").querySelectorAll("label").forEach((label) => label.remove());
  byId("values").querySelector("legend").textContent = attribute;
  values.forEach((name, value) => {
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "value", value, required: true });
    const label = document.createElement("label");
    label.append(radio, ` ${name}`);
    byId("values").append(label);
  });
  byId("left").textContent = `${left} more after this one`;
  byId("answers").hidden = byId("picture").hidden = false;
}

byId("answers").addEventListener("submit", (event) => {
  event.preventDefault();
  const answers = new FormData(event.target);
  send({ kind: "rated", natural: answers.get("natural") === "1", value: Number(answers.get("value")) });
});
