/**
 * A bad network in one port: passes each connection on to another port, and ends it (FIN, in both directions) once the
 * server has sent so many bytes through it, as a box on the way may do for reasons of its own.
 *
 *     bun docs/lab/badnet.ts 8889 8888 3000000     8889 is 8888, but no connection brings more than 3 MB
 */
import { connect, createServer } from "node:net";
import { Transform } from "node:stream";

const [port = 8889, toPort = 8888, bytesMax = 3_000_000] = process.argv.slice(2).map(Number);
let connections = 0;

createServer((client) => {
  const number = ++connections;
  const server = connect(toPort, "127.0.0.1");
  let left = bytesMax;
  const cutter = new Transform({
    transform(bytes: Buffer, _, done) {
      const passed = bytes.subarray(0, left);
      left -= passed.length;
      done(null, passed);
      if (left > 0 || bytes.length === 0 || cutter.writableEnded) return;
      console.log(`#${number} cut after ${bytesMax} bytes`);
      server.unpipe(cutter);
      server.destroy();
      cutter.end(); // and so the client gets a FIN behind the bytes that have passed
    },
  });
  // `pipe` stops reading from one side as long as the other takes no more: backpressure passes through.
  client.pipe(server).pipe(cutter).pipe(client);
  for (const socket of [client, server])
    socket.on("error", ({ message }) => {
      if (left === bytesMax) console.log(`#${number} ${message}`); // nothing has come: the server is not there
      client.destroy();
      server.destroy();
    });
}).listen(port, "localhost");
