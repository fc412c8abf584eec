/** client-robust.ts over TLS: against server.ts, and python's ssl for what a server should not do. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { EXIT_CODES, RecordWatch } from "../client-robust.ts";
import {
  command,
  hasTool,
  makeCertificate,
  run,
  runProgram,
  startPython,
  startServer,
  temporaryFolder,
  VARIANTS,
} from "./harness.ts";

setDefaultTimeout(60_000);

/** Answers each connection over TLS with an HTTP/1.0 response of `size` bytes, and closes in the way of `end`. A field may follow. */
const CLOSING = `
import socket, ssl, struct, sys
cert, key, version, size, end = sys.argv[1:6]
fields = "".join(field + "\\r\\n" for field in sys.argv[6:])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(cert, key)
context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(5); print(s.getsockname()[1], flush=True)
while True:
    c, _ = s.accept()
    try:
        t = context.wrap_socket(c, server_side=True)
        t.recv(65536)
        t.sendall(b"HTTP/1.0 200 OK\\r\\n" + fields.encode() + b"\\r\\n" + b"x" * int(size))
        if end == "in order": t.unwrap()
        if end == "reset": t.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        t.close()
    except OSError: pass`;

describe.each(VARIANTS)("client-robust over TLS (%s)", (variant) => {
  const get = (...args: string[]) => runProgram("client-robust", variant, ["--retry", "0", "-o", "-", ...args]);

  test.concurrent.if(hasTool("openssl"))(
    "believes whom it is told to believe, and says what is wrong with anybody else",
    async () => {
      await using folder = await temporaryFolder();
      const { cert, key } = await makeCertificate(folder.path);
      await using server = await startServer(variant, ["--log", "off", "--tls-cert", cert, "--tls-key", key]);
      const trusted = await get("--cacert", cert, server.url);
      expect([trusted.stdout, trusted.stderr, trusted.exitCode]).toEqual(["Hello, World!", "", 0]);
      const unknown = await get(server.url);
      expect(unknown.stderr).toBe("Error: the certificate of localhost is not trusted: self signed certificate\n");
      expect([unknown.stdout, unknown.exitCode]).toEqual(["", EXIT_CODES.certificate]);
      const misnamed = await get("--cacert", cert, server.url.replace("localhost", "127.0.0.2"));
      expect(misnamed.exitCode).toBe(EXIT_CODES.connect); // nobody listens there
      expect((await get("-k", server.url)).stdout).toBe("Hello, World!");
      expect((await get("--cacert", "/nowhere", server.url)).exitCode).toBe(EXIT_CODES.authorities);
    },
  );

  test.concurrent.if(hasTool("openssl"))("reads --cacert once: it may be a pipe, and a redirect follows", async () => {
    await using folder = await temporaryFolder();
    const { cert, key } = await makeCertificate(folder.path);
    mkdirSync(join(folder.path, "sub"));
    writeFileSync(join(folder.path, "sub", "index.html"), "here");
    const options = ["--log", "off", "--root", folder.path, "--tls-cert", cert, "--tls-key", key];
    await using server = await startServer(variant, options);
    const args = [...(await command("client-robust", variant)), "--retry", "0", "-L", "-o", "-", `${server.url}/sub`];
    const { stdout, stderr } = await run(["bash", "-c", 'exec "$@" --cacert <(cat "$0")', cert, ...args]);
    expect([stdout, stderr]).toEqual(["here", ""]);
  });

  test.concurrent.if(hasTool("openssl"))("takes no certificate for another name", async () => {
    await using folder = await temporaryFolder();
    const { cert, key } = await makeCertificate(folder.path, "DNS:other.test");
    await using server = await startServer(variant, ["--log", "off", "--tls-cert", cert, "--tls-key", key]);
    const { stdout, stderr, exitCode } = await get("--cacert", cert, server.url);
    expect(stderr).toMatch(/^Error: the certificate of localhost is not trusted: .*other\.test\n$/);
    expect([stdout, exitCode]).toEqual(["", EXIT_CODES.certificate]);
  });

  test.concurrent("a server without TLS is one line and exit 35", async () => {
    await using server = await startServer(variant, ["--log", "off"]);
    const { stderr, exitCode } = await get(server.url.replace("http:", "https:"));
    expect(stderr).toMatch(/^Error: no TLS with localhost: .+\n$/);
    expect(exitCode).toBe(EXIT_CODES.tls);
  });

  test.concurrent("a connection that is lost before there is TLS is tried again", async () => {
    let connections = 0;
    using listener = Bun.listen({
      hostname: "127.0.0.1",
      port: 0,
      socket: {
        open: () => void connections++,
        data: (socket) =>
          connections === 1 ? socket.terminate() : void socket.end("HTTP/1.1 400 Bad Request\r\n\r\n"),
      },
    });
    const { stderr, exitCode } = await get("--retry", "5", `https://127.0.0.1:${listener.port}/`);
    expect(stderr).toMatch(
      /^Retry in .+: the connection to 127\.0\.0\.1 was closed before there was TLS; 0 bytes kept\n/,
    );
    // The second one speaks no TLS, and will not the next time.
    expect(stderr).toMatch(/\nError: no TLS with 127\.0\.0\.1: .+\n$/);
    expect([connections, exitCode]).toEqual([2, EXIT_CODES.tls]);
  });

  for (const version of ["TLSv1_2", "TLSv1_3"])
    test.concurrent.if(hasTool("openssl"))(
      `${version}: an end that nobody has announced is not the end of the content`,
      async () => {
        await using folder = await temporaryFolder();
        const { cert, key } = await makeCertificate(folder.path);
        // Two bytes make a record of the length that the alert has.
        for (const size of ["0", "2", "100000"]) {
          await using orderly = await startPython(CLOSING, [cert, key, version, size, "in order"]);
          const whole = await get("--cacert", cert, `https://localhost:${orderly.port}/`);
          expect([whole.stdout.length, whole.exitCode]).toEqual([Number(size), 0]);
          await using cut = await startPython(CLOSING, [cert, key, version, size, "cut off"]);
          const part = await get("--cacert", cert, `https://localhost:${cut.port}/`);
          expect([part.stdout.length, part.exitCode]).toEqual([Number(size), EXIT_CODES.partial]);
        }
      },
    );

  test.concurrent.if(hasTool("openssl"))(
    "content with a length ends with its last byte, however it is closed",
    async () => {
      await using folder = await temporaryFolder();
      const { cert, key } = await makeCertificate(folder.path);
      for (const [end, length, exitCode] of [
        ["cut off", 100_000, EXIT_CODES.ok],
        ["cut off", 100_001, EXIT_CODES.partial],
        ["in order", 100_001, EXIT_CODES.partial],
        ["reset", 100_001, EXIT_CODES.receive],
      ] as const) {
        const field = `Content-Length: ${length}`;
        await using server = await startPython(CLOSING, [cert, key, "TLSv1_3", "100000", end, field]);
        const ended = await get("--cacert", cert, `https://localhost:${server.port}/`);
        expect([end, length, ended.exitCode]).toEqual([end, length, exitCode]);
        if (end !== "reset") expect(ended.stdout).toBe("x".repeat(100_000));
      }
    },
  );

  test.concurrent.if(hasTool("openssl")).each([
    ["without a length", []],
    ["with a length", ["Content-Length: 40000000"]],
  ])("40 MB come whole, %s, through a reader that is slow at first", async (_, fields) => {
    await using folder = await temporaryFolder();
    const { cert, key } = await makeCertificate(folder.path);
    await using server = await startPython(CLOSING, [cert, key, "TLSv1_3", "40000000", "in order", ...fields]);
    const argv = [
      ...(await command("client-robust", variant)),
      "-o",
      "-",
      "--cacert",
      cert,
      `https://localhost:${server.port}/`,
    ];
    const { stdout } = await run(["bash", "-c", '"$@" | (sleep 0.5; sha256sum)', "bash", ...argv]);
    expect(stdout.split(" ")[0]).toBe(createHash("sha256").update(Buffer.alloc(40_000_000, "x")).digest("hex"));
  });
});

test("RecordWatch tells an alert from content of the same length, however the records are split", () => {
  const record = (type: number, length: number) =>
    Buffer.from([type, 3, 3, length >> 8, length & 255, ...Buffer.alloc(length)]);
  const [content, alert, alert12] = [record(23, 17 + 2), record(23, 19), record(21, 26)];
  const ends = (last: Buffer, plaintext: number, cut: number) => {
    const watch = new RecordWatch();
    watch.take(record(22, 300));
    watch.take(Buffer.concat([content, last]).subarray(0, cut));
    if (cut < content.length + last.length) watch.take(Buffer.concat([content, last]).subarray(cut));
    watch.room -= plaintext;
    return watch.endsInOrder;
  };
  const whole = content.length + alert.length;
  expect([ends(alert, 2, whole), ends(content, 4, whole)]).toEqual([true, false]);
  expect([ends(alert12, 2, 1000), ends(alert12, 2, 30)]).toEqual([true, true]);
  for (let cut = content.length; cut < whole; cut++) expect(ends(alert, 0, cut)).toBeTrue();
});
