/**
 * client-robust among real servers, from outside: that it is patient where that helps, that nothing misleads it, and
 * that it says what it does. What it does after a failure in general is in retry.test.ts, FILE in output.test.ts.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  closeSync,
  existsSync,
  ftruncateSync,
  openSync,
  readdirSync,
  readFileSync,
  statSync,
  truncateSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { EXIT_CODES } from "../client-robust.ts";
import {
  canMount,
  command,
  freePort,
  hasTool,
  makeCertificate,
  measureResidentMiB,
  run,
  runProgram,
  saveToFile,
  start,
  startPython,
  temporaryFolder,
  Transcript,
  until,
  VARIANTS,
} from "./harness.ts";
import {
  type Answer,
  CONTENT,
  HALF,
  OTHER,
  pausing,
  rangeOf,
  raw,
  response,
  scripted,
  type Script,
  serving,
  sha256,
} from "./origin.ts";

// Most of the time nothing happens here: what waits for its retry waits beside the others.
setDefaultTimeout(60_000);

/** For a test that is not about the length of the waits. */
const QUICK = ["--retry-delay", "0.05"];

/** Modified long before it was sent: a strong validator. Then a second too late for that. */
const [SENT, MINUTE_BEFORE, LESS_BEFORE] = [
  "Sun, 22 Nov 2026 12:00:00 GMT",
  "Sun, 22 Nov 2026 11:59:00 GMT",
  "Sun, 22 Nov 2026 11:59:01 GMT",
];

/** The seconds that each line about a retry tells. */
const waitsOf = (stderr: string) => [...stderr.matchAll(/^Retry in (\S+) s: /gm)].map(([, wait]) => Number(wait));
const requestLine = (request = "") => request.split("\r\n", 1)[0];
const fieldOf = (request = "", name: string) => new RegExp(`\r\n${name}: (.*)\r\n`).exec(request)?.[1];
const redirectTo = (location: string | Buffer, status = "302 Found"): Script =>
  raw(
    Buffer.concat([
      Buffer.from(`HTTP/1.1 ${status}\r\nContent-Length: 0\r\nLocation: `),
      Buffer.from(location),
      Buffer.from("\r\n\r\n"),
    ]),
  );

/** A file of zeros that takes no room on the disk. */
function makeSparse(path: string, bytes: number): void {
  const fd = openSync(path, "w");
  ftruncateSync(fd, bytes);
  closeSync(fd);
}

/** Binds a port that refuses connections until SIGUSR1 comes, and then answers one. */
const LATE = `
import signal, socket
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True)
signal.sigwait({signal.SIGUSR1})
s.listen(5); c, _ = s.accept()
print(c.recv(65536).decode().splitlines()[0], flush=True)
c.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello"); c.close()
signal.pause()`;

/**
 * Reads requests with content, and answers them with the statuses of its arguments, the last one for ever. Prints of
 * each how much came, how much was promised and its SHA-256. If the first argument is "wait", it reads the content
 * after SIGUSR1.
 */
const RECEIVING = `
import hashlib, re, signal, socket, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
waits, statuses = sys.argv[1] == "wait", sys.argv[2:]
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(5); print(s.getsockname()[1], flush=True)
while True:
    c, _ = s.accept(); data = b""
    while b"\\r\\n\\r\\n" not in data: data += c.recv(65536)
    if waits: print("waiting", flush=True); signal.sigwait({signal.SIGUSR1}); waits = False
    if sys.argv[1] == "interim": c.sendall(b"HTTP/"); time.sleep(0.2); c.sendall(b"1.1 100 Continue\\r\\n\\r\\nHTTP/1.1 103 Hints\\r\\nLink: </a>\\r\\n\\r\\n")
    head, _, content = data.partition(b"\\r\\n\\r\\n")
    length = int(re.search(rb"(?i)content-length: (\\d+)", head)[1])
    digest, count = hashlib.sha256(content), len(content)
    try:
        while count < length and (piece := c.recv(1 << 20)): digest.update(piece); count += len(piece)
    except OSError: pass # the client may reset the connection
    status = statuses[0]; statuses = statuses[1:] or statuses
    print("got", count, "of", length, digest.hexdigest(), flush=True)
    try: c.sendall(b"HTTP/1.1 %s X\\r\\nContent-Length: 0\\r\\n\\r\\n" % status.encode())
    except OSError: pass
    c.close()`;

/** Starts what its arguments say in a terminal, types Ctrl-C when the progress line has come, and prints all that is seen. */
const INTERRUPTING = `
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0: os.execvp(sys.argv[1], sys.argv[1:])
seen = b""
try:
    while piece := os.read(terminal, 65536):
        if b" s left" in piece and b" s left" not in seen: os.write(terminal, b"\\x03")
        seen += piece
except OSError: pass # the terminal is closed
os.waitpid(pid, 0); sys.stdout.buffer.write(seen)`;

/** Sends content without end, and prints for how many seconds it was taken. */
const ENDLESS = `
import socket, time
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(5); print(s.getsockname()[1], flush=True)
c, _ = s.accept(); began = time.monotonic(); c.recv(65536); c.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
try:
    while True: c.sendall(bytes(1 << 20))
except OSError: print("taken for", time.monotonic() - began, flush=True)
s.accept()`;

/** Prints of each connection over TLS the name that was asked for, or what went wrong. */
const TELLING_NAMES = `
import socket, ssl, sys
cert, key, demand, version = sys.argv[1:5]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(cert, key)
context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
context.sni_callback = lambda socket, name, context: print("name", name, flush=True)
if demand == "demand": context.verify_mode = ssl.CERT_REQUIRED; context.load_verify_locations(cert)
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(5); print(s.getsockname()[1], flush=True)
while True:
    c, _ = s.accept(); print("connection", flush=True)
    try:
        t = context.wrap_socket(c, server_side=True); t.recv(65536)
        t.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok"); t.unwrap(); t.close()
    except OSError: c.close()`;

