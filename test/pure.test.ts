/** The parts without sockets: what vectors do not reach of parsing, formatting, policy and the connection's clockwork. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as client from "../client.ts";
import * as robust from "../client-robust.ts";
import {
  ChunkedDecoder,
  FileSite,
  fitLimits,
  LIMITS,
  printable,
  RequestHead,
  parseRequestHead,
  Server,
  TextSite,
} from "../server.ts";
import { converse, FakeTransport, nextTurn } from "./transport.ts";

setDefaultTimeout(60_000);

const GET = Buffer.from("GET / HTTP/1.1\r\nHost: x\r\n\r\n");

/** A server without sockets, with one connection to it. Bytes of the peer have their effect before `receive` settles. */
function connect({
  room,
  text = "Hi",
  limits = {},
}: { room?: number; text?: string; limits?: Partial<typeof LIMITS> } = {}) {
  const log: string[] = [];
  const server = new Server(new TextSite(text), "request", (entry) => log.push(entry), { ...LIMITS, ...limits });
  const transport = new FakeTransport(room);
  const connection = converse(transport, server);
  const after = async (event: () => void) => {
    event();
    await nextTurn();
  };
  const receive = (bytes: string | Buffer) => after(() => connection.onData(Buffer.from(bytes)));
  return { server, transport, connection, log, receive, after };
}

const count = (text: string, part: string) => text.split(part).length - 1;
const several = (times: number) => Buffer.concat(Array.from({ length: times }, () => GET));

