// Shows blocks of frames at their pace, and never holds more than a few: what comes late is left out.

const MOST_WAITING = 2; // blocks
const COUNT_MS = 1000;

/** The header and JPEG blobs of a binary message (asd_rt/serve/protocol.py). */
export function unpack(data) {
  const length = new DataView(data).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let begin = 4 + length;
  const images = header.sizes.map((size) => {
    const image = new Blob([new Uint8Array(data, begin, size)], { type: "image/jpeg" });
    begin += size;
    return image;
  });
  return { header, images };
}

export class Player {
  /** `onBlock(header)` is called when a block begins to show. */
  constructor(canvas, onBlock) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.onBlock = onBlock;
    this.waiting = [];
    this.current = null;
    this.decoded = Promise.resolve();
    this.generation = 0;
    this.shown = []; // times of the last second's frames
    requestAnimationFrame((now) => this.tick(now));
  }

  /** Forget all that waits; the last frame stays. */
  clear() {
    this.generation += 1;
    for (const block of this.waiting.splice(0)) close(block);
    if (this.current) close(this.current);
    this.current = null;
  }

  /** Take a message's block; its frames are decoded beside each other, and blocks stay in order. */
  push(data) {
    const { header, images } = unpack(data);
    const generation = this.generation;
    const frames = Promise.all(images.map((image) => createImageBitmap(image)));
    frames.catch(() => {}); // dealt with below, in its turn
    this.decoded = this.decoded.then(async () => {
      try {
        const block = { header, frames: await frames };
        if (generation === this.generation) this.take(block);
        else close(block);
      } catch (error) {
        console.warn("a block could not be decoded", error);
      }
    });
  }

  take(block) {
    const last = this.waiting.at(-1) ?? this.current;
    if (last && last.header.prompt_id !== block.header.prompt_id) {
      for (const old of this.waiting.splice(0)) close(old);
      if (this.current) close(this.current);
      this.current = null; // a new prompt shows at once
    }
    this.waiting.push(block);
    while (this.waiting.length > MOST_WAITING) close(this.waiting.shift());
  }

  tick(now) {
    requestAnimationFrame((later) => this.tick(later));
    if (this.current) {
      const { start, period, frames } = this.current;
      if (now - start >= period * frames.length && this.waiting.length) this.next(now);
    } else if (this.waiting.length) {
      this.next(now);
    }
    if (!this.current) return;
    const { start, period, frames } = this.current;
    const index = Math.min(Math.floor((now - start) / period), frames.length - 1);
    if (index > this.current.index) this.draw(index, now);
  }

  next(now) {
    const before = this.current;
    const block = this.waiting.shift();
    block.period = 1000 / block.header.fps;
    block.index = -1;
    // Where one block ends the next begins, unless there was a gap.
    const end = before ? before.start + before.period * before.frames.length : now;
    block.start = now - end < block.period ? Math.min(end, now) : now;
    this.current = block;
    if (before) close(before);
    this.onBlock(block.header);
  }

  draw(index, now) {
    const frame = this.current.frames[index];
    if (this.canvas.width !== frame.width || this.canvas.height !== frame.height) {
      this.canvas.width = frame.width;
      this.canvas.height = frame.height;
    }
    this.context.drawImage(frame, 0, 0);
    this.current.index = index;
    this.shown.push(now);
  }

  /** Frames shown during the last second. */
  get fps() {
    const now = performance.now();
    while (this.shown.length && now - this.shown[0] > COUNT_MS) this.shown.shift();
    return this.shown.length;
  }
}

function close(block) {
  for (const frame of block.frames) frame.close();
}
