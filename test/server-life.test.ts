/**
 * What a connection to server.ts lives through, over real sockets: deadlines that are renewed and some that are not,
 * peers that read slowly, stop reading, leave or half-close, and what must not carry over to the next request.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, readdirSync, readFileSync, statSync, truncateSync, utimesSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { exchange, hasTool, makeCertificate, Peer, run, startServer, temporaryFolder, VARIANTS } from "./harness.ts";

// A test that waits for a deadline waits beside the others.
setDefaultTimeout(60_000);

const GET = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
const GET_AND_CLOSE = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
const POST = "POST / HTTP/1.1\r\nHost: x\r\n";
const CONTINUE = "HTTP/1.1 100 Continue\r\n\r\n";
const MIB = 2 ** 20;

const count = (text: string, part: string) => text.split(part).length - 1;
const statusOf = (response: string) => Number(/^HTTP\/1.1 (\d{3}) /.exec(response)?.[1]);
/** The statuses of all answers in a stream, 100 included. */
const statusesOf = (stream: string) => [...stream.matchAll(/HTTP\/1\.1 (\d{3}) /g)].map(([, status]) => Number(status));

/** The resident memory of a process, in MiB. */
const residentMiB = (pid: number) =>
  Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;

/** How many files and sockets a process has open. */
const openFiles = (pid: number) => readdirSync(`/proc/${pid}/fd`).length;

/** Waits for what no event tells. @throws where it does not come true within the time */
async function until(what: string, isTrue: () => boolean, milliseconds = 30_000): Promise<void> {
  const deadline = performance.now() + milliseconds;
  while (!isTrue()) {
    if (performance.now() > deadline) throw new Error(`it did not come to this: ${what}`);
    await Bun.sleep(10);
  }
}

/**
 * Sends a request many times and FIN or not, then reads `slow` times a little with pauses between, and then all; prints
 * the bytes that came, the answers among them, and how the connection went on. Its receive buffer is small, so that the
 * server notices at once how slow it is.
 */
const SLOW_READER = `
import socket, sys, threading, time
port, request, times, slow, piece, pause = int(sys.argv[1]), sys.argv[2].encode(), *map(float, sys.argv[3:7])
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
s.connect(("127.0.0.1", port))
s.settimeout(20)
t = threading.Thread(target=lambda: s.sendall(request * int(times)))
t.start()
bytes, answers, tail = 0, 0, b""
def take(n):
    global bytes, answers, tail
    data = s.recv(n)
    bytes += len(data)
    tail += data
    answers += tail.count(b"HTTP/1.1 200 OK")
    tail = tail[-14:]
    return data
expected = int(sys.argv[7])
try:
    for i in range(int(slow)):
        take(int(piece))
        time.sleep(pause)
    while answers < int(times) or bytes < expected:
        if not take(1 << 20): break
    t.join()
    print(answers, bytes >= expected, flush=True)
    while select_more := int(sys.argv[8]):
        time.sleep(0.2)
        s.sendall(request.split(b" ")[0] + b" /again HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
        rest = b"".join(iter(lambda: s.recv(65536), b""))
        print("again", len(rest) > 0, flush=True)
        break
except OSError as e: print("cut off after", answers, bytes, e)`;

