/** The parts without sockets: what vectors do not reach of parsing, formatting, policy and the connection's clockwork. */
import { describe, expect, test } from "bun:test";
import { mkdtempSync, realpathSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as client from "../client.ts";
import * as robust from "../client-robust.ts";
import {
  ChunkedDecoder,
  Connection,
  FileSite,
  fitLimits,
  LIMITS,
  printable,
  respond,
  Server,
  TextSite,
} from "../server.ts";
import { FakeTransport } from "./transport.ts";

const GET = Buffer.from("GET / HTTP/1.1\r\nHost: x\r\n\r\n");

/** A server without sockets, with one connection to it. */
function connect({
  room,
  text = "Hi",
  limits = {},
}: { room?: number; text?: string; limits?: Partial<typeof LIMITS> } = {}) {
  const log: string[] = [];
  const server = new Server(new TextSite(text), "request", (entry) => log.push(entry), { ...LIMITS, ...limits });
  const transport = new FakeTransport(room);
  const connection = new Connection(transport, server);
  return { server, transport, connection, log };
}

const count = (text: string, part: string) => text.split(part).length - 1;

describe("a connection", () => {
  test("writes once for what one read brings", () => {
    const { transport, connection } = connect();
    let writes = 0;
    const write = transport.write.bind(transport);
    transport.write = (...args) => (writes++, write(...args));
    connection.onData(Buffer.concat(Array.from({ length: 16 }, () => GET)));
    expect([writes, count(transport.written, "200 OK")]).toEqual([1, 16]);
  });

  test("stops reading when the peer takes nothing, keeps little, and loses nothing", () => {
    const { server, transport, connection } = connect({ room: 0, limits: { unsentBytesMax: 1000 } });
    connection.onData(Buffer.concat(Array.from({ length: 500 }, () => GET)));
    expect(transport.calls).toEqual(["pause"]);
    expect(server.waitingBytes).toBeLessThan(2 * 500 * GET.length + 2000);
    connection.onData(GET); // what was on its way when reading stopped
    for (let turn = 0; turn < 5000 && count(transport.written, "\r\n\r\nHi") < 501; turn++) {
      transport.room = 77;
      connection.onDrain();
    }
    expect(count(transport.written, "\r\n\r\nHi")).toBe(501);
    expect(server.waitingBytes).toBe(0);
    expect(transport.calls.at(-1)).toBe("resume");
  });

  test("ends when writing fails", () => {
    const { transport, connection } = connect({ room: -1 });
    connection.onData(Buffer.concat([GET, GET.subarray(0, 10)]));
    connection.onEnd();
    connection.onDrain();
    expect(transport.calls).toEqual(["terminate"]);
  });

  test("gives a peer that has half-closed all its answers before it closes", () => {
    const { transport, connection } = connect({ room: 10 });
    connection.onData(Buffer.concat([GET, GET]));
    connection.onEnd();
    expect(transport.calls).toEqual(["pause"]);
    transport.room = 10_000;
    connection.onDrain();
    expect(count(transport.written, "\r\n\r\nHi")).toBe(2);
    expect(transport.calls).toEqual(["pause", "resume", "shutdown", "end"]);
  });

  test("answers 500 when the application throws, and serves the others", () => {
    const { server, transport, connection } = connect();
    const broken = Object.defineProperty(new TextSite(""), "text", {
      get: () => expect.unreachable("broken on purpose"),
    });
    Object.defineProperty(server, "site", { value: broken });
    connection.onData(GET);
    expect(transport.written).toStartWith("HTTP/1.1 500 Internal Server Error\r\n");
    expect(transport.written).not.toContain("broken");
    const other = new FakeTransport();
    new Connection(other, server).onData(Buffer.from("OPTIONS / HTTP/1.1\r\nHost: x\r\n\r\n"));
    expect(other.written).toStartWith("HTTP/1.1 204 No Content\r\n");
  });

  test("has a time for a head that no byte of it extends", () => {
    const { server, transport, connection } = connect();
    const start = server.now;
    for (const byte of "GET / HTTP/1.1\r\nX: ") {
      connection.onData(Buffer.from(byte));
      server.now += 100;
    }
    expect(connection.deadline).toBe(start + LIMITS.headTimeoutMs);
    connection.onDeadline();
    expect(transport.written).toStartWith("HTTP/1.1 408 Request Timeout\r\n");
    expect(transport.calls).toEqual(["shutdown"]);
    connection.onDeadline();
    // Not a reset: it would take back what the kernel has not delivered yet.
    expect(transport.calls).toEqual(["shutdown", "end"]);
  });

  test("has a time for each part of the content that no byte of it extends", () => {
    const { server, transport, connection } = connect();
    connection.onData(Buffer.from("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"));
    const { deadline } = connection;
    expect(deadline).toBe(server.now + LIMITS.contentTimeoutMs);
    for (let i = 0; i < 50; i++) {
      server.now += 100;
      connection.onData(Buffer.from("x"));
    }
    expect(connection.deadline).toBe(deadline);
    connection.onDeadline();
    expect(transport.written).toStartWith("HTTP/1.1 408 Request Timeout\r\n");
  });

  test("gives the time back in which the process stood still: nobody could read then what peers had sent", () => {
    const { server, transport, connection } = connect();
    server.now -= 2 * LIMITS.headTimeoutMs;
    connection.deadline = server.now + 1000;
    server.sweep();
    expect(transport.calls).toEqual([]);
    server.now += 1000;
    connection.onData(GET);
    expect(transport.written).toStartWith("HTTP/1.1 200 OK\r\n");
  });

  test("is told to stop: what came together is answered to the last request, which says close", () => {
    const { server, transport, connection } = connect({ room: 10 });
    connection.onData(Buffer.concat([GET, GET, GET]));
    server.stop();
    connection.onData(Buffer.concat([GET, GET]));
    transport.room = 10_000;
    connection.onDrain();
    expect(count(transport.written, "200 OK")).toBe(5);
    expect(transport.written.lastIndexOf("Connection: close")).toBeGreaterThan(transport.written.lastIndexOf("200 OK"));
    expect(count(transport.written, "Connection: close")).toBe(1);
    expect(transport.calls).toEqual(["pause", "resume", "shutdown"]);
  });

  test("is told to stop while it sends a file: what was asked behind it gets its answer", async () => {
    const root = mkdtempSync(join(tmpdir(), "http-over-tcp-"));
    try {
      writeFileSync(join(root, "large"), Buffer.alloc(300_000));
      const server = new Server(new FileSite(realpathSync(root), LIMITS), "off", () => {});
      const transport = new FakeTransport(1000);
      const connection = new Connection(transport, server);
      connection.onData(Buffer.from("GET /large HTTP/1.1\r\nHost: x\r\n\r\n"));
      connection.onData(GET);
      server.stop();
      transport.room = 1_000_000;
      connection.onDrain();
      await new Promise((resolve) => setTimeout(resolve));
      while (count(transport.written, "HTTP/1.1 ") < 2) await new Promise((resolve) => setImmediate(resolve));
      expect(count(transport.written, "HTTP/1.1 200 OK")).toBe(2);
      expect(count(transport.written, "Connection: close")).toBe(1);
      expect(transport.calls).toContain("shutdown");
    } finally {
      rmSync(root, { recursive: true });
    }
  });

  test("is told to stop: idle it has a moment left, and what it is asked then is answered with a close", () => {
    const { server, transport, connection } = connect();
    connection.onData(GET);
    server.now -= 250; // the last sweep was a while ago
    const told = performance.now();
    server.stop();
    expect(connection.deadline).toBeGreaterThanOrEqual(told + 250);
    expect(connection.deadline).toBeLessThan(server.now + 1000);
    connection.onData(Buffer.concat([GET, GET]));
    expect(count(transport.written, "200 OK")).toBe(3);
    expect(count(transport.written, "Connection: close")).toBe(1);
    expect(transport.calls).toEqual(["shutdown"]);
    let isEmpty = false;
    server.onEmpty = () => (isEmpty = true);
    connection.onClose();
    expect(isEmpty).toBeTrue();
  });

  test("logs a head from its own bytes, wherever those have moved", () => {
    const { connection, log } = connect();
    const lend = (text: string) => {
      const bytes = Buffer.from(text);
      connection.onData(bytes);
      bytes.fill("z"); // the bytes of a read are lent for the call, no longer
    };
    lend("GET /first HTTP/1.1\r\nHo");
    lend("st: x\r\n\r\nPOST /second HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n");
    lend("okGET /third HTTP/1.1\r\nHost: inc");
    connection.onEnd();
    expect(log).toEqual([
      "GET /first HTTP/1.1\nHost: x\n\n",
      "POST /second HTTP/1.1\nHost: x\nContent-Length: 2\n\nok\n",
      "GET /third HTTP/1.1\nHost: inc\n",
    ]);
  });

  test("logs a request with the start of its content, and says how much there is more", () => {
    const { connection, log } = connect();
    connection.onData(Buffer.from("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n"));
    for (let i = 0; i < 3; i++) connection.onData(Buffer.alloc(1000, "x"));
    expect(log).toEqual([`POST / HTTP/1.1\nHost: x\nContent-Length: 3000\n\n${"x".repeat(1024)}\n(1976 more bytes)\n`]);
  });
});

test("respond has an answer for every method", () => {
  const { server } = connect();
  const site = new TextSite("Hi");
  const statusOf = (method: string) => respond(Object.assign(server.spareHead, { method }), site).status;
  expect(["GET", "HEAD", "POST", "OPTIONS", "PUT", "TRACE", ""].map(statusOf)).toEqual([
    200, 200, 200, 204, 405, 405, 501,
  ]);
});

test("printable leaves text as it is and makes everything else visible", () => {
  expect(printable("a\tb\r\nc\n grüße 你好 🙂 \\")).toBe("a\tb\nc\n grüße 你好 🙂 \\");
  expect(printable("\x00\x1b[2J\x7f\x9b\r")).toBe("\\x00\\x1b[2J\\x7f\\x9b\\x0d");
  expect(printable("\u202e\u2028\u{e0001}\ufeff")).toBe("\\u{202e}\\u{2028}\\u{e0001}\\u{feff}");
});

test("client.ts names host and port as RFC 9112 §3.2 asks", () => {
  expect(client.formatRequest("localhost", 8888, "/data")).toBe("GET /data HTTP/1.1\r\nHost: localhost:8888\r\n\r\n");
  expect(client.formatRequest("::1", 80, "*")).toBe("GET * HTTP/1.1\r\nHost: [::1]\r\n\r\n");
});

describe("client-robust.ts", () => {
  test.each([
    ["localhost:8888/data", "http://localhost:8888/data"],
    ["example.test", "http://example.test/"],
    ["HTTP://EXAMPLE.test:80/a/../b?c d".replace(" ", "%20"), "http://example.test/b?c%20d"],
    ["http://[::1]:1/", "http://[::1]:1/"],
    ["bücher.test/ü", "http://xn--bcher-kva.test/%C3%BC"],
  ])("reads the URL %s", (text, href) => {
    expect(robust.parseUrl(text).href).toBe(href);
  });

  test("asks for what the URL names, fragment excluded, and for a close", () => {
    const url = robust.parseUrl("http://[::1]:81/a%20b?c#d");
    expect(
      Buffer.from(
        robust.formatRequest({ method: "GET", url, fields: [], content: undefined }, robust.NOTHING),
      ).toString(),
    ).toMatch(
      /^GET \/a%20b\?c HTTP\/1.1\r\nHost: \[::1\]:81\r\nUser-Agent: http-over-tcp\/[\d.]+\r\nAccept: \*\/\*\r\nWant-Repr-Digest: sha-256=10\r\nConnection: close\r\n\r\n$/,
    );
  });

  test("a request that cannot be sent is the failure of the send, exit 55", async () => {
    const connection = new robust.Connection(new robust.Clock({ connectMs: 1000, stallMs: 1000, maxMs: 1000 }));
    const gone = { write: () => -1 } as unknown as Bun.Socket<robust.Connection>; // all that is called of it
    connection.onOpen(gone);
    const failure = await connection.send(GET).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(robust.TransferError);
    expect((failure as robust.TransferError).outcome).toBe("send"); // as just checked
    expect(robust.EXIT_CODES.send).toBe(55);
  });

  test("what was received before a reset is delivered before the failure", async () => {
    const connection = new robust.Connection(new robust.Clock({ connectMs: 1000, stallMs: 1000, maxMs: 1000 }));
    connection.onData(Buffer.from("a"));
    connection.onClose(Object.assign(new Error("reset"), { code: "ECONNRESET" }));
    expect(await connection.receive()).toEqual(Buffer.from("a"));
    expect(connection.receive()).rejects.toThrow("the connection was lost: ECONNRESET");
  });
});

describe("fitLimits", () => {
  test("leaves the limits as they are where there are descriptors enough, or nobody says how many", () => {
    expect(fitLimits(LIMITS, Number.POSITIVE_INFINITY, 2)).toEqual(LIMITS);
    expect(fitLimits(LIMITS, 1_048_576, 2)).toEqual(LIMITS);
  });

  test.each([64, 256, 1024, 20_000])("never lets more be open than %d descriptors allow", (descriptors) => {
    for (const each of [1, 2] as const) {
      const limits = fitLimits(LIMITS, descriptors, each);
      const { connectionsMax, refusedConnectionsMax, pendingDigestsMax, recentFilesMax } = limits;
      expect(connectionsMax).toBeGreaterThanOrEqual(descriptors / 8);
      const open = each * connectionsMax + refusedConnectionsMax + pendingDigestsMax + recentFilesMax;
      expect(open).toBeLessThan(descriptors - 10);
    }
  });
});

describe("ChunkedDecoder", () => {
  test("keeps nothing of an extension, however long it is", () => {
    const decoder = new ChunkedDecoder(LIMITS, false);
    const length = 1_048_576;
    const start = Buffer.from(`${length.toString(16)}\r\n${"x".repeat(length)}\r\n1;a="`);
    for (let at = 0; at < start.length;) at = decoder.next(start, at, start.length);
    const text = Buffer.alloc(length, 'a;=\t\\"');
    expect(decoder.next(text, 0, length)).toBe(length);
    expect([decoder.state, decoder.heldBytes]).toEqual(["extension", 0]);
    decoder.next(Buffer.alloc(8192, "a"), 0, 8192); // more than the content allows
    expect(decoder.fault).toBe("chunk-extension");
  });
});