describe("a connection", () => {
  test("writes once for what one read brings", async () => {
    const { transport, receive } = connect();
    let writes = 0;
    const write = transport.write.bind(transport);
    transport.write = (...args) => (writes++, write(...args));
    await receive(several(16));
    expect([writes, count(transport.written, "200 OK")]).toEqual([1, 16]);
  });

  test("stops reading when the peer takes nothing, keeps little, and loses nothing", async () => {
    const { server, transport, connection, receive, after } = connect({ room: 0 });
    await receive(several(5000));
    expect(transport.calls).toEqual([]);
    // The bytes received, and one buffer of answers: of 5,000 answers of 150 bytes these are a tenth.
    expect(server.waitingBytes).toBeLessThan(5000 * GET.length + 65_536 + 200);
    await receive(GET); // more comes before it has taken any answer: no more is read
    expect(transport.calls).toEqual(["pause"]);
    for (let turn = 0; turn < 5000 && count(transport.written, "\r\n\r\nHi") < 5001; turn++) {
      transport.room = 7777;
      await after(() => connection.wake("room"));
    }
    expect(count(transport.written, "\r\n\r\nHi")).toBe(5001);
    expect(server.waitingBytes).toBe(0);
    expect(transport.calls.at(-1)).toBe("resume");
  });

  test("is cut off when too many bytes wait for all peers, whether it sends more or not", async () => {
    const limits = { waitingBytesMax: 20_000 };
    const { server, transport, receive } = connect({ room: 0, limits });
    await receive(several(1000)); // 28,000 bytes, of which hardly any is used before answers wait
    expect([transport.calls, server.waitingBytes]).toEqual([["terminate"], 0]);
    const other = connect({ room: 0, limits });
    await other.receive(several(100));
    expect(other.transport.calls).toEqual([]);
    for (let i = 0; i < 10; i++) await other.receive(several(100));
    expect([other.transport.calls, other.server.waitingBytes]).toEqual([["pause", "terminate"], 0]);
  });

  test("ends when writing fails", async () => {
    const { transport, connection, receive, after } = connect({ room: -1 });
    await receive(Buffer.concat([GET, GET.subarray(0, 10)]));
    await after(() => connection.onEnd());
    await after(() => connection.wake("room"));
    expect(transport.calls).toEqual(["terminate"]);
    const other = connect({ room: 10 });
    await other.receive(GET);
    other.transport.room = -1;
    await after(() => other.connection.wake("room"));
    expect([other.transport.calls, other.server.waitingBytes]).toEqual([["terminate"], 0]);
  });

  test("gives a peer that has half-closed all its answers before it closes", async () => {
    const { transport, connection, receive, after } = connect({ room: 10 });
    await receive(several(2));
    await after(() => connection.onEnd());
    expect(transport.calls).toEqual([]);
    transport.room = 10_000;
    await after(() => connection.wake("room"));
    expect(count(transport.written, "\r\n\r\nHi")).toBe(2);
    expect(transport.calls).toEqual(["shutdown", "end"]);
  });

  test("tells a peer that has half-closed which answer is the last one", async () => {
    const { transport, connection, receive, after } = connect({ room: 10 });
    await receive(several(1000)); // more answers than are formatted at once
    await after(() => connection.onEnd());
    transport.room = Number.POSITIVE_INFINITY;
    await after(() => connection.wake("room"));
    expect(count(transport.written, "200 OK")).toBe(1000);
    expect(count(transport.written, "Connection: close")).toBe(1);
    expect(transport.written).toEndWith("\r\nConnection: close\r\n\r\nHi");
  });

  test("answers 500 when the application throws, and serves the others", async () => {
    const broken = Object.defineProperty(new TextSite(""), "text", {
      get: () => expect.unreachable("broken on purpose"),
    });
    const server = new Server(broken, "off", () => {});
    const ask = async (request: string | Buffer) => {
      const transport = new FakeTransport();
      converse(transport, server).onData(Buffer.from(request));
      await nextTurn();
      return transport.written;
    };
    const answer = await ask(GET);
    expect(answer).toStartWith("HTTP/1.1 500 Internal Server Error\r\n");
    expect(answer).not.toContain("broken");
    expect(await ask("OPTIONS / HTTP/1.1\r\nHost: x\r\n\r\n")).toStartWith("HTTP/1.1 204 No Content\r\n");
  });

  test("has a time for a head that no byte of it extends", async () => {
    const { server, transport, connection, receive, after } = connect();
    const start = server.now;
    for (const byte of "GET / HTTP/1.1\r\nX: ") {
      await receive(byte);
      server.now += 100;
    }
    expect(connection.deadline).toBe(start + LIMITS.headTimeoutMs);
    await after(() => connection.wake("late"));
    expect(transport.written).toStartWith("HTTP/1.1 408 Request Timeout\r\n");
    expect(transport.calls).toEqual(["shutdown"]);
    await after(() => connection.wake("late"));
    // Not a reset: the peer's kernel might discard what it has not delivered yet.
    expect(transport.calls).toEqual(["shutdown", "end"]);
  });

  test("has a time for each part of the content that no byte of it extends", async () => {
    const { server, transport, connection, receive, after } = connect();
    await receive("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n");
    const { deadline } = connection;
    expect(deadline).toBe(server.now + LIMITS.contentTimeoutMs);
    for (let i = 0; i < 50; i++) {
      server.now += 100;
      await receive("x");
    }
    expect(connection.deadline).toBe(deadline);
    await after(() => connection.wake("late"));
    expect(transport.written).toStartWith("HTTP/1.1 408 Request Timeout\r\n");
  });

  test("does not count the time in which the process stood still: nobody could read what peers had sent", async () => {
    const { server, transport, connection, receive } = connect();
    await receive("GET / HT");
    connection.deadline = server.now + 1000;
    Bun.sleepSync(1500);
    server.sweep();
    await nextTurn();
    expect(transport.calls).toEqual([]);
    await receive(GET.subarray(8));
    expect(transport.written).toStartWith("HTTP/1.1 200 OK\r\n");
  });

  test("is told to stop: what came together is answered to the last request, which says close", async () => {
    const { server, transport, connection, receive, after } = connect({ room: 10 });
    await receive(several(3));
    server.stop();
    await receive(several(2));
    transport.room = 10_000;
    await after(() => connection.wake("room"));
    expect(count(transport.written, "200 OK")).toBe(5);
    expect(transport.written.lastIndexOf("Connection: close")).toBeGreaterThan(transport.written.lastIndexOf("200 OK"));
    expect(count(transport.written, "Connection: close")).toBe(1);
    expect(transport.calls).toEqual(["pause", "shutdown", "resume"]);
  });

  test("is told to stop while it sends a file: what was asked behind it gets its answer", async () => {
    const root = mkdtempSync(join(tmpdir(), "http-over-tcp-"));
    try {
      writeFileSync(join(root, "large"), Buffer.alloc(300_000));
      const server = new Server(new FileSite(root), "off", () => {});
      const transport = new FakeTransport(1000);
      const connection = converse(transport, server);
      connection.onData(Buffer.from("GET /large HTTP/1.1\r\nHost: x\r\n\r\n"));
      await nextTurn();
      connection.onData(GET);
      server.stop();
      transport.room = 1_000_000;
      connection.wake("room");
      while (count(transport.written, "HTTP/1.1 ") < 2) await nextTurn();
      expect(count(transport.written, "HTTP/1.1 200 OK")).toBe(2);
      expect(count(transport.written, "Connection: close")).toBe(1);
      await nextTurn();
      expect(transport.calls).toContain("shutdown");
    } finally {
      rmSync(root, { recursive: true });
    }
  });

  test("is told to stop: idle it has a moment left, and what it is asked then is answered with a close", async () => {
    const { server, transport, connection, receive, after } = connect();
    await receive(GET);
    await after(() => server.stop());
    expect(connection.deadline).toBeGreaterThanOrEqual(server.now + 250);
    expect(connection.deadline).toBeLessThan(server.now + 1000);
    await receive(several(2));
    expect(count(transport.written, "200 OK")).toBe(3);
    expect(count(transport.written, "Connection: close")).toBe(1);
    expect(transport.calls).toEqual(["shutdown"]);
    let isEmpty = false;
    server.onEmpty = () => (isEmpty = true);
    connection.onClose();
    expect(isEmpty).toBeTrue();
  });

  test("is told to stop while its answer waits for room: once that is taken, it has a moment left, not an idle time", async () => {
    const { server, transport, connection, receive, after } = connect({ room: 10 });
    await receive(GET);
    server.stop();
    transport.room = 10_000;
    await after(() => connection.wake("room"));
    expect(connection.deadline).toBeLessThan(server.now + 1000);
    await receive("\r\n");
    expect(connection.deadline).toBeLessThan(server.now + 1000);
    await after(() => connection.wake("late"));
    expect(count(transport.written, "200 OK")).toBe(1);
    expect(transport.calls).toEqual(["shutdown"]);
  });

  test("logs a head from its own bytes, wherever those have moved", async () => {
    const { connection, log, receive, after } = connect();
    await receive("GET /first HTTP/1.1\r\nHo");
    await receive("st: x\r\n\r\nPOST /second HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n");
    await receive("okGET /third HTTP/1.1\r\nHost: inc");
    await after(() => connection.onEnd());
    expect(log).toEqual([
      "GET /first HTTP/1.1\nHost: x\n\n",
      "POST /second HTTP/1.1\nHost: x\nContent-Length: 2\n\nok\n",
      "GET /third HTTP/1.1\nHost: inc\n",
    ]);
  });

  test("logs a request with the start of its content, and says how much there is more", async () => {
    const { log, receive } = connect();
    await receive("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n");
    for (let i = 0; i < 3; i++) await receive(Buffer.alloc(1000, "x"));
    expect(log).toEqual([`POST / HTTP/1.1\nHost: x\nContent-Length: 3000\n\n${"x".repeat(1024)}\n(1976 more bytes)\n`]);
  });

  test("keeps of a read only what it has not used, and nothing once it is idle", async () => {
    const { server, receive } = connect();
    await receive(Buffer.concat([several(10_000), GET.subarray(0, 10)]));
    expect(server.waitingBytes).toBeLessThan(1000);
    await receive(GET.subarray(10));
    expect(server.waitingBytes).toBe(0);
  });

  test("parses a long head that comes a byte at a time only now and then, and refuses it all the same", async () => {
    const head = `GET / HTTP/1.1\r\nHost: x\r\nX: ${"x".repeat(20_000)}`;
    const started = performance.now();
    const { transport, connection } = connect();
    for (const byte of Buffer.from(head)) {
      connection.onData(Buffer.of(byte));
      await Promise.resolve();
    }
    await nextTurn();
    expect(performance.now() - started).toBeLessThan(2000);
    connection.onData(Buffer.from("\0"));
    await nextTurn();
    connection.onEnd();
    await nextTurn();
    expect(transport.written).toContain("\r\n\r\na control character in a field-value\n");
  });
});

