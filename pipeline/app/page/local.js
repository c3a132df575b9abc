"use strict";
// Stands where the server's WebSocket does in a page that was exported: it answers the same messages by ONNX Runtime, here.

const STEPS = [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2];

class LocalServer {
  constructor(hear) {
    Object.assign(this, { hear, readyState: WebSocket.OPEN, move: null, busy: Promise.resolve() });
    this.then(() => this.begin());
  }

  /** Do one thing after another; what fails is said as the server says it. */
  then(work) {
    this.busy = this.busy.then(work).catch((error) => this.say({ kind: "error", text: error.message }));
  }

  say(message) {
    this.hear({ data: JSON.stringify(message) });
  }

  async give(head, canvas, type) {
    const blob = await new Promise((done) => canvas.toBlob(done, type, 0.92));
    const text = new TextEncoder().encode(JSON.stringify(head));
    const length = new DataView(new ArrayBuffer(4));
    length.setUint32(0, text.length);
    this.hear({ data: await new Blob([length, text, blob]).arrayBuffer() });
  }

  send(data) {
    if (typeof data !== "string") return this.then(() => this.open(data));
    const message = JSON.parse(data);
    if (message.kind === "move") { // the newest wins, and none queue
      const waiting = this.move !== null;
      this.move = message;
      if (!waiting) this.then(() => this.shown());
    } else if (message.kind === "strip") this.then(() => this.strip(message));
    else if (message.kind === "save") this.then(() => this.save(message));
  }

  async begin() {
    this.card = await (await fetch("card.json")).json();
    [this.encoder, this.decoder] = await Promise.all(["encoder.onnx", "decoder.onnx"].map((name) => ort.InferenceSession.create(name)));
    const { method, image_size: size, images_seen, attributes, licence, name } = this.card;
    const about = `${method} at ${size} pixels after ${images_seen.toLocaleString()} images`;
    this.say({ kind: "model", model: name, about, size, attributes, licence, edits: true, local: true, upload_bytes: 1e8 });
  }

  async open(data) {
    const length = new DataView(await data.slice(0, 4).arrayBuffer()).getUint32(0);
    const { name } = JSON.parse(await data.slice(4, 4 + length).text());
    const photo = await createImageBitmap(data.slice(4 + length)).catch(() => { throw new Error(`${name} is not a readable picture`); });
    const size = this.card.image_size, side = Math.min(photo.width, photo.height);
    const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(photo, (photo.width - side) / 2, (photo.height - side) / 2, side, side, 0, 0, size, size);
    const { data: pixels } = context.getImageData(0, 0, size, size), images = new Float32Array(3 * size * size);
    for (let i = 0; i < size * size; i += 1) for (let c = 0; c < 3; c += 1) images[c * size * size + i] = pixels[4 * i + c] / 127.5 - 1;
    const feeds = { images: new ort.Tensor("float32", images, [1, 3, size, size]) };
    if (this.encoder.inputNames.includes("labels")) feeds.labels = new ort.Tensor("float32", new Float32Array(this.card.attributes.length), [1, this.card.attributes.length]);
    this.latent = await this.encoder.run(feeds);
    [this.name, this.labels] = [name, await this.estimated(images)];
    this.say({
      kind: "face", name, faces: [canvas.toDataURL()], chosen: 0, labels: this.labels, idle: "--sweep " + this.card.attributes[0].name + "=-2:2:9",
      notes: ["The photo's centred square is used: the face should fill it as in the training images."],
      origins: Object.fromEntries(this.card.attributes.map((one) => [one.name, "estimated"])), command: `fader edit ${quoted(name)} --model ${quoted(this.card.name)}`,
    });
  }

  /** The labels with which the reconstruction is nearest to the picture, one attribute after another, twice around. */
  async estimated(images) {
    const { attributes } = this.card, labels = attributes.map(() => -1);
    for (const j of [...attributes.keys(), ...attributes.keys()]) {
      const { kind, categories = [] } = attributes[j];
      const values = kind === "continuous" ? [0, 0.25, 0.5, 0.75, 1] : [...(categories.length ? categories : [0, 1]).keys()];
      let least = Infinity, best = labels[j];
      for (const value of values) {
        labels[j] = value;
        const decoded = await this.decoded({}, labels);
        const error = decoded.reduce((sum, number, i) => sum + (number - images[i]) ** 2, 0);
        if (error < least) [least, best] = [error, value];
      }
      labels[j] = best;
    }
    return labels;
  }

  /** The code of labels with these sliders moved, as fader/attributes.py has it. */
  code(sliders, labels) {
    const blocks = this.card.attributes.map(({ kind, categories = [] }, j) => {
      const k = categories.length || 2;
      if (labels[j] < 0) return Array(k).fill(1 / k);
      return kind === "continuous" ? [1 - labels[j], labels[j]] : [...Array(k).keys()].map((value) => Number(value === labels[j]));
    });
    for (const [name, value] of Object.entries(sliders)) {
      const j = this.card.attributes.findIndex((one) => name === one.name || name.startsWith(`${one.name}.`));
      const k = blocks[j].length, category = k > 2 || name !== this.card.attributes[j].name
        ? this.card.attributes[j].categories.indexOf(name.slice(this.card.attributes[j].name.length + 1)) : 1;
      const strength = (value + 1) / 2;
      blocks[j] = blocks[j].map((_, i) => (i === category ? strength : (1 - strength) / (k - 1)));
    }
    return Float32Array.from(blocks.flat());
  }

  async decoded(sliders, labels = this.labels) {
    if (!this.latent) throw new Error("there is no photo yet: give one first");
    const code = this.code(sliders, labels);
    const { image } = await this.decoder.run({ ...this.latent, code: new ort.Tensor("float32", code, [1, code.length]) });
    return image.data;
  }

  async painted(settings) {
    const size = this.card.image_size, canvas = Object.assign(document.createElement("canvas"), { width: settings.length * size, height: size });
    for (const [number, sliders] of settings.entries()) {
      const image = await this.decoded(sliders), pixels = new ImageData(size, size);
      for (let i = 0; i < size * size; i += 1) {
        for (let c = 0; c < 3; c += 1) pixels.data[4 * i + c] = Math.round(127.5 * (image[c * size * size + i] + 1));
        pixels.data[4 * i + 3] = 255;
      }
      canvas.getContext("2d").putImageData(pixels, number * size, 0);
    }
    return canvas;
  }

  async shown() {
    const { number, sliders } = this.move;
    this.move = null;
    await this.give({ kind: "shown", number }, await this.painted([sliders]), "image/png");
  }

  async strip({ slider, sliders }) {
    await this.give({ kind: "strip", slider, steps: STEPS }, await this.painted(STEPS.map((step) => ({ ...sliders, [slider]: step }))), "image/png");
  }

  async save({ sliders }) {
    const name = `${this.name.replace(/^.*\//, "").replace(/\.[^.]*$/, "")}-edited.png`;
    await this.give({ kind: "saved", name }, await this.painted([sliders]), "image/png");
  }
}

window.LocalServer = LocalServer;
