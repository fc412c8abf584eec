/** A copy of server.ts, changed as its comments say that a copy can be changed. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { exchange, ROOT, run, startCopy } from "./harness.ts";

setDefaultTimeout(60_000);

const source = readFileSync(join(ROOT, "server.ts"), "utf8");
/** The example in the comment of `respond`: a health endpoint in JSON, and an echo. */
const example = (
  /^ \*\n((?: \* {5}.*\n)+) \*\n/m.exec(source.slice(source.indexOf("/**\n * Maps a request")))?.[1] ?? ""
).replace(/^ \* {5}/gm, "  ");
const BODY = '  return request.method === "OPTIONS" ? site.options : site.text;\n';
const NEEDS_CONTENT = "const RESPOND_NEEDS_CONTENT = false";
const withExample = { [BODY]: example + BODY, [NEEDS_CONTENT]: "const RESPOND_NEEDS_CONTENT = true" };

test("the example of respond works in a copy: /health in JSON, and an echo of what was posted", async () => {
  expect(example.split("\n").length).toBeGreaterThan(4);
  await using server = await startCopy(withExample, ["--log", "off", "--content-bytes-max", "300000"]);
  const curl = (...args: string[]) => run(["curl", "-s", "-w", " %{http_code} %{content_type}", ...args]);
  expect((await curl(`${server.url}/health?from=test`)).stdout).toBe('{"status":"ok"}\n 200 application/json');
  expect((await curl("-I", `${server.url}/health`)).stdout).toContain("Content-Length: 16\r\n");
  expect((await curl("-d", "a=b", `${server.url}/echo`)).stdout).toBe("a=b 200 application/octet-stream");
  expect((await curl("-X", "POST", `${server.url}/echo`)).stdout).toBe(" 200 application/octet-stream");
  expect((await curl("-d", "a=b", `${server.url}/other`)).stdout).toBe("Hello, World! 200 text/plain; charset=utf-8");
  expect((await curl("-X", "PUT", "-d", "a=b", `${server.url}/echo`)).stdout).toStartWith("method not allowed\n 405 ");
  const large = Buffer.alloc(300_000, "0123456789");
  for (const how of [[], ["-H", "Transfer-Encoding: chunked"]]) {
    const echoed = await run(["curl", "-s", ...how, "--data-binary", "@-", `${server.url}/echo`], { stdin: large });
    expect(echoed.stdout === large.toString()).toBeTrue();
  }
  const over = await run(["curl", "-s", "--data-binary", "@-", `${server.url}/echo`], {
    stdin: Buffer.alloc(300_001, "x"),
  });
  expect(over.stdout).toBe("the content is too large\n");
});

test("content that a copy keeps is its own: requests in a row and byte by byte, and none of it stays", async () => {
  await using server = await startCopy(withExample, ["--log", "off", "--waiting-bytes-max", "100000"]);
  const post = (content: string) =>
    `POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: ${content.length}\r\n\r\n${content}`;
  const chunked =
    "POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
  const contents = (stream: string) =>
    stream
      .split("\r\n\r\n")
      .slice(1)
      .map((part) => part.split("HTTP/1.1 ", 1)[0]);
  const requests = post("one") + "GET / HTTP/1.1\r\nHost: x\r\n\r\n" + post("two") + chunked;
  expect(contents(await exchange(server.port, [requests]))).toEqual(["one", "Hello, World!", "two", "abcde"]);
  expect(contents(await exchange(server.port, [...requests]))).toEqual(["one", "Hello, World!", "two", "abcde"]);
  // Content that is kept counts among the bytes that wait for all peers.
  const many = `POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n${"x".repeat(200_000)}`;
  await expect(exchange(server.port, [many])).rejects.toThrow("reset");
  // Many times what may wait in all: what was answered is forgotten.
  for (let i = 0; i < 40; i++) {
    const answer = await exchange(server.port, [`${post("x".repeat(20_000))}${chunked}`]);
    expect(answer.length).toBeGreaterThan(20_000);
  }
});

test("a copy whose respond throws answers 500, tells why on its own stderr, and serves the others", async () => {
  const throws = `  if (request.path === "/throw") throw new Error("broken on purpose");\n${BODY}`;
  await using server = await startCopy({ [BODY]: throws }, ["--log", "off"]);
  const get = (path: string) => `GET ${path} HTTP/1.1\r\nHost: x\r\n\r\n`;
  const [broken, other] = await Promise.all([
    exchange(server.port, [get("/") + get("/throw") + get("/")]),
    exchange(server.port, [get("/")], { finish: true }),
  ]);
  expect(broken).toMatch(
    /^HTTP\/1\.1 200 [^]*Hello, World!HTTP\/1\.1 500 [^]*Connection: close\r\n\r\nthe server failed\n$/,
  );
  expect(broken).not.toContain("purpose");
  expect(other).toEndWith("Hello, World!");
  await server.stderr.waitFor(/\nError: Error: broken on purpose\n/);
});

test("a copy may answer 304 and 204, even with a content, and the next answer is where it should be", async () => {
  const bare = `  if (request.path === "/bare") return prepareResponse(Number(request.query), {}, "not to be sent");\n${BODY}`;
  await using server = await startCopy({ [BODY]: bare }, ["--log", "off"]);
  for (const status of [204, 304]) {
    const answers = await exchange(server.port, [
      `GET /bare?${status} HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n`,
    ]);
    expect(answers).toMatch(
      /^HTTP\/1\.1 (204|304) [^\r]*\r\nDate: [^\r]*\r\n\r\nHTTP\/1\.1 200 [^]*\r\n\r\nHello, World!$/,
    );
  }
});

test("a copy without its chapter Files serves a text", async () => {
  const files = /^\/\/ ═══ \d+ Files ═[^]*?(?=^\/\/ ═══ \d+ Main)/m.exec(source)?.[0] ?? "";
  expect(files.split("\n").length).toBeGreaterThan(300);
  await using server = await startCopy({ [files]: "" }, ["--log", "access"]);
  expect((await run(["curl", "-s", "-d", "a=b", server.url])).stdout).toBe("Hello, World!");
});
