/** Every limit of server.ts: its flag, and a peer that reaches it. What the peer gets is exact; the times are not. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { LIMITS } from "../server.ts";
import {
  exchange,
  hasTool,
  makeCertificate,
  Peer,
  run,
  startCopy,
  startServer,
  temporaryFolder,
  until,
  VARIANTS,
} from "./harness.ts";

// Tests that wait for a deadline wait beside the others.
setDefaultTimeout(60_000);

const GET = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
const POST = "POST / HTTP/1.1\r\nHost: x\r\n";

/** The milliseconds that something took. */
async function timed(step: () => Promise<unknown>): Promise<number> {
  const start = performance.now();
  await step();
  return performance.now() - start;
}

const statusOf = (response: string) => Number(/^HTTP\/1.1 (\d{3}) /.exec(response)?.[1]);

describe.each(VARIANTS)("limits (%s)", (variant) => {
  const serve = (...args: string[]) => startServer(variant, ["--log", "off", ...args]);

  test.concurrent.each([
    ["--request-target-bytes-max 4", "GET /123 HTTP/1.0\r\n\r\n", 200],
    ["--request-target-bytes-max 4", "GET /1234 HTTP/1.0\r\n\r\n", 414],
    ["--head-bytes-max 40", `GET / HTTP/1.0\r\nX: ${"x".repeat(17)}\r\n\r\n`, 200],
    ["--head-bytes-max 40", `GET / HTTP/1.0\r\nX: ${"x".repeat(18)}\r\n\r\n`, 431],
    ["--field-lines-max 2", "GET / HTTP/1.0\r\nA:\r\nB:\r\n\r\n", 200],
    ["--field-lines-max 2", "GET / HTTP/1.0\r\nA:\r\nB:\r\nC:\r\n\r\n", 431],
    ["--content-bytes-max 4", "POST / HTTP/1.0\r\nContent-Length: 4\r\n\r\n1234", 200],
    ["--content-bytes-max 4", "POST / HTTP/1.0\r\nContent-Length: 5\r\n\r\n", 413],
    ["--content-bytes-max 4", `${POST}Transfer-Encoding: chunked\r\n\r\n4\r\n1234\r\n1\r\n`, 413],
    [
      "--chunk-extension-bytes-max 4",
      `${POST}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n1;a\r\nx\r\n0;bc\r\n\r\n`,
      200,
    ],
    ["--chunk-extension-bytes-max 4", `${POST}Transfer-Encoding: chunked\r\n\r\n1;a\r\nx\r\n0;bcd\r\n\r\n`, 400],
  ])("%s: %j gets %d", async (flag, request, status) => {
    await using server = await serve(...flag.split(" "));
    expect(statusOf(await exchange(server.port, [request]))).toBe(status);
  });

  test.concurrent("--connections-max: one more gets 503 at once, and is served when there is room again", async () => {
    await using server = await serve("--connections-max", "2");
    using first = await Peer.connect(server.port);
    using second = await Peer.connect(server.port);
    for (const peer of [first, second]) {
      await peer.send(GET);
      await peer.waitFor(/Hello, World!$/);
    }
    expect(await exchange(server.port, [])).toMatch(
      /^HTTP\/1.1 503 Service Unavailable\r\n[^]*\r\nConnection: close\r\n\r\n/,
    );
    first.finish();
    await first.closed;
    // The server may see the next connection before the end of the last one.
    let status = 503;
    while (status === 503) status = statusOf(await exchange(server.port, [GET], { finish: true }));
    expect(status).toBe(200);
  });

  test.concurrent(
    "--head-timeout-ms: 408 for a head that is not whole in time, however its bytes trickle in",
    async () => {
      await using server = await serve("--head-timeout-ms", "600");
      using peer = await Peer.connect(server.port);
      let isClosed = false;
      void peer.closed.then(() => (isClosed = true));
      const milliseconds = await timed(async () => {
        await peer.send("GET / HTTP/1.1\r\nX: ");
        while (!isClosed) {
          await peer.send("x");
          await Promise.race([peer.closed, Bun.sleep(50)]);
          if (peer.received.includes("\r\n\r\n")) peer.finish();
        }
      });
      expect(statusOf(peer.received)).toBe(408);
      expect(milliseconds).toBeGreaterThan(550);
      // A second request on a connection that is kept alive has its own time, from its first byte on.
      expect(await exchange(server.port, [GET, "GET /"])).toMatch(/Hello, World!HTTP\/1.1 408 /);
    },
  );

  test.concurrent("--head-timeout-ms: a silent connection is closed without an answer", async () => {
    await using server = await serve("--head-timeout-ms", "300");
    expect(await exchange(server.port, [])).toBe("");
  });

  test.concurrent("--idle-timeout-ms: a connection that is not used again is closed without a word", async () => {
    await using server = await serve("--idle-timeout-ms", "300");
    expect(await exchange(server.port, [GET])).toEndWith("\r\n\r\nHello, World!");
  });

  test.concurrent(
    "--content-timeout-ms: 408 for content that stalls or trickles, not for content that is slow",
    async () => {
      await using server = await serve("--content-timeout-ms", "600");
      expect(statusOf(await exchange(server.port, [`${POST}Content-Length: 5\r\n\r\n`, "1234"]))).toBe(408);
      using slow = await Peer.connect(server.port);
      await slow.send(`${POST}Content-Length: 100000\r\n\r\n`);
      for (let i = 0; i < 20; i++) {
        await slow.send("x".repeat(5000));
        await Bun.sleep(80); // 20 pieces take more than two intervals, and one piece is enough for an interval
      }
      await slow.waitFor(/^HTTP\/1.1 200 OK/);
    },
  );

  test.concurrent(
    "--write-timeout-ms: a peer that takes none of its answers is cut off, and the others are served",
    async () => {
      await using server = await serve("--write-timeout-ms", "500", "--text", "x".repeat(10_000));
      using peer = await Peer.connect(server.port);
      peer.pause();
      await peer.send(GET.repeat(5000));
      expect(statusOf(await exchange(server.port, [GET], { finish: true }))).toBe(200);
      // The paused peer cannot see the reset: the server closes its side of it.
      const files = async () => (await run(["ls", `/proc/${server.child.pid}/fd`])).stdout.split("\n").length;
      const before = await files();
      while ((await files()) >= before) await Bun.sleep(100);
    },
  );

  test.concurrent("--waiting-bytes-max: what all peers together leave unread is bounded", async () => {
    await using server = await serve("--waiting-bytes-max", "200000", "--text", "x".repeat(10_000));
    const peers = await Promise.all(Array.from({ length: 8 }, () => Peer.connect(server.port)));
    for (const peer of peers) peer.pause();
    await Promise.all(peers.map((peer) => Promise.race([peer.send(GET.repeat(20_000)), Bun.sleep(500)])));
    for (const peer of peers) peer.resume();
    const ends = await Promise.all(
      peers.map((peer) => Promise.race([peer.closed, Bun.sleep(1000).then(() => "open")])),
    );
    expect(ends).toContain("reset");
    expect(statusOf(await exchange(server.port, [GET], { finish: true }))).toBe(200);
    for (const peer of peers) peer[Symbol.dispose]();
  });

  test.concurrent("--grace-ms: what does not end in time does not keep the server from stopping", async () => {
    await using server = await serve("--grace-ms", "300");
    using peer = await Peer.connect(server.port);
    await peer.send("GET / HTTP/1.1\r\n");
    await exchange(server.port, [GET], { finish: true });
    const milliseconds = await timed(async () => {
      server.child.kill("SIGTERM");
      expect(await server.child.exited).toBe(0);
    });
    expect(milliseconds).toBeGreaterThan(250);
    expect(milliseconds).toBeLessThan(9000);
  });
});