test("text mode has an answer for every method", () => {
  const site = new TextSite("Hi");
  const statusOf = (method: string) => {
    const head = new RequestHead(LIMITS);
    const bytes = Buffer.from(`${method} / HTTP/1.0\r\n\r\n`);
    parseRequestHead(head, bytes, 0, bytes.length);
    return (site.refuse(head) ?? site.respond(head)).status;
  };
  expect(["GET", "HEAD", "POST", "OPTIONS", "PUT", "TRACE", "BREW"].map(statusOf)).toEqual([
    200, 200, 200, 204, 405, 405, 501,
  ]);
});

test.each([
  ["/", "/", ""],
  ["/a%20b?c=d?e", "/a%20b", "c=d?e"],
  ["/a?", "/a", ""],
  ["http://x", "/", ""],
  ["HTTP://x:1?q", "/", "q"],
  ["http://x/a/b?c", "/a/b", "c"],
  ["//evil/a", "//evil/a", ""],
])("the request-target %s has the path %s and the query %j", (target, path, query) => {
  const head = new RequestHead(LIMITS);
  const bytes = Buffer.from(`GET ${target} HTTP/1.1\r\nHost: x\r\nA: b\r\na:c\r\n\r\n`);
  expect(parseRequestHead(head, bytes, 0, bytes.length)).toBe(bytes.length);
  expect([head.method, head.path, head.query, head.fields.get("a")]).toEqual(["GET", path, query, "b, c"]);
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
      Buffer.from(robust.formatRequest({ method: "GET", url, fields: [], content: [] }, robust.NOTHING)).toString(),
    ).toMatch(
      /^GET \/a%20b\?c HTTP\/1.1\r\nHost: \[::1\]:81\r\nUser-Agent: http-over-tcp\/[\d.]+\r\nAccept: \*\/\*\r\nAccept-Encoding: identity\r\nWant-Repr-Digest: sha-256=10\r\nConnection: close\r\n\r\n$/,
    );
  });

  test.each([
    ["http://h/?", "/?"],
    ["http://h?#x", "/?"],
    ["http://h#x?", "/"],
    ["http://user:pass@h/a?b=http://c/d#e", "/a?b=http://c/d"], // as a redirect may name it
  ])("%s is asked for as %s", (href, target) => {
    const request = { method: "GET", url: new URL(href), fields: [], content: [] };
    const [line] = Buffer.from(robust.formatRequest(request, robust.NOTHING)).toString().split("\r\n", 1);
    expect(line).toBe(`GET ${target} HTTP/1.1`);
  });

  test("seconds are a decimal number, above 0 and up to 2000000", () => {
    const maxMs = (text: string) => robust.parseCommandLine([`--max-time=${text}`]).maxMs;
    const right = ["0.5", ".5", "00.50", "1999999.5", "2000000", "02000000.00"];
    expect(right.map(maxMs)).toEqual([500, 500, 500, 1_999_999_500, 2_000_000_000, 2_000_000_000]);
    for (const text of ["", "0", "0.0", "5.", "1e3", "-1", "2000000.01", "2000001", "10000000"])
      expect(() => maxMs(text)).toThrow("--max-time takes seconds");
  });

  test("a request that cannot be sent is the failure of the send, exit 55", async () => {
    const connection = new robust.Connection(robust.parseCommandLine(["--stall-timeout", "1"]));
    const gone = {
      write() {
        setImmediate(() => connection.handlers.close(gone));
        return -1;
      },
    } as unknown as Bun.Socket; // all that is called of it
    connection.handlers.open(gone);
    const failure = await connection.send(GET).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(robust.TransferError);
    expect((failure as robust.TransferError).outcome).toBe("send"); // as just checked
    expect(robust.EXIT_CODES.send).toBe(55);
  });

  test("what was received before a reset is delivered before the failure", async () => {
    const connection = new robust.Connection(robust.parseCommandLine(["--stall-timeout", "1"]));
    const socket = {} as Bun.Socket; // nothing is called of it
    connection.handlers.data(socket, Buffer.from("a"));
    connection.handlers.close(socket, Object.assign(new Error("reset"), { code: "ECONNRESET" }));
    expect(await connection.receive()).toEqual(Buffer.from("a"));
    expect(connection.receive()).rejects.toThrow("the connection was lost: ECONNRESET");
  });
});

