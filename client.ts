#!/usr/bin/env bun
/**
 * client.ts: stage 2, a minimal HTTP client.
 *
 *     bun server.ts                              # in another terminal
 *     bun client.ts                              # GET /data from localhost:8888
 *     bun client.ts example.test 80 /index.html  # from another host, port and target
 *
 * It connects, sends one request, receives ONCE, prints the bytes that came, and closes. That is the
 * lesson and the fault: TCP carries bytes, not messages, so one receive is not one response. It fails on:
 *
 *  - a longer response (`bun server.ts --text "$(seq 999)"`): the bytes after the first 1024 are lost,
 *    and a character that is cut in two there is destroyed
 *  - a slower response (the head now, the content later): the content is missing
 *
 * client-robust.ts handles both.
 */

// ═══ 1 Limits and defaults ═══════════════════════════════════════════════════════════════════════

const VERSION = "0.1.0";
const RECEIVED_BYTES_MAX = 1024; // the tutorial's recv(1024)
const TIMEOUT_MS = 10_000; // a server that sends nothing must not make the client wait forever

const HELP = `Usage: client [-h | -V] [HOST [PORT [TARGET]]]
Sends GET TARGET to HOST:PORT, by default /data to localhost:8888, receives once (at most
${RECEIVED_BYTES_MAX} bytes), prints that, and closes.

Exit 1: no answer, or none within ${TIMEOUT_MS / 1000} s. Exit 2: wrong usage.
`;

// ═══ 2 Formatting ═══════════════════════════════════════════════════════════════════════════════

/** RFC 9112 §3.2: an HTTP/1.1 request names its host; and the port, unless it is the default, 80. */
export function formatRequest(host: string, port: number, target: string): string {
  const uriHost = host.includes(":") ? `[${host}]` : host; // an IPv6 address
  return `GET ${target} HTTP/1.1\r\nHost: ${uriHost}${port === 80 ? "" : `:${port}`}\r\n\r\n`;
}

// ── shared: printable ──
const hexOf = (character: string) => character.codePointAt(0)?.toString(16).padStart(2, "0");
const escaped = (character: string) => (character <= "\xff" ? `\\x${hexOf(character)}` : `\\u{${hexOf(character)}}`);

/** Text of a peer's, safe to print: nothing in it moves the cursor, colours, rings or reorders text. */
export const printable = (text: string) =>
  text.replaceAll("\r\n", "\n").replace(/[^\n\t\P{C}]|[\u2028\u2029]/gu, escaped);
const asLine = (text: string) => `${printable(text).replace(/[\n\t]/g, " ")}\n`;
// ── end shared ──

// ═══ 3 Sockets ═══════════════════════════════════════════════════════════════════════════════════

/** Connects, sends, receives once, closes. @throws Error if nothing came */
function exchange(hostname: string, port: number, request: string): Promise<Uint8Array> {
  const { promise, resolve, reject } = Promise.withResolvers<Uint8Array>();
  const fail = (what: string, error?: Error & { code?: string }) =>
    reject(new Error(error === undefined ? what : `${what}: ${error.code ?? error.message}`));
  setTimeout(() => fail(`no answer within ${TIMEOUT_MS / 1000} s`), TIMEOUT_MS);
  const socket: Bun.SocketHandler = {
    // The kernel may take only a part. client-robust.ts shows how to send the rest.
    open: (socket) => void (socket.write(request) < request.length && fail("the request could not be sent whole")),
    data(socket, bytes) {
      resolve(bytes.subarray(0, RECEIVED_BYTES_MAX)); // the bytes after these are lost
      socket.end();
    },
    close: (_, error) => fail("the connection was closed without an answer", error),
    connectError: (_, error) => fail(`cannot connect to ${hostname}:${port}`, error),
  };
  Bun.connect({ hostname, port, socket }).catch(reject);
  return promise;
}

// ═══ 4 Command line ══════════════════════════════════════════════════════════════════════════════

/** @throws Error that says in one line what is wrong */
function parseCommandLine([host = "localhost", port = "8888", target = "/data", extra]: readonly string[]) {
  if (extra !== undefined) throw new Error(`one argument too many: ${JSON.stringify(extra)}`);
  if (!/^[\w.:][\w.:-]*$/.test(host)) throw new Error(`not a host or a known option: ${JSON.stringify(host)}`);
  if (!/^\d{1,5}$/.test(port) || Number(port) > 65_535) throw new Error(`not a port: ${JSON.stringify(port)}`);
  // Anything but visible ASCII could end the request-line early and start another request.
  if (!/^[\x21-\x7e]+$/.test(target)) throw new Error(`not a request-target: ${JSON.stringify(target)}`);
  return { host, port: Number(port), target };
}

/** @returns the exit code */
async function main(args: readonly string[]): Promise<number> {
  let exitCode = 2;
  try {
    const isHelp = args.includes("-h") || args.includes("--help");
    let text = isHelp ? HELP : args.includes("-V") || args.includes("--version") ? `client ${VERSION}\n` : "";
    const { host, port, target } = parseCommandLine(text === "" ? args : []);
    exitCode = 1;
    if (text === "") {
      const response = await exchange(host, port, formatRequest(host, port, target));
      text = `${printable(new TextDecoder().decode(response))}\n`;
    }
    await Bun.write(Bun.stdout, text);
    return 0;
  } catch (error) {
    const line = asLine(`Error: ${(error as Error).message}`); // all throws are Errors
    await Bun.write(Bun.stderr, line).catch(() => {}); // if stderr is closed the message is lost
    return exitCode;
  }
}

// ═══ 5 Main ══════════════════════════════════════════════════════════════════════════════════════

if (import.meta.main) process.exit(await main(process.argv.slice(2)));
