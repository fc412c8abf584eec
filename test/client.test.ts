/** client.ts from outside: the script and the binary, against server.ts, python3 and nginx. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import {
  freePort,
  hasTool,
  ROOT,
  run,
  runProgram,
  startNginx,
  startPython,
  startServer,
  temporaryFolder,
  VARIANTS,
} from "./harness.ts";

// What waits for a deadline waits beside the others.
setDefaultTimeout(60_000);

/** A python server that takes one connection, receives once, runs `answer` and closes. */
const onceWith = (answer: string) => `
import socket, struct, sys, time
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(1); print(s.getsockname()[1], flush=True)
c, _ = s.accept()
request = c.recv(1024)
${answer}
c.close()
print(request, flush=True)`;

describe.each(VARIANTS)("client (%s)", (variant) => {
  const get = (...args: (string | number)[]) => runProgram("client", variant, args.map(String));

  test.concurrent("prints the server's whole answer", async () => {
    await using server = await startServer(variant);
    const { stdout, stderr, exitCode } = await get("localhost", server.port);
    expect(stdout).toMatch(
      /^HTTP\/1.1 200 OK\nContent-Type: text\/plain; charset=utf-8\nContent-Length: 13\nDate: .*\n\nHello, World!\n$/,
    );
    expect([stderr, exitCode]).toEqual(["", 0]);
    await server.stdout.waitFor(/^GET \/data HTTP\/1.1\nHost: localhost:\d+\n\n/);
  });

  test.concurrent("sends the tutorial's request, byte for byte but for the port", async () => {
    await using server = await startPython(onceWith('c.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\nHi")'));
    expect((await get("127.0.0.1", server.port, "/x?y")).stdout).toBe("HTTP/1.1 200 OK\n\nHi\n");
    await server.stdout.waitFor(/b'GET \/x\?y HTTP\/1.1\\r\\nHost: 127.0.0.1:\d+\\r\\n\\r\\n'/);
  });

  test.concurrent("receives once: 1024 bytes and not one more, and cuts through a character", async () => {
    await using server = await startPython(onceWith('c.sendall(b"x" * 1023 + "é".encode() + b"y" * 1000)'));
    const { stdout, exitCode } = await get("127.0.0.1", server.port);
    expect([stdout, exitCode]).toEqual([`${"x".repeat(1023)}�\n`, 0]);
  });

  test.concurrent("prints nothing raw that a server could write on the terminal with", async () => {
    await using server = await startPython(onceWith(String.raw`c.sendall(b"\x1b[2J\x07\r\n\tok\xe2\x80\xae")`));
    expect((await get("127.0.0.1", server.port)).stdout).toBe("\\x1b[2J\\x07\n\tok\\u{202e}\n");
  });

  test.concurrent("no server: one line and exit 1", async () => {
    const port = await freePort();
    const { stdout, stderr, exitCode } = await get("127.0.0.1", port);
    expect([stdout, stderr, exitCode]).toEqual(["", `Error: cannot connect to 127.0.0.1:${port}: ECONNREFUSED\n`, 1]);
  });

  test.concurrent("no such host: one line and exit 1", async () => {
    const { stderr, exitCode } = await get("nowhere.invalid", 80);
    expect([stderr, exitCode]).toEqual(["Error: cannot connect to nowhere.invalid:80: ENOTFOUND\n", 1]);
  });

  test.concurrent("closed without an answer, by FIN or by reset: one line and exit 1", async () => {
    await using silent = await startPython(onceWith("pass"));
    const fin = await get("127.0.0.1", silent.port);
    expect([fin.stderr, fin.exitCode]).toEqual(["Error: the connection was closed without an answer\n", 1]);
    const reset = 'c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))';
    await using resetting = await startPython(onceWith(reset));
    const rst = await get("127.0.0.1", resetting.port);
    expect([rst.stderr, rst.exitCode]).toEqual(["Error: the connection was closed without an answer: ECONNRESET\n", 1]);
  });

  test.concurrent.each(["--nonsense", "localhost|x", "localhost|65536", "a b", "localhost|1|/ HTTP/1.1", "a|1|/|b"])(
    "wrong usage is one line and exit 2: %s",
    async (args) => {
      const { stdout, stderr, exitCode } = await get(...args.split("|"));
      expect(stderr).toMatch(/^Error: .+\n$/);
      expect([stdout, exitCode]).toEqual(["", 2]);
    },
  );

  test.concurrent("a stdout that is full is one line and exit 1", async () => {
    await using server = await startServer(variant);
    const { stderr, exitCode } = await runProgram("client", variant, ["localhost", String(server.port)], {
      stdout: "/dev/full",
    });
    expect(stderr).toMatch(/^Error: ENOSPC: .*\n$/);
    expect(exitCode).toBe(1);
  });

  test.concurrent.if(hasTool("nginx"))("prints the start of what nginx answers", async () => {
    await using folder = await temporaryFolder();
    await Bun.write(`${folder.path}/data`, "from a file\n");
    await using nginx = await startNginx(folder.path);
    const { stdout, exitCode } = await get("localhost", nginx.port);
    expect(stdout).toMatch(/^HTTP\/1.1 200 OK\nServer: nginx/);
    expect(exitCode).toBe(0);
  });
});

test.concurrent("does not wait for ever for a server that says nothing", async () => {
  // Ten seconds are long for a test: a copy waits for less, and is the same otherwise.
  const text = await Bun.file(join(ROOT, "client.ts")).text();
  const impatient = text.replace("TIMEOUT_MS = 10_000;", "TIMEOUT_MS = 300;");
  expect(impatient).not.toBe(text);
  await using folder = await temporaryFolder();
  await Bun.write(join(folder.path, "client.ts"), impatient);
  await using server = await startPython(onceWith("time.sleep(60)"));
  const argv = [process.execPath, "client.ts", "127.0.0.1", String(server.port)];
  const { stderr, exitCode } = await run(argv, { cwd: folder.path });
  expect([stderr, exitCode]).toEqual(["Error: no answer within 0.3 s\n", 1]);
});
