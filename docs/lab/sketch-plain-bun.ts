/**
 * The tutorial's server once more, on Bun's own sockets. Nothing blocks here, so it serves many peers at once; but what
 * the kernel does not take (`write` returns how much it took) is kept without a bound. Meant to fail: see docs/lab.md.
 *
 *     bun docs/lab/sketch-plain-bun.ts
 */
const PORT = Number(process.env["PORT"] ?? 8888);
const RESPONSE = Buffer.from(`HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n${"Hello, World! ".repeat(220)}`);

/** For each peer, what the kernel has not taken. */
const waiting = new Map<Bun.Socket, Buffer[]>();
let waitingBytes = 0;
let toldMegabytes = 0;

function send(socket: Bun.Socket, bytes: Buffer): void {
  const queue = waiting.get(socket);
  const taken = queue === undefined || queue.length === 0 ? socket.write(bytes) : 0;
  if (taken === bytes.length) return;
  queue?.push(bytes.subarray(Math.max(0, taken)));
  waitingBytes += bytes.length - Math.max(0, taken);
  if (waitingBytes < (toldMegabytes + 10) * 1e6) return;
  toldMegabytes += 10;
  console.log(`${toldMegabytes} MB wait for peers that do not read`);
}

function sendOn(socket: Bun.Socket): void {
  const queue = waiting.get(socket) ?? [];
  for (let bytes = queue[0]; bytes !== undefined; bytes = queue[0]) {
    const taken = Math.max(0, socket.write(bytes));
    waitingBytes -= taken;
    if (taken < bytes.length) return void (queue[0] = bytes.subarray(taken));
    queue.shift();
  }
}

Bun.listen({
  hostname: "localhost",
  port: PORT,
  socket: {
    open: (socket) => void waiting.set(socket, []),
    // A request ends with an empty line. The sketch answers each, whatever waits already.
    data(socket, bytes) {
      for (const _ of bytes.toString("latin1").matchAll(/\r\n\r\n/g)) send(socket, RESPONSE);
    },
    drain: sendOn,
    close: (socket) => void waiting.delete(socket),
  },
});