test.concurrent("four empty lines before a request are skipped, a fifth gets 400", async () => {
  await using server = await startServer("script", ["--log", "off"]);
  const ask = async (emptyLines: number) =>
    statusOf(await exchange(server.port, [`${"\r\n".repeat(emptyLines)}GET / HTTP/1.0\r\n\r\n`]));
  expect(await Promise.all([0, 1, 4, 5].map(ask))).toEqual([200, 200, 200, 400]);
});

test.concurrent("in a flood of connections some get 503, and the rest is disconnected without a word", async () => {
  const change = { "const REFUSED_CONNECTIONS_MAX = 256;": "const REFUSED_CONNECTIONS_MAX = 3;" };
  await using server = await startCopy(change, ["--log", "off", "--connections-max", "2"]);
  // All of them are there when the server looks again.
  server.child.kill("SIGSTOP");
  const peers = await Promise.all(Array.from({ length: 7 }, () => Peer.connect(server.port)));
  server.child.kill("SIGCONT");
  const ends = peers.map((peer) => Promise.race([peer.closed, peer.waitFor(/later\n$/).catch(() => {})]));
  for (let settled = 0; settled < 5; settled++) {
    await Promise.race(ends);
    ends.splice(await Promise.race(ends.map((end, i) => end.then(() => i))), 1);
  }
  const statuses = peers.map(({ received }) => statusOf(received));
  expect(statuses.filter((status) => status === 503).length).toBe(3);
  for (const peer of peers) peer[Symbol.dispose]();
});

