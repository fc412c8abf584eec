/** Servers in numbers, as docs/scaling.md has it: several on one port, in units of systemd, and behind HAProxy. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import {
  command,
  hasTool,
  LISTENING,
  mortal,
  ROOT,
  run,
  start,
  startServer,
  temporaryFolder,
  VARIANTS,
} from "./harness.ts";

// On two idle cores each test takes some seconds; a busy machine may take its time.
setDefaultTimeout(120_000);

const DOCS = join(ROOT, "docs");
/** The connections that wrk holds: enough to have requests under way wherever a server is stopped. */
const CONNECTIONS = 50;
/** So many requests at the least go through HAProxy while the servers are stopped and started. */
const REQUESTS_MIN = 100_000;

/**
 * A port that nobody has, and that nobody gets without asking for it: a port from where the kernel takes those of
 * outgoing connections (from 32768 on) could be gone when a server comes back to it.
 */
function lastingPort(): number {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 22_000);
    try {
      Bun.listen({ hostname: "127.0.0.1", port, socket: { data() {} } }).stop(true);
      return port;
    } catch {}
  }
}

/** Waits until something that only asking can tell is so. */
async function until(isSo: () => Promise<boolean>): Promise<void> {
  while (!(await isSo())) await Bun.sleep(20);
}

/** A command for HAProxy's socket, and the answer. */
async function ask(path: string, line: string): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  let answer = "";
  await Bun.connect({
    unix: path,
    socket: {
      open: (socket) => void socket.write(`${line}\n`),
      data: (_, bytes) => void (answer += bytes.toString()),
      close: (_, error) => (error === undefined ? resolve(answer) : reject(error)),
    },
  });
  return promise;
}

/** Starts HAProxy with the file that the documentation shows, in front of servers on these three ports. */
async function startHaproxy(ports: number[]) {
  await using stack = new AsyncDisposableStack();
  const folder = stack.use(await temporaryFolder());
  const port = lastingPort();
  const path = join(folder.path, "socket");
  const [PORT1, PORT2, PORT3] = ports.map(String) as [string, string, string]; // there are three
  const env = { LISTEN: `127.0.0.1:${port}`, PORT1, PORT2, PORT3, SOCKET: path };
  const argv = ["haproxy", "-db", "-f", join(DOCS, "haproxy.cfg")];
  stack.use(await start(argv, /Health check for server servers\/\w+ succeeded/, { env, cwd: folder.path }));

  /** What `show stat` says of one of its rows. */
  const statistics = async (row: string): Promise<Record<string, string>> => {
    const [names = "", ...lines] = (await ask(path, "show stat")).split("\n");
    const values = lines.map((line) => line.split(",")).find((each) => each[1] === row) ?? [];
    return Object.fromEntries(names.split(",").map((name, i) => [name, values[i] ?? ""]));
  };
  const started = stack.move();
  return {
    url: `http://127.0.0.1:${port}/`,
    folder: folder.path,
    statistics,
    tell: (line: string) => ask(path, line),
    sees: (name: string, status: RegExp) => until(async () => status.test((await statistics(name))["status"] ?? "")),
    [Symbol.asyncDispose]: () => started.disposeAsync(),
  };
}
type Haproxy = Awaited<ReturnType<typeof startHaproxy>>;

/** Starts wrk, which goes on until it is told to say what came. */
function startWrk(url: string, args: string[] = []) {
  const argv = ["wrk", "-t1", `-c${CONNECTIONS}`, "-d1h", "--timeout", "30s", ...args, url];
  const child = Bun.spawn(mortal(argv), { stdin: "ignore", stdout: "pipe", stderr: "inherit" });
  const finish = async () => {
    child.kill("SIGINT");
    return new Response(child.stdout).text();
  };
  return { finish, [Symbol.asyncDispose]: () => child[Symbol.asyncDispose]() };
}

/** wrk's report says that so many requests at the least were answered, and none failed. */
function expectNoFailure(report: string, requestsMin: number): void {
  expect(report).not.toMatch(/Socket errors|Non-2xx/);
  expect(Number(/(\d+) requests in/.exec(report)?.[1])).toBeGreaterThanOrEqual(requestsMin);
}

/** The names of docs/haproxy.cfg. */
const NAMES = ["one", "two", "three"];

/** Three servers on ports that they can come back to. */
async function startServers() {
  const stack = new AsyncDisposableStack();
  const start = async (port: number, text: string) =>
    stack.use(await startServer("binary", ["--log", "off", "--text", text, "--port", String(port)]));
  try {
    const servers = [];
    for (const _ of NAMES) servers.push(await start(lastingPort(), "old"));
    return { servers, start, [Symbol.asyncDispose]: () => stack.disposeAsync() };
  } catch (error) {
    await stack.disposeAsync();
    throw error;
  }
}

/**
 * Stops each server and starts a new one in its place while wrk asks, until wrk has got so many answers.
 * @returns wrk's report
 */
