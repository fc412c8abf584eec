/** server.ts from outside: the script and the binary, over real sockets, with curl, python3, ab and wrk as peers. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { DEFAULTS, LIMITS } from "../server.ts";
import {
  command,
  exchange,
  freePort,
  hasTool,
  LISTENING,
  makeCertificate,
  Peer,
  run,
  runProgram,
  start,
  startServer,
  temporaryFolder,
  Transcript,
  VARIANTS,
} from "./harness.ts";

setDefaultTimeout(60_000);

const GET = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
const GET_AND_CLOSE = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

/** Is there a ::1 to listen on? */
function hasIPv6(): boolean {
  try {
    Bun.listen({ hostname: "::1", port: 0, socket: { data() {} } }).stop(true);
    return true;
  } catch {
    return false;
  }
}

/** The resident memory of a process, in MiB. */
const residentMiB = (pid: number) =>
  Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;

/** How many files and sockets a process has open. */
const openFiles = (pid: number) => readdirSync(`/proc/${pid}/fd`).length;

const count = (text: string, part: string) => text.split(part).length - 1;

describe.each(VARIANTS)("server (%s)", (variant) => {
  const serve = (...args: string[]) => startServer(variant, args);

  test("answers curl with the text, its length, its type and a date", async () => {
    await using server = await serve();
    const { stdout } = await run(["curl", "-si", `${server.url}/data`]);
    const date = /Date: (.*)\r\n/.exec(stdout)?.[1] ?? "";
    expect(stdout).toBe(
      `HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 13\r\nDate: ${date}\r\n\r\nHello, World!`,
    );
    expect(new Date(date).toUTCString()).toBe(date);
    expect(Math.abs(Date.parse(date) - Date.now())).toBeLessThan(5000);
  });

  test("listens on both loopback addresses where there are two", async () => {
    await using server = await serve();
    for (const family of hasIPv6() ? ["-4", "-6"] : ["-4"])
      expect((await run(["curl", "-s", family, server.url])).stdout).toBe("Hello, World!");
  });

  test("answers HEAD without content, POST after its content, chunked or not", async () => {
    await using server = await serve();
    const head = await run(["curl", "-sI", server.url]);
    expect(head.stdout).toContain("Content-Length: 13\r\n");
    expect(head.stdout.endsWith("\r\n\r\n")).toBeTrue();
    expect((await run(["curl", "-s", "-d", "a=b", server.url])).stdout).toBe("Hello, World!");
    const chunked = ["-H", "Transfer-Encoding: chunked", "-d", "a=b"];
    expect((await run(["curl", "-s", ...chunked, server.url])).stdout).toBe("Hello, World!");
    const large = ["-H", "Expect: 100-continue", "--data-binary", "@-"];
    const sent = await run(["curl", "-s", ...large, server.url], { stdin: new Uint8Array(1_000_000) });
    expect(sent.stdout).toBe("Hello, World!");
  });

  test("prints each request as it was received, and nothing raw of it", async () => {
    await using server = await serve();
    await exchange(
      server.port,
      ["POST /data HTTP/1.1\r\nHost: x\r\nX: \u00e9\r\nContent-Length: 8\r\n\r\n\x1b[2Jdone"],
      { finish: true },
    );
    const { 0: printed } = await server.stdout.waitFor(/POST[^]*done\n/);
    expect(printed).toBe("POST /data HTTP/1.1\nHost: x\nX: \u00e9\nContent-Length: 8\n\n\\x1b[2Jdone\n");
  });

  test("prints what was refused, too", async () => {
    await using server = await serve();
    await exchange(server.port, ["\x16\x03\x01\x02"]);
    await server.stdout.waitFor(/^\\x16\\x03\\x01\\x02\n$/);
  });

  test("--log access writes the Combined Log Format, in which a peer can forge no line", async () => {
    await using server = await serve("--log", "access");
    await run(["curl", "-s", "-A", 'a"b', "-e", "http://from/", `${server.url}/data?x=%0a`]);
    await exchange(server.port, ['GET /"x HTTP/1.1\r\nHost: x\r\nUser-Agent: \xff\\\r\n\r\n', "nonsense\r\n"]);
    await server.stdout.waitFor(/\n[^]*\n[^]*\n/);
    const lines = server.stdout.text.split("\n");
    const time = /\[\d\d\/[A-Z][a-z]{2}\/\d{4}:\d\d:\d\d:\d\d \+0000\]/;
    expect(lines.map((line) => line.replace(time, "[time]"))).toEqual([
      '127.0.0.1 - - [time] "GET /data?x=%0a HTTP/1.1" 200 13 "http://from/" "a\\x22b"',
      '127.0.0.1 - - [time] "GET /\\x22x HTTP/1.1" 200 13 "-" "\\xc3\\xbf\\x5c"',
      '127.0.0.1 - - [time] "nonsense" 400 66 "-" "-"',
      "",
    ]);
  });

  test("answers python's sockets, used as the tutorial uses them", async () => {
    await using server = await serve("--log", "off");
    const code = `
import socket
client_socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
client_socket.connect(("localhost", ${server.port}))
client_socket.sendall("GET /data HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n".encode())
print(client_socket.recv(1024).decode())
client_socket.close()`;
    const { stdout, exitCode } = await run(["python3", "-c", code]);
    expect(stdout).toStartWith("HTTP/1.1 200 OK\r\n");
    expect(stdout).toEndWith("\r\n\r\nHello, World!\n");
    expect(exitCode).toBe(0);
  });

  test("takes a request a byte at a time, and a thousand at once", async () => {
    await using server = await serve("--log", "off", "--text", "grüße");
    const slow = await exchange(server.port, [...GET_AND_CLOSE]);
    expect(slow).toEndWith(
      `Content-Length: 7\r\nDate: ${/Date: (.*)\r/.exec(slow)?.[1]}\r\nConnection: close\r\n\r\ngr\xc3\xbc\xc3\x9fe`,
    );
    const many = await exchange(server.port, [GET.repeat(999) + GET_AND_CLOSE]);
    expect(count(many, "HTTP/1.1 200 OK\r\n")).toBe(1000);
    expect(count(many, "gr\xc3\xbc\xc3\x9fe")).toBe(1000);
    expect(count(many, "Connection: close")).toBe(1);
  });

  test("answers a peer that has half-closed, as nc -N does", async () => {
    await using server = await serve("--log", "off");
    expect(await exchange(server.port, [GET], { finish: true })).toEndWith("\r\n\r\nHello, World!");
  });

  test("refuses what is not HTTP, repeats none of it, and closes", async () => {
    await using server = await serve("--log", "off");
    for (const nonsense of ["\x16\x03\x01\x02\x00", "hello\r\n\r\n", "GET /secret HTTP/1.1\nHost: x\n\n"]) {
      const answer = await exchange(server.port, [nonsense]);
      expect(answer).toStartWith("HTTP/1.1 400 Bad Request\r\n");
      expect(answer).toContain("\r\nConnection: close\r\n");
      expect(answer).not.toContain("secret");
    }
  });

  test("lets no reset destroy an answer while the peer is still sending", async () => {
    await using server = await serve("--log", "off");
    const code = `
import socket
s = socket.create_connection(("127.0.0.1", ${server.port}))
s.sendall(b"nonsense\\r\\n" + b"x" * 5000000)
s.shutdown(socket.SHUT_WR)
print(b"".join(iter(lambda: s.recv(65536), b"")).decode())`;
    const { stdout, stderr } = await run(["python3", "-c", code]);
    expect(stderr).toBe("");
    expect(stdout).toStartWith("HTTP/1.1 400 Bad Request\r\n");
  });

  test("keeps every answer for a peer that sends long before it reads, in bounded memory", async () => {
    await using server = await serve("--log", "off", "--text", "x".repeat(500));
    const before = residentMiB(server.child.pid);
    // The peer's sendall stops when nobody takes more: it goes on in a thread, and is read from only later.
    const code = `
import socket, threading, sys
request = b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"
s = socket.create_connection(("127.0.0.1", ${server.port}))
s.settimeout(20)
t = threading.Thread(target=lambda: (s.sendall(request * 100000), s.shutdown(socket.SHUT_WR)))
t.start()
t.join(1)
print("sent", flush=True)
sys.stdin.readline()
total, answers, tail = 0, 0, b""
for data in iter(lambda: s.recv(1 << 20), b""):
    tail += data
    answers += tail.count(b"HTTP/1.1 200 OK")
    tail = tail[-14:]
t.join()
print(answers)`;
    const peer = Bun.spawn(["python3", "-c", code], { stdin: "pipe", stdout: "pipe", stderr: "inherit" });
    await using _ = peer;
    const output = new Transcript(peer.stdout);
    await output.waitFor(/sent/);
    expect((await run(["curl", "-s", server.url])).stdout).toBe("x".repeat(500));
    expect(residentMiB(server.child.pid) - before).toBeLessThan(64);
    peer.stdin.write("\n");
    await peer.stdin.end();
    await output.waitFor(/^sent\n100000\n/);
  });

  test("goes on serving when nobody reads its stdout any more", async () => {
    const argv = [...(await command("server", variant)), "--port", "0"];
    // The shell becomes the server; its stdout is a pipe whose only reader ends at once.
    await using server = await start(["bash", "-c", 'exec "$@" > >(true)', "bash", ...argv], LISTENING);
    for (let i = 0; i < 5; i++) expect((await run(["curl", "-s", server.match[0]])).stdout).toBe("Hello, World!");
  });

  test("goes on serving, and stops when told to, while its stdout is a pipe that nobody empties", async () => {
    await using folder = await temporaryFolder();
    const argv = [...(await command("server", variant)), "--port", "0"];
    // The shell becomes the server; a FIFO that it holds open for reading too fills up and stays full.
    const script = 'mkfifo fifo && exec 3<>fifo && exec "$@" >fifo';
    await using server = await start(["bash", "-c", script, "bash", ...argv], LISTENING, { cwd: folder.path });
    const before = residentMiB(server.child.pid);
    const answers = await exchange(Number(server.match[1]), [GET.repeat(20_000), GET_AND_CLOSE]);
    expect(count(answers, "Hello, World!")).toBe(20_001);
    expect(residentMiB(server.child.pid) - before).toBeLessThan(64);
    server.child.kill("SIGTERM");
    expect(await server.child.exited).toBe(0);
  });

  test("SIGTERM: nobody waits for idle peers that do not close, exit 0", async () => {
    await using server = await serve("--log", "off");
    const answers = ["", GET].map(async (request) => {
      const { promise: answered, resolve } = Promise.withResolvers<string>();
      const socket = await Bun.connect({
        hostname: "127.0.0.1",
        port: server.port,
        allowHalfOpen: true, // it never sends FIN
        socket: { data: (_, bytes) => resolve(bytes.toString()), end() {} },
      });
      socket.write(request);
      return request === "" ? "" : answered;
    });
    expect((await Promise.all(answers)).at(-1)).toEndWith("Hello, World!");
    const start = performance.now();
    server.child.kill("SIGTERM");
    expect(await server.child.exited).toBe(0);
    expect(performance.now() - start).toBeLessThan(4000); // others may have five seconds to take their answers
  });

  test("SIGTERM: what is under way is answered, idle connections are closed, exit 0", async () => {
    await using server = await serve("--log", "off");
    const { promise: underWay, resolve: hasSent } = Promise.withResolvers<Bun.Socket>();
    const { promise: answered, resolve: hasClosed } = Promise.withResolvers<string>();
    let received = "";
    await Bun.connect({
      hostname: "127.0.0.1",
      port: server.port,
      allowHalfOpen: true,
      socket: {
        open: (socket) => void socket.write(`${GET}GET / HTTP/1.1\r\n`),
        data(socket, bytes) {
          received += bytes.toString();
          if (received.endsWith("Hello, World!")) hasSent(socket);
        },
        end: (socket) => void socket.end(),
        close: () => hasClosed(received),
      },
    });
    using idle = await Peer.connect(server.port);
    await idle.send(GET);
    await idle.waitFor(/Hello, World!$/);
    const socket = await underWay;
    server.child.kill("SIGTERM");
    expect(await idle.closed).toBe("end");
    socket.write("Host: x\r\n\r\n");
    const answers = await answered;
    expect(count(answers, "HTTP/1.1 200 OK")).toBe(2);
    expect(count(answers, "Connection: close")).toBe(1);
    expect(await server.child.exited).toBe(0);
  });

  test("a second signal exits at once", async () => {
    await using server = await serve("--log", "off");
    const held = exchange(server.port, ["GET / HTTP/1.1\r\n"]).catch(() => "lost");
    await exchange(server.port, [GET_AND_CLOSE]);
    server.child.kill("SIGINT");
    server.child.kill("SIGTERM");
    expect(await server.child.exited).toBe(0);
    await held;
  });

  test("HOST and PORT stand in for absent flags", async () => {
    const port = await freePort();
    await using server = await startServer(variant, ["--host", "127.0.0.1"], {
      env: { PORT: "1", HOST: "nowhere.invalid" },
    });
    expect(server.url).toBe(`http://127.0.0.1:${server.port}`);
    const taken = await runProgram("server", variant, [], { env: { PORT: String(server.port), HOST: "127.0.0.1" } });
    expect(taken.stderr).toContain(`port ${server.port} is taken`);
    // Names have no case, and both addresses of this one are listened on.
    await using anyCase = await startServer(variant, [], { env: { HOST: "LocalHost" } });
    for (const hostname of hasIPv6() ? ["127.0.0.1", "::1"] : ["127.0.0.1"])
      (await Bun.connect({ hostname, port: anyCase.port, socket: { data() {} } })).end();
    const unknown = await runProgram("server", variant, ["--port", String(port)], { env: { HOST: "nowhere.invalid" } });
    expect(unknown.stderr).toBe(
      "Error: cannot listen on nowhere.invalid: no such host, or no file descriptor is free; the environment variable HOST names it, --host another\n",
    );
    expect(unknown.exitCode).toBe(1);
    // What conda and Kubernetes set: a message about a flag that nobody gave would be a riddle.
    const named = await runProgram("server", variant, ["--host", "nowhere.invalid"], { env: { HOST: "other" } });
    expect(named.stderr).toEndWith("is free\n");
    const kubernetes = await runProgram("server", variant, [], { env: { PORT: "tcp://10.96.0.1:80" } });
    expect(kubernetes.stderr).toBe(
      'Error: the environment variable PORT takes a number from 0 to 65535, not "tcp://10.96.0.1:80" (see server --help)\n',
    );
    expect(kubernetes.exitCode).toBe(2);
  });

  test("a port that is taken is one line and exit 1", async () => {
    await using server = await serve();
    const { stdout, stderr, exitCode } = await runProgram("server", variant, ["--port", String(server.port)]);
    expect(stderr).toBe(
      `Error: port ${server.port} is taken: stop the program that has it, or choose another with --port; if it has just ended, wait a minute\n`,
    );
    expect([stdout, exitCode]).toEqual(["", 1]);
  });

  test("nor is a port free that a program has just left without SO_REUSEADDR: the message says to wait", async () => {
    // The side that closes first keeps the port in TIME_WAIT.
    const code = `
import socket
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(1)
c = socket.create_connection(s.getsockname()); a, _ = s.accept(); a.close(); c.recv(1)
print(s.getsockname()[1])`;
    const left = await run(["python3", "-c", code]);
    const { stderr, exitCode } = await runProgram("server", variant, ["--port", left.stdout.trim()]);
    expect(stderr).toContain("; if it has just ended, wait a minute\n");
    expect(exitCode).toBe(1);
  });

  const wrongUsages = [
    "--nonsense",
    "extra",
    "--port x",
    "--port 65536",
    "--port -1",
    "--port ",
    "--host ",
    "--tls-cert x",
    "--head-bytes-max -1",
    "--head-bytes-max 1e3",
    "--head-timeout-ms",
    "--method-bytes-max 32",
    "limits",
    "--log loud",
    "--text",
  ];

  test.each(wrongUsages)("wrong usage is one line and exit 2: %s", async (args) => {
    const { stdout, stderr, exitCode } = await runProgram("server", variant, args.split(" "));
    expect(stderr).toMatch(/^Error: .+ \(see server --help\)\n$/);
    expect([stdout, exitCode]).toEqual(["", 2]);
  });

  test("--help and --version are for stdout", async () => {
    const help = await runProgram("server", variant, ["-h"]);
    expect([help.stdout.split("\n")[0], help.exitCode]).toEqual(["Usage: server [options]", 0]);
    const limits = await runProgram("server", variant, ["--help", "limits"]);
    expect([limits.stdout.match(/^ {2}--/gm)?.length, limits.exitCode]).toEqual([Object.keys(LIMITS).length, 0]);
    expect(help.stdout).not.toContain("--head-bytes-max");
    expect((await runProgram("server", variant, ["--help", "other"])).exitCode).toBe(2);
    expect((await runProgram("server", variant, ["-V"])).stdout).toMatch(/^server \d+\.\d+\.\d+\n$/);
    const argv = await command("server", variant);
    const script = 'exec 3> >(true); wait $!; "$@" --help >&3; echo $?'; // its reader has gone
    const unread = await run(["bash", "-c", script, "bash", ...argv]);
    expect([unread.stdout, unread.stderr]).toEqual(["0\n", ""]);
  });

  test.if(hasTool("openssl"))(
    "serves TLS: right answers, none lost, and a deadline for peers that never shake hands",
    async () => {
      await using folder = await temporaryFolder();
      const { cert, key } = await makeCertificate(folder.path);
      const flags = ["--log", "off", "--tls-cert", cert, "--tls-key", key, "--head-timeout-ms", "400"];
      await using server = await serve(...flags);
      expect(server.url).toBe(`https://localhost:${server.port}`);
      expect((await run(["curl", "-s", "--cacert", cert, server.url])).stdout).toBe("Hello, World!");

      // As editors on Windows save them.
      const marked = [join(folder.path, "marked-cert.pem"), join(folder.path, "marked-key.pem")] as const;
      for (const [i, path] of marked.entries())
        await Bun.write(path, `\ufeff${(await Bun.file([cert, key][i] ?? "").text()).replaceAll("\n", "\r\n")}`);
      await using other = await serve("--log", "off", "--tls-cert", marked[0], "--tls-key", marked[1]);
      expect((await run(["curl", "-s", "--cacert", cert, other.url])).stdout).toBe("Hello, World!");

      using silent = await Peer.connect(server.port);
      using pipelining = await Peer.connect(server.port, { ca: await Bun.file(cert).text(), serverName: "localhost" });
      await pipelining.send(GET.repeat(20_000) + GET_AND_CLOSE);
      await pipelining.closed;
      expect(count(pipelining.received, "Hello, World!")).toBe(20_001);

      using refused = await Peer.connect(server.port, { ca: await Bun.file(cert).text(), serverName: "localhost" });
      await refused.send(`nonsense\r\n${"x".repeat(1_000_000)}`);
      await refused.closed;
      expect(refused.received).toStartWith("HTTP/1.1 400 Bad Request\r\n");
      await silent.closed;
      expect(silent.received).toBe("");
    },
  );

  test.if(hasTool("openssl"))("SIGHUP: certificate and key are read again for new connections", async () => {
    await using folder = await temporaryFolder();
    await using other = await temporaryFolder();
    const { cert, key } = await makeCertificate(folder.path);
    const renewed = await makeCertificate(other.path);
    const [first, second] = [await Bun.file(cert).text(), await Bun.file(renewed.cert).text()];
    await using server = await serve("--log", "off", "--tls-cert", cert, "--tls-key", key);
    const isServedWith = async (ca: string) => {
      using peer = await Peer.connect(server.port, { ca, serverName: "localhost", rejectUnauthorized: true });
      await peer.send(GET_AND_CLOSE);
      await peer.closed;
      return peer.received.endsWith("Hello, World!");
    };
    using old = await Peer.connect(server.port, { ca: first, serverName: "localhost" });
    await old.send(GET);
    await old.waitFor(/Hello, World!$/);
    expect([await isServedWith(first), await isServedWith(second)]).toEqual([true, false]);

    // A key that does not fit: the old ones stay.
    await Bun.write(cert, second);
    server.child.kill("SIGHUP");
    await server.stderr.waitFor(/\nError: .+; certificate and key stay as they were\n/);
    expect([await isServedWith(first), await isServedWith(second)]).toEqual([true, false]);

    await Bun.write(key, await Bun.file(renewed.key).text());
    server.child.kill("SIGHUP");
    await server.stderr.waitFor(/\nCertificate and key are read again\n/);
    expect([await isServedWith(first), await isServedWith(second)]).toEqual([false, true]);
    await old.send(GET_AND_CLOSE);
    await old.closed;
    expect(count(old.received, "Hello, World!")).toBe(2);
    server.child.kill("SIGTERM");
    expect(await server.child.exited).toBe(0);
  });

  test.if(hasTool("openssl"))(
    "stderr speaks while stdout is a full, non-blocking pipe that nobody empties",
    async () => {
      await using folder = await temporaryFolder();
      const { cert, key } = await makeCertificate(folder.path);
      // The script becomes the server, and holds both ends of its stdout.
      const code = `
import os, sys
r, w = os.pipe(); os.set_inheritable(r, True); os.set_blocking(w, False)
os.write(w, b"z" * 65536)
os.dup2(w, 1); os.execvp(sys.argv[1], sys.argv[1:])`;
      const argv = [...(await command("server", variant)), "--port", "0", "--tls-cert", cert, "--tls-key", key];
      await using server = await start(["python3", "-c", code, ...argv], LISTENING);
      expect((await run(["curl", "-sk", server.match[0]])).stdout).toBe("Hello, World!");
      server.child.kill("SIGHUP");
      await server.stderr.waitFor(/\nCertificate and key are read again\n/);
      server.child.kill("SIGTERM");
      expect(await server.child.exited).toBe(0);
    },
  );

  test("a failed start ends, though stderr is a full, non-blocking pipe that nobody empties", async () => {
    const code = `
import os, subprocess, sys
r, w = os.pipe(); os.set_blocking(w, False)
os.write(w, b"z" * 65536)
print(subprocess.run(sys.argv[1:], stderr=w, timeout=10).returncode)`;
    const argv = [...(await command("server", variant)), "--port", "none"];
    expect((await run(["python3", "-c", code, ...argv])).stdout).toBe("2\n");
  });

  test.if(hasTool("openssl"))("SIGHUP resets no peer that has connected and waits to be accepted", async () => {
    await using folder = await temporaryFolder();
    const { cert, key } = await makeCertificate(folder.path);
    await using server = await serve("--log", "off", "--tls-cert", cert, "--tls-key", key);
    const code = `
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[2])
peers = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(8)]
print("connected", flush=True)
for peer in peers:
    secure = context.wrap_socket(peer, server_hostname="localhost")
    secure.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    print(b"".join(iter(lambda: secure.recv(1000), b"")).decode()[-13:])`;
    for (let i = 1; i <= 2; i++) {
      server.child.kill("SIGSTOP");
      await using peers = await start(["python3", "-c", code, String(server.port), cert], /^connected\n/);
      server.child.kill("SIGHUP");
      server.child.kill("SIGCONT");
      await peers.stdout.waitFor(/(?:Hello, World!\n){8}/);
      await server.stderr.waitFor(new RegExp(`(?:read again\n[^]*){${i}}`));
    }
  });

  test("a certificate that cannot be read or used is one line and exit 1", async () => {
    const missing = await runProgram("server", variant, ["--tls-cert", "/nowhere", "--tls-key", "/nowhere"]);
    expect([missing.stderr, missing.exitCode]).toEqual(["Error: cannot read /nowhere: ENOENT\n", 1]);
    const args = ["--port", "0", "--tls-cert", "/etc/passwd", "--tls-key", "/etc/passwd"];
    const nonsense = await runProgram("server", variant, args);
    expect(nonsense.stderr).toBe("Error: the certificate and the key cannot be used: PEM_NO_START_LINE\n");
    expect(nonsense.exitCode).toBe(1);
  });

  test("--reuse-port: two servers share a port, and each answers when the other has gone", async () => {
    await using first = await serve("--reuse-port", "--text", "first");
    const argv = [
      ...(await command("server", variant)),
      "--reuse-port",
      "--port",
      String(first.port),
      "--text",
      "second",
    ];
    await using second = await start(argv, LISTENING);
    const answers = new Set<string>();
    // The kernel chooses by the peer's port: it is a matter of tries until both have been chosen.
    while (answers.size < 2) answers.add((await run(["curl", "-s", first.url])).stdout);
    expect([...answers].toSorted()).toEqual(["first", "second"]);
    first.child.kill("SIGTERM");
    await first.child.exited;
    expect((await run(["curl", "-s", second.match[0]])).stdout).toBe("second");
  });

  test.if(hasTool("wrk"))("SIGTERM under load: nothing that was accepted goes unanswered, exit 0", async () => {
    await using server = await serve("--log", "off");
    const wrk = run(["wrk", "-t1", "-c20", "-d2", server.url]);
    while (openFiles(server.child.pid) < 20) await Bun.sleep(20);
    await Bun.sleep(300);
    server.child.kill("SIGTERM");
    expect(await server.child.exited).toBe(0);
    // Connecting fails, again and again, once there is no server (wrk may notice at the first write); no answer fails to come.
    expect((await wrk).stdout).toMatch(/Socket errors: connect \d+, read 0, write \d+, timeout 0/);
  });

  test.if(hasTool("ab"))("ab -k gets right answers", async () => {
    await using server = await serve("--log", "off");
    const { stdout } = await run(["ab", "-q", "-k", "-n", "5000", "-c", "20", `http://127.0.0.1:${server.port}/`]);
    expect(stdout).toMatch(/Complete requests: +5000\n/);
    expect(stdout).toMatch(/Failed requests: +0\n/);
    expect(stdout).toMatch(/Keep-Alive requests: +5000\n/);
    expect(stdout).not.toContain("Non-2xx");
  });

  test.if(hasTool("wrk"))("wrk gets right answers", async () => {
    await using server = await serve("--log", "off");
    const { stdout } = await run(["wrk", "-t1", "-c20", "-d1", server.url]);
    expect(Number(/(\d+) requests in/.exec(stdout)?.[1])).toBeGreaterThan(1000);
    expect(stdout).not.toMatch(/Socket errors|Non-2xx/);
  });
});

test.if(hasTool("setpriv"))(
  "no server outlives the test process that has started it, even if that is killed",
  async () => {
    const code = `
    import { test } from "bun:test";
    import { startServer } from ${JSON.stringify(join(import.meta.dir, "harness.ts"))};
    test("hangs", async () => {
      const { port } = await startServer("script");
      console.log("port " + port);
      await new Promise(() => {});
    }, 600_000);`;
    await using folder = await temporaryFolder();
    await Bun.write(join(folder.path, "hangs.test.ts"), code);
    await using tests = await start([process.execPath, "test", "hangs"], /^port (\d+)\n/m, { cwd: folder.path });
    const port = Number(tests.match[1]);
    tests.child.kill("SIGKILL");
    const accepts = async () => {
      using peer = await Peer.connect(port).catch(() => undefined);
      return peer !== undefined;
    };
    while (await accepts());
    expect(await accepts()).toBeFalse();
  },
);

test("without --port it listens on the tutorial's port", () => {
  expect(DEFAULTS).toMatchObject({ host: "localhost", port: 8888, text: "Hello, World!" });
});
