/** client-robust.ts from outside: the script and the binary, against server.ts, python3 and nginx. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { closeSync, existsSync, ftruncateSync, openSync, readdirSync, readFileSync } from "node:fs";
import { EXIT_CODES } from "../client-robust.ts";
import {
  command,
  freePort,
  hasTool,
  measureResidentMiB,
  run,
  runProgram,
  start,
  startNginx,
  startPython,
  startServer,
  temporaryFolder,
  until,
  VARIANTS,
} from "./harness.ts";

setDefaultTimeout(60_000);

/** A python server that answers each connection, once the request is there, by running `answer`. */
const serving = (answer: string) => `
import socket, struct, sys, time
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(5); print(s.getsockname()[1], flush=True)
while True:
    c, _ = s.accept()
    print(c.recv(65536), flush=True)
    try:
        ${answer.trim().split("\n").join("\n        ")}
    except OSError: pass
    c.close()`;

const RESET = 'c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))';
const HEAD = 'c.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 10\\r\\n\\r\\n")';

describe.each(VARIANTS)("client-robust (%s)", (variant) => {
  /** Without retries, which have tests of their own. */
  const get = (...args: string[]) => runProgram("client-robust", variant, ["--retry", "0", ...args]);

  test.concurrent("prints the whole response of the server, and nothing else", async () => {
    await using server = await startServer(variant);
    const { stdout, stderr, exitCode } = await get(`${server.url}/data?x#fragment`);
    expect(stdout).toMatch(
      /^HTTP\/1.1 200 OK\r\nContent-Type: text\/plain; charset=utf-8\r\nContent-Length: 13\r\nDate: .*\r\nConnection: close\r\n\r\nHello, World!$/,
    );
    expect([stderr, exitCode]).toEqual(["", 0]);
    await server.stdout.waitFor(/^GET \/data\?x HTTP\/1.1\nHost: localhost:\d+\n/);
  });

  test.concurrent(
    "takes a URL without http://, an IPv6 address, and a whole megabyte that comes in pieces",
    async () => {
      const text = "äöü".repeat(15_000);
      await using server = await startServer(variant, ["--log", "off", "--text", text]);
      expect((await get("-o", "-", `localhost:${server.port}`)).stdout).toBe(text);
      if (server.child.pid && existsSync("/proc/net/if_inet6"))
        expect((await get("-o", "-", `http://[::1]:${server.port}/`)).stdout).toBe(text);
    },
  );

  test.concurrent("reads python's http.server until the connection closes", async () => {
    await using folder = await temporaryFolder();
    await Bun.write(`${folder.path}/a.txt`, "from python\n");
    const code = `
import http.server, functools, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
print(server.server_port, flush=True)
server.serve_forever()`;
    await using server = await startPython(code, [folder.path]);
    const { stdout, exitCode } = await get("-o", "-", `http://127.0.0.1:${server.port}/a.txt`);
    expect([stdout, exitCode]).toEqual(["from python\n", 0]);
  });

  test.concurrent(
    "takes a response apart that comes a byte at a time, in chunks, with characters cut in two",
    async () => {
      const response = String.raw`b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nsch\r\n1\r\n\xc3\r\n2\r\n\xb6n\r\n0\r\nT: x\r\n\r\n"`;
      await using server = await startPython(
        serving(`c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for byte in ${response}: c.sendall(bytes([byte]))
time.sleep(60)`),
      );
      const { stdout, exitCode } = await get("-o", "-", `http://127.0.0.1:${server.port}`);
      expect([stdout, exitCode]).toEqual(["schön", 0]);
    },
  );

  test.concurrent("finishes when the framing says so, though the server keeps the connection open", async () => {
    await using server = await startPython(serving(`${HEAD}; c.sendall(b"0123456789 more"); time.sleep(60)`));
    const { stdout, exitCode } = await get("-o", "-", `http://127.0.0.1:${server.port}`);
    expect([stdout, exitCode]).toEqual(["0123456789", 0]);
  });

  test.concurrent("-o saves the content alone, whole, and leaves nothing else behind", async () => {
    await using server = await startServer(variant, ["--log", "off"]);
    await using folder = await temporaryFolder();
    await Bun.write(`${folder.path}/file`, "something old and longer");
    const { stdout, stderr, exitCode } = await get("-s", "-o", `${folder.path}/file`, server.url);
    expect([stdout, stderr, exitCode]).toEqual(["", "", 0]);
    expect(readFileSync(`${folder.path}/file`, "utf8")).toBe("Hello, World!");
    expect(readdirSync(folder.path)).toEqual(["file"]);
  });

  test.concurrent("-o leaves FILE as it was when the transfer fails", async () => {
    await using server = await startPython(serving(`${HEAD}; c.sendall(b"01234")`));
    await using folder = await temporaryFolder();
    await Bun.write(`${folder.path}/file`, "old");
    const { stderr, exitCode } = await get("-o", `${folder.path}/file`, `http://127.0.0.1:${server.port}`);
    expect(stderr).toBe("Error: the response is not complete: 5 of 10 bytes of content came\n");
    expect(exitCode).toBe(EXIT_CODES.partial);
    expect(readFileSync(`${folder.path}/file`, "utf8")).toBe("old");
  });

  test.concurrent("-o /dev/null writes to the device and does not replace it", async () => {
    await using server = await startServer(variant, ["--log", "off"]);
    expect((await get("-o", "/dev/null", server.url)).exitCode).toBe(0);
    expect((await Bun.file("/dev/null").stat()).isCharacterDevice()).toBeTrue();
  });

  test.concurrent.each([
    ["empty", "pass", "the server closed the connection without an answer"],
    ["receive", RESET, "the connection was lost: ECONNRESET"],
    ["receive", `${HEAD}; c.sendall(b"01234"); time.sleep(0.1); ${RESET}`, "the connection was lost: ECONNRESET"],
    ["partial", `c.sendall(b"HTTP/1.1 200 OK\\r\\nCont")`, "the response ends inside its head"],
    ["partial", `${HEAD}; c.sendall(b"01234")`, "the response is not complete: 5 of 10 bytes of content came"],
    [
      "partial",
      `c.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n01234"); time.sleep(0.1); ${RESET}`,
      "the connection was lost: ECONNRESET",
    ],
    [
      "unparsable",
      `c.sendall(b"220 mail ESMTP\\r\\n")`,
      "the response is malformed: its first line is not a status-line of HTTP/1",
    ],
    ["timeout", `${HEAD}; c.sendall(b"01234"); time.sleep(60)`, "no byte for 0.3 s"],
    [
      "status",
      `c.sendall(b"HTTP/1.1 404 Gone \\xc2\\x9b1mfishing\\r\\n\\r\\n")`,
      "the server answered 404 Gone \\x9b1mfishing",
    ],
  ] as const)("a failure is one line and curl's exit code: %s after %s", async (outcome, answer, message) => {
    await using server = await startPython(serving(answer));
    const { stdout, stderr, exitCode } = await get(
      "-o",
      "-",
      "--stall-timeout",
      outcome === "timeout" ? "0.3" : "20",
      `http://127.0.0.1:${server.port}`,
    );
    expect(stderr).toBe(`Error: ${message}\n`);
    expect(exitCode).toBe(EXIT_CODES[outcome]);
    expect("01234").toStartWith(stdout);
  });

  test.concurrent("an error page is printed without -o, and never passes for content with it", async () => {
    const page = 'c.sendall(b"HTTP/1.1 500 Oops\\r\\nContent-Length: 4\\r\\n\\r\\npage")';
    await using server = await startPython(serving(page));
    await using folder = await temporaryFolder();
    const url = `http://127.0.0.1:${server.port}`;
    const shown = await get(url);
    expect([shown.stdout.slice(-6), shown.exitCode]).toEqual(["\r\npage", EXIT_CODES.status]);
    const kept = await get("-o", `${folder.path}/file`, url);
    expect([kept.stdout, kept.stderr, kept.exitCode]).toEqual([
      "",
      "Error: the server answered 500 Oops\n",
      EXIT_CODES.status,
    ]);
    expect(readdirSync(folder.path)).toEqual([]);
  });

  test.concurrent("an answer that comes before all is sent is received, though a reset follows it", async () => {
    await using folder = await temporaryFolder();
    await Bun.write(`${folder.path}/data`, new Uint8Array(2_000_000));
    // It closes with bytes unread, as many servers do.
    const answer = 'c.sendall(b"HTTP/1.1 501 No\\r\\nContent-Length: 4\\r\\n\\r\\npage")';
    await using server = await startPython(serving(answer));
    const url = `http://127.0.0.1:${server.port}`;
    for (let i = 0; i < 10; i++) {
      const { stdout, stderr, exitCode } = await get("--retry", "0", "-d", `@${folder.path}/data`, url);
      expect([stdout.slice(-4), stderr]).toEqual(["page", "Error: the server answered 501 No\n"]);
      expect(exitCode).toBe(EXIT_CODES.status);
    }
  });

  test.concurrent("no server, no host: one line, exit 7 and 6", async () => {
    const port = await freePort();
    const refused = await get(`http://127.0.0.1:${port}`);
    expect([refused.stdout, refused.stderr]).toEqual([
      "",
      `Error: cannot connect to 127.0.0.1:${port}: ECONNREFUSED\n`,
    ]);
    expect(refused.exitCode).toBe(EXIT_CODES.connect);
    const unknown = await get("http://nowhere.invalid/");
    expect([unknown.stderr, unknown.exitCode]).toEqual(["Error: cannot resolve nowhere.invalid\n", EXIT_CODES.resolve]);
  });

  test.concurrent("a host that does not take the connection: exit 28 after --connect-timeout", async () => {
    // The kernel keeps one connection for a backlog of 0 and drops the SYN of the others.
    const code = `
import socket, time
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(0)
full = []
for i in range(8):
    c = socket.socket(); c.setblocking(False); c.connect_ex(s.getsockname()); full.append(c)
print(s.getsockname()[1], flush=True)
time.sleep(60)`;
    await using server = await startPython(code);
    const { stderr, exitCode } = await get("--connect-timeout", "0.3", `http://127.0.0.1:${server.port}`);
    expect(stderr).toBe(`Error: no connection to 127.0.0.1:${server.port} within 0.3 s\n`);
    expect(exitCode).toBe(EXIT_CODES.timeout);
  });

  test.concurrent("--trace tells of connections that are reset at once, and they are retried", async () => {
    const code = `
import socket, struct
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(100); print(s.getsockname()[1], flush=True)
while True:
    c, _ = s.accept(); c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)); c.close()`;
    await using server = await startPython(code);
    const many = ["--trace", "--retry", "150", "--retry-delay", "0.001"]; // one in a hundred is reset early enough
    const { stderr, exitCode } = await get(...many, `http://127.0.0.1:${server.port}/`);
    expect(stderr).toMatch(/ \(after 151 attempts\)\n$/);
    expect(stderr).not.toContain("undefined");
    expect(exitCode).toBeOneOf([EXIT_CODES.connect, EXIT_CODES.send, EXIT_CODES.receive]);
  });

  test.concurrent("--trace shows each step on each connection, and changes nothing else", async () => {
    const sockets: Bun.Socket[] = [];
    const handlers = { open: (socket: Bun.Socket) => void sockets.push(socket), data() {} };
    using listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: handlers });
    const url = `http://127.0.0.1:${listener.port}/`;
    const argv = [
      ...(await command("client-robust", variant)),
      "--trace",
      "-s",
      "--retry-delay",
      "0.1",
      "-o",
      "-",
      url,
    ];
    await using client = await start(argv, /#1 .* send .*\n/);
    const { stderr } = client;
    for (const [i, number] of ["#1", "#2"].entries()) {
      await stderr.waitFor(new RegExp(`${number} .* send .*\n`));
      await until(() => sockets.length > i); // the client may tell of its connection before it is accepted here
      sockets[i]?.write('HTTP/1.1 200 OK\r\nETag: "a"\r\nContent-Length: 6\r\n');
      await stderr.waitFor(new RegExp(`${number} .*nothing yet\n`));
      sockets[i]?.write("\r\n\x1b[");
      await stderr.waitFor(new RegExp(`${number} .*head, content\n`));
      if (i === 0) sockets[i]?.terminate();
      else sockets[i]?.write("2Jok");
    }
    expect([await client.child.exited, await client.stdout.waitFor(/ok$/)]).toEqual([0, expect.anything()]);
    await stderr.waitFor(/#2 .* close .*\n/);
    expect(client.stdout.text).toBe("\x1b[2Jok");
    const head = '"HTTP/1.1 200 OK\\r\\nETag: \\"a\\"\\r\\nContent-Leng"…';
    // A number, and the time in a column of its own.
    expect(stderr.text).toMatch(/^(#[12] (?= {2,5}\d+\.\d ms)[ \d.]{8} ms {2}.*\n){12}$/);
    expect(stderr.text.replace(/^(#\d) .{8} ms {2}/gm, "$1 ").split("\n")).toEqual([
      `#1 connect  127.0.0.1:${listener.port}`,
      "#1 send     163 of 163 B",
      `#1 receive  47 B  ${head}  nothing yet`,
      '#1 receive  4 B  "\\r\\n\\x1b["  head, content',
      "#1 reset    the connection was lost: ECONNRESET",
      "#1 close",
      `#2 connect  127.0.0.1:${listener.port}`,
      "#2 send     195 of 195 B",
      `#2 receive  47 B  ${head}  nothing yet`,
      '#2 receive  4 B  "\\r\\n\\x1b["  head, content',
      '#2 receive  4 B  "2Jok"  content complete',
      "#2 close    FIN sent",
      "",
    ]);
  });

  test.concurrent.each(["--nonsense", "a b", "-o", "--stall-timeout 0", "--connect-timeout x", "--stall-timeout 1e9"])(
    "wrong usage is one line and exit 2: %s",
    async (args) => {
      const { stdout, stderr, exitCode } = await get(...args.split(" "));
      expect(stderr).toMatch(/^Error: .+ \(see client-robust --help\)\n$/);
      expect([stdout, exitCode]).toEqual(["", EXIT_CODES.usage]);
    },
  );

  test.concurrent.each([
    "http://",
    "ftp://localhost/",
    "http://a:99999/",
    "http://user:secret@localhost/",
    "http://a\nb/",
  ])("not a URL that is spoken here is one line and exit 3: %j", async (url) => {
    const { stdout, stderr, exitCode } = await get(url);
    expect(stderr).toMatch(/^Error: .+\n$/);
    expect([stdout, exitCode]).toEqual(["", EXIT_CODES.url]);
  });

  test.concurrent("where nothing can be written: one line and exit 23", async () => {
    await using server = await startServer(variant, ["--log", "off"]);
    for (const path of ["/nowhere/file", "/tmp"]) {
      const { stderr, exitCode } = await get("-o", path, server.url);
      expect(stderr).toMatch(/^Error: cannot write \/[^\n]*: E[A-Z]+\n$/);
      expect(exitCode).toBe(EXIT_CODES.write);
    }
    for (const args of [[], ["-I"]]) {
      const full = await runProgram("client-robust", variant, [...args, server.url], { stdout: "/dev/full" });
      expect([full.stderr, full.exitCode]).toEqual(["Error: cannot write: ENOSPC\n", EXIT_CODES.write]);
    }
  });

  test.concurrent("goes on where somebody made its stdout non-blocking and reads slowly", async () => {
    await using server = await startServer(variant, ["--log", "off", "--text", "x".repeat(100_000)]);
    const argv = [...(await command("client-robust", variant)), "-o", "-", server.url];
    const code = `
import os, subprocess, sys, time
r, w = os.pipe(); os.set_blocking(w, False)
child = subprocess.Popen(sys.argv[1:], stdout=w); os.close(w)
n = 0
while data := os.read(r, 4096): n += len(data)
print(n, child.wait())`;
    expect((await run(["python3", "-c", code, ...argv])).stdout).toBe("100000 0\n");
  });

  test.concurrent(
    "prints each byte once into a non-blocking pipe that has room for a part of it, or for none",
    async () => {
      const program = await command("client-robust", variant);
      const code = `
import os, subprocess, sys
filled, argv = int(sys.argv[1]), sys.argv[2:]
r, w = os.pipe(); os.set_blocking(w, False)
os.write(w, b"z" * filled)
child = subprocess.Popen(argv, stdout=w, stderr=subprocess.PIPE); os.close(w)
try: child.wait(0.5)
except subprocess.TimeoutExpired: pass
data = b""
while piece := os.read(r, 4096): data += piece
print(data[filled:].decode(), child.wait(), end="")`;
      for (const [length, filled] of [
        [4000, 65_536],
        [4000, 63_000],
        [60_000, 60_000],
      ] as const) {
        const text = Array.from({ length }, (_, i) => String.fromCharCode(97 + (i % 23))).join("");
        await using server = await startServer(variant, ["--log", "off", "--text", text]);
        const printed = await run(["python3", "-c", code, `${filled}`, ...program, "-o", "-", server.url]);
        expect([length, filled, printed.stdout === `${text} 0`]).toEqual([length, filled, true]);
      }
    },
  );

  test.if(hasTool("nginx"))(
    "1 GiB from nginx: whole, in constant memory, and `| head` ends it quietly",
    async () => {
      await using folder = await temporaryFolder();
      const size = 2 ** 30;
      const file = openSync(`${folder.path}/large`, "w");
      ftruncateSync(file, size); // sparse: takes no room on the disk
      closeSync(file);
      await Bun.write(`${folder.path}/small`, "small");
      await using nginx = await startNginx(folder.path);
      const argv = await command("client-robust", variant);
      // Some 10 MiB more than for a small content, whatever the size: the garbage of 1 GiB is not waited for.
      const small = await measureResidentMiB([...argv, "-o", "-", `${nginx.url}/small`]);
      expect(await measureResidentMiB([...argv, "-o", "-", `${nginx.url}/large`])).toBeLessThan(small + 24);
      const bash = (script: string) => run(["bash", "-c", script, "bash", ...argv]);
      const counted = await bash(`"$@" -o - ${nginx.url}/large | wc -c; echo \${PIPESTATUS[*]}`);
      expect([counted.stdout, counted.stderr]).toEqual([`${size}\n0 0\n`, ""]);
      const cut = await bash(`"$@" -o - ${nginx.url}/large | head -c 10 | wc -c; echo \${PIPESTATUS[*]}`);
      expect([cut.stdout, cut.stderr]).toEqual([`10\n${EXIT_CODES.write} 0 0\n`, ""]);
    },
    60_000,
  );
});