describe.each(VARIANTS)("a connection (%s)", (variant) => {
  const serve = (...args: string[]) => startServer(variant, ["--log", "off", ...args]);

  /** A server on a folder with these files. */
  async function serveFiles(files: Readonly<Record<string, string | Uint8Array>>, ...args: string[]) {
    const folder = await temporaryFolder();
    for (const [name, content] of Object.entries(files)) {
      mkdirSync(dirname(join(folder.path, name)), { recursive: true });
      writeFileSync(join(folder.path, name), content);
    }
    const server = await startServer(variant, ["--log", "off", "--root", folder.path, ...args]);
    const dispose = async () => {
      await server[Symbol.asyncDispose]();
      await folder[Symbol.asyncDispose]();
    };
    return { ...server, folder: folder.path, [Symbol.asyncDispose]: dispose };
  }

  // ── deadlines ──

  test.concurrent("has its idle time, and its time for a head, anew after each answer", async () => {
    await using server = await serve("--idle-timeout-ms", "2500", "--head-timeout-ms", "2500");
    const keepAsking = async (first: string, second: string) => {
      using peer = await Peer.connect(server.port);
      for (let i = 0; i < 24; i++) {
        peer.received = "";
        await peer.send(first);
        await Bun.sleep(75);
        await peer.send(second);
        await peer.waitFor(/^HTTP\/1\.1 200 [^]*Hello, World!$/);
        await Bun.sleep(75);
      }
    };
    // Halves of a head a little apart: these moments add up to more than one head may take. And whole ones.
    await Promise.all([keepAsking("GET / HTTP/1.1\r\n", "Host: x\r\n\r\n"), keepAsking("", GET)]);
  });

  test.concurrent("counts the time for a head from its first byte, however long it was idle before", async () => {
    await using server = await serve("--idle-timeout-ms", "20000", "--head-timeout-ms", "1500");
    using peer = await Peer.connect(server.port);
    await peer.send(GET);
    await peer.waitFor(/Hello, World!$/);
    await Bun.sleep(2000);
    await peer.send("GET / HTTP/1.1\r\nHo");
    await Bun.sleep(50);
    await peer.send("st: x\r\n\r\n");
    await peer.waitFor(/Hello, World![^]*Hello, World!$/);
    // An empty line is no beginning of a request: it is not answered, and does not end the idle time early.
    await peer.send("\r\n");
    await Bun.sleep(2000);
    await peer.send(GET_AND_CLOSE);
    await peer.closed;
    expect(statusesOf(peer.received)).toEqual([200, 200, 200]);
  });

  test.concurrent("is closed without a word when it was idle for too long, empty lines or not", async () => {
    await using server = await serve("--idle-timeout-ms", "300");
    expect(statusesOf(await exchange(server.port, [GET, "\r\n"]))).toEqual([200]);
    expect(statusesOf(await exchange(server.port, [GET + "\r\n"]))).toEqual([200]);
  });

  test.concurrent("gets 408 for content that comes a byte at a time, whatever came quickly before", async () => {
    await using server = await serve("--content-timeout-ms", "500");
    const trickle = async (first: string) => {
      using peer = await Peer.connect(server.port);
      let isClosed = false;
      void peer.closed.then(() => (isClosed = true));
      await peer.send(`${POST}Content-Length: 100000\r\n\r\n${first}`);
      while (!isClosed && !peer.received.includes("\r\n\r\n")) {
        await peer.send("x");
        await Promise.race([peer.closed, Bun.sleep(50)]);
      }
      return statusOf(peer.received);
    };
    expect(await Promise.all([trickle(""), trickle("x".repeat(20_000))])).toEqual([408, 408]);
  });

  test.concurrent("has time for its content as long as enough of it comes, and anew for each request", async () => {
    await using server = await serve("--content-timeout-ms", "2500");
    using peer = await Peer.connect(server.port);
    for (const pieces of [30, 3]) {
      peer.received = "";
      await peer.send(`${POST}Content-Length: ${3000 * pieces}\r\n\r\n`);
      for (let i = 0; i < pieces; i++) {
        await peer.send("x".repeat(3000));
        await Bun.sleep(100); // 30 of them take longer than one interval
      }
      await peer.waitFor(/^HTTP\/1\.1 200 [^]*Hello, World!$/);
    }
  });

  test.concurrent(
    "is not cut off while it takes some of its answers now and then, and is idle only after",
    async () => {
      await using server = await serve(
        "--write-timeout-ms",
        "500",
        "--idle-timeout-ms",
        "600",
        "--text",
        "x".repeat(100_000),
      );
      const args = [String(server.port), GET, "150", "20", "8192", "0.1", String(150 * 100_000), "1"];
      expect((await run(["python3", "-c", SLOW_READER, ...args])).stdout).toBe("150 True\nagain True\n");
    },
  );

  test.concurrent("is not cut off while it takes some of its file now and then, and is idle only after", async () => {
    await using server = await serveFiles(
      { file: new Uint8Array(12 * MIB), again: "again" },
      ...["--write-timeout-ms", "500", "--idle-timeout-ms", "1500"],
    );
    const request = "GET /file HTTP/1.1\r\nHost: x\r\n\r\n";
    const args = [String(server.port), request, "1", "20", "8192", "0.1", String(12 * MIB), "1"];
    expect((await run(["python3", "-c", SLOW_READER, ...args])).stdout).toBe("1 True\nagain True\n");
  });

  test.concurrent("is cut off when it takes nothing of its file", async () => {
    await using server = await serveFiles({ file: new Uint8Array(12 * MIB) }, "--write-timeout-ms", "300");
    const before = openFiles(server.child.pid);
    using peer = await Peer.connect(server.port);
    await peer.send("GET /file HTTP/1.1\r\nHost: x\r\n\r\n");
    await peer.waitFor(/\r\n\r\n\0/);
    peer.pause();
    expect(openFiles(server.child.pid)).toBeGreaterThan(before);
    await until("socket and file are closed", () => openFiles(server.child.pid) <= before);
  });

  test.concurrent("is told the time of each answer", async () => {
    await using server = await serve();
    using peer = await Peer.connect(server.port);
    await peer.send(GET);
    await peer.waitFor(/Hello, World!$/);
    await Bun.sleep(1500);
    const asked = Date.now();
    await peer.send(GET_AND_CLOSE);
    await peer.closed;
    const [first = 0, second = 0] = [...peer.received.matchAll(/Date: (.*)\r\n/g)].map(([, date = ""]) =>
      Date.parse(date),
    );
    expect(second - first).toBeGreaterThanOrEqual(1000);
    expect(second).toBeGreaterThan(asked - 2000);
    expect(second).toBeLessThanOrEqual(Date.now());
  });

  // ── what belongs to one request ──

  test.concurrent("is told to go on where it asks, and nowhere else", async () => {
    await using server = await serve();
    const expectation = "Expect: 100-continue\r\n";
    using peer = await Peer.connect(server.port);
    await peer.send(`GET / HTTP/1.1\r\nHost: x\r\n${expectation}\r\n`);
    await peer.waitFor(/^HTTP\/1\.1 200 [^]*Hello, World!$/);
    peer.received = "";
    // The head alone, and the content a moment later: 100 would come between them.
    const post = async (to: Peer, fields = "") => {
      await to.send(`${POST}${fields}Content-Length: 2\r\n\r\n`);
      if (fields.includes("Expect")) await to.waitFor(/100 Continue\r\n\r\n$/);
      else await Bun.sleep(150);
      await to.send("ok");
      await to.waitFor(/Hello, World!$/);
      const { received } = to;
      to.received = "";
      return statusesOf(received);
    };
    expect(await post(peer)).toEqual([200]);
    expect(await post(peer, expectation)).toEqual([100, 200]);
    expect(await post(peer)).toEqual([200]);
    expect(await post(peer, expectation)).toEqual([100, 200]);
    using other = await Peer.connect(server.port);
    expect(await post(other)).toEqual([200]);
    // Nor where the content is already there.
    const whole = `${POST}${expectation}Content-Length: 2\r\n\r\nok`;
    expect(statusesOf(await exchange(server.port, [whole + whole + GET_AND_CLOSE]))).toEqual([200, 200, 200]);
    const old = await exchange(server.port, [`POST / HTTP/1.0\r\n${expectation}Content-Length: 2\r\n\r\n`, "ok"]);
    expect(statusesOf(old)).toEqual([200]);
  });

  test.concurrent("asks for chunked content too, and once", async () => {
    await using server = await serve();
    using peer = await Peer.connect(server.port);
    await peer.send(`${POST}Expect: 100-continue\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n`);
    await peer.waitFor(/100 Continue\r\n\r\n$/);
    for (const piece of ["2\r\n", "ok", "\r\n", "0\r\n", "\r\n"]) {
      await peer.send(piece);
      await Bun.sleep(20);
    }
    await peer.closed;
    expect(statusesOf(peer.received)).toEqual([100, 200]);
    expect(peer.received).toStartWith(CONTINUE);
  });

  test.concurrent("may send content of exactly the limit, again and again, and not a byte more", async () => {
    await using server = await serve("--content-bytes-max", "100");
    const plain = (length: number) => `${POST}Content-Length: ${length}\r\n\r\n${"x".repeat(length)}`;
    const chunked = (...lengths: number[]) =>
      `${POST}Transfer-Encoding: chunked\r\n\r\n${lengths.map((length) => `${length.toString(16)}\r\n${"x".repeat(length)}\r\n`).join("")}0\r\n\r\n`;
    const allowed = [plain(100), chunked(100), chunked(40, 60), chunked(1, 98, 1), plain(100), GET_AND_CLOSE];
    expect(statusesOf(await exchange(server.port, [allowed.join("")]))).toEqual(Array(6).fill(200));
    expect(statusesOf(await exchange(server.port, allowed))).toEqual(Array(6).fill(200));
    for (const refused of [plain(101), chunked(101), chunked(40, 61), chunked(1, 99, 1)]) {
      expect(statusesOf(await exchange(server.port, [refused]))).toEqual([413]);
      expect(statusesOf(await exchange(server.port, [refused.slice(0, 90), refused.slice(90)]))).toEqual([413]);
    }
  });

  test.concurrent("content is never taken for a request, wherever it is split", async () => {
    await using server = await serve();
    const inner = "GET /inner HTTP/1.1\r\nHost: x\r\n\r\n";
    const requests = [
      `${POST}Content-Length: ${inner.length}\r\n\r\n${inner}`,
      `${POST}Transfer-Encoding: chunked\r\n\r\n${inner.length.toString(16)};a=b\r\n${inner}\r\n0\r\nX: y\r\n\r\n`,
      GET_AND_CLOSE,
    ].join("");
    for (let at = 40; at < requests.length; at += 7)
      expect(statusesOf(await exchange(server.port, [requests.slice(0, at), requests.slice(at)]))).toEqual([
        200, 200, 200,
      ]);
  });

  test.concurrent("each request is logged as it came, also when another peer's comes in between", async () => {
    await using server = await startServer(variant, []);
    using one = await Peer.connect(server.port);
    using other = await Peer.connect(server.port);
    await one.send("GET /first HTTP/1.1\r\nHo");
    await Bun.sleep(20);
    await other.send("POST /other HTTP/1.1\r\nHost: x\r\nContent-Le");
    await Bun.sleep(20);
    await one.send("st: one\r\n\r\nPOST /second HTTP/1.1\r\nHost: one\r\nContent-Length: 3000\r\n\r\n");
    await one.waitFor(/Hello, World!$/);
    await other.send("ngth: 2\r\n\r\no");
    for (const piece of ["a", "b", "c"]) {
      await one.send(piece.repeat(1000));
      await Bun.sleep(20);
    }
    await one.waitFor(/Hello, World![^]*Hello, World!$/);
    await other.send("kGET /third HTTP/1.1\r\nHost: inc");
    await other.waitFor(/Hello, World!$/);
    other.finish();
    await other.closed;
    await server.stdout.waitFor(/Host: inc\n$/);
    expect(server.stdout.text).toBe(
      [
        "GET /first HTTP/1.1\nHost: one\n\n",
        `POST /second HTTP/1.1\nHost: one\nContent-Length: 3000\n\n${"a".repeat(1000)}${"b".repeat(24)}\n(1976 more bytes)\n`,
        "POST /other HTTP/1.1\nHost: x\nContent-Length: 2\n\nok\n",
        "GET /third HTTP/1.1\nHost: inc\n",
      ].join(""),
    );
    expect(statusesOf(other.received)).toEqual([200, 400]);
  });

  test.concurrent(
    "--log wire shows each step: what came and what it completed, what was taken, how it ended",
    async () => {
      await using server = await startServer(variant, ["--log", "wire", "--idle-timeout-ms", "300"]);
      /** The steps of a connection so far, without its number and the times. */
      const stepsOf = (number: number) =>
        [...server.stdout.text.matchAll(new RegExp(`^#${number} +\\d+\\.\\d ms  (.*)\n`, "gm"))].map(
          ([, step]) => step,
        );
      using one = await Peer.connect(server.port);
      await one.send("GET /da");
      await server.stdout.waitFor(/nothing yet/);
      await one.send("ta HTTP/1.1\r\nHost: x\r\n\r\n\r\nPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\na\x1b");
      await server.stdout.waitFor(/head \(2 times\), content\n/);
      await one.send("[m");
      await one.closed;
      await server.stdout.waitFor(/^#1.* FIN +received\n/m);
      expect(stepsOf(1)).toEqual([
        "connect  from 127.0.0.1",
        'receive  7 B  "GET /da"  nothing yet',
        'receive  75 B  "ta HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n\\r\\nPOST / HTTP/1."…  head (2 times), content',
        "send     130 of 130 B",
        'receive  2 B  "[m"  content complete',
        "send     130 of 130 B",
        "deadline nothing has come in time",
        "close    FIN sent",
        "FIN      received",
      ]);

      using two = await Peer.connect(server.port);
      await two.send('"\\\x1b[31m\xff');
      two.finish();
      await two.closed;
      await server.stdout.waitFor(/^#2.* close .*\n/m);
      expect(stepsOf(2).slice(1, 3)).toEqual([
        'receive  9 B  "\\"\\\\\\x1b[31m\\xc3\\xbf"  nothing yet',
        "refuse   with 400",
      ]);

      using three = await Peer.connect(server.port);
      await three.send("GET / HTTP/1.1\r\n");
      await server.stdout.waitFor(/^#3.*nothing yet\n/m);
      three[Symbol.dispose]();
      await server.stdout.waitFor(/^#3.* reset +received\n/m);
    },
  );

  test.concurrent("the access log tells what each request got, in order, refused ones too", async () => {
    await using server = await startServer(variant, ["--log", "access", "--content-timeout-ms", "300"]);
    await exchange(server.port, [
      `${GET}HEAD /1 HTTP/1.1\r\nHost: x\r\n\r\nOPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n`,
      "POST /2 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\no",
      "kPOST /3 HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n",
    ]);
    await exchange(server.port, ["POST /4 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n1"]);
    await server.stdout.waitFor(/ \/4 .*\n/);
    const lines = server.stdout.text.split("\n").map((line) => line.replace(/\[.*?\]/, ""));
    expect(lines).toEqual([
      '127.0.0.1 - -  "GET / HTTP/1.1" 200 13 "-" "-"',
      '127.0.0.1 - -  "HEAD /1 HTTP/1.1" 200 0 "-" "-"',
      '127.0.0.1 - -  "OPTIONS * HTTP/1.1" 204 0 "-" "-"',
      '127.0.0.1 - -  "POST /2 HTTP/1.1" 200 13 "-" "-"',
      '127.0.0.1 - -  "POST /3 HTTP/1.1" 413 25 "-" "-"',
      expect.stringMatching(/^127\.0\.0\.1 - - {2}"POST \/4 HTTP\/1\.1" 408 \d+ "-" "-"$/),
      "",
    ]);
  });

  // ── peers that do not read, that leave, that half-close ──

  test.concurrent("a peer that sends and does not read is not read from either, and costs little", async () => {
    await using server = await serveFiles({ small: "x".repeat(500), large: new Uint8Array(64 * MIB) });
    const before = residentMiB(server.child.pid);
    const flood = async (first: string) => {
      const code = `
import socket, sys
s = socket.create_connection(("127.0.0.1", ${server.port}))
s.settimeout(0.7)
sent = s.send(sys.argv[1].encode())
piece = b"GET /small HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" * 2000
try:
    while sent < 100000000: sent += s.send(piece)
except TimeoutError: pass
print(sent)`;
      return Number((await run(["python3", "-c", code, first])).stdout);
    };
    // Answers that wait; a file that waits; and a digest that takes its time.
    const digest = "HEAD /large HTTP/1.1\r\nHost: x\r\nWant-Repr-Digest: sha-256=1\r\n\r\n";
    const sent = await Promise.all([flood(""), flood("GET /large HTTP/1.1\r\nHost: x\r\n\r\n"), flood(digest)]);
    for (const bytes of sent) {
      expect(bytes).toBeGreaterThan(0);
      expect(bytes).toBeLessThan(24 * MIB); // what both kernels hold
    }
    expect(residentMiB(server.child.pid) - before).toBeLessThan(64);
  });

  test.concurrent("bytes that waited for a peer are forgotten when it leaves, and when it has read them", async () => {
    await using server = await serve("--waiting-bytes-max", "400000", "--text", "x".repeat(10_000));
    const before = openFiles(server.child.pid);
    const stop = async () => {
      const peer = await Peer.connect(server.port);
      peer.pause();
      await peer.send(GET.repeat(2000));
      // An answer to another shows that the server has come to these, more or less.
      for (let i = 0; i < 3; i++) expect(statusOf(await exchange(server.port, [GET_AND_CLOSE]))).toBe(200);
      return peer;
    };
    for (let i = 0; i < 10; i++) {
      using peer = await stop();
      if (i % 5 > 0) continue;
      peer.resume();
      peer.finish();
      await peer.closed;
    }
    await until("all are gone", () => openFiles(server.child.pid) <= before);
    using last = await stop();
    last.resume();
    last.finish();
    expect(await last.closed).toBe("end");
    expect(count(last.received, "HTTP/1.1 200 OK")).toBe(2000);
  });

  test.concurrent("FIN while answers wait: all of them come, then the server closes", async () => {
    await using server = await serve("--text", "x".repeat(10_000));
    const before = openFiles(server.child.pid);
    const ask = async (requests: string) => {
      using peer = await Peer.connect(server.port);
      peer.pause();
      await peer.send(requests);
      peer.finish();
      await Bun.sleep(100);
      peer.resume();
      expect(await peer.closed).toBe("end");
      return statusesOf(peer.received);
    };
    expect(await ask(GET.repeat(1200))).toEqual(Array(1200).fill(200));
    expect(await ask(`${GET.repeat(1200)}GET /inc`)).toEqual([...Array(1200).fill(200), 400]);
    // At once, not after the time to linger.
    await until("the server has closed", () => openFiles(server.child.pid) <= before, 2000);
  });

  test.concurrent(
    "FIN behind a request for a file or a digest: its answer comes whole, then the server closes",
    async () => {
      await using server = await serveFiles({ file: new Uint8Array(12 * MIB), small: "small" });
      const file = await exchange(server.port, ["GET /file HTTP/1.1\r\nHost: x\r\n\r\n"], { finish: true });
      expect(file.length - file.indexOf("\r\n\r\n") - 4).toBe(12 * MIB);
      const [digest, both] = await Promise.all([
        exchange(server.port, ["HEAD /file HTTP/1.1\r\nHost: x\r\nWant-Repr-Digest: sha-256=1\r\n\r\n"], {
          finish: true,
        }),
        exchange(server.port, ["GET /file HTTP/1.1\r\nHost: x\r\n\r\nGET /small HTTP/1.1\r\nHost: x\r\n\r\n"], {
          finish: true,
        }),
      ]);
      expect(digest).toContain("\r\nRepr-Digest: sha-256=:");
      expect(both).toEndWith("\r\n\r\nsmall");
    },
  );

  test.concurrent("no answer leaves a file open, whatever it says of the file", async () => {
    await using server = await serveFiles({ large: new Uint8Array(MIB), small: "small", "folder/index.html": "index" });
    const before = openFiles(server.child.pid);
    const ask = (method: string, path: string, field = "X: x") =>
      `${method} ${path} HTTP/1.1\r\nHost: x\r\n${field}\r\n\r\n`;
    const requests = ["large", "small", "folder/"].flatMap((path) => [
      ask("HEAD", `/${path}`),
      ask("HEAD", `/${path}`, "Want-Repr-Digest: sha-256=1"),
      ask("GET", `/${path}`, "If-None-Match: *"),
      ask("GET", `/${path}`, 'If-Match: "other"'),
      ask("GET", `/${path}`, "Range: bytes=9999999-"),
      ask("GET", `/${path}`, "Range: bytes=0-2"),
    ]);
    requests.push(ask("GET", "/folder"), ask("GET", "/small/"), ask("GET", "/"), ask("OPTIONS", "/small"));
    using peer = await Peer.connect(server.port);
    const statuses = [200, 200, 304, 412, 416, 206];
    const expected = [...statuses, ...statuses, ...statuses, 301, 404, 200, 204];
    await peer.send(requests.join("").repeat(10));
    peer.finish();
    await peer.closed;
    expect(statusesOf(peer.received)).toEqual(Array(10).fill(expected).flat());
    await until("no file is open", () => openFiles(server.child.pid) <= before);
  });

  test.concurrent(
    "one digest after another is waited for: the place of a response that waited is free again",
    async () => {
      const names = Array.from({ length: 20 }, (_, i) => `file-${i}`);
      await using server = await serveFiles(Object.fromEntries(names.map((name) => [name, new Uint8Array(MIB)])));
      for (const name of names) {
        const digest = `HEAD /${name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nWant-Repr-Digest: sha-256=1\r\n\r\n`;
        expect(await exchange(server.port, [digest])).toContain("\r\nRepr-Digest: sha-256=:");
      }
    },
  );

  test.concurrent("peers that ask for a digest or a listing and leave: no descriptor stays open", async () => {
    const files = Object.fromEntries(Array.from({ length: 20 }, (_, i) => [`f${i}`, new Uint8Array(4 * MIB)]));
    await using server = await serveFiles(files);
    const { pid } = server.child;
    await exchange(server.port, ["GET /f0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]);
    await until("it is at rest", () => openFiles(pid) < 25);
    await Bun.sleep(600);
    const before = openFiles(pid);
    for (const target of ["f", ""]) {
      const peers = await Promise.all(Array.from({ length: 20 }, () => Peer.connect(server.port)));
      for (const [i, peer] of peers.entries()) {
        const path = target === "" ? "/" : `/${target}${i}`;
        await peer.send(`GET ${path} HTTP/1.1\r\nHost: x\r\nWant-Repr-Digest: sha-256=1\r\n\r\n`);
      }
      for (const peer of peers) peer[Symbol.dispose]();
    }
    await until("sockets and files are closed", () => openFiles(pid) <= before);
  });

  test.concurrent("peers that reset, idle or in the middle of something, leave room for others", async () => {
    await using server = await serve("--connections-max", "2");
    const before = openFiles(server.child.pid);
    for (const begun of ["", GET, "GET / HT", `${POST}Content-Length: 5\r\n\r\n1`, "nonsense\r\n"])
      for (let i = 0; i < 4; i++) {
        const peer = await Peer.connect(server.port);
        await peer.send(begun);
        if (begun === GET) await peer.waitFor(/(?:Hello, World!|try again later\n)$/);
        peer[Symbol.dispose]();
        if (i === 3) await until("all are gone", () => openFiles(server.child.pid) <= before);
      }
    let status = 503;
    while (status === 503) status = statusOf(await exchange(server.port, [GET_AND_CLOSE]));
    expect(status).toBe(200);
  });

  test.concurrent("a close in order needs no time: the peer's FIN ends it", async () => {
    await using server = await serve();
    const before = openFiles(server.child.pid);
    for (const last of [GET_AND_CLOSE, "nonsense\r\n", "GET / HTTP/1.0\r\n\r\n"]) await exchange(server.port, [last]);
    await exchange(server.port, [GET], { finish: true });
    await until("the server has closed", () => openFiles(server.child.pid) <= before, 2000);
  });

  test.concurrent("the last answer to a peer that has half-closed says close", async () => {
    await using server = await serveFiles({ file: "" });
    // Its digest takes longer than the FIN. A file that has changed within a tick of the clock gets none.
    const path = join(server.folder, "file");
    truncateSync(path, 300 * MIB);
    await until("the tick is over", () => Date.now() - statSync(path).ctimeMs > 20);
    const digest = "HEAD /file HTTP/1.1\r\nHost: x\r\nWant-Repr-Digest: sha-256=1\r\n\r\n";
    const answer = await exchange(server.port, [digest], { finish: true });
    expect(answer).toMatch(/^HTTP\/1\.1 200 OK\r\n[^]*\r\nConnection: close\r\n\r\n$/);
  });

  test.concurrent("a well-formed request leaves the connection open, whatever its status", async () => {
    await using server = await serveFiles({ file: "0123456789" });
    const ask = (line: string, ...fields: string[]) =>
      `${[`${line} HTTP/1.1`, "Host: x", ...fields].join("\r\n")}\r\n\r\n`;
    const requests = [
      ask("GET /nothing"),
      ask("HEAD /nothing"),
      ask("POST /file", "Content-Length: 3") + "abc",
      ask("DELETE /file"),
      ask("BREW /file"),
      ask("GET /file", 'If-Match: "x"'),
      ask("GET /file", "Range: bytes=10-"),
      ask("GET /file", "Connection: close"),
    ];
    const stream = await exchange(server.port, [requests.join("")]);
    expect(statusesOf(stream)).toEqual([404, 404, 405, 405, 501, 412, 416, 200]);
    expect(count(stream, "Connection: close")).toBe(1);
    expect(statusesOf(await exchange(server.port, requests))).toEqual([404, 404, 405, 405, 501, 412, 416, 200]);
    // What leaves in doubt where the next request starts closes.
    const next = ask("GET /file", "Connection: close");
    const refused = {
      400: ["GET / HTTP/1.1\r\n\r\n", ask("GET /../file"), ask("GET /", "Content-Length: x")],
      413: [ask("GET /", "Content-Length: 9999999")],
      414: [ask(`GET /${"x".repeat(9000)}`)],
      417: [ask("GET /", "Expect: x")],
      431: [ask("GET /", `X: ${"x".repeat(40_000)}`)],
      501: [ask("GET /", "Transfer-Encoding: gzip, chunked")],
      505: [ask("GET /").replace("1.1", "2.0")],
    };
    for (const [status, ones] of Object.entries(refused))
      for (const one of ones) {
        const answer = await exchange(server.port, [one + next]);
        expect([statusesOf(answer), count(answer, "Connection: close")]).toEqual([[Number(status)], 1]);
      }
  });

  test.concurrent("a refused method is told so before its content is judged", async () => {
    await using server = await serveFiles({ file: "x" });
    const upload = "POST /file HTTP/1.1\r\nHost: x\r\n";
    for (const content of [
      `Content-Length: 1500000\r\n\r\n${"x".repeat(1_500_000)}`,
      "Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
      "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n",
    ]) {
      const answer = await exchange(server.port, [upload + content]);
      expect([statusesOf(answer), count(answer, "Connection: close")]).toEqual([[405], 1]);
    }
    expect(await exchange(server.port, ["GET /b\xc3\xbccher HTTP/1.1\r\nHost: x\r\n\r\n"])).toEndWith(
      "percent-encode it\n",
    );
  });

  test.concurrent("a file is never modified after the Date of its answer", async () => {
    await using server = await serveFiles({ file: "x" });
    const path = join(server.folder, "file");
    const until = Date.now() + 1500;
    for (let i = 0; Date.now() < until; i++) {
      writeFileSync(path, String(i));
      const answer = await exchange(server.port, ["GET /file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]);
      const time = (name: string) => Date.parse(new RegExp(`\r\n${name}: (.*)\r\n`).exec(answer)?.[1] ?? "");
      expect(time("Last-Modified")).toBeLessThanOrEqual(time("Date"));
    }
  });

  test.concurrent("the access log knows the address of a peer that has left during a file", async () => {
    await using server = await serveFiles({ file: new Uint8Array(64 * MIB) }, "--log", "access");
    for (let i = 0; i < 5; i++) {
      using peer = await Peer.connect(server.port);
      await peer.send(`GET /file?${i} HTTP/1.1\r\nHost: x\r\n\r\n`);
      await peer.waitFor(/\r\n\r\n\0/);
      peer.pause();
    }
    await server.stdout.waitFor(/(?:[^]*?\n){5}/);
    expect(server.stdout.text.split("\n").map((line) => line.split(" ", 1)[0])).toEqual([
      ...Array(5).fill("127.0.0.1"),
      "",
    ]);
  });

  // ── a stop ──

  test.concurrent("SIGTERM while answers wait: what comes is whole, the last one says close, exit 0", async () => {
    await using server = await serve("--text", "x".repeat(10_000));
    using peer = await Peer.connect(server.port);
    peer.pause();
    await peer.send(GET.repeat(1500));
    expect(statusOf(await exchange(server.port, [GET_AND_CLOSE]))).toBe(200);
    server.child.kill("SIGTERM");
    await Bun.sleep(100);
    peer.resume();
    await peer.closed;
    // A peer that goes on and on is stopped after a moment: how many are answered until then is a matter of time.
    const answers = peer.received.split("HTTP/1.1 200 OK\r\n").slice(1);
    expect(answers.length).toBeGreaterThan(10);
    expect(answers.every((answer) => answer.endsWith(`\r\n\r\n${"x".repeat(10_000)}`))).toBeTrue();
    expect(answers.findIndex((answer) => answer.includes("\r\nConnection: close\r\n"))).toBe(answers.length - 1);
    expect(await server.child.exited).toBe(0);
  });

  test.concurrent("SIGTERM while a file is sent: what was asked behind it is answered, exit 0", async () => {
    await using server = await serveFiles({ file: new Uint8Array(12 * MIB), small: "small" });
    using peer = await Peer.connect(server.port);
    await peer.send("GET /file HTTP/1.1\r\nHost: x\r\n\r\nGET /small HTTP/1.1\r\nHost: x\r\n\r\n");
    await peer.waitFor(/\r\n\r\n\0/);
    peer.pause();
    server.child.kill("SIGTERM");
    await Bun.sleep(50);
    peer.resume();
    await peer.closed;
    expect(statusesOf(peer.received)).toEqual([200, 200]);
    expect(peer.received).toMatch(/Connection: close\r\n\r\nsmall$/);
    expect(await server.child.exited).toBe(0);
  });

  test.concurrent("SIGTERM: the last peer leaves in the middle of a file, and the log has its line", async () => {
    await using server = await serveFiles({ file: new Uint8Array(12 * MIB) }, "--log", "access");
    using idle = await Peer.connect(server.port);
    using peer = await Peer.connect(server.port);
    await peer.send("GET /file HTTP/1.1\r\nHost: x\r\n\r\n");
    await peer.waitFor(/\r\n\r\n\0/);
    peer.pause();
    server.child.kill("SIGTERM");
    expect(await idle.closed).toBe("end");
    peer[Symbol.dispose]();
    await server.stdout.waitFor(/"GET \/file HTTP\/1.1" 200 \d+ /);
    expect(await server.child.exited).toBe(0);
  });

  test.concurrent(
    "SIGTERM: requests that are on their way to an idle connection are still answered, all of them",
    async () => {
      await using server = await serve();
      using peer = await Peer.connect(server.port);
      await peer.send(GET);
      await peer.waitFor(/Hello, World!$/);
      // Both are there when the server looks again.
      server.child.kill("SIGSTOP");
      server.child.kill("SIGTERM");
      await peer.send(GET.repeat(3));
      await Bun.sleep(50);
      server.child.kill("SIGCONT");
      await peer.closed;
      expect(statusesOf(peer.received)).toEqual([200, 200, 200, 200]);
      // The last answer says close if the server learned of the stop first.
      const says = peer.received.split("HTTP/1.1 200 OK").map((answer) => answer.includes("Connection: close"));
      expect(says.slice(0, -1)).toEqual([false, false, false, false]);
      expect(await server.child.exited).toBe(0);
    },
  );

  test.concurrent("SIGTERM: content on its way is awaited and answered", async () => {
    await using server = await serve();
    using peer = await Peer.connect(server.port);
    await peer.send(`${POST}Content-Length: 4\r\n\r\n1`);
    await exchange(server.port, [GET_AND_CLOSE]);
    server.child.kill("SIGTERM");
    for (const piece of ["2", "3", "4"]) {
      await Bun.sleep(150);
      await peer.send(piece);
    }
    await peer.closed;
    expect(peer.received).toMatch(/^HTTP\/1\.1 200 OK\r\n[^]*Connection: close\r\n\r\nHello, World!$/);
    expect(await server.child.exited).toBe(0);
  });

  // ── files and TLS ──

  test.concurrent("Last-Modified tells the second in which a file was modified, not the next one", async () => {
    await using server = await serveFiles({ file: "x" });
    const modified = 1_000_000_000.9;
    utimesSync(join(server.folder, "file"), modified, modified);
    const date = "Sun, 09 Sep 2001 01:46:40 GMT";
    const get = (...lines: string[]) =>
      exchange(server.port, [
        `${["GET /file HTTP/1.1", "Host: x", "Connection: close", ...lines].join("\r\n")}\r\n\r\n`,
      ]);
    expect(await get()).toContain(`\r\nLast-Modified: ${date}\r\n`);
    expect(statusOf(await get(`If-Modified-Since: ${date}`))).toBe(304);
    expect(statusOf(await get("If-Modified-Since: Sun, 09 Sep 2001 01:46:39 GMT"))).toBe(200);
    expect(statusOf(await get(`If-Unmodified-Since: ${date}`))).toBe(200);
    expect(statusOf(await get("Range: bytes=0-0", `If-Range: ${date}`))).toBe(206);
  });

  test.concurrent.if(hasTool("openssl"))(
    "over TLS the same holds for slow readers, half-closes and excess",
    async () => {
      await using folder = await temporaryFolder();
      const { cert, key } = await makeCertificate(folder.path);
      const content = new Uint8Array(6 * MIB).fill(0x61);
      const flags = ["--tls-cert", cert, "--tls-key", key, "--write-timeout-ms", "600", "--connections-max", "2"];
      await using server = await serveFiles({ file: content, small: "small" }, ...flags);
      const tls = { ca: await Bun.file(cert).text(), serverName: "localhost" };
      using slow = await Peer.connect(server.port, tls);
      await slow.send("GET /file HTTP/1.1\r\nHost: x\r\n\r\nGET /small HTTP/1.1\r\nHost: x\r\n\r\n");
      await slow.waitFor(/\r\n\r\na/);
      for (let i = 0; i < 8; i++) {
        slow.pause();
        await Bun.sleep(100);
        slow.resume();
        await Bun.sleep(5);
      }
      using second = await Peer.connect(server.port, tls);
      await second.send("GET /small HTTP/1.1\r\nHost: x\r\n\r\n");
      await second.waitFor(/small$/);
      using third = await Peer.connect(server.port, tls);
      await third.closed;
      expect(statusOf(third.received)).toBe(503);
      expect(third.received).toContain("\r\nConnection: close\r\n");
      slow.finish();
      await slow.closed;
      expect(statusesOf(slow.received)).toEqual([200, 200]);
      expect(slow.received.length).toBeGreaterThan(content.length);
      expect(slow.received).toEndWith("\r\n\r\nsmall");
    },
  );
});