test.concurrent.if(hasTool("openssl"))(
  "over TLS, peers that never shake hands count as connections: in a flood they are dropped, SIGTERM waits for none",
  async () => {
    await using folder = await temporaryFolder();
    const { cert, key } = await makeCertificate(folder.path);
    const change = { "const REFUSED_CONNECTIONS_MAX = 256;": "const REFUSED_CONNECTIONS_MAX = 3;" };
    const never = ["--head-timeout-ms", "600000", "--write-timeout-ms", "600000", "--grace-ms", "600000"];
    const flags = ["--log", "off", "--tls-cert", cert, "--tls-key", key, "--connections-max", "2", ...never];
    await using server = await startCopy(change, flags);
    using _first = await Peer.connect(server.port);
    using _second = await Peer.connect(server.port);
    const excess = await Promise.all(Array.from({ length: 5 }, () => Peer.connect(server.port)));
    let dropped = 0;
    for (const peer of excess) void peer.closed.then(() => dropped++);
    await until(() => dropped >= 2);
    expect(dropped).toBe(2);
    for (const peer of excess) peer[Symbol.dispose]();
    server.child.kill("SIGTERM");
    expect(await server.child.exited).toBe(0);
  },
);

test.concurrent.each([
  ["sends on and on", { "const LINGER_MS_MAX = 30_000;": "const LINGER_MS_MAX = 300;" }, 0.05],
  ["sends nothing", { "const LINGER_TIMEOUT_MS = 5000;": "const LINGER_TIMEOUT_MS = 300;" }, 2],
] as const)("after the last answer a peer that %s and does not close is closed", async (_, change, seconds) => {
  await using server = await startCopy(change, ["--log", "off"]);
  const code = `
import socket, sys, time
s = socket.create_connection(("127.0.0.1", ${server.port}))
s.sendall(b"nonsense\\r\\n")
while s.recv(1000): pass
t = time.time()
try:
  while time.time() < t + 8: s.sendall(b"x"); time.sleep(${seconds})
except OSError: print("closed")`;
  expect((await run(["python3", "-c", code])).stdout).toBe("closed\n");
});

test.concurrent("a peer that sends too much after the last answer is cut off", async () => {
  const change = { "const LINGER_BYTES_MAX = 1_073_741_824;": "const LINGER_BYTES_MAX = 16_777_216;" };
  await using server = await startCopy(change, ["--log", "off"]);
  const code = `
import socket
s = socket.create_connection(("127.0.0.1", ${server.port}))
s.sendall(b"nonsense\\r\\n")
while s.recv(1000): pass
try:
  for i in range(1000): s.sendall(b"x" * 100000)
  print("all taken")
except OSError: print("cut off")`;
  expect((await run(["python3", "-c", code])).stdout).toBe("cut off\n");
});

/** Sends all of a request, and only then reads: as http.client, Firefox and Apache's mod_proxy do. */
test.concurrent.each([
  ["large", 30, 0, {}],
  // It takes five times as long as a peer may be silent.
  ["slow", 2, 0.05, { "const LINGER_TIMEOUT_MS = 5000;": "const LINGER_TIMEOUT_MS = 400;" }],
] as const)("a client gets the refusal of its %s upload once all is sent", async (_, megabytes, seconds, change) => {
  await using server = await startCopy(change, ["--log", "off"]);
  const code = `
import socket, time
s = socket.create_connection(("127.0.0.1", ${server.port}))
s.sendall(b"PUT /file HTTP/1.1\\r\\nHost: h\\r\\nContent-Length: ${megabytes}000000\\r\\n\\r\\n")
for i in range(40): s.sendall(b"x" * ${megabytes * 25_000}); time.sleep(${seconds})
print(s.recv(12).decode())`;
  expect((await run(["python3", "-c", code])).stdout).toBe("HTTP/1.1 405\n");
});

test("the defaults answer 408 between 5 and 30 seconds, and leave room for 10,000 connections", () => {
  for (const milliseconds of [LIMITS.headTimeoutMs, LIMITS.contentTimeoutMs]) {
    expect(milliseconds).toBeGreaterThan(5000);
    expect(2 * milliseconds).toBeLessThan(30_000);
  }
  expect(LIMITS.connectionsMax).toBeGreaterThan(10_000);
});