describe("fitLimits", () => {
  test("leaves the limits as they are if there are descriptors enough, or if nobody says how many", () => {
    expect(fitLimits(LIMITS, Number.POSITIVE_INFINITY, 2)).toEqual({ limits: LIMITS, reserve: 256 });
    expect(fitLimits(LIMITS, 1_048_576, 2)).toEqual({ limits: LIMITS, reserve: 256 });
  });

  test.each([64, 256, 1024, 20_000])("never lets more be open than %d descriptors allow", (descriptors) => {
    for (const each of [1, 2] as const) {
      const { limits, reserve } = fitLimits(LIMITS, descriptors, each);
      expect(limits.connectionsMax).toBeGreaterThanOrEqual(descriptors / 8);
      expect(each * limits.connectionsMax + 3 * reserve).toBeLessThan(descriptors - 10);
    }
  });
});

describe("ChunkedDecoder", () => {
  test("keeps nothing of an extension, however long it is, and checks each byte of it once", () => {
    const decoder = new ChunkedDecoder(LIMITS, false);
    const length = 1_048_576;
    const start = Buffer.from(`${length.toString(16)}\r\n${"x".repeat(length)}\r\n`);
    for (let at = 0; at < start.length;) at = decoder.next(start, at, start.length);
    const text = Buffer.concat([Buffer.from('1;a="'), Buffer.alloc(100_000, 'a;=\t\\"')]);
    const started = performance.now();
    // As if it came a byte at a time: no byte of the line is used before its end is there.
    for (let to = 5; to < text.length; to++) expect(decoder.next(text, 0, to)).toBe(0);
    expect(performance.now() - started).toBeLessThan(2000);
    expect(decoder.state).toBe("line");
    decoder.next(Buffer.alloc(200_000, "1;a"), 0, 200_000); // longer than any line may be
    expect(decoder.fault).toBe("chunk-extension");
  });

  test("bounds all extensions together by the content that they come with", () => {
    const decoder = new ChunkedDecoder(LIMITS, false);
    const chunk = Buffer.from(`1;a=${"x".repeat(1000)}\r\nx\r\n`);
    let chunks = 0;
    for (; decoder.fault === undefined && chunks < 100; chunks++)
      for (let at = 0; at < chunk.length && decoder.fault === undefined;) at = decoder.next(chunk, at, chunk.length);
    expect([decoder.fault, chunks]).toEqual(["chunk-extension", 5]);
  });

  test.each([
    ["an extension that is too long", `1${";a".repeat(65_000)}\r\n`, LIMITS.chunkExtensionBytesMax, "chunk-extension"],
    ["a long quoted string", `1;a="${"x".repeat(130_000)}"\r\n`, 1_048_576, undefined],
  ] as const)("takes no time for %s", (_, text, chunkExtensionBytesMax, fault) => {
    const line = Buffer.from(text);
    const before = process.cpuUsage();
    for (let times = 0; times < 10; times++) {
      const decoder = new ChunkedDecoder({ ...LIMITS, chunkExtensionBytesMax }, false);
      decoder.next(line, 0, line.length);
      expect(decoder.fault).toBe(fault);
    }
    const { user, system } = process.cpuUsage(before);
    expect(user + system).toBeLessThan(500_000);
  });
});