describe.each(VARIANTS)("client-robust among real servers (%s)", (variant) => {
  const get = (...args: string[]) => runProgram("client-robust", variant, args);

  const save = (url: string, ...args: string[]) => saveToFile(variant, url, ...args);

  /** Starts it in a terminal of its own, and returns all that is seen there. */
  async function seenOnTerminal(...args: string[]): Promise<string> {
    const argv = [...(await command("client-robust", variant)), ...args];
    const code = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)";
    const { stdout } = await run(["python3", "-c", code, ...argv]);
    // A slow machine shows the progress line in between.
    return stdout.replaceAll("\r\n", "\n").replace(/\r[^\r\n]*\x1b\[K/g, "");
  }

  describe("is patient", () => {
    test.concurrent(
      "with a port that is closed: each wait is about twice the one before, from a second on",
      async () => {
        await using server = await startPython(LATE);
        const client = [...(await command("client-robust", variant)), "-o", "-", `http://127.0.0.1:${server.port}/`];
        await using waiting = await start(client, /^Retry in/);
        // Back in the midst of the fourth wait: after some five seconds, when it would have been given up once.
        await waiting.stderr.waitFor(/(Retry in .*\n){4}/);
        server.child.kill("SIGUSR1");
        expect(await waiting.child.exited).toBe(EXIT_CODES.ok);
        expect(waiting.stdout.text).toBe("hello");
        const waits = waitsOf(waiting.stderr.text);
        expect(waits.length).toBe(4);
        for (const [i, wait] of waits.entries()) {
          expect(wait).toBeGreaterThanOrEqual(2 ** i / 2);
          expect(wait).toBeLessThanOrEqual(2 ** i);
        }
      },
    );

    test.concurrent("--retry-delay makes all waits the same, and they are kept", async () => {
      using origin = scripted([raw("")]);
      const { stderr, exitCode } = await save(origin.url, "--retry", "3", "--retry-delay", "0.4");
      expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.empty, 4]);
      expect(waitsOf(stderr)).toEqual([0.4, 0.4, 0.4]);
      for (const [i, time] of origin.times.slice(1).entries())
        expect(time - (origin.times[i] ?? 0)).toBeGreaterThanOrEqual(399);
    });

    test.concurrent("the last wait is shortened to --retry-max-time, and one more attempt follows it", async () => {
      using helped = scripted([raw(""), serving()]);
      const { content, stderr, exitCode } = await save(helped.url, "--retry-delay", "50", "--retry-max-time", "3");
      expect([exitCode, content?.equals(CONTENT), helped.requests.length]).toEqual([0, true, 2]);
      expect(waitsOf(stderr)[0]).toBeLessThanOrEqual(3);
      expect((helped.times[1] ?? 0) - (helped.times[0] ?? 0)).toBeGreaterThan(300);
      using vain = scripted([raw("")]);
      const failed = await save(vain.url, "--retry-delay", "50", "--retry-max-time", "3");
      expect([failed.exitCode, vain.requests.length]).toEqual([EXIT_CODES.empty, 2]);
      expect(failed.stderr).toEndWith("(no time is left for another attempt)\n");
    });

    test.concurrent.each([
      ["a wait that grows", []],
      ["a fixed wait", ["--retry-delay", "0.3"]],
      ["a limit for retries too", ["--retry-delay", "0.3", "--retry-max-time", "60"]],
    ])("--max-time ends it with 28, and few requests: %s", async (_, args) => {
      using origin = scripted([response("503 Busy")]);
      const startedAt = performance.now();
      const { stderr, exitCode } = await save(origin.url, "--max-time", "2", "--retry", "1000", ...args);
      expect(performance.now() - startedAt).toBeGreaterThan(1900);
      expect(exitCode).toBe(EXIT_CODES.timeout);
      expect(stderr).toMatch(/(^|\n)Error: not done within 2 s(; before that, [^\n]*503 Busy)?\n$/);
      expect(origin.requests.length).toBeLessThanOrEqual(8);
    });

    test.concurrent("--max-time never makes it ask before Retry-After, and neither does --retry-delay", async () => {
      using origin = scripted([response("503 Busy", "", "Retry-After: 30")]);
      const { stderr, exitCode } = await save(origin.url, "--max-time", "2", ...QUICK);
      expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.timeout, 1]);
      expect(stderr).toMatch(/^Error: not done within 2 s; before that, [^\n]*503 Busy\n$/);
      using soon = scripted([response("503 Busy", "", "Retry-After: 1"), serving()]);
      expect((await save(soon.url, ...QUICK)).exitCode).toBe(EXIT_CODES.ok);
      expect((soon.times[1] ?? 0) - (soon.times[0] ?? 0)).toBeGreaterThanOrEqual(999);
    });

    test.concurrent("--max-time ends a transfer that goes on, and what has come is kept", async () => {
      using origin = scripted([serving({ cut: HALF, end: "stall" })]);
      const { stderr, exitCode, files } = await save(origin.url, "--max-time", "3");
      expect([exitCode, origin.requests.length, files.length]).toEqual([EXIT_CODES.timeout, 1, 2]);
      expect(stderr).toMatch(/^Error: not done within 3 s\nKept 9000 bytes in /);
      expect((await save(origin.url, "--max-time", "1", "--trace")).stderr).toMatch(
        /^#1 +[\d.]+ ms +deadline not done within 1 s\nError: /m,
      );
    });

    const ZEROS = raw(Buffer.concat([Buffer.from("HTTP/1.1 200 OK\r\n\r\n"), Buffer.alloc(3_000_000)]), "stall");
    const HEAD = raw("HTTP/1.1 200 OK\r\n\r\n", "stall");
    test.concurrent.each([
      ["a stdout that nobody reads", 'exec timeout 20 "$@" -o - >&3', ZEROS],
      ["a stdout that nobody reads, the head included", 'head -c 65536 /dev/zero >&3; exec timeout 20 "$@" >&3', HEAD],
      ["a FIFO as FILE that nobody opens", 'exec timeout 20 "$@" -o other', HEAD],
      ["data that does not come", 'exec timeout 20 "$@" -d @- <&3', HEAD],
    ])("--max-time ends it whatever it waits for: %s", async (_, script, answer) => {
      await using folder = await temporaryFolder();
      using origin = scripted([answer]);
      const argv = [...(await command("client-robust", variant)), "--max-time", "2", origin.url];
      // Descriptor 3 is both ends of a FIFO, and what is started has no other.
      const argvOfShell = ["bash", "-c", `mkfifo fifo other; exec 3<>fifo; ${script}`, "bash", ...argv];
      const startedAt = performance.now();
      const { stderr, exitCode } = await run(argvOfShell, { cwd: folder.path });
      expect([exitCode, stderr]).toEqual([EXIT_CODES.timeout, "Error: not done within 2 s\n"]);
      expect(performance.now() - startedAt).toBeGreaterThan(1900);
    });

    const LIMITS_OF_TIME = ["--stall-timeout", "--max-time"];
    test.concurrent.each(LIMITS_OF_TIME)("bytes that came while it was stopped count, for %s, too", async (limit) => {
      const stopped = Promise.withResolvers<void>();
      using origin = scripted([pausing(serving(), HALF, () => stopped.promise)]);
      const argv = [...(await command("client-robust", variant)), "--retry", "0", limit, "3", "-o", "-"];
      await using child = Bun.spawn([...argv, origin.url], { stdio: ["ignore", "pipe", "pipe"] });
      const stdout = new Transcript(child.stdout);
      await stdout.waitFor(new RegExp(`^[^]{${HALF}}`));
      await Bun.sleep(500); // by then it waits for more
      child.kill("SIGSTOP");
      stopped.resolve();
      await Bun.sleep(3500);
      child.kill("SIGCONT");
      await child.exited;
      expect([await new Response(child.stderr).text(), child.exitCode]).toEqual(["", EXIT_CODES.ok]);
    });

    test.concurrent("--max-time ends content that comes as fast as it is read", async () => {
      await using server = await startPython(ENDLESS);
      const { stderr, exitCode } = await get("--max-time", "1", "-o", "/dev/null", `http://127.0.0.1:${server.port}/`);
      expect([exitCode, stderr]).toEqual([EXIT_CODES.timeout, "Error: not done within 1 s\n"]);
      const [, seconds] = await server.stdout.waitFor(/taken for (.+)\n/);
      expect(Number(seconds)).toBeLessThan(2);
    });
  });

  describe("tries again what may pass", () => {
    test.concurrent.each([
      ["mail", "220 mail.example ESMTP\r\n"],
      ["SSH", "SSH-2.0-OpenSSH_9.2\r\n"],
      ["a page without a head", "<!DOCTYPE html><title>Log in</title>"],
      ["HTTP/2", "\0\0\x12\x04\0\0\0\0\0"],
      ["a line that ends nowhere", "x"],
    ])("an answer that is not HTTP: %s", async (_, answer) => {
      using origin = scripted([raw(answer), serving()]);
      const { content, exitCode, stderr } = await save(origin.url, ...QUICK);
      expect([exitCode, content?.equals(CONTENT), waitsOf(stderr).length]).toEqual([0, true, 1]);
      origin.answerAnew(raw(answer));
      const failed = await save(origin.url, ...QUICK, "--retry", "2", "-s");
      expect([failed.exitCode, failed.files, origin.requests.length]).toEqual([EXIT_CODES.unparsable, [], 3]);
      expect(failed.stderr).toMatch(/^Error: the response is malformed: [^\n]+ \(after 3 attempts\)\n$/);
    });

    test.concurrent.each([
      ["where a size should stand", "zz\r\nyy"],
      ["after a chunk that is none of its content", "5\r\nhelloX\r\n"],
      ["in place of a line end", "\0\0"],
    ])("chunked content that is damaged %s: what came before that is not to be trusted", async (_, garbage) => {
      const chunk = `${HALF.toString(16)}\r\n${CONTENT.subarray(0, HALF)}\r\n`;
      const damaged = raw(`HTTP/1.1 200 OK\r\nETag: "a"\r\nTransfer-Encoding: chunked\r\n\r\n${chunk}${garbage}`);
      using origin = scripted([damaged, serving()]);
      const { content, exitCode } = await save(origin.url, ...QUICK);
      expect([exitCode, content?.equals(CONTENT)]).toEqual([0, true]);
      expect(origin.requests.map(rangeOf)).toEqual([undefined, undefined]);
      // Printed bytes cannot be taken back.
      origin.answerAnew(damaged, serving());
      expect((await get("-o", "-", ...QUICK, origin.url)).exitCode).toBe(EXIT_CODES.unparsable);
      expect(origin.requests.length).toBe(1);
      // The part of an earlier run stays if an answer is not HTTP.
      origin.answerAnew(serving({ cut: HALF }), raw("220 mail\r\n"), serving());
      expect((await save(origin.url, ...QUICK)).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests.map(rangeOf)).toEqual([undefined, HALF, HALF]);
    });

    test.concurrent("a head that is HTTP, but malformed, is meant so: one attempt", async () => {
      for (const fault of ["Content-Length: 5\r\nContent-Length: 6", "no colon", "Transfer-Encoding: gzip"]) {
        using origin = scripted([raw(`HTTP/1.1 200 OK\r\n${fault}\r\n\r\nhello`)]);
        expect((await save(origin.url, ...QUICK)).exitCode).toBe(EXIT_CODES.unparsable);
        expect(origin.requests.length).toBe(1);
      }
    });

    test.concurrent("a name that does not resolve, and says so", async () => {
      const { stderr, exitCode } = await save("http://nowhere.invalid:81/", ...QUICK, "--retry", "2");
      expect(exitCode).toBe(EXIT_CODES.resolve);
      const line = "Retry in 0.1 s: cannot resolve nowhere.invalid; 0 bytes kept\n";
      expect(stderr).toBe(`${line}${line}Error: cannot resolve nowhere.invalid (after 3 attempts)\n`);
    });

    test.concurrent.if(canMount)("a name that is known a little later, as those of containers", async () => {
      await using folder = await temporaryFolder();
      const hosts = `${folder.path}/hosts`;
      writeFileSync(hosts, "127.0.0.1 localhost\n");
      using origin = scripted([serving()]);
      const url = `http://late.test:${origin.port}/file`;
      const argv = [
        ...(await command("client-robust", variant)),
        "--retry",
        "80",
        "--retry-delay",
        "0.5",
        "-o",
        "-",
        url,
      ];
      const script = 'mount --bind "$0" /etc/hosts && exec "$@"';
      await using waiting = await start(
        ["unshare", "--map-root-user", "--mount", "bash", "-c", script, hosts, ...argv],
        /^Retry in 0.5 s: cannot resolve late\.test; 0 bytes kept\n/,
      );
      writeFileSync(hosts, "127.0.0.1 localhost late.test\n");
      expect(await waiting.child.exited).toBe(EXIT_CODES.ok);
      expect(waiting.stdout.text).toBe(CONTENT.toString());
      // It is found at the next attempt, or at the one after that: no failure is remembered for long.
      expect(waitsOf(waiting.stderr.text).length).toBeLessThanOrEqual(3);
    });

    const PASSING = [408, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524, 530, 599];
    test.concurrent("the statuses that may pass, and no others", async () => {
      using origin = scripted([...PASSING.map((status) => response(`${status} Oops`, "page")), serving()]);
      const { content, exitCode, stderr } = await save(origin.url, "--retry", "15", "--retry-delay", "0.01");
      expect([exitCode, content?.equals(CONTENT)]).toEqual([0, true]);
      const told = [...stderr.matchAll(/^Retry in 0\.0 s: the server answered (\d+) Oops; 0 bytes kept$/gm)];
      expect(told.map(([, status]) => Number(status))).toEqual(PASSING);
      for (const status of [400, 401, 403, 404, 410, 451, 501, 505, 508, 511, 525, 526, 531, 600, 999]) {
        origin.answerAnew(response(`${status} Oops`, "page"));
        expect([status, (await save(origin.url, ...QUICK)).exitCode]).toEqual([status, EXIT_CODES.status]);
        expect([status, origin.requests.length]).toEqual([status, 1]);
      }
    });
  });

  describe("over TLS", () => {
    /** Connections that a run with default retries has made, and how it ended. */
    async function countConnections(url: string, server: Awaited<ReturnType<typeof startPython>>, ...args: string[]) {
      const { stderr, exitCode } = await save(url, ...QUICK, ...args);
      return { stderr, exitCode, connections: server.stdout.text.match(/^connection$/gm)?.length ?? 0 };
    }

    test.concurrent.if(hasTool("openssl"))("a certificate that is not trusted is one attempt", async () => {
      await using folder = await temporaryFolder();
      const { cert, key } = await makeCertificate(folder.path);
      await using server = await startPython(TELLING_NAMES, [cert, key, "", "TLSv1_3"]);
      const { stderr, exitCode, connections } = await countConnections(`https://localhost:${server.port}/`, server);
      expect([exitCode, connections]).toEqual([EXIT_CODES.certificate, 1]);
      expect(stderr).toMatch(/^Error: the certificate of localhost is not trusted: [^\n]+\n$/);
    });

    test.concurrent.if(hasTool("openssl")).each(["TLSv1_2", "TLSv1_3"])(
      "%s: an alert, such as that a certificate is required, is one attempt",
      async (version) => {
        await using folder = await temporaryFolder();
        const { cert, key } = await makeCertificate(folder.path);
        await using server = await startPython(TELLING_NAMES, [cert, key, "demand", version]);
        const url = `https://localhost:${server.port}/`;
        const { stderr, exitCode, connections } = await countConnections(url, server, "--cacert", cert);
        expect(stderr).toMatch(/^Error: [^\n]+\n$/);
        expect([exitCode, connections]).toEqual([EXIT_CODES.tls, 1]);
      },
    );

    test.concurrent.if(hasTool("openssl"))(
      "a --cacert that is no PEM is 77 at once, before the server matters",
      async () => {
        await using folder = await temporaryFolder();
        const { cert, key } = await makeCertificate(folder.path);
        await using server = await startPython(TELLING_NAMES, [cert, key, "", "TLSv1_3"]);
        const pem = readFileSync(cert, "latin1");
        const bad = `${folder.path}/bad.pem`;
        for (const text of [
          "",
          "hello\n",
          readFileSync(key, "latin1"),
          pem.slice(0, 300),
          "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n",
        ]) {
          writeFileSync(bad, text);
          for (const port of [server.port, await freePort()]) {
            const { stderr, exitCode } = await save(`https://localhost:${port}/`, "--cacert", bad);
            expect([text, exitCode]).toEqual([text, EXIT_CODES.authorities]);
            expect(stderr).toMatch(/^Error: [^\n]*bad\.pem[^\n]*\n$/);
          }
        }
        for (const path of [folder.path, "/nowhere/ca.pem"])
          expect((await save("https://localhost:1/", "--cacert", path)).exitCode).toBe(EXIT_CODES.authorities);
      },
    );

    test.concurrent.if(hasTool("openssl"))(
      "no name is sent for an address, and none with a dot at its end",
      async () => {
        await using folder = await temporaryFolder();
        const { cert, key } = await makeCertificate(folder.path);
        await using server = await startPython(TELLING_NAMES, [cert, key, "", "TLSv1_3"]);
        for (const [host, name] of [
          ["127.0.0.1", "None"],
          ["2130706433", "None"], // another way to write it
          ["localhost", "localhost"],
          ["localhost.", "localhost"],
          ["LocalHost", "localhost"],
        ]) {
          const before = server.stdout.text.length;
          const { exitCode } = await get("-o", "-", "--cacert", cert, `https://${host}:${server.port}/`);
          expect([host, exitCode]).toEqual([host, EXIT_CODES.ok]);
          expect(server.stdout.text.slice(before)).toContain(`name ${name}\n`);
        }
      },
    );

    test.concurrent.if(hasTool("openssl"))("a certificate is checked against the address all the same", async () => {
      for (const names of ["DNS:localhost", "IP:127.0.0.2", "DNS:127.0.0.1"]) {
        await using folder = await temporaryFolder();
        const { cert, key } = await makeCertificate(folder.path, names);
        await using server = await startPython(TELLING_NAMES, [cert, key, "", "TLSv1_2"]);
        const { exitCode, stderr } = await save(`https://127.0.0.1:${server.port}/`, "--cacert", cert);
        expect([names, exitCode]).toEqual([names, EXIT_CODES.certificate]);
        expect(stderr).toMatch(/^Error: the certificate of 127\.0\.0\.1 is not trusted: /);
      }
    });
  });

  describe("Retry-After", () => {
    /** The three forms of RFC 9110 §5.6.7, of a time so many seconds from now. */
    function datesIn(seconds: number): string[] {
      const date = new Date(Date.now() + seconds * 1000);
      const fixdate = date.toUTCString();
      const [, day = "", month = "", year = "", time = ""] = fixdate.replace(",", "").split(" ");
      const name = date.toLocaleDateString("en", { weekday: "long", timeZone: "UTC" });
      return [
        fixdate,
        `${name}, ${day}-${month}-${year.slice(2)} ${time} GMT`,
        `${fixdate.slice(0, 3)} ${month} ${String(Number(day)).padStart(2)} ${time} ${year}`,
      ];
    }

    test.concurrent("is read in all three forms of dates: what is too long ends it at once", async () => {
      for (const date of datesIn(1800)) {
        using origin = scripted([response("503 Busy", "", `Retry-After: ${date}`)]);
        const { exitCode, stderr } = await save(origin.url, "--retry-max-time", "60");
        expect([date, exitCode, origin.requests.length]).toEqual([date, EXIT_CODES.status, 1]);
        const told = Number(/\(Retry-After is too long: (\d+) s\)\n$/.exec(stderr)?.[1]);
        expect(Math.abs(told - 1790)).toBeLessThanOrEqual(20);
      }
    });

    test.concurrent.each([0, 1, 2])("a date is waited for: form %d", async (form) => {
      const busy: Script = () => ({
        bytes: `HTTP/1.1 503 Busy\r\nRetry-After: ${datesIn(4)[form]}\r\nContent-Length: 0\r\n\r\n`,
      });
      using origin = scripted([busy, serving()]);
      const { exitCode } = await save(origin.url, ...QUICK);
      // A date has no fractions of a second, and a loaded machine reads it late: the rest is well above the delay.
      expect([exitCode, (origin.times[1] ?? 0) - (origin.times[0] ?? 0) > 1000]).toEqual([EXIT_CODES.ok, true]);
    });

    test.concurrent.each(["3601", "86400", "9".repeat(15), "9".repeat(25), "9".repeat(400)])(
      "longer than an hour it is not waited for, whatever the number: %s",
      async (value) => {
        using origin = scripted([response("503 Busy", "", `Retry-After: ${value}`)]);
        const { exitCode, stderr } = await save(origin.url);
        expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.status, 1]);
        expect(stderr).toMatch(/^Error: the server answered 503 Busy \(Retry-After is too long: [^\n]+\)\n$/);
      },
    );

    test.concurrent.each(["soon", "-1", "1.5", "1 hour", "Sun, 22 Nov 2026 25:00:00 GMT", ""])(
      "what cannot be read is no zero: the usual wait follows: %j",
      async (value) => {
        using origin = scripted([response("503 Busy", "", `Retry-After: ${value}`), serving()]);
        const { exitCode, stderr } = await save(origin.url);
        expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.ok, 2]);
        const [wait] = waitsOf(stderr);
        expect(wait).toBeGreaterThanOrEqual(0.5);
        expect(wait).toBeLessThanOrEqual(1);
      },
    );
  });

  describe("progress", () => {
    test.concurrent.each([
      ["at one place", [HALF, HALF, HALF, HALF, HALF, HALF]],
      ["later each time", [1000, 3000, 5000, 7000, 9000, 11_000]],
    ])("mirrors with different tags, each cut off %s, are a bounded number of attempts", async (_, cuts) => {
      const mirrors = cuts.map((cut, i) =>
        i % 2 === 0 ? serving({ cut }) : serving({ etag: '"b"', content: OTHER, cut }),
      );
      using origin = scripted([...mirrors, serving()]);
      const { exitCode, stderr, files } = await save(origin.url, ...QUICK, "--retry", "2");
      expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.partial, 3]);
      expect(stderr.match(/^Starting over: the content has changed$/gm)?.length).toBe(2);
      // The last part is worth as much as the first.
      expect(stderr).toMatch(/\nKept \d+ bytes in /);
      expect(files.length).toBe(2);
    });

    test.concurrent("what nothing names, cut off later each time, is a bounded number too", async () => {
      const cuts = [1000, 3000, 5000, 7000, 9000].map((cut) => serving({ etag: "", cut }));
      using origin = scripted([...cuts, serving()]);
      const { exitCode } = await save(origin.url, ...QUICK, "--retry", "2");
      expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.partial, 3]);
    });

    test.concurrent("any number of attempts that bring more of one version follow each other", async () => {
      using origin = scripted([...Array.from({ length: 8 }, () => serving({ cut: 2500 })), serving()]);
      const { exitCode, content } = await save(origin.url, ...QUICK, "--retry", "1");
      expect([exitCode, content?.equals(CONTENT), origin.requests.length]).toEqual([0, true, 9]);
    });

    test.concurrent("what is held already is no progress", async () => {
      // The server ignores Range, and is cut off before the byte that is missing.
      const deaf: Script = (request) => serving({ cut: HALF - 1 })(request.replace(/Range: /g, "X: "));
      using origin = scripted([serving({ cut: HALF }), deaf]);
      const { exitCode } = await save(origin.url, ...QUICK, "--retry", "2");
      expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.partial, 3]);
    });

    test.concurrent("a 416 for what the length promises is no endless wait: the whole is asked for", async () => {
      for (const range of [`bytes */${CONTENT.length}`, `bytes */${HALF}`, ""]) {
        const no = response("416 No", "", ...(range === "" ? [] : [`Content-Range: ${range}`]), 'ETag: "a"');
        const stubborn: Script = (request) => (rangeOf(request) === undefined ? serving()(request) : no(request));
        using origin = scripted([serving({ cut: HALF }), stubborn]);
        const { exitCode, content } = await save(origin.url, ...QUICK, "--retry", "2");
        expect([range, exitCode, content?.equals(CONTENT)]).toEqual([range, 0, true]);
        expect(origin.requests.map(rangeOf)).toEqual([undefined, HALF, undefined]);
      }
    });
  });

  describe("goes on by a date", () => {
    /** A run that breaks off at HALF, and then gets these answers. */
    async function resume(first: Script, ...others: Script[]) {
      using origin = scripted([first, ...others]);
      const { content, exitCode, stderr } = await save(origin.url, ...QUICK);
      return { content, exitCode, stderr, requests: origin.requests };
    }

    test.concurrent.each([
      ["no tag", ""],
      ["a weak tag", 'W/"a"'],
    ])("that is a minute older than the response, with %s", async (_, etag) => {
      const old = { etag, lastModified: MINUTE_BEFORE, date: SENT };
      const { content, exitCode, requests } = await resume(serving({ ...old, cut: HALF }), serving(old));
      expect([exitCode, content?.equals(CONTENT)]).toEqual([0, true]);
      expect(requests.map(rangeOf)).toEqual([undefined, HALF]);
      expect(fieldOf(requests[1], "If-Range")).toBe(MINUTE_BEFORE);
    });

    test.concurrent("in a later run, too, and on stdout", async () => {
      const old = { etag: 'W/"a"', lastModified: MINUTE_BEFORE, date: SENT };
      await using folder = await temporaryFolder();
      const file = `${folder.path}/file`;
      using origin = scripted([serving({ ...old, cut: HALF }), serving(old)]);
      const broken = await get("--retry", "0", "-o", file, origin.url);
      expect([broken.exitCode, existsSync(file)]).toEqual([EXIT_CODES.partial, false]);
      expect((await get("-o", file, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect([readFileSync(file).equals(CONTENT), readdirSync(folder.path)]).toEqual([true, ["file"]]);
      expect(fieldOf(origin.requests[1], "If-Range")).toBe(MINUTE_BEFORE);
      origin.answerAnew(serving({ ...old, cut: HALF }), serving(old));
      const printed = await get("-o", "-", ...QUICK, origin.url);
      expect([printed.exitCode, printed.stdout === CONTENT.toString()]).toEqual([EXIT_CODES.ok, true]);
    });

    test.concurrent.each([
      ["less than a minute older", { lastModified: LESS_BEFORE, date: SENT }],
      ["newer", { lastModified: SENT, date: MINUTE_BEFORE }],
      ["no date", { lastModified: "yesterday", date: SENT }],
      ["beside a Date that is none", { lastModified: MINUTE_BEFORE, date: "now" }],
    ])("but not where it is %s: then the whole is asked for", async (_, dates) => {
      for (const etag of ["", 'W/"a"']) {
        const weak = { etag, ...dates };
        const { content, exitCode, requests } = await resume(serving({ ...weak, cut: HALF }), serving(weak));
        expect([exitCode, content?.equals(CONTENT)]).toEqual([0, true]);
        expect(requests.map(rangeOf)).toEqual([undefined, undefined]);
        expect(fieldOf(requests[1], "If-Range")).toBeUndefined();
      }
    });

    test.concurrent("a strong tag goes before a date", async () => {
      const both = { etag: '"a"', lastModified: MINUTE_BEFORE, date: SENT };
      const { exitCode, requests } = await resume(serving({ ...both, cut: HALF }), serving(both));
      expect([exitCode, fieldOf(requests[1], "If-Range")]).toEqual([EXIT_CODES.ok, '"a"']);
    });

    test.concurrent.each([
      ["another date", 'W/"a"', LESS_BEFORE],
      ["another weak tag", 'W/"b"', MINUTE_BEFORE],
    ])("a 206 of %s is of another version, as servers exist that ignore If-Range", async (_, etag, lastModified) => {
      const old = { etag: 'W/"a"', lastModified: MINUTE_BEFORE, date: SENT };
      const other = serving({ etag, lastModified, date: SENT, content: OTHER });
      const deaf: Script = (request) => other(request.replace("If-Range: ", "X: "));
      const { content, exitCode, requests } = await resume(serving({ ...old, cut: HALF }), deaf);
      expect([exitCode, content?.equals(OTHER)]).toEqual([0, true]);
      expect(requests.map(rangeOf)).toEqual([undefined, HALF, undefined]);
    });

    test.concurrent("with a strong tag a 206 of another date is of another version, too", async () => {
      const old = { lastModified: MINUTE_BEFORE, date: SENT };
      const other = serving({ lastModified: LESS_BEFORE, date: SENT, content: OTHER });
      const { content, exitCode } = await resume(serving({ ...old, cut: HALF }), other);
      expect([exitCode, content?.equals(OTHER)]).toEqual([0, true]);
    });

    test.concurrent("the bytes of a tag beyond ASCII come back as they were, in a later run too", async () => {
      await using folder = await temporaryFolder();
      for (const etag of ['"schön"', '"sch\xf6n"']) {
        const bytes = Buffer.from(etag, etag.includes("\xf6") && etag.length === 7 ? "latin1" : "utf8");
        const head = (status: string, length: number) =>
          Buffer.concat([
            Buffer.from(`HTTP/1.1 ${status}\r\nContent-Length: ${length}\r\nETag: `),
            bytes,
            Buffer.from("\r\n\r\n"),
          ]);
        using origin = scripted([raw(Buffer.concat([head("200 OK", CONTENT.length), CONTENT.subarray(0, HALF)]))]);
        await get("--retry", "1", ...QUICK, "-o", `${folder.path}/file`, origin.url);
        await get("--retry", "0", "-o", `${folder.path}/file`, origin.url);
        for (const request of origin.requests.slice(1))
          expect(fieldOf(request, "If-Range")).toBe(bytes.toString("latin1"));
      }
    });
  });

  describe("only what has changed", () => {
    /** FILE with a time of its own, in a folder. */
    async function makeFile(text: string, date: string) {
      const folder = await temporaryFolder();
      const file = `${folder.path}/file`;
      writeFileSync(file, text);
      utimesSync(file, Date.parse(date) / 1000, Date.parse(date) / 1000);
      return { folder: folder.path, file, [Symbol.asyncDispose]: folder[Symbol.asyncDispose] };
    }
    const NOT_MODIFIED = raw("HTTP/1.1 304 Not Modified\r\n\r\n");
    const timeOf = (file: string) => statSync(file).mtime.toUTCString();

    test.concurrent("-z FILE asks with the time of FILE; 304 leaves FILE as it was, and is no failure", async () => {
      await using place = await makeFile("as it was", MINUTE_BEFORE);
      using origin = scripted([NOT_MODIFIED]);
      const before = statSync(place.file);
      const { stdout, stderr, exitCode } = await get("-z", place.file, "-o", place.file, origin.url);
      expect([stdout, stderr, exitCode]).toEqual(["", "", EXIT_CODES.ok]);
      expect(fieldOf(origin.requests[0], "If-Modified-Since")).toBe(MINUTE_BEFORE);
      const after = statSync(place.file);
      expect([after.ino, after.mtimeMs, readFileSync(place.file, "utf8")]).toEqual([
        before.ino,
        before.mtimeMs,
        "as it was",
      ]);
      expect(readdirSync(place.folder)).toEqual(["file"]);
    });

    test.concurrent("-z holds with a server that ignores it: what is not newer than FILE is not fetched", async () => {
      await using place = await makeFile("as it was", MINUTE_BEFORE);
      const [same, newer, undated] = [MINUTE_BEFORE, LESS_BEFORE, ""].map((lastModified) => serving({ lastModified }));
      using origin = scripted([same ?? NOT_MODIFIED]);
      const { stderr, exitCode } = await get("-v", "-z", place.file, "-o", place.file, origin.url);
      expect([exitCode, readFileSync(place.file, "utf8")]).toEqual([EXIT_CODES.ok, "as it was"]);
      expect(stderr).not.toContain("verified");
      expect((await get("-z", place.file, origin.url)).stdout).toEndWith(CONTENT.toString()); // it is printed as it came
      for (const script of [newer, undated]) {
        await using place = await makeFile("as it was", MINUTE_BEFORE);
        origin.answerAnew(script ?? NOT_MODIFIED);
        expect((await get("-z", place.file, "-o", place.file, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expect(readFileSync(place.file).equals(CONTENT)).toBeTrue();
      }
    });

    test.concurrent("-z with a FILE that is not there is no condition", async () => {
      await using folder = await temporaryFolder();
      using origin = scripted([serving()]);
      const file = `${folder.path}/file`;
      expect((await get("-z", file, "-o", file, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(origin.requests[0]).not.toContain("If-Modified-Since");
      expect(readFileSync(file).equals(CONTENT)).toBeTrue();
    });

    test.concurrent("-z and -R keep a mirror: the second run gets nothing, the third what is new", async () => {
      await using folder = await temporaryFolder();
      const file = `${folder.path}/file`;
      const versions = [
        { etag: "", content: CONTENT, lastModified: MINUTE_BEFORE },
        { etag: "", content: OTHER, lastModified: LESS_BEFORE },
      ];
      let current = versions[0];
      const mirrored: Script = (request) => {
        const isSame = fieldOf(request, "If-Modified-Since") === current?.lastModified;
        return (isSame ? NOT_MODIFIED : serving({ ...current, date: SENT }))(request);
      };
      using origin = scripted([mirrored]);
      const mirror = () => get("-R", "-z", file, "-o", file, origin.url);
      for (const expected of [versions[0], versions[0], versions[1], versions[1]]) {
        current = expected;
        const { stdout, stderr, exitCode } = await mirror();
        expect([stdout, stderr, exitCode]).toEqual(["", "", EXIT_CODES.ok]);
        expect(readFileSync(file).equals(expected?.content ?? Buffer.from(""))).toBeTrue();
        expect(timeOf(file)).toBe(expected?.lastModified ?? "");
      }
      expect(origin.requests.map((request) => fieldOf(request, "If-Modified-Since"))).toEqual([
        undefined,
        MINUTE_BEFORE,
        MINUTE_BEFORE,
        LESS_BEFORE,
      ]);
      expect(readdirSync(folder.path)).toEqual(["file"]);
    });

    test.concurrent("a mirror that broke off goes on, and FILE gets the time of what it is", async () => {
      await using place = await makeFile("as it was", "Sun, 22 Nov 2026 10:00:00 GMT");
      const fresh = { etag: '"b"', lastModified: MINUTE_BEFORE, date: SENT };
      using origin = scripted([serving({ ...fresh, cut: HALF }), serving(fresh)]);
      const mirror = (...args: string[]) => get(...args, "-R", "-z", place.file, "-o", place.file, origin.url);
      expect((await mirror("--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
      expect(readFileSync(place.file, "utf8")).toBe("as it was");
      expect((await mirror()).exitCode).toBe(EXIT_CODES.ok);
      expect(rangeOf(origin.requests[1])).toBe(HALF);
      expect([readFileSync(place.file).equals(CONTENT), timeOf(place.file)]).toEqual([true, MINUTE_BEFORE]);
      // With a part at hand, 304 still says that FILE is current.
      origin.answerAnew(serving({ ...fresh, lastModified: LESS_BEFORE, cut: HALF }), NOT_MODIFIED);
      expect((await mirror("--retry", "0")).exitCode).toBe(EXIT_CODES.partial);
      expect((await mirror()).exitCode).toBe(EXIT_CODES.ok);
      expect(readFileSync(place.file).equals(CONTENT)).toBeTrue();
    });

    test.concurrent("no -R, no date, or one that is none: FILE has the time of the download", async () => {
      for (const lastModified of ["", "yesterday"]) {
        await using place = await makeFile("old", MINUTE_BEFORE);
        using origin = scripted([serving({ lastModified })]);
        const before = Date.now();
        expect((await get("-R", "-o", place.file, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expect(statSync(place.file).mtimeMs).toBeGreaterThan(before - 2000);
      }
      await using place = await makeFile("old", MINUTE_BEFORE);
      using dated = scripted([serving({ lastModified: MINUTE_BEFORE })]);
      const before = Date.now();
      expect((await get("-o", place.file, dated.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(statSync(place.file).mtimeMs).toBeGreaterThan(before - 2000);
      using origin = scripted([serving({ lastModified: MINUTE_BEFORE })]);
      for (const output of ["-", "/dev/null"])
        expect((await get("-R", "-o", output, origin.url)).exitCode).toBe(EXIT_CODES.ok);
    });

    test.concurrent("304 is no failure, with -o or without, and is not asked about again", async () => {
      using origin = scripted([raw('HTTP/1.1 304 Not Modified\r\nETag: "a"\r\n\r\n')]);
      const condition = ["-H", 'If-None-Match: "a"'];
      const printed = await get(...condition, origin.url);
      expect([printed.stdout, printed.exitCode]).toEqual([
        'HTTP/1.1 304 Not Modified\r\nETag: "a"\r\n\r\n',
        EXIT_CODES.ok,
      ]);
      const content = await get(...condition, "-o", "-", origin.url);
      expect([content.stdout, content.stderr, content.exitCode]).toEqual(["", "", EXIT_CODES.ok]);
      const saved = await save(origin.url, ...condition);
      expect([saved.stderr, saved.exitCode, saved.files]).toEqual(["", EXIT_CODES.ok, []]);
      expect(origin.requests.length).toBe(3);
    });

    test.concurrent("-O takes the last segment of the path as it was typed", async () => {
      using origin = scripted([serving()]);
      for (const [path, name] of [
        ["/a/b.iso", "b.iso"],
        ["/b.iso?sig=x/y&z=../w", "b.iso"],
        ["/b.iso#/c", "b.iso"],
        ["/a%20b%2Fc.iso", "a%20b%2Fc.iso"],
        ["/schön.iso", "schön.iso"],
        ["/-o", "-o"],
        ["/...", "..."],
      ] as const) {
        await using folder = await temporaryFolder();
        const argv = [...(await command("client-robust", variant)), "-O", `http://127.0.0.1:${origin.port}${path}`];
        expect([path, (await run(argv, { cwd: folder.path })).exitCode]).toEqual([path, EXIT_CODES.ok]);
        expect(readdirSync(folder.path)).toEqual([name]);
      }
    });

    test.concurrent("-O takes no other name for one, from no redirect and no server", async () => {
      await using folder = await temporaryFolder();
      using origin = scripted([
        redirectTo("/evil"),
        serving({ fields: "Content-Disposition: attachment; filename=evil\r\n" }),
      ]);
      const inFolder = async (...args: string[]) =>
        run([...(await command("client-robust", variant)), ...args], { cwd: folder.path });
      expect((await inFolder("-LO", origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(readdirSync(folder.path)).toEqual(["file"]);
      unlinkSync(`${folder.path}/file`);
      origin.answerAnew(serving());
      const base = `http://127.0.0.1:${origin.port}`;
      const paths = [
        "",
        "/",
        "/a/",
        "/.",
        "/..",
        "/a/..",
        "/%2e%2E",
        "/.%2e",
        "?a=/b",
        "#/b",
        "/a\\b",
        "/a/?b",
        "/a\\..\\..",
      ];
      for (const path of paths) {
        const { stderr, exitCode } = await inFolder("-O", base + path);
        expect([path, exitCode]).toEqual([path, EXIT_CODES.usage]);
        expect(stderr).toMatch(/^Error: --remote-name finds no name of a file in [^\n]+\n$/);
      }
      expect((await inFolder("-O", "-o", "x", `${base}/b`)).exitCode).toBe(EXIT_CODES.usage);
      expect([origin.requests.length, readdirSync(folder.path)]).toEqual([0, []]);
    });

    test.concurrent("-O of a URL that ends in - is a file of that name", async () => {
      await using folder = await temporaryFolder();
      using origin = scripted([serving()]);
      const argv = [...(await command("client-robust", variant)), "-O", `http://127.0.0.1:${origin.port}/-`];
      const { stdout, exitCode } = await run(argv, { cwd: folder.path });
      expect([stdout, exitCode, readdirSync(folder.path)]).toEqual(["", EXIT_CODES.ok, ["-"]]);
    });

    test.concurrent("-R takes any date since 1970, of any status that has content, and of any method", async () => {
      await using folder = await temporaryFolder();
      const [file, now] = [`${folder.path}/file`, Date.now() - 60_000];
      for (const [status, args, seconds] of [
        ["203 Changed", [], 1_000_000_000],
        ["200 OK", ["-d", "x"], 1_000_000_000],
        ["201 Made", ["-X", "PUT", "-d", "x"], 1_000_000_000],
        ["200 OK", [], 0],
      ] as const) {
        using origin = scripted([response(status, "x", `Last-Modified: ${new Date(seconds * 1000).toUTCString()}`)]);
        expect((await get("-R", ...args, "-o", file, origin.url)).exitCode).toBe(EXIT_CODES.ok);
        expect([status, statSync(file).mtimeMs]).toEqual([status, seconds * 1000]);
      }
      using origin = scripted([response("200 OK", "x", "Last-Modified: Wed, 31 Dec 1969 23:59:58 GMT")]);
      expect((await get("-R", "-o", file, origin.url)).exitCode).toBe(EXIT_CODES.ok);
      expect(statSync(file).mtimeMs).toBeGreaterThan(now);
    });

    test.concurrent("-z with something that is no file and not -o's says so, unless -s", async () => {
      await using folder = await temporaryFolder();
      using origin = scripted([serving()]);
      const get = async (...args: string[]) =>
        run([...(await command("client-robust", variant)), ...args, "-o", "file", origin.url], { cwd: folder.path });
      expect(await get("-z", "22 Nov 2026")).toEqual({
        stdout: "",
        stderr: "No condition is sent: there is no file 22 Nov 2026\n",
        exitCode: EXIT_CODES.ok,
      });
      expect((await get("-s", "-z", "22 Nov 2026")).stderr).toBe("");
      expect((await get("-z", "file")).stderr).toBe("");
      expect(origin.requests.map((request) => fieldOf(request, "If-Modified-Since") === undefined)).toEqual([
        true,
        true,
        false,
      ]);
    });

    test.concurrent("-v says nothing of content that has not changed", async () => {
      await using place = await makeFile("as it was", MINUTE_BEFORE);
      using origin = scripted([NOT_MODIFIED]);
      for (const args of [["-o", place.file], []]) {
        const { stderr, exitCode } = await get("-v", "-z", place.file, ...args, origin.url);
        expect(exitCode).toBe(EXIT_CODES.ok);
        expect(stderr).toEndWith("\n< HTTP/1.1 304 Not Modified\n");
      }
    });

    test.concurrent("what hands type is understood: -fsSL, -fsSLo FILE, -fsSLO", async () => {
      await using folder = await temporaryFolder();
      using origin = scripted([]);
      for (const args of [["-fsSL", "-o", "file"], ["-fsSLo", "file"], ["-fsSLO"], ["-f", "-S", "-L", "-O"]]) {
        origin.answerAnew(redirectTo("/next"), serving());
        const argv = [...(await command("client-robust", variant)), ...args, origin.url];
        const { stdout, stderr, exitCode } = await run(argv, { cwd: folder.path });
        expect([args, stdout, stderr, exitCode]).toEqual([args, "", "", EXIT_CODES.ok]);
        expect(readFileSync(`${folder.path}/file`).equals(CONTENT)).toBeTrue();
        unlinkSync(`${folder.path}/file`);
      }
      origin.answerAnew(redirectTo("/next"), serving());
      expect((await get("-fsSL", origin.url)).stdout.endsWith(CONTENT.toString())).toBeTrue();
      origin.answerAnew(response("404 Gone", "page"));
      const failed = await save(origin.url, "-fsSL");
      expect([failed.stderr, failed.exitCode, failed.files]).toEqual([
        "Error: the server answered 404 Gone\n",
        EXIT_CODES.status,
        [],
      ]);
      expect((await get("-fsS", origin.url)).exitCode).toBe(EXIT_CODES.status);
    });
  });

  describe("signals", () => {
    const SIGNALS = ["SIGHUP", "SIGINT", "SIGTERM"] as const;

    test.concurrent.each(SIGNALS)("%s takes away what no later run can continue", async (signal) => {
      await using folder = await temporaryFolder();
      using origin = scripted([serving({ etag: "", cut: HALF, end: "stall" })]);
      const argv = [...(await command("client-robust", variant)), "-s", "-o", "file", origin.url];
      await using child = Bun.spawn(argv, { cwd: folder.path, stdio: ["ignore", "ignore", "ignore"] });
      await until(() => readdirSync(folder.path).some((name) => statSync(`${folder.path}/${name}`).size === HALF));
      child.kill(signal);
      await child.exited;
      expect([child.signalCode, readdirSync(folder.path)]).toEqual([signal, []]);
    });

    test.concurrent.each(SIGNALS)("%s stays ignored if it was so at the start, as by nohup", async (signal) => {
      await using folder = await temporaryFolder();
      const { promise: killed, resolve } = Promise.withResolvers<void>();
      using origin = scripted([pausing(serving(), HALF, () => killed)]);
      const argv = [...(await command("client-robust", variant)), "-s", "-o", "file", origin.url];
      const ignoring = ["bash", "-c", `trap "" ${signal}; exec "$@"`, "bash", ...argv];
      await using child = Bun.spawn(ignoring, { cwd: folder.path, stdio: ["ignore", "ignore", "ignore"] });
      await until(() => readdirSync(folder.path).length === 2);
      child.kill(signal);
      // If it is not ignored, this is time to die.
      await Promise.race([child.exited, Bun.sleep(500)]);
      resolve();
      expect([await child.exited, child.signalCode]).toEqual([EXIT_CODES.ok, null]);
      expect(readFileSync(`${folder.path}/file`).equals(CONTENT)).toBeTrue();
    });
  });

  describe("redirects", () => {
    test.concurrent.each([
      ["UTF-8", Buffer.from("/dl/schön.iso"), "/dl/sch%C3%B6n.iso"],
      ["ISO 8859-1", Buffer.from("/dl/sch\xf6n.iso", "latin1"), "/dl/sch%F6n.iso"],
      [
        "UTF-8 in path and query",
        Buffer.from("/下载/文件.zip?n=文"),
        "/%E4%B8%8B%E8%BD%BD/%E6%96%87%E4%BB%B6.zip?n=%E6%96%87",
      ],
      ["four bytes a character", Buffer.from("/💾"), "/%F0%9F%92%BE"],
      ["encoded", Buffer.from("/a%2Fb%20c%C3%B6"), "/a%2Fb%20c%C3%B6"],
      ["neither", Buffer.from("/\xff\xfe", "latin1"), "/%FF%FE"],
      ["a space", Buffer.from("/a b.iso"), "/a%20b.iso"],
      ["relative", Buffer.from("next.iso"), "/dir/next.iso"],
      ["a query alone", Buffer.from("?v=2"), "/dir/start?v=2"],
      ["a fragment", Buffer.from("/x.iso#sha"), "/x.iso"],
    ])("a Location leads to the same bytes: %s", async (_, location, target) => {
      using origin = scripted([redirectTo(location), serving()]);
      const { exitCode } = await save(`http://127.0.0.1:${origin.port}/dir/start`, "-L");
      expect([exitCode, requestLine(origin.requests[1])]).toEqual([EXIT_CODES.ok, `GET ${target} HTTP/1.1`]);
    });

    test.concurrent("what a server says is read so, wherever it is printed", async () => {
      for (const encoding of ["utf8", "latin1"] as const) {
        using origin = scripted([
          raw(Buffer.from("HTTP/1.1 404 Straße gesperrt\r\nContent-Length: 0\r\n\r\n", encoding)),
        ]);
        expect((await save(origin.url)).stderr).toBe("Error: the server answered 404 Straße gesperrt\n");
        origin.answerAnew(redirectTo(Buffer.from("/schön", encoding)));
        expect((await save(origin.url)).stderr).toEndWith(encoding === "utf8" ? " /sch%C3%B6n\n" : " /sch%F6n\n");
      }
    });

    test.concurrent("an empty Location is none", async () => {
      using origin = scripted([redirectTo("")]);
      const { exitCode, stderr } = await save(origin.url, "-L");
      expect([exitCode, stderr, origin.requests.length]).toEqual([
        EXIT_CODES.status,
        "Error: the server answered 302 Found\n",
        1,
      ]);
      const printed = await get("-L", origin.url);
      expect([printed.exitCode, printed.stdout, origin.requests.length]).toEqual([
        EXIT_CODES.ok,
        "HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: \r\n\r\n",
        2,
      ]);
    });

    test.concurrent("with -o and without -L, the message names -L", async () => {
      for (const status of ["300 Choices", "301 Moved", "302 Found", "303 Other", "307 Temporary", "308 Permanent"]) {
        using origin = scripted([redirectTo("/next", status)]);
        const { exitCode, stderr } = await save(origin.url);
        expect([exitCode, origin.requests.length]).toEqual([EXIT_CODES.status, 1]);
        expect(stderr).toBe(`Error: the server answered ${status}; -L follows it to /next\n`);
      }
    });

    test.concurrent.each(["PUT", "POST", "DELETE"])(
      "the request after %s and a 303 is a GET: it goes on after a cut, and the first one is not repeated",
      async (method) => {
        using origin = scripted([
          redirectTo("/result", "303 See Other"),
          serving({ cut: HALF }),
          raw("", "reset"),
          serving(),
        ]);
        const { content, exitCode } = await save(origin.url, "-L", "-X", method, "-d", "x=1", ...QUICK);
        expect([exitCode, content?.equals(CONTENT)]).toEqual([EXIT_CODES.ok, true]);
        expect(origin.requests.map((request) => requestLine(request))).toEqual([
          `${method} /file HTTP/1.1`,
          "GET /result HTTP/1.1",
          "GET /result HTTP/1.1",
          "GET /result HTTP/1.1",
        ]);
        expect(origin.requests.map(rangeOf)).toEqual([undefined, undefined, HALF, HALF]);
        for (const request of origin.requests.slice(1)) expect(request).not.toMatch(/x=1|Content-(Length|Type)/);
      },
    );

    test.concurrent("POST becomes GET at 301 to 303, and what was about its content goes", async () => {
      for (const [status, method] of [
        ["300 Choices", "POST"],
        ["301 Moved", "GET"],
        ["302 Found", "GET"],
        ["303 Other", "GET"],
        ["307 Temporary", "POST"],
      ] as const) {
        using origin = scripted([redirectTo("/next", status), serving()]);
        const fields = ["Content-Type: text/x", "Content-Language: de", "Repr-Digest: sha-256=:x:", "X-Mine: y"];
        const { exitCode } = await save(origin.url, "-L", "-d", "x=1", ...fields.flatMap((field) => ["-H", field]));
        const [, next] = origin.requests;
        expect([status, exitCode, requestLine(next)]).toEqual([status, EXIT_CODES.ok, `${method} /next HTTP/1.1`]);
        expect(fieldOf(next, "X-Mine")).toBe("y");
        expect([status, fieldOf(next, "Content-Type")]).toEqual([status, method === "POST" ? "text/x" : undefined]);
        if (method === "GET") expect(next).not.toMatch(/x=1|\r\n(Content-|Repr-)/);
      }
    });

    test.concurrent("where it leads after a POST may be closed for a while", async () => {
      await using late = await startPython(LATE);
      using origin = scripted([redirectTo(`http://127.0.0.1:${late.port}/result`, "303 See Other")]);
      const argv = [...(await command("client-robust", variant)), "-L", "-d", "x=1", "--retry-delay", "0.5", "-o", "-"];
      const client = await start([...argv, "--retry", "60", origin.url], /^(Retry in|Error: )/);
      await using _ = client;
      late.child.kill("SIGUSR1");
      expect(await client.child.exited).toBe(EXIT_CODES.ok);
      expect([client.stdout.text, origin.requests.length]).toEqual(["hello", 1]);
      await late.stdout.waitFor(/\nGET \/result HTTP\/1.1\n/);
    });

    test.concurrent("307 and 308 repeat the method, and a POST that was sent is not sent again", async () => {
      for (const status of ["307 Temporary", "308 Permanent"]) {
        using origin = scripted([redirectTo("/next", status), raw("", "reset"), serving()]);
        const { exitCode } = await save(origin.url, "-L", "-d", "x=1", ...QUICK);
        expect(exitCode).toBe(EXIT_CODES.receive);
        expect(origin.requests.map((request) => requestLine(request))).toEqual([
          "POST /file HTTP/1.1",
          "POST /next HTTP/1.1",
        ]);
        expect(origin.requests[1]).toEndWith("\r\n\r\nx=1");
      }
    });
  });

  test.concurrent("heads with bare LF are read; lines of chunk sizes are not", async () => {
    const fields = `ETag: "a"\nContent-Length: ${CONTENT.length}\n`;
    using origin = scripted([raw(`HTTP/1.0 200 OK\n${fields}\n${CONTENT}`)]);
    const { content, exitCode } = await save(origin.url);
    expect([exitCode, content?.equals(CONTENT)]).toEqual([0, true]);
    // It goes on from there as from any other, and follows redirects.
    origin.answerAnew(raw(`HTTP/1.1 200 OK\r\n${fields}\n${CONTENT.subarray(0, HALF)}`), serving());
    expect((await save(origin.url, ...QUICK)).content?.equals(CONTENT)).toBeTrue();
    expect(origin.requests.map(rangeOf)).toEqual([undefined, HALF]);
    origin.answerAnew(raw("HTTP/1.1 302 Found\nLocation: /next\n\n"), serving());
    expect((await save(origin.url, "-L")).exitCode).toBe(EXIT_CODES.ok);
    origin.answerAnew(raw("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n"));
    expect((await save(origin.url, "--retry", "0")).exitCode).toBe(EXIT_CODES.unparsable);
  });

  describe("slow answers", () => {
    test.concurrent("--help says that a minute without a byte is waited for", async () => {
      expect((await get("--help")).stdout).toMatch(/^ +--stall-timeout S .*\(60\)$/m);
    });

    test.concurrent("a byte each 0.3 s, for 3 s, with --stall-timeout 1 is a success", async () => {
      const code = `
import socket, time
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(5); print(s.getsockname()[1], flush=True)
while True:
    c, _ = s.accept(); c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1); c.recv(65536); print("request", flush=True)
    c.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 10\\r\\n\\r\\n")
    for i in range(10): time.sleep(0.3); c.sendall(b"%d" % i)
    c.close()`;
      await using server = await startPython(code);
      const { stdout, stderr, exitCode } = await get(
        "-o",
        "-",
        "--stall-timeout",
        "1",
        `http://127.0.0.1:${server.port}/`,
      );
      expect([stdout, stderr, exitCode]).toEqual(["0123456789", "", EXIT_CODES.ok]);
      expect(server.stdout.text.match(/request/g)?.length).toBe(1);
    });
  });

  describe("--max-size", () => {
    const chunked = (text: string) =>
      `Transfer-Encoding: chunked\r\n\r\n${text.length.toString(16)}\r\n${text}\r\n0\r\n\r\n`;
    const framings: readonly [name: string, frame: (text: string) => string][] = [
      ["with a length", (text) => `Content-Length: ${text.length}\r\n\r\n${text}`],
      ["in chunks", chunked],
      ["until the connection closes", (text) => `\r\n${text}`],
    ];
    test.concurrent.each(framings)("exactly that much passes, and one byte more does not: %s", async (_, frame) => {
      for (const size of [0, 1, 1000]) {
        using origin = scripted([raw(`HTTP/1.1 200 OK\r\n${frame("x".repeat(size))}`)]);
        const exact = await save(origin.url, "--max-size", String(size));
        expect([size, exact.exitCode, exact.content?.length]).toEqual([size, EXIT_CODES.ok, size]);
        origin.answerAnew(raw(`HTTP/1.1 200 OK\r\n${frame("x".repeat(size + 1))}`));
        const over = await save(origin.url, "--max-size", String(size), ...QUICK);
        expect([over.exitCode, over.files, origin.requests.length]).toEqual([EXIT_CODES.tooLarge, [], 1]);
        expect((await get("-o", "-", "--max-size", String(size), origin.url)).stdout.length).toBeLessThanOrEqual(size);
      }
    });

    test.concurrent("what is gone on with counts as a whole", async () => {
      for (const [size, code] of [
        [CONTENT.length, EXIT_CODES.ok],
        [CONTENT.length - 1, EXIT_CODES.tooLarge],
      ] as const) {
        const unknown = raw(
          `HTTP/1.1 200 OK\r\nETag: "a"\r\nTransfer-Encoding: chunked\r\n\r\n2328\r\n${CONTENT.subarray(0, HALF)}`,
        );
        using origin = scripted([unknown, serving()]);
        expect((await save(origin.url, "--max-size", String(size), ...QUICK)).exitCode).toBe(code);
      }
    });
  });

  describe("codings", () => {
    test.concurrent("none is asked for, unless the user does", async () => {
      using origin = scripted([serving()]);
      const asked = async (...args: string[]) => {
        origin.answerAnew(serving());
        await get(...args, origin.url);
        return fieldOf(origin.requests[0], "Accept-Encoding");
      };
      expect(await asked()).toBe("identity");
      expect(await asked("-H", "accept-encoding: gzip")).toBeUndefined();
      expect(origin.requests[0]).toContain("\r\naccept-encoding: gzip\r\n");
      expect(await asked("-H", "Accept-Encoding:")).toBeUndefined();
    });

    test.concurrent.each(["gzip", "x-gzip", "br", "zstd, gzip"])(
      "%s is saved as it comes, and one line says so",
      async (coding) => {
        const fields = `Content-Encoding: ${coding}\r\n`;
        using origin = scripted([serving({ fields, cut: 0 }), serving({ fields, cut: HALF }), serving({ fields })]);
        const { content, exitCode, stderr } = await save(origin.url, ...QUICK);
        expect([exitCode, content?.equals(CONTENT), origin.requests.length]).toEqual([EXIT_CODES.ok, true, 3]);
        const told = stderr.split("\n").filter((line) => line.includes("Content-Encoding"));
        expect(told).toEqual([`The content is saved as it comes, with Content-Encoding: ${coding}`]);
        origin.answerAnew(serving({ fields }));
        expect((await save(origin.url, "-s")).stderr).toBe("");
        expect((await get(origin.url)).stderr).toBe("");
      },
    );

    test.concurrent("identity is no coding", async () => {
      for (const fields of ["Content-Encoding: identity\r\n", "Content-Encoding: \r\n", ""]) {
        using origin = scripted([serving({ fields })]);
        expect((await save(origin.url)).stderr).toBe("");
      }
    });
  });

  describe("content to send", () => {
    test.concurrent("300 MB of a file arrive whole, with their length, in constant memory", async () => {
      await using folder = await temporaryFolder();
      const size = 300_000_000;
      const [large, small] = [`${folder.path}/large`, `${folder.path}/small`];
      makeSparse(large, size);
      appendFileSync(large, "end");
      writeFileSync(small, "x");
      await using server = await startPython(RECEIVING, ["", "200"]);
      const argv = [...(await command("client-robust", variant)), "-o", "/dev/null"];
      const url = `http://127.0.0.1:${server.port}/`;
      const little = await measureResidentMiB([...argv, "-d", `@${small}`, url]);
      const much = await measureResidentMiB([...argv, "-d", `@${large}`, url]);
      expect(much).toBeLessThan(little + 48);
      await server.stdout.waitFor(new RegExp(`got ${size + 3} of ${size + 3} `));
    });

    test.concurrent("a retry reads the file again, from its start", async () => {
      await using folder = await temporaryFolder();
      const file = `${folder.path}/data`;
      const content = Buffer.concat(Array(100).fill(CONTENT));
      writeFileSync(file, content);
      await using server = await startPython(RECEIVING, ["", "503", "200"]);
      const { exitCode } = await get("-X", "PUT", ...QUICK, "-d", `@${file}`, `http://127.0.0.1:${server.port}/`);
      expect(exitCode).toBe(EXIT_CODES.ok);
      const line = `got ${content.length} of ${content.length} ${sha256(content)}\n`;
      expect(server.stdout.text).toEndWith(`\n${line}${line}`);
    });

    test.concurrent.each([
      ["grows", (file: string) => appendFileSync(file, Buffer.alloc(8_000_000)), EXIT_CODES.ok],
      ["shrinks", (file: string) => truncateSync(file, 100), EXIT_CODES.send],
    ] as const)("a file that %s meanwhile: no other length is sent than was told", async (how, change, code) => {
      await using folder = await temporaryFolder();
      const [file, size] = [`${folder.path}/data`, 40_000_000];
      makeSparse(file, size);
      await using server = await startPython(RECEIVING, ["wait", "200"]);
      const argv = [...(await command("client-robust", variant)), "-X", "PUT", "-d", `@${file}`];
      await using client = Bun.spawn([...argv, `http://127.0.0.1:${server.port}/`], {
        stdio: ["ignore", "pipe", "pipe"],
      });
      await server.stdout.waitFor(/waiting/);
      change(file);
      server.child.kill("SIGUSR1");
      const stderr = await new Response(client.stderr).text();
      expect(await client.exited).toBe(code);
      const [, got, told] = await server.stdout.waitFor(/got (\d+) of (\d+)/);
      expect(Number(told)).toBe(size);
      if (how === "grows") expect(Number(got)).toBe(size);
      else expect(stderr).toBe("Error: the data has become shorter\n");
    });

    test.concurrent("a file that is gone by the time of a retry is told as what it is", async () => {
      await using folder = await temporaryFolder();
      const file = `${folder.path}/data`;
      writeFileSync(file, "x");
      const busy: Script = () => {
        unlinkSync(file);
        return { bytes: "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n" };
      };
      using origin = scripted([busy, serving()]);
      const { stderr, exitCode } = await get("-X", "PUT", ...QUICK, "-d", `@${file}`, origin.url);
      expect(stderr).toEndWith(`\nError: cannot read the data: ENOENT\n`);
      expect(exitCode).toBe(EXIT_CODES.send);
    });

    test.concurrent("stdin and pipes are held, so that a retry can send them again", async () => {
      await using server = await startPython(RECEIVING, ["", "503", "200"]);
      const argv = [...(await command("client-robust", variant)), "-X", "PUT", ...QUICK];
      const url = `http://127.0.0.1:${server.port}/`;
      const { exitCode } = await run([...argv, "-d", "@-", url], { stdin: CONTENT });
      const line = `got ${CONTENT.length} of ${CONTENT.length} ${sha256(CONTENT)}\n`;
      expect([exitCode, server.stdout.text.endsWith(`\n${line}${line}`)]).toEqual([EXIT_CODES.ok, true]);
      await using folder = await temporaryFolder();
      writeFileSync(`${folder.path}/data`, CONTENT);
      const piped = await run([
        "bash",
        "-c",
        '"${@:2}" -d @<(cat "$1") '.concat(url),
        "bash",
        `${folder.path}/data`,
        ...argv,
      ]);
      expect([piped.exitCode, server.stdout.text.endsWith(line.repeat(3))]).toEqual([EXIT_CODES.ok, true]);
    });

    test.concurrent("so much of stdin is held and no more: then one line says what to do", async () => {
      await using server = await startPython(RECEIVING, ["", "200"]);
      const argv = [...(await command("client-robust", variant)), "-d", "@-", `http://127.0.0.1:${server.port}/`];
      const feed = (bytes: number) => run(["bash", "-c", `head -c ${bytes} /dev/zero | "$@"`, "bash", ...argv]);
      const max = 64 * 1024 * 1024;
      expect((await feed(max)).exitCode).toBe(EXIT_CODES.ok);
      await server.stdout.waitFor(new RegExp(`got ${max} of ${max} `));
      const over = await feed(max + 1);
      expect(over.exitCode).toBe(EXIT_CODES.usage);
      expect(over.stderr).toMatch(/^Error: (?=[^\n]*64\.0 MiB)[^\n]*file[^\n]*\n$/i);
    });

    test.concurrent("several -d are joined, in their order, whatever they are", async () => {
      await using folder = await temporaryFolder();
      const [file, empty] = [`${folder.path}/data`, `${folder.path}/empty`];
      writeFileSync(file, "two\r\nlines");
      writeFileSync(empty, "");
      await using server = await startPython(RECEIVING, ["", "200"]);
      const url = `http://127.0.0.1:${server.port}/`;
      const argv = [...(await command("client-robust", variant)), "-d", "a=1", "-d", `@${file}`, "-d", `@${empty}`];
      const { exitCode } = await run([...argv, "-d", "@-", "-d", "b=ö", url], { stdin: Buffer.from("stdin") });
      const content = Buffer.from("a=1&two\r\nlines&&stdin&b=ö");
      expect(exitCode).toBe(EXIT_CODES.ok);
      await server.stdout.waitFor(new RegExp(`got ${content.length} of ${content.length} ${sha256(content)}\n`));
      expect((await get("-d", `@${empty}`, url)).exitCode).toBe(EXIT_CODES.ok);
      await server.stdout.waitFor(/got 0 of 0 /);
    });

    test.concurrent("a device is read, and a file of /proc, which tells no size", async () => {
      await using server = await startPython(RECEIVING, ["", "200"]);
      const version = "/proc/sys/kernel/version";
      for (const path of ["/dev/null", version]) {
        const content = path === version ? readFileSync(path) : Buffer.of();
        const { exitCode } = await get("-d", `@${path}`, `http://127.0.0.1:${server.port}/`);
        expect([path, exitCode]).toEqual([path, EXIT_CODES.ok]);
        await server.stdout.waitFor(new RegExp(`got ${content.length} of ${content.length} ${sha256(content)}\n`));
      }
    });

    test.concurrent("what cannot be read is one line, and nothing is asked", async () => {
      await using folder = await temporaryFolder();
      using origin = scripted([response("200 OK")]);
      for (const path of [`${folder.path}/none`, folder.path]) {
        const { stderr, exitCode } = await get("-d", `@${path}`, origin.url);
        expect([path, exitCode]).toEqual([path, EXIT_CODES.usage]);
        expect(stderr).toMatch(/^Error: cannot read the data: E[A-Z]+ \(see client-robust --help\)\n$/);
      }
      expect(origin.connections()).toBe(0);
    });

    test.concurrent("interim responses do not end it", async () => {
      await using folder = await temporaryFolder();
      const [file, size] = [`${folder.path}/data`, 50_000_000];
      makeSparse(file, size);
      await using server = await startPython(RECEIVING, ["interim", "200"]);
      const { exitCode } = await get("--retry", "0", "-d", `@${file}`, `http://127.0.0.1:${server.port}/`);
      expect(exitCode).toBe(EXIT_CODES.ok);
      await server.stdout.waitFor(new RegExp(`got ${size} of ${size} `));
    });

    test.concurrent.each(["", "HTTP/1.1 100 Continue\\r\\n\\r\\n"])(
      "an answer before the end of the content is read, and the rest is not sent (%j)",
      async (interim) => {
        await using folder = await temporaryFolder();
        const [file, size] = [`${folder.path}/data`, 100_000_000];
        makeSparse(file, size);
        const code = `
import signal, socket
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(5); print(s.getsockname()[1], flush=True)
c, _ = s.accept(); c.recv(65536)
c.sendall(b"${interim}HTTP/1.1 413 Too Large\\r\\nContent-Length: 2\\r\\n\\r\\nno"); c.shutdown(socket.SHUT_WR)
signal.sigwait({signal.SIGUSR1}); n = 0
try:
    while piece := c.recv(1 << 20): n += len(piece)
except OSError: pass # the client resets the connection
print("read", n, flush=True)`;
        await using server = await startPython(code);
        const { stdout, exitCode } = await get("-d", `@${file}`, `http://127.0.0.1:${server.port}/`);
        expect([stdout, exitCode]).toEqual([
          "HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno",
          EXIT_CODES.status,
        ]);
        server.child.kill("SIGUSR1");
        expect(Number((await server.stdout.waitFor(/read (\d+)/))[1])).toBeLessThan(size / 2);
      },
    );
  });

  describe("says it where people look", () => {
    test.concurrent("an error after partial content begins on a line of its own on a terminal", async () => {
      for (const [content, args] of [
        ["Hello", ["--retry", "0"]],
        ["Hello\n", ["--retry", "0"]],
        ["Hello", ["--retry", "0", "-o", "-"]],
      ] as const) {
        using origin = scripted([raw(`HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n${content}`)]);
        const seen = await seenOnTerminal(...args, origin.url);
        expect(seen).toEndWith(
          `Hello\nError: the response is not complete: ${content.length} of 10 bytes of content came\n`,
        );
      }
    });

    test.concurrent("so does the line about a retry, and the content goes on after it", async () => {
      using origin = scripted([
        serving({ content: Buffer.from("Hello, World!"), cut: 5 }),
        serving({ content: Buffer.from("Hello, World!") }),
      ]);
      expect(await seenOnTerminal("-o", "-", ...QUICK, origin.url)).toMatch(
        /^Hello\nRetry in 0\.1 s: [^\n]+\n, World!$/,
      );
    });

    test.concurrent("Ctrl-C or a deadline ends the progress line before something else is said", async () => {
      await using folder = await temporaryFolder();
      const slow = (): Answer => ({
        bytes: `HTTP/1.1 200 OK\r\nETag: "a"\r\nContent-Length: ${CONTENT.length}\r\n\r\nabc`,
        pause: () => Bun.sleep(1500), // the progress line comes after a second
        rest: "def",
        end: "stall",
      });
      using origin = scripted([slow]);
      const argv = [...(await command("client-robust", variant)), "-o", `${folder.path}/file`, origin.url];
      const { stdout } = await run(["python3", "-c", INTERRUPTING, ...argv]);
      // No wrap: in a narrow terminal the line would leave a row of its own each time.
      expect(stdout).toMatch(
        /\r\x1b\[\?7l[^\r\n]+ s left\x1b\[\?7h\x1b\[K(\^C)?\r\x1b\[KKept 6 bytes in [^\r\n]+\r\n$/,
      );
      // So does the deadline.
      const spawn = "import pty, sys; pty.spawn(sys.argv[1:])";
      const late = await run(["python3", "-c", spawn, ...argv.with(-2, `${folder.path}/late`), "--max-time", "4"]);
      expect(late.stdout).toMatch(/ s left\x1b\[\?7h\x1b\[K\r\x1b\[KError: not done within 4 s\r\nKept 6 bytes/);
    });

    test.concurrent("what is not a terminal gets no byte that is not content", async () => {
      using origin = scripted([serving({ cut: HALF })]);
      const { stdout } = await get("-o", "-", "--retry", "0", origin.url);
      expect(stdout).toBe(CONTENT.subarray(0, HALF).toString());
    });

    test.concurrent("a retry to stdout without -o prints one head, and the content once", async () => {
      using origin = scripted([serving({ cut: HALF }), serving({ cut: 5000 }), serving()]);
      const { stdout, exitCode } = await get(...QUICK, origin.url);
      const head = `HTTP/1.1 200 OK\r\nETag: "a"\r\nContent-Length: ${CONTENT.length}\r\n\r\n`;
      expect([exitCode, stdout === head + CONTENT.toString(), origin.requests.length]).toEqual([
        EXIT_CODES.ok,
        true,
        3,
      ]);
    });

    test.concurrent("--help names each option, and what is not done: proxies, and user names in URLs", async () => {
      const { stdout } = await get("--help");
      for (const option of [
        "-f, --fail",
        "-S, --show-error",
        "-O, --remote-name",
        "-R, --remote-time",
        "-z, --time-cond",
        "--retry-delay",
      ])
        expect(stdout).toContain(option);
      expect(stdout).toMatch(/prox(y|ies)/i);
      expect(stdout).toMatch(/user names?/i);
    });
  });
});
