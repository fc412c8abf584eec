/**
 * Blocking sockets, as Python's `socket` module has them, so that the tutorial's code can be translated line by line.
 * Bun's own sockets never block, and most of the tutorial's faults come from blocking: they would not show.
 *
 * These are the functions of libc, called through bun:ffi. Linux with glibc only, IPv4 only, for the lab only.
 */
import { dlopen, ptr, read } from "bun:ffi";

const { symbols: libc } = dlopen("libc.so.6", {
  socket: { args: ["int", "int", "int"], returns: "int" },
  connect: { args: ["int", "ptr", "u32"], returns: "int" },
  bind: { args: ["int", "ptr", "u32"], returns: "int" },
  listen: { args: ["int", "int"], returns: "int" },
  accept: { args: ["int", "ptr", "ptr"], returns: "int" },
  recv: { args: ["int", "ptr", "u64", "int"], returns: "i64" },
  send: { args: ["int", "ptr", "u64", "int"], returns: "i64" },
  close: { args: ["int"], returns: "int" },
  __errno_location: { args: [], returns: "ptr" },
});

export class SocketError extends Error {
  override readonly name = "SocketError";
}
export type Address = readonly [host: "localhost", port: number];

const [AF_INET, SOCK_STREAM, MSG_NOSIGNAL] = [2, 1, 0x4000];
const ERRORS: Readonly<Record<number, string>> = {
  32: "EPIPE",
  98: "EADDRINUSE",
  104: "ECONNRESET",
  111: "ECONNREFUSED",
};

/** @throws SocketError where a call of libc has returned -1 */
function checked(call: string, result: number | bigint): number {
  if (Number(result) >= 0) return Number(result);
  const location = libc.__errno_location();
  const errno = location === null ? 0 : read.i32(location);
  throw new SocketError(`${call}: ${ERRORS[errno] ?? `errno ${errno}`}`);
}

/** struct sockaddr_in for 127.0.0.1 */
function sockaddr([, port]: Address): Uint8Array {
  return new Uint8Array([AF_INET, 0, port >> 8, port & 0xff, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
}

export class Socket {
  constructor(private readonly fd = checked("socket", libc.socket(AF_INET, SOCK_STREAM, 0))) {}

  connect(address: Address): void {
    checked("connect", libc.connect(this.fd, ptr(sockaddr(address)), 16));
  }

  bind(address: Address): void {
    checked("bind", libc.bind(this.fd, ptr(sockaddr(address)), 16));
  }

  listen(backlog: number): void {
    checked("listen", libc.listen(this.fd, backlog));
  }

  /** Waits for a connection. */
  accept(): Socket {
    return new Socket(checked("accept", libc.accept(this.fd, null, null)));
  }

  /** Waits until there are bytes, and returns what there is, at most `size`; nothing at all after the peer's FIN. */
  recv(size: number): Uint8Array {
    const bytes = new Uint8Array(size);
    return bytes.subarray(0, checked("recv", libc.recv(this.fd, ptr(bytes), size, 0)));
  }

  /** Waits until the kernel has taken all of it. */
  sendall(bytes: Uint8Array): void {
    for (let sent = 0; sent < bytes.length;)
      sent += checked("send", libc.send(this.fd, ptr(bytes, sent), bytes.length - sent, MSG_NOSIGNAL));
  }

  close(): void {
    libc.close(this.fd);
  }
}

export const encode = (text: string) => new TextEncoder().encode(text);
/** Python's bytes.decode(): throws where the bytes are no UTF-8. */
export const decode = (bytes: Uint8Array) => new TextDecoder("utf-8", { fatal: true }).decode(bytes);
/** The tutorial's 8888, or another one: `bun docs/lab/sketch-client.ts 8890`. */
export const PORT = Number(process.argv[2] ?? process.env["PORT"] ?? 8888);
