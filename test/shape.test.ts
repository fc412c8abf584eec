/** The shape of the project: what a copy of one file, a binary in a hostile folder and the README rely on. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { accessSync, constants, existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { PROGRAMS } from "../.ci/build.ts";
import { LIMITS } from "../server.ts";
import { ROOT, run, runProgram, startServer, temporaryFolder, VARIANTS } from "./harness.ts";

// The binaries are built for the first test that needs one.
setDefaultTimeout(30_000);

const read = (path: string) => readFileSync(join(ROOT, path), "utf8");
const sources = PROGRAMS.map((program) => ({ program, text: read(`${program}.ts`) }));

/** The fenced blocks of a script, by name. */
const sharedBlocks = (text: string) =>
  new Map(
    [...text.matchAll(/^\/\/ ── shared: ([^\n]+) ──\n(.*?)^\/\/ ── end shared ──$/gms)].map(([, name, block]) => [
      name,
      block,
    ]),
  );

describe.each(PROGRAMS)("%s.ts", (program) => {
  const text = read(`${program}.ts`);

  test("imports nothing but built-ins of Bun and Node", () => {
    const imports = [...text.matchAll(/^import .* from "(.*)";$|\bimport\("(.*?)"\)|\brequire\("(.*?)"\)/gm)];
    expect(imports.length > 0 || program === "client").toBeTrue(); // client.ts needs none
    for (const [, from, dynamic, required] of imports) expect(from ?? dynamic ?? required).toMatch(/^(node:|bun$)/);
  });

  test("can be run by its name, and does nothing when it is imported", async () => {
    expect(text).toStartWith("#!/usr/bin/env bun\n");
    accessSync(join(ROOT, `${program}.ts`), constants.X_OK);
    expect(text).toMatch(/\nif \(import\.meta\.main\) .*;\n$/);
    const imported = await run([process.execPath, "-e", `await import("./${program}.ts")`]);
    expect([imported.stdout, imported.stderr, imported.exitCode]).toEqual(["", "", 0]);
  });

  test("has its sections in order, and a header of at most 30 lines", () => {
    const sections = [...text.matchAll(/^\/\/ ═══ (\d+) /gm)].map(([, number]) => Number(number));
    expect(sections).toEqual(sections.toSorted((a, b) => a - b));
    expect(new Set(sections).size).toBe(sections.length);
    expect(text.slice(0, text.indexOf("*/")).split("\n").length).toBeLessThanOrEqual(30);
  });

  test("says in --help what the README says, and has the version of package.json", async () => {
    const help = await runProgram(program, "script", ["--help"]);
    expect(help.exitCode).toBe(0);
    expect(read("README.md")).toContain(`\n\`\`\`text\n${help.stdout}\`\`\`\n`);
    const version = await runProgram(program, "script", ["--version"]);
    expect(version.stdout).toBe(`${program} ${JSON.parse(read("package.json")).version}\n`);
  });

  test("is about as long as the README says", () => {
    const told = Number(new RegExp(`\\| \`${program}\\.ts\` +\\| +(\\d+) `).exec(read("README.md"))?.[1]);
    expect(Math.abs(told / text.split("\n").length - 1)).toBeLessThan(0.05);
  });

  test("runs from a copy of the one file, without this repository", async () => {
    await using folder = await temporaryFolder();
    await Bun.write(join(folder.path, `${program}.ts`), text);
    const { stdout, exitCode } = await run([process.execPath, `${program}.ts`, "--version"], { cwd: folder.path });
    expect([stdout.split(" ")[0], exitCode]).toEqual([program, 0]);
  });

  test.each(VARIANTS.filter((variant) => variant === "binary"))(
    "the %s obeys nothing in the folder that it is run in",
    async (variant) => {
      await using folder = await temporaryFolder();
      await Bun.write(join(folder.path, "bunfig.toml"), 'preload = ["./evil.ts"]\n');
      await Bun.write(join(folder.path, "evil.ts"), 'console.log("evil"); process.exit(66);\n');
      await Bun.write(join(folder.path, ".env"), "HOST=nowhere.invalid\nPORT=1\n");
      await Bun.write(join(folder.path, "tsconfig.json"), "{");
      await Bun.write(join(folder.path, "package.json"), "{");
      const { stdout, stderr, exitCode } = await runProgram(program, variant, ["--version"], { cwd: folder.path });
      expect([stdout.split(" ")[0], stderr, exitCode]).toEqual([program, "", 0]);
      if (program !== "server") return;
      await using server = await startServer(variant, [], { cwd: folder.path });
      expect(server.url).toStartWith("http://localhost:");
    },
  );
});

test("the README has what server --help limits prints", async () => {
  const limits = await runProgram("server", "script", ["--help", "limits"]);
  expect(limits.exitCode).toBe(0);
  expect(read("README.md")).toContain(`\n\`\`\`text\n${limits.stdout}\`\`\`\n`);
});

