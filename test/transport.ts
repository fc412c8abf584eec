/** A socket that is none: what a Connection does with it can be seen, and how much it takes is for the test to say. */
import { Connection, serve, type Server, type Transport } from "../server.ts";

/** Takes `room` bytes, and notes what else is done to it. Less than no room: the connection has gone. */
export class FakeTransport implements Transport {
  /** One character a byte. */
  written = "";
  readonly calls: string[] = [];
  readonly remoteAddress = "192.0.2.1";

  constructor(public room = Number.POSITIVE_INFINITY) {}

  write(bytes: Uint8Array, from: number, length: number): number {
    if (this.room < 0) return -1;
    const taken = Math.min(this.room, length);
    this.room -= taken;
    this.written += Buffer.from(bytes.buffer, bytes.byteOffset + from, taken).toString("latin1");
    return taken;
  }
  shutdown = () => void this.calls.push("shutdown");
  end = () => void this.calls.push("end");
  terminate = () => void this.calls.push("terminate");
  pause = () => void this.calls.push("pause");
  resume = () => void this.calls.push("resume");
}

/** Lets everything that is due happen. */
export const nextTurn = () => new Promise<void>((resolve) => setImmediate(resolve));

/** A connection of a server to a transport, and the conversation on it. Its steps go on when everything due happens. */
export function converse(transport: Transport, server: Server): Connection {
  const connection = new Connection(transport, server);
  void serve(connection);
  return connection;
}