async function roll(
  haproxy: Haproxy,
  { servers, start }: Awaited<ReturnType<typeof startServers>>,
  step: { before(name: string): Promise<unknown>; after(name: string): Promise<unknown> },
  { requestsMin, args = [] }: { requestsMin: number; args?: string[] },
): Promise<string> {
  const answered = async () => Number((await haproxy.statistics("FRONTEND"))["hrsp_2xx"]);
  await using wrk = startWrk(haproxy.url, args);
  await until(async () => (await answered()) > 1000);
  do {
    for (const [i, { child, port }] of servers.entries()) {
      const name = NAMES[i] ?? "";
      await haproxy.sees(name, /^UP$/);
      await step.before(name);
      child.kill("SIGTERM");
      expect(await child.exited).toBe(0);
      await step.after(name);
      servers[i] = await start(port, "new");
      // Where it was drained; otherwise it says nothing new.
      await haproxy.tell(`set server servers/${name} state ready`);
      await haproxy.sees(name, /^UP$/);
    }
    // What is under way when wrk stops is answered, but not counted by it.
  } while ((await answered()) < requestsMin + CONNECTIONS);
  return await wrk.finish();
}

/** All three servers are new ones: HAProxy asks them in turn. */
async function expectNew(haproxy: Haproxy): Promise<void> {
  for (let i = 0; i < 2 * NAMES.length; i++) expect((await run(["curl", "-s", haproxy.url])).stdout).toBe("new");
}

describe.if(hasTool("haproxy") && hasTool("wrk"))("servers behind HAProxy", () => {
  test("SIGTERM, exit 0, start, one server after the other: no request fails", async () => {
    await using all = await startServers();
    await using haproxy = await startHaproxy(all.servers.map(({ port }) => port));
    const step = { before: async () => {}, after: (name: string) => haproxy.sees(name, /^DOWN/) };
    const report = await roll(haproxy, all, step, { requestsMin: REQUESTS_MIN });
    expectNoFailure(report, REQUESTS_MIN);
    await expectNew(haproxy);
  });

  test("a server that is drained first: no request fails, none is sent twice, whatever its method", async () => {
    await using all = await startServers();
    await using haproxy = await startHaproxy(all.servers.map(({ port }) => port));
    const script = join(haproxy.folder, "post.lua");
    await Bun.write(script, 'wrk.method = "POST"\nwrk.body = "a=b"\n');
    const drain = async (name: string) => {
      await haproxy.tell(`set server servers/${name} state drain`);
      await until(async () => (await haproxy.statistics(name))["scur"] === "0");
    };
    const step = { before: drain, after: async () => {} };
    const report = await roll(haproxy, all, step, { requestsMin: 20_000, args: ["-s", script] });
    expectNoFailure(report, 20_000);
    expect(await haproxy.statistics("BACKEND")).toMatchObject({ wretr: "0", wredis: "0", econ: "0", eresp: "0" });
    await expectNew(haproxy);
  });

  test("docs/haproxy.cfg is valid as it stands, and beside Debian's own file", async () => {
    const ours = ["-f", join(DOCS, "haproxy.cfg")];
    expect(await run(["haproxy", "-c", ...ours])).toMatchObject({
      stdout: "Configuration file is valid\n",
      exitCode: 0,
    });
    const theirs = "/etc/haproxy/haproxy.cfg";
    if (!(await Bun.file(theirs).exists())) return;
    expect(await run(["haproxy", "-c", "-f", theirs, ...ours])).toMatchObject({ exitCode: 0 });
  });
});

describe.if(hasTool("systemd-analyze"))("units of systemd", () => {
  test.each(["server.service", "server@.service"])("docs/%s is valid, and leaves the service little", async (name) => {
    await using folder = await temporaryFolder();
    const unit = join(folder.path, name.replace("@", "@1"));
    const [binary = ""] = await command("server", "binary");
    const text = await Bun.file(join(DOCS, name)).text();
    expect(text).toContain("/usr/local/bin/http-over-tcp-server ");
    await Bun.write(unit, text.replaceAll("/usr/local/bin/http-over-tcp-server", binary));
    const verified = await run(["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit]);
    expect(verified).toMatchObject({ stdout: "", exitCode: 0 });
    // Out of 100, where 0 is no danger.
    const secured = await run(["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]);
    expect(secured).toMatchObject({ exitCode: 0 });
  });

  test("server@.service is server.service, but for the instance and --reuse-port", async () => {
    const one = await Bun.file(join(DOCS, "server.service")).text();
    const many = await Bun.file(join(DOCS, "server@.service")).text();
    const settings = (text: string) => text.split("\n").filter((line) => /^[[\w]/.test(line));
    const ofInstance = settings(many).filter((line) => !line.startsWith("SyslogIdentifier="));
    expect(ofInstance.map((line) => line.replace(/ %i$| --reuse-port$/, ""))).toEqual(settings(one));
  });
});

test.each(VARIANTS)("three servers on one port: each of them is given connections (%s)", async (variant) => {
  await using first = await startServer(variant, ["--reuse-port", "--text", "1"]);
  const argv = [...(await command("server", variant)), "--reuse-port", "--port", String(first.port), "--text"];
  await using _second = await start([...argv, "2"], LISTENING);
  await using _third = await start([...argv, "3"], LISTENING);
  const answers = new Set<string>();
  // The kernel chooses by the peer's port: it is a matter of tries until all have been chosen.
  while (answers.size < 3) answers.add((await run(["curl", "-s", first.url])).stdout);
  expect([...answers].toSorted()).toEqual(["1", "2", "3"]);
});