test("the README has each limit of the server's with its default and the reason that stands beside it in the code", () => {
  const source = /^const BOUNDS = \{\n(.*?)^\} as const/ms.exec(read("server.ts"))?.[1] ?? "";
  const rows = read("README.md").replace(/ +/g, " ");
  let reason = "";
  let limits = 0;
  for (const line of source.split("\n")) {
    reason = /^ {2}\/\*\* (.*) \*\/$/.exec(line)?.[1] ?? reason;
    const [, name = "", value = ""] = /^ {2}(\w+): \[([\d_]+),/.exec(line) ?? [];
    if (name === "") continue;
    limits++;
    const flag = name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
    expect(rows).toContain(`| \`--${flag}\` | ${value.replaceAll("_", "")} | ${reason} |`);
  }
  expect(limits).toBe(Object.keys(LIMITS).length);
});

test("every link of the documents leads to a file, and to a heading that is there", () => {
  const documents = ["README.md", "docs/scaling.md", "docs/README.zh-CN.md", "bench/README.md", "bench/RESULTS.md"];
  const anchors = (path: string) =>
    [...read(path).matchAll(/^#+ (.*)$/gm)].map(([, heading = ""]) =>
      heading
        .toLowerCase()
        .replace(/[^\p{L}\p{N} _-]/gu, "")
        .replaceAll(" ", "-"),
    );
  for (const document of [...documents, "CONTRIBUTING.md", "SECURITY.md"])
    for (const [, link = ""] of read(document).matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^https?:/.test(link)) continue;
      const [path = "", anchor] = link.split("#");
      const target = path === "" ? document : join(dirname(document), path);
      expect(existsSync(join(ROOT, target)), `${document}: ${link}`).toBeTrue();
      if (anchor !== undefined) expect(anchors(target), `${document}: ${link}`).toContain(anchor);
    }
});

test("what two scripts share is the same in both", () => {
  const names = new Set<string | undefined>();
  for (const { text } of sources)
    for (const [name, block] of sharedBlocks(text)) {
      names.add(name);
      for (const other of sources) expect(sharedBlocks(other.text).get(name) ?? block).toBe(block);
    }
  expect([...names]).toContain("printable");
  // A name that stands in one script alone is a slip of the pen in the other.
  for (const name of names)
    expect(sources.filter(({ text }) => sharedBlocks(text).has(name)).length).toBeGreaterThan(1);
});

test("package.json asks for two packages, of exact versions, and for nothing at run time", () => {
  const { dependencies, devDependencies, packageManager } = JSON.parse(read("package.json"));
  expect(dependencies).toBeUndefined();
  expect(Object.keys(devDependencies)).toEqual(["@types/node", "bun-types"]);
  for (const version of Object.values(devDependencies)) expect(version).toMatch(/^\d+\.\d+\.\d+$/);
  expect(packageManager).toBe("bun@1.4.5");
});

test("Bun gives each data event bytes of its own, as client-robust.ts relies on", async () => {
  const chunks: { bytes: Buffer; first: number }[] = [];
  const { promise: closed, resolve } = Promise.withResolvers<void>();
  const total = 4 * 2 ** 20;
  const content = Buffer.alloc(total);
  for (let at = 0; at < total; at += 4096) content.fill((at / 4096) % 251, at, at + 4096);
  using listener = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: () => new Response(content) });
  await Bun.connect({
    hostname: "127.0.0.1",
    port: listener.port ?? 0,
    socket: {
      open: (socket) => void socket.write("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
      data: (_, bytes) => void chunks.push({ bytes, first: bytes[0] ?? -1 }),
      close: () => resolve(),
    },
  });
  await closed;
  expect(chunks.length).toBeGreaterThan(4);
  for (const { bytes, first } of chunks) expect([bytes[0], bytes.buffer.byteLength]).toEqual([first, bytes.length]);
  expect(
    Buffer.concat(chunks.map(({ bytes }) => bytes))
      .subarray(-total)
      .equals(content),
  ).toBeTrue();
});

test("the Chinese README has the same command blocks as the English one, in the same order, and the same numbers in its tables", () => {
  const english = read("README.md");
  const chinese = read("docs/README.zh-CN.md");
  const fencedBlock = /^```.*?^```$/gms;
  expect(chinese.match(fencedBlock)).toEqual(english.match(fencedBlock));

  /** Of each row of each table in order: its code spans and its numbers, sorted, as another language orders them otherwise. */
  const tables = (text: string) =>
    [...text.replace(fencedBlock, "").matchAll(/(?:^\|.*\n)+/gm)].map(([table]) =>
      table
        .trimEnd()
        .split("\n")
        .map((row) => (row.match(/`[^`]+`|\d+(?:[.,]\d+)*/g) ?? []).sort()),
    );
  // One section is the Chinese README's own: the way from the tutorial to the code.
  const own = /^## 从教程到代码\n.*?(?=^## )/ms.exec(chinese)?.[0] ?? "";
  const translated = tables(chinese.replace(own, ""));
  expect(own).not.toBe("");
  for (const [index, table] of tables(english).entries()) expect(translated[index]).toEqual(table);
  expect(translated.length).toBe(tables(english).length);

  // The same outline, and the same numbers and code spans in the prose of each section.
  const sections = (text: string) => text.replace(fencedBlock, "").split(/^(?=#+ )/m);
  const told = (section: string) =>
    (section.replace(/\]\([^)]*\)/g, "]").match(/^#+|`[^`]+`|\d+(?:[.,]\d+)*/g) ?? []).sort();
  expect(sections(chinese.replace(own, "")).map(told)).toEqual(sections(english).map(told));

  // The functions that its second column names stand in the section of the script that it says: `name`（7）.
  for (const part of own.split(/^### .*：/m).slice(1)) {
    const [script = "", ...rows] = part.split("\n");
    const places = read(script).split(/^\/\/ ═══ (?=\d)/m);
    const does = rows.map((row) => row.split("|")[2] ?? "").join("\n");
    for (const [, names = "", place] of does.matchAll(/((?:`\w+`(?:、| → )?)+)（(\d+)）/g))
      for (const [name] of names.matchAll(/\w+/g)) {
        const text = places.find((text) => text.startsWith(`${place} `)) ?? "";
        expect(new RegExp(`\\b${name}\\b`).test(text), `${script}, section ${place}: ${name}`).toBeTrue();
      }
  }
});
